"""Quality against size and against latency: one labelled point per step, as SVG and PNG."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from specs.schema.base import BASELINE
from specs.schema.metrics import METRICS
from tasks.evaluate.format import figure
from tasks.evaluate.summary import RunSummary, StepRow

AXES = {"quality_size": "size", "quality_latency": "latency_p50"}
"""Name of each plot to the metric on its horizontal axis."""

_KINDS = {
    "model": ("#3b6fd4", "o", "torch"),
    "swapped": ("#b5541c", "^", "torch, other attention"),
    "packed": ("#7a4fc9", "s", "torch, packed"),
    "export": ("#0f8f6f", "D", "exported file"),
}
# Placeholders that the SVG's style sheet turns into colours of the page, so that a plot follows light and dark.
_INK, _FAINT = "#0a0b0c", "#8d8e8f"


@dataclass(frozen=True)
class _Point:
    step: StepRow
    x: float
    y: float
    x_bounds: tuple[float, float] | None
    y_bounds: tuple[float, float] | None

    @property
    def kind(self) -> str:
        record = self.step.evaluation.record if self.step.evaluation is not None else {}
        return str(record.get("kind", "model"))


def plots(run: RunSummary) -> dict[str, bytes]:
    """The plots by file name, ``quality_size.svg``, ``quality_size.png`` and so on; none where nothing was measured."""
    found: dict[str, bytes] = {}
    for name, metric in AXES.items():
        points = _points(run, metric)
        if points:
            found[f"{name}.svg"] = _draw(run, metric, points, "svg", name)
            found[f"{name}.png"] = _draw(run, metric, points, "png", name)
    return found


def of_steps(run: RunSummary) -> dict[str, tuple[str, bytes]]:
    """What steps drew themselves: each plot's title and content, by the name that it has in the report.

    A plot is an SVG with a PNG of the same name beside it; anything else in an artifact is no plot.
    """
    found: dict[str, tuple[str, bytes]] = {}
    for step in run.steps:
        for picture in sorted(step.folder.glob("*.svg")) if step.folder is not None else ():
            if picture.with_suffix(".png").is_file():
                title = f"{step.id}: {picture.stem.replace('_', ' ')}"
                for path in (picture, picture.with_suffix(".png")):
                    found[f"{step.id}_{path.name}"] = title, path.read_bytes()
    return found


def inline(svg: bytes, prefix: str) -> str:
    """An SVG for use inside a page: no header, no namespace, ids that no other plot has."""
    text = svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text).replace("xlink:href", "href")


def _points(run: RunSummary, metric: str) -> list[_Point]:
    found = []
    for step in run.steps:
        x, y = step.entry(metric), step.entry(run.headline)
        if x["value"] is not None and y["value"] is not None:
            found.append(_Point(step, x["value"], y["value"], _bounds(x), _bounds(y)))
    return found


def _bounds(entry: Any) -> tuple[float, float] | None:
    return None if entry["low"] is None or entry["high"] is None else (entry["low"], entry["high"])


def _draw(run: RunSummary, metric: str, points: list[_Point], form: str, salt: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _FAINT,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        _plot(axes, run, metric, points)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        figure.set_layout_engine("none")
        _label(canvas, axes, points)
        buffer = io.BytesIO()
        if form == "png":
            figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
            return buffer.getvalue()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _follow_page(buffer.getvalue())


def _follow_page(svg: bytes) -> bytes:
    text = svg.decode()
    text = re.sub(r"<!DOCTYPE[^>]*>\s*", "", text)  # it names a host
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([^;]*?)'DejaVu Sans'[^;\"]*", r"font: \1system-ui, 'DejaVu Sans', sans-serif", text)
    text = text.replace(_INK, "var(--ink, #1c2128)").replace(_FAINT, "var(--faint, #8b949e)")
    for colour, _, name in _KINDS.values():
        text = text.replace(colour, f"var(--{name.lower().rpartition(' ')[2]}, {colour})")
    return text.encode()


def _plot(axes: Any, run: RunSummary, metric: str, points: list[_Point]) -> None:
    from matplotlib.lines import Line2D

    quality, across = METRICS[run.headline], METRICS[metric]
    _scale(axes, "x", [point.x for point in points], across.name)
    _scale(axes, "y", [point.y for point in points], quality.name)
    seen: dict[str, Any] = {}
    for point in points:
        colour, marker, name = _KINDS.get(point.kind, _KINDS["model"])
        errors = {
            f"{axis}err": [[centre - bounds[0]], [bounds[1] - centre]]
            for axis, centre, bounds in (("x", point.x, point.x_bounds), ("y", point.y, point.y_bounds))
            if bounds is not None and bounds[0] <= centre <= bounds[1]
        }
        hollow = point.step.id == BASELINE
        axes.errorbar(
            point.x,
            point.y,
            **errors,
            color=colour,
            marker=marker,
            markersize=7.5,
            markerfacecolor="none" if hollow else colour,
            markeredgewidth=1.8 if hollow else 0.8,
            elinewidth=1,
            capsize=2.5,
            linestyle="none",
            alpha=0.9,
        )
        seen[name] = Line2D([], [], color=colour, marker=marker, markersize=7, linestyle="none", label=name)
    baseline = next((point for point in points if point.step.id == BASELINE), None)
    if baseline is not None:
        axes.axhline(baseline.y, color=_FAINT, linewidth=0.9, linestyle="--", zorder=0)
    better = {"lower": "smaller is better", "higher": "larger is better"}
    names = {"size": "size", "latency_p50": "latency p50"}
    axes.set_xlabel(f"{names.get(metric, metric)} ({better[across.better]})")
    axes.set_ylabel(f"{run.headline} ({better[quality.better]})")
    axes.margins(x=0.16, y=0.16)
    axes.grid(color=_FAINT, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(seen) > 1:
        axes.figure.legend(
            handles=list(seen.values()),
            loc="outside upper right",
            ncols=len(seen),
            frameon=False,
            fontsize=9,
            handletextpad=0.3,
        )


def _scale(axes: Any, which: str, values: list[float], metric: str) -> None:
    """A logarithmic axis where the values span a factor of more than four, and ticks for people."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    axis = getattr(axes, f"{which}axis")
    if max(values) > 4 * min(values) > 0:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    else:
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, metric)))


