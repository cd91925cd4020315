"""The step ``adaptive_input``: tokens in bands, each with the precision that it needs, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from tasks.adaptive_input import information as info
from tasks.adaptive_input import softmax, table
from tasks.adaptive_input.bands import Fitted, Measured
from tasks.adaptive_input.curves import metric
from tasks.adaptive_input.in_exports import Exported, grown
from tasks.adaptive_input.layout import softmax_bytes
from tasks.adaptive_input.places import Place, places
from tasks.adaptive_input.preflight import budget_of, look, refuses, too_large, too_small
from tasks.adaptive_input.quality import BandQuality, Drawn, lookup_ratio, plots, qualities, sacrificed
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.evaluate.format import size
from tasks.registry import step

if TYPE_CHECKING:
    from torch import nn

    from tasks.adaptive_input.information import Information
    from tasks.data.encoded import Encoded
    from tasks.finetune.loop import Trained

_SALT = 0x74757266
"""Of the streams that draw outputs and examples."""

_JUDGED = 64
"""Training examples on which each band's tokens are foretold before and after."""


_SLOW = 1.25
"""Times the dense table's lookup that are worth a warning: of small tables a tenth more or less is noise."""


@step(
    AdaptiveInputSpec,
    libraries=("numpy", "tokenizers", "torch", "transformers"),
    preflight=look,
    refuses=refuses,
)
def adaptive_input(model: Artifact, *, spec: AdaptiveInputSpec, ctx: StepContext) -> StepResult:
    """Put the tokens of a trained model into bands of rank and bits.

    Args:
        model: a Hugging Face folder.
        spec: the budget, what counts as information, and the healing.
        ctx: where, and the training data, which shows how often tokens are needed.

    Raises:
        StepError: the model has no table of tokens, the budget is too small or asks for nothing, the data has no
            tokens, or the healing failed.
    """
    from tasks.adaptive_input.sensitivity import OBSERVED, moments
    from tasks.compress.calibrate import sample
    from tasks.data import encode
    from tasks.models import load, save
    from tasks.models.transforms import read_extras

    network: Any = load(model.path)
    found, left = _wanted(network, spec)
    dense = sum(4 * place.weight.numel() for place in found)
    shapes = [(place.weight.shape[0], place.weight.shape[1]) for place in found]
    problem = too_small(spec, shapes) or too_large(spec, shapes)
    if problem is not None:
        raise StepError(problem)
    budget = budget_of(spec, dense)
    beside = _beside(found, spec)
    if budget >= dense:
        save(network, ctx.out, tokenizer_from=model.path, transforms=read_extras(model.path).transforms)
        names = tuple(place.name for place in found)
        return StepResult("model", names, f"left {', '.join(names)} as it was: the budget asks for nothing", left)
    data = encode(ctx.data, "train", ctx.task, model.path, ctx.store)
    told = _information(network, data, found[0].weight.shape[0], spec, ctx)
    ctx.note("measuring what errors do to the outputs")
    weights = [place.weight for place in found]
    seen = moments(network, found, sample(model, OBSERVED, ctx), ctx.generator(_SALT), ctx.progress)
    metrics = [metric(weight.shape[1], moment) for weight, moment in zip(weights, seen, strict=True)]
    ctx.note("measuring what bands lose")
    measured = Measured(weights, metrics, told, spec.widths, spec.bands, ctx.progress)
    fitted = _allocated(measured, found, budget - beside, spec)
    judged = data.take(slice(0, _JUDGED)) if ctx.task == "text-generation" else None
    before = None if judged is None else info.surprise(network, judged, len(told.counts))
    hard, trained = _placed(network, list(zip(found, fitted, strict=True)), model, spec, ctx)
    network.eval()
    parts = [
        {"layout": one.layout.record(), "embeddings": dict(place.embeddings), "heads": dict(place.heads)}
        | ({"softmax": "adaptive"} if _adaptive(place, spec) else {})
        for place, one in zip(found, fitted, strict=True)
    ]
    earlier = read_extras(model.path).transforms
    save(network, ctx.out, tokenizer_from=model.path, transforms=[*earlier, table.entry(parts)])
    stored = sum(stored_bytes(ctx.out, place) for place in found)
    if stored > budget:
        raise RuntimeError(f"{stored} bytes were written and {budget} planned")
    after = None if judged is None else info.surprise(network, judged, len(told.counts))
    quality = [
        qualities(one, place.weight, made, told, before, after)
        for one, place, made in zip(fitted, found, hard, strict=True)
    ]
    with ctx.exclusive():
        slower = lookup_ratio(weights[0], hard[0], ctx.data.max_length, ctx.seed)
    drawn = [Drawn(place.name, at, fitted[at], quality[at]) for at, place in enumerate(found)]
    for name, content in plots(measured, drawn, told).items():
        (ctx.out / name).write_bytes(content)
    return _result(spec, found, fitted, quality, left, _Sizes(dense, stored, budget, slower), trained)


