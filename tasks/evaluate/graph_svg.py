"""The graph of a run as a small SVG, left to right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_HIGH, _GAP_X, _GAP_Y, _CHARACTER, _PAD = 30, 44, 14, 8.0, 14


def graph_svg(ids: Sequence[str], edges: Sequence[tuple[str, str]]) -> str:
    """Boxes in columns by the longest way from the start, with curves between them; empty without edges.

    Args:
        ids: of the steps, each after those it needs.
        edges: ``(from, to)`` pairs.
    """
    known = [(start, end) for start, end in edges if start in ids and end in ids]
    if not known:
        return ""
    depth = dict.fromkeys(ids, 0)
    for name in ids:
        depth[name] = max((depth[start] + 1 for start, end in known if end == name), default=0)
    columns = [[name for name in ids if depth[name] == level] for level in range(max(depth.values()) + 1)]
    tallest = max(len(column) for column in columns)
    height = tallest * (_HIGH + _GAP_Y) - _GAP_Y + 4
    boxes: dict[str, tuple[float, float, float]] = {}
    x = 2.0
    for column in columns:
        width = max(len(name) for name in column) * _CHARACTER + 2 * _PAD
        y = 2 + (height - 4 - (len(column) * (_HIGH + _GAP_Y) - _GAP_Y)) / 2
        for name in sorted(column, key=lambda one: _level(one, known, boxes, ids)):
            boxes[name] = (x, y, width)
            y += _HIGH + _GAP_Y
        x += width + _GAP_X
    total = x - _GAP_X + 2
    parts = [f'<svg viewBox="0 0 {total:.0f} {height:.0f}" width="{total:.0f}" height="{height:.0f}" role="img">']
    parts.append(f"<title>{escape(', '.join(f'{start} to {end}' for start, end in known))}</title>")
    for start, end in known:
        x1, y1 = boxes[start][0] + boxes[start][2], boxes[start][1] + _HIGH / 2
        x2, y2 = boxes[end][0], boxes[end][1] + _HIGH / 2
        bend = max(_GAP_X / 2, (x2 - x1) / 2)
        parts.append(
            f'<path d="M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"/>'
        )
    for name, (left, top, width) in boxes.items():
        parts.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_HIGH}" rx="7"/>')
        middle = left + width / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{top + _HIGH / 2 + 4.5:.1f}" text-anchor="middle">{escape(name)}</text>'
        )
    return "".join((*parts, "</svg>"))


def _level(
    name: str, edges: Sequence[tuple[str, str]], boxes: dict[str, tuple[float, float, float]], ids: Sequence[str]
) -> tuple[float, int]:
    """Mean height of what a box is fed from, so that curves cross little."""
    above = [boxes[start][1] for start, end in edges if end == name and start in boxes]
    return (sum(above) / len(above) if above else 0.0, list(ids).index(name))
