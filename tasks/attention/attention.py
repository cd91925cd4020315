"""The step ``attention``: another attention in place of a trained model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.attention import FIELDS, SAMPLES, AttentionSpec
from tasks.attention import breakeven, kernel, swap
from tasks.attention.calibrate import Choice, capture, choose
from tasks.attention.lengths import NEVER, at_every_length, by_length
from tasks.compress.calibrate import outputs, sample
from tasks.compress.quantize import relative_error
from tasks.compress.selection import reasons
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.registry import step

if TYPE_CHECKING:
    from torch import nn

    from tasks.attention.swap import Seen
    from tasks.models.applications import Family

BOUND = 0.02
CHECKED_EXAMPLES = 2
SHORT = 512
"""Tokens below which no replacement was seen to be faster."""

_SALT = 41

CAUSAL_CHUNKS = (
    "is causal, and which keys stand in a chunk of sorted ones depends on later tokens; write method: lsh, which knows "
    "no later token"
)
NO_COMPILER = (
    "this machine has no C++ compiler, so that plain torch computes the buckets, many times slower; install g++ before "
    "relying on the speed"
)
FLEX = (
    "flex compiles in every process that loads the model, about a minute on a CPU, where it cannot train and nothing "
    "is gained; it pays on a GPU alone"
)
NO_EXPORT = (
    "a model with replaced attention can be trained, quantized and measured, but not exported: neither LiteRT nor an "
    "NPU has the sorting and the gathering of buckets of unequal size"
)


def look(spec: AttentionSpec, config: Mapping[str, Any], task: Task, max_length: int) -> tuple[list[str], list[str]]:
    """What stops a replacement, and what it will not bring, before anything is done."""
    import torch
    from transformers import CONFIG_MAPPING

    from tasks.models.configuration import build_model

    try:
        with torch.device("meta"):
            network = build_model(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)), task)
        modules = swap.dispatching(network)
        _numbered(modules, spec)
    except StepError as error:
        return [str(error)], []
    if not FIELDS[spec.method]:
        slow = spec.method == "flex" and not torch.cuda.is_available()
        if slow and kernel.compiler() is None:
            return ["method: flex needs a C++ compiler on a CPU, and this machine has none; install g++"], []
        return [], [FLEX] if slow else []
    obstacles = {name: swap.obstacle_of(module) for name, module in modules.items()}
    if all(obstacles.values()):
        name, why = next(iter(obstacles.items()))
        return [f"no attention of this model can be replaced: {name} {why}; take a model of another type"], []
    warnings = [NO_EXPORT]
    if spec.method != "reformer" and kernel.compiler() is None:
        warnings.append(NO_COMPILER)
    dropout = swap.without_dropout(config)
    if spec.recover is not None and dropout is not None:
        warnings.append(dropout)
    if max_length < SHORT:
        warnings.append(
            f"data.max_length is {max_length}, and replaced attention is faster only from about {SHORT} to 2048 tokens "
            "on: up to there the module computes exactly, and nothing is gained"
        )
    return [], warnings


def refuses(spec: AttentionSpec | None, family: Family, task: Task) -> str | None:
    """Why a model of ``family`` cannot get this attention; None where it can."""
    if spec is not None and spec.method == "reformer" and family == "decoder":
        return f"method: reformer: a decoder {CAUSAL_CHUNKS}"
    return None


@dataclass
class _Made:
    """What became of the attentions, by name."""

    chosen: dict[str, Choice] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    times: dict[str, breakeven.Timings] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@step(
    AttentionSpec,
    libraries=("numpy", "tokenizers", "torch", "transformers"),
    preflight=look,
    refuses=refuses,
    variants={"attention (reformer)": AttentionSpec(uses="attention", id="reformer", method="reformer")},
)
def attention(model: Artifact, *, spec: AttentionSpec, ctx: StepContext) -> StepResult:
    """Replace the attentions of a model that keep the bound on the error and get faster.

    Args:
        model: a Hugging Face folder.
        spec: with what, which, and how close it must come.
        ctx: where; training data to decide by, and the exclusive slot in which times are taken.

    Raises:
        StepError: the model does not call its attention through transformers' interface, an attention that the spec
            names does not keep the bound, none is replaced, or the training of ``recover`` fails.
    """
    from tasks.models import load, save
    from tasks.models.transforms import read_extras

    network = load(model.path)
    modules = swap.dispatching(network)
    earlier = [entry for entry in read_extras(model.path).transforms if entry["name"] not in swap.TRANSFORMS]
    if spec.method in ("sdpa", "flex"):
        return _plain(network, modules, model, spec, ctx, earlier)
    wanted = _numbered(modules, spec)
    data = sample(model, spec.samples or SAMPLES, ctx)
    judged = data.take(slice(len(data) // 2, None))  # the others fit the hashes
    few = judged.take(judged.lengths().argsort(kind="stable")[::-1][:CHECKED_EXAMPLES])
    for module in modules.values():
        if hasattr(module, swap.LAYER):
            delattr(module, swap.LAYER)
    before = outputs(network, few)
    made = _decide(network, modules, wanted, data, spec, ctx)
    if not made.chosen:
        raise StepError(_nothing(made, spec))
    swap.use(network)
    with at_every_length(network):
        properties: dict[str, Any] = {"output_error": relative_error(before, outputs(network, few))}
        if spec.recover is not None:
            properties |= _recovered(network, model, spec, ctx)
    with ctx.exclusive():
        properties["by_length"] = by_length(network, judged)
    longest = int(data.lengths().max())
    after = outputs(network, few)
    counted = swap.counts(network)
    save(network, ctx.out, tokenizer_from=model.path, transforms=[*earlier, swap.entry_of(network)])
    if relative_error(after, outputs(load(ctx.out), few)) != 0:
        raise RuntimeError("the saved model does not compute what the model in memory does")
    for name, content in breakeven.draw(*_lines(made, spec)).items():
        (ctx.out / name).write_bytes(content)
    pays = _pays(made, spec)
    faster = f"faster from {pays} tokens on" if pays < NEVER else "faster at no length measured"
    if pays > longest:
        made.warnings.append(
            f"the longest of the {len(data)} training examples has {longest} tokens, and replaced attention is "
            f"{faster}: up to there the module computes exactly, nothing is gained, and what follows measures exact "
            "attention"
        )
    worst = max(found.error for found in made.chosen.values())
    summary = (
        f"replaced {len(made.chosen)} of {len(modules)} attentions ({spec.method}), error of one at most {worst:.2%}, "
        f"of the outputs {properties['output_error']:.2%} with all; {faster}"
    )
    return StepResult(
        kind="swapped",
        touched=tuple(made.chosen),
        left=made.left,
        summary="; ".join((summary, *_whole(properties["by_length"]), *([reasons(made.left)] if made.left else ()))),
        properties={
            **properties,
            "method": spec.method,
            "break_even": pays,
            "attentions": {name: _record(name, made) for name in made.chosen},
            "calls": counted,
            "compiled": kernel.library() is not None,
        },
        warnings=tuple(made.warnings),
    )


def _numbered(modules: Mapping[str, nn.Module], spec: AttentionSpec) -> list[str] | None:
    """The names of the attentions that the spec numbers; None where it leaves them to be chosen.

    Raises:
        StepError: there is none of a number, or the attention cannot be replaced.
    """
    if spec.layers is None or spec.layers == "auto":
        return None
    names = list(modules)
    beyond = [number for number in spec.layers if number >= len(names)]
    if beyond:
        raise StepError(
            f"layers: the model has {len(names)} attentions, 0 to {len(names) - 1}, and no {beyond[0]}; write smaller "
            "numbers, or layers: auto"
        )
    found = list(dict.fromkeys(names[number] for number in spec.layers))
    for name in found:
        why = swap.obstacle_of(modules[name])
        if why is not None:
            raise StepError(f"layers: {name} {why}, which a replacement cannot honour; leave it out of layers")
    return found


def _decide(
    network: nn.Module,
    modules: Mapping[str, nn.Module],
    wanted: list[str] | None,
    data: Any,
    spec: AttentionSpec,
    ctx: StepContext,
) -> _Made:
    made = _Made()
    bound = spec.error.at_most if spec.error is not None else BOUND
    kept = {name: module for name, module in modules.items() if wanted is None or name in wanted}
    made.left |= {name: "not in layers" for name in modules if name not in kept}
    measured: dict[tuple[Any, ...], breakeven.Timings] = {}
    for done, (name, calls) in enumerate(capture(network, kept, data), start=1):
        ctx.note(f"calibrating {name}")
        ctx.progress(done, len(kept), "attentions")
        why, found = _tried(modules[name], calls, spec, bound, ctx)
        if why is None and found is not None:
            form = (*calls[0].query.shape[1:2], *calls[0].key.shape[1:2], *_form(found))
            if form not in measured:
                with ctx.exclusive():
                    swap.put(modules[name], found.settings, found.tensors)
                    measured[form] = breakeven.measure(modules[name], calls[-1], ctx.generator(_SALT))
                    delattr(modules[name], swap.LAYER)
            made.times[name] = measured[form]
            why = _slow(measured[form], spec, wanted)
        if why is not None:
            if wanted is not None:
                raise StepError(f"layers: {name}: {why}")
            made.left[name] = why
            continue
        assert found is not None
        made.chosen[name] = found
        settings = {**found.settings, "min_length": _from(made.times[name], spec)}
        settings["limit"] = None if calls[0].causal or spec.method != "lsh" else 2 * bound
        swap.put(modules[name], settings, found.tensors)
    return made


def _tried(
    module: nn.Module, calls: list[Seen], spec: AttentionSpec, bound: float, ctx: StepContext
) -> tuple[str | None, Choice | None]:
    """Why an attention stays as it is, and what would take its place."""
    if not calls:
        return "was not called", None
    why = swap.obstacle_of(module) or next((seen.obstacle for seen in calls if seen.obstacle), None)
    if why is not None:
        return why, None
    if calls[0].causal and spec.method == "reformer":
        return CAUSAL_CHUNKS, None
    found = choose(spec, calls, bound, ctx.generator(_SALT))
    if found is None:
        return "looks at other tokens than its own, so that no window is near", None
    if found.error > bound:
        how = f"{found.settings['probes']} of {_form(found)[0]} buckets" if spec.method == "lsh" else spec.method
        return (
            f"its error is {found.error:.1%} at best ({how}), above the bound of {bound:.1%}; leave it exact, or write "
            f"error: {{at_most: {1.1 * found.error:.0%}}}"
        ), None
    return None, found


def _form(found: Choice) -> tuple[Any, ...]:
    """What the time of a replacement depends on."""
    settings, shapes = found.settings, found.settings["shapes"]
    first = next(iter(shapes.values()))
    return first[1], *(settings[name] for name in ("probes", "window", "residual")), tuple(first)


def _slow(times: breakeven.Timings, spec: AttentionSpec, wanted: list[str] | None) -> str | None:
    if wanted is None and spec.min_length is None and times.break_even is None:
        return f"exact attention was as fast at every length measured, up to {max(times.exact)} tokens"
    return None


def _from(times: breakeven.Timings, spec: AttentionSpec) -> int:
    return spec.min_length or times.break_even or NEVER


def _pays(made: _Made, spec: AttentionSpec) -> int:
    """The length from which one of the replacements is faster."""
    return min(made.times[name].break_even or NEVER for name in made.chosen)


def _nothing(made: _Made, spec: AttentionSpec) -> str:
    name, why = next(iter(made.left.items()))
    return (
        f"no attention is replaced by {spec.method}: {name}: {why}"
        + (f" ({len(made.left) - 1} others alike)" if len(made.left) > 1 else "")
        + "; leave this step out, or allow a larger error"
    )


def _lines(made: _Made, spec: AttentionSpec) -> tuple[dict[str, Mapping[int, float]], list[int]]:
    name = next(iter(made.chosen))
    times = made.times[name]
    return {"exact (SDPA)": times.exact, spec.method: times.replaced}, [times.break_even] if times.break_even else []


def _whole(lengths: list[dict[str, float]]) -> list[str]:
    """What the whole model gains at the longest of the lengths, for the summary."""
    return [
        f"the model at {row['length']} tokens {row['seconds_exact'] / row['seconds_replaced']:.2f}x as fast"
        for row in lengths[-1:]
    ]


def _record(name: str, made: _Made) -> dict[str, Any]:
    found, times = made.chosen[name], made.times[name]
    settings = {key: value for key, value in found.settings.items() if key not in ("shapes", "limit", "min_length")}
    return {
        **settings,
        "shapes": dict(found.settings["shapes"]),
        "error": found.error,
        "head_errors": list(found.head_errors),
        "captured": None if found.captured is None else list(found.captured),
        "work": found.work,
        "break_even": times.break_even,
        "seconds_exact": {str(length): value for length, value in times.exact.items()},
        "seconds_replaced": {str(length): value for length, value in times.replaced.items()},
    }


def _recovered(network: nn.Module, model: Artifact, spec: AttentionSpec, ctx: StepContext) -> dict[str, Any]:
    from tasks.finetune.finetune import properties, training_data
    from tasks.finetune.loop import train

    assert spec.recover is not None
    ctx.note("training with the replaced attention")
    trained = train(network, training_data(network, model, ctx), spec.recover, ctx)
    network.to("cpu")
    return {"recovery": properties(trained)["training"]}


def _plain(
    network: nn.Module,
    modules: Mapping[str, nn.Module],
    model: Artifact,
    spec: AttentionSpec,
    ctx: StepContext,
    earlier: list[Mapping[str, Any]],
) -> StepResult:
    """Exact attention by transformers' own implementations."""
    from tasks.models import save

    replaced = swap.swapped(network)
    if spec.method == "sdpa" and model.kind == "model":
        raise StepError("method: sdpa takes replaced attention back, and this model's is exact; leave this step out")
    for name in replaced:
        delattr(modules[name], swap.LAYER)
    network.set_attn_implementation({"sdpa": "sdpa", "flex": swap.FLEX}[spec.method])  # type: ignore[operator]
    if spec.method == "flex":
        save(network, ctx.out, tokenizer_from=model.path, transforms=[*earlier, {"name": swap.FLEX}])
        return StepResult("swapped", tuple(modules), f"{len(modules)} attentions by FlexAttention", warnings=(FLEX,))
    save(network, ctx.out, tokenizer_from=model.path, transforms=earlier)
    return StepResult("model", tuple(replaced) or tuple(modules), "exact attention taken back")