def _tick(value: float, metric: str) -> str:
    text = figure(metric, value)
    number, _, suffix = text.partition(" ")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number} {suffix}".strip()


def _label(canvas: Any, axes: Any, points: list[_Point]) -> None:
    """Put each step's name where it covers no other name, point or error bar; a thin line leads to it if need be."""
    from matplotlib.transforms import Bbox

    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    scale = canvas.figure.dpi / 72
    places = [axes.transData.transform((point.x, point.y)) for point in points]
    taken: list[Any] = []
    for line in axes.get_lines():
        if line.get_linestyle() == "--":  # the baseline's level
            level = axes.transData.transform((1, line.get_ydata()[0]))[1]
            taken.append(Bbox.from_extents(frame.x0, level - scale, frame.x1, level + scale))
    for point, (x, y) in zip(points, places, strict=True):
        taken.append(Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale))
        for bounds, horizontal in ((point.x_bounds, True), (point.y_bounds, False)):
            if bounds is None:
                continue
            ends = [axes.transData.transform((end, point.y) if horizontal else (point.x, end)) for end in bounds]
            taken.append(
                Bbox.from_extents(
                    ends[0][0] - 2 * scale, ends[0][1] - 2 * scale, ends[1][0] + 2 * scale, ends[1][1] + 2 * scale
                )
            )
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: tuple(pair[1])):
        text = axes.annotate(
            point.step.id, (point.x, point.y), xytext=(0, 0), textcoords="offset points", fontsize=9.5, va="center"
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        box, (dx, dy), far = _free(x, y, width, height, scale, taken, frame)
        taken.append(box)
        text.remove()
        arrow = {"arrowstyle": "-", "color": _FAINT, "linewidth": 0.7, "shrinkB": 4} if far else None
        axes.annotate(
            point.step.id,
            (point.x, point.y),
            xytext=(dx / scale, dy / scale),
            textcoords="offset points",
            fontsize=9.5,
            ha="center",
            va="center",
            arrowprops=arrow,
        )


def _free(
    x: float, y: float, width: float, height: float, scale: float, taken: list[Any], frame: Any
) -> tuple[Any, tuple[float, float], bool]:
    """The nearest free place for a label: its box, the offset of its centre in pixels, and whether a line is needed."""
    from matplotlib.transforms import Bbox

    best: tuple[float, Any, tuple[float, float], bool] | None = None
    for ring, gap in enumerate((8, 16, 26, 38, 52, 70, 90)):
        reach = gap * scale
        for side, rise in ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1)):
            dx, dy = side * (reach + width / 2), rise * (reach + height / 2)
            box = Bbox.from_bounds(x + dx - width / 2, y + dy - height / 2, width, height).padded(1.5 * scale)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 + 6 * scale or box.y0 < frame.y0 or box.y1 > frame.y1
            cost = (100.0 if outside else 0.0) + 10.0 * sum(box.overlaps(other) for other in taken) + ring
            if best is None or cost < best[0]:
                best = (cost, box, (dx, dy), ring > 1)
        if best is not None and best[0] < 10:
            break
    assert best is not None
    return best[1], best[2], best[3]