@dataclass(frozen=True)
class _Sizes:
    dense: int
    stored: int
    budget: int
    slower: float


def _wanted(network: Any, spec: AdaptiveInputSpec) -> tuple[list[Place], dict[str, str]]:
    """The tables that are put into bands, and what is left with the reason."""
    found, left = places(network)
    if spec.head == "leave":
        left |= {name: "head: leave" for place in found if not place.embeddings for name in place.heads}
        found = [place for place in found if place.embeddings]
    return found, left


def _information(network: Any, data: Encoded, rows: int, spec: AdaptiveInputSpec, ctx: StepContext) -> Information:
    counts = info.count(data, rows)
    if spec.information == "unigram":
        return info.unigram(counts)
    import torch

    ctx.note("measuring what the model does not foresee")
    drawn = torch.randperm(len(data), generator=ctx.generator(_SALT + 1))[: info.SURPRISED]
    return info.contextual(counts, *info.surprise(network, data.take(drawn.sort().values.numpy()), rows, ctx.progress))


def _allocated(measured: Measured, found: Sequence[Place], budget: int, spec: AdaptiveInputSpec) -> list[Fitted]:
    several = [at for at, place in enumerate(found) if _adaptive(place, spec)]  # what such a softmax chooses between
    if spec.head == "joint" or len(found) == 1:
        fitted = measured.allocate(budget, several=several)
    else:
        total = sum(place.weight.numel() for place in found)
        shares = [budget * place.weight.numel() // total for place in found]
        parts = [measured.allocate(share, [at], several) for at, share in enumerate(shares)]
        fitted = None if any(part is None for part in parts) else [one for part in parts for one in part or ()]
    if fitted is None:
        raise StepError(
            f"no allocation fits into {size(budget)}: head: {spec.head} leaves one of the tables too little; write "
            "head: joint, or a larger budget"
        )
    return fitted


def _placed(
    network: Any,
    pairs: Sequence[tuple[Place, Fitted]],
    model: Artifact,
    spec: AdaptiveInputSpec,
    ctx: StepContext,
) -> tuple[list[nn.Module], Trained | None]:
    """Put the tables into the model; as they are stored, and what the healing did."""
    if spec.heal is not None:
        from tasks.adaptive_input.heal import heal

        return heal(network, pairs, model, spec.heal, ctx)
    hard = [stored_table(fitted) for _, fitted in pairs]
    for (place, _), one in zip(pairs, hard, strict=True):
        adaptive = _adaptive(place, spec)
        table.place(network, one, place.embeddings, place.heads, adaptive)
        if adaptive:
            softmax.check(network)
    return hard, None


def _adaptive(place: Place, spec: AdaptiveInputSpec) -> bool:
    """Whether an adaptive softmax is over the bands of ``place``."""
    return spec.softmax == "adaptive" and bool(place.heads)


def _beside(found: Sequence[Place], spec: AdaptiveInputSpec) -> int:
    """Bytes to leave for what an adaptive softmax has beside its table.

    Raises:
        StepError: no output layer can have one.
    """
    if spec.softmax == "full":
        return 0
    heads = {name: bias for place in found for name, bias in place.heads.items()}
    if len(heads) != 1 or any(heads.values()):
        why = "has a bias" if any(heads.values()) else "has no tokens to choose among" if not heads else "is several"
        raise StepError(f"the model's output layer {why}, which softmax: adaptive does not go with; leave softmax out")
    return softmax_bytes(spec.bands, next(place for place in found if place.heads).weight.shape[1])


def stored_table(fitted: Fitted) -> Any:
    """A fit, rounded, as the module that is stored."""
    tensors = {}
    for number, band in enumerate(fitted.layout.bands):
        tensors |= table.tensors_of(number, band, fitted.rows[number], fitted.projections[number], fitted.means[number])
    return table.stored(fitted.layout, fitted.band_of, tensors)


def stored_bytes(folder: Path, place: Place) -> int:
    """Bytes that the file in ``folder`` holds of a table, the entries in its head included."""
    import json

    from tasks.models.load import WEIGHTS

    names = [f"{name}.table." for name in (*place.embeddings, *place.heads)] + [
        f"{name}.others" for name in place.heads
    ]
    with (folder / WEIGHTS).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if any(name.startswith(one) for one in names):
            start, end = entry["data_offsets"]
            total += end - start + len(json.dumps({name: entry}, separators=(",", ":")).encode()) - 1
    return total


def _result(
    spec: AdaptiveInputSpec,
    found: Sequence[Place],
    fitted: Sequence[Fitted],
    quality: Sequence[Sequence[BandQuality]],
    left: dict[str, str],
    sizes: _Sizes,
    healed: Trained | None,
) -> StepResult:
    tables = []
    warnings: list[str] = []
    remedy = _remedy(spec)
    for place, one, bands in zip(found, fitted, quality, strict=True):
        tables.append({"table": place.name, "bytes": one.layout.bytes, "bands": [band.record() for band in bands]})
        warnings += [f"{place.name}: {text}" for text in sacrificed(bands, remedy)]
    bands = "; ".join(f"{name}: {', '.join(band.told() for band in bands)}" for name, bands in _named(found, quality))
    summary = (
        f"embedding {size(sizes.dense)} -> {size(sizes.stored)} ({sizes.dense / sizes.stored:.1f} times smaller), "
        f"lookup {sizes.slower:.2f} times as long; {bands}"
    )
    if healed is not None:
        from tasks.finetune import finetune

        summary += f"; healed: {finetune.summary(healed)}"
        warnings += finetune.warnings(healed)
    exported = [
        Exported(one.layout, bool(place.embeddings), bool(place.heads))
        for place, one in zip(found, fitted, strict=True)
    ]
    warnings += grown(exported, spec, sizes.dense / sizes.budget)
    if sizes.slower > _SLOW:
        warnings.append(
            f"a lookup takes {sizes.slower:.2f} times as long as in the dense table, measured on this machine in one "
            "thread; the latencies in the report say whether the model feels it"
        )
    return StepResult(
        kind="model",
        touched=tuple(name for place in found for name in (*place.embeddings, *place.heads)),
        left=left,
        summary=summary,
        properties={
            "adaptive_input": {
                "budget": sizes.budget,
                "bytes": sizes.stored,
                "bytes_before": sizes.dense,
                "information": spec.information,
                "lookup_times": sizes.slower,
                "tables": tables,
            }
        },
        warnings=tuple(warnings),
    )


def _remedy(spec: AdaptiveInputSpec) -> str:
    """What keeps more of the tokens' vectors than the step has kept."""
    more = "a larger budget" if spec.ratio is None else "a smaller ratio"
    if spec.method == "adaptive":
        return f"{more} keeps more, and a finetune behind this step trains what was kept"
    return f"{more} keeps more" if spec.heal is not None else f"{more} or heal keeps more"


def _named(found: Sequence[Place], quality: Sequence[Sequence[BandQuality]]) -> list[tuple[str, Sequence[BandQuality]]]:
    return [(place.name, bands) for place, bands in zip(found, quality, strict=True)]
