"""What training examples say of a replacement: how far its output is from exact attention, and with which parameters it
keeps a bound at the least cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from specs.schema.steps.attention import CHUNK, ROUNDS, AttentionSpec
from tasks.attention.swap import Seen, put, run, tensors_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded

PROBES = (1, 2, 4, 8, 16)
BUCKETS = (16, 32, 64, 128, 256)
WINDOW = 64
_MOST_BYTES = 1 << 29
"""Of queries, keys and values that are held at a time."""


@dataclass(frozen=True)
class Choice:
    """A replacement of one attention: what ``swap.put`` takes, and what was measured of it.

    Args:
        settings: see ``tasks.attention.swap.layer_class``.
        tensors: of the hash functions.
        error: ``‖output − exact‖ / ‖exact‖`` over the examples that judge.
        head_errors: the same for each head.
        captured: of each head the mean share of the exact attention that is met key by key; None where that is not
            counted.
        work: multiplications a query, of exact attention as 1.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    error: float
    head_errors: tuple[float, ...]
    captured: tuple[float, ...] | None
    work: float


def capture(network: nn.Module, modules: Mapping[str, nn.Module], data: Encoded) -> Iterator[tuple[str, list[Seen]]]:
    """For each attention what it is given, example after example; few attentions are held at a time, so that the model
    runs over ``data`` more than once where they are large."""
    import torch

    from tasks.attention.swap import watched
    from tasks.compress.calibrate import examples, forward

    names = {module: name for name, module in modules.items()}
    waiting = set(modules)
    while waiting:
        held: dict[str, list[Seen]] = {}

        def see(seen: Seen, held: dict[str, list[Seen]] = held, waiting: frozenset[str] = frozenset(waiting)) -> None:
            name = names.get(seen.module)
            full = sum(3 * 4 * call.query.numel() for calls in held.values() for call in calls) > _MOST_BYTES
            if name not in waiting or (full and name not in held):
                return
            query, key, value = (given.detach().float().contiguous() for given in (seen.query, seen.key, seen.value))
            held.setdefault(name, []).append(replace(seen, query=query, key=key, value=value))

        with torch.no_grad(), watched(network, see):
            for batch in examples(data):
                forward(network, batch)
        if not held:
            yield from ((name, []) for name in sorted(waiting))
            return
        waiting -= set(held)
        yield from held.items()


def judge(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], calls: Sequence[Seen]) -> Choice:
    """Measure a replacement on what an attention was given, all but what it captures."""
    layer = _layer(settings, tensors)
    off, whole = 0.0, 0.0
    for seen in calls:
        exact = seen.exact().float()
        far = run(layer, seen).float() - exact
        if seen.mask is not None and seen.mask.shape[-1] == exact.shape[1]:
            far, exact = (tensor * seen.mask[:, :, None, None] for tensor in (far, exact))
        off, whole = (total + part.pow(2).sum((0, 1, 3)) for total, part in ((off, far), (whole, exact)))
    heads = (off / whole.clamp_min(1e-30)).sqrt()  # type: ignore[union-attr]
    return Choice(
        {**settings, "shapes": layer.settings["shapes"]},
        tensors,
        float((off.sum() / whole.sum().clamp_min(1e-30)).sqrt()),  # type: ignore[union-attr]
        tuple(round(float(value), 6) for value in heads),
        None,
        work(settings, tensors, calls),
    )


def _layer(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    from torch import nn

    module = nn.Module()
    put(module, settings, tensors)
    return module.attention_swap


def with_captured(found: Choice, calls: Sequence[Seen]) -> Choice:
    """``found`` with what it captures, where that can be counted."""
    import torch

    if found.settings["method"] == "reformer":
        return found
    layer = _layer({name: value for name, value in found.settings.items() if name != "shapes"}, found.tensors)
    shares = torch.stack([_captured(layer, seen) for seen in calls]).mean(0)
    return replace(found, captured=tuple(round(float(share), 4) for share in shares))


def _captured(layer: Any, seen: Seen, rows: int = 64) -> Tensor:
    """Of each head the share of the exact softmax that is met key by key, over evenly spread queries."""
    import torch

    from tasks.attention.lsh import attend
    from tasks.attention.swap import call_of

    _, mass = attend(replace(call_of(layer, seen), residual=False))
    length = seen.query.shape[2]
    at = torch.linspace(0, length - 1, min(rows, length)).long()
    per = seen.query.shape[1] // seen.key.shape[1]
    scores = seen.query[:, :, at] @ seen.key.repeat_interleave(per, 1).transpose(2, 3) * seen.scale
    if seen.mask is not None:
        scores = scores.masked_fill(~seen.mask[:, None, None], -1e30)
    if seen.causal:
        keys = seen.key.shape[2]
        late = torch.arange(keys)[None] > (at + keys - length)[:, None]
        scores = scores.masked_fill(late, -1e30)
    return (mass[:, :, at] - scores.logsumexp(-1)).exp().mean((0, 2))


def work(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], calls: Sequence[Seen]) -> float:
    """Multiplications of a replacement over those of exact attention, by counting."""
    import torch

    from tasks.attention.hashing import codes

    done = exact = 0.0
    for seen in calls:
        keys, width = seen.key.shape[2:]
        both = width + seen.value.shape[-1]
        exact += keys * both / (2 if seen.causal else 1)
        if settings["method"] == "reformer":
            done += tensors["rotations"].shape[1] * (2 * width * tensors["rotations"].shape[3] + 2 * CHUNK * both)
            continue
        count = tensors["table"].shape[1]
        window = settings["window"] * (1.5 if seen.causal else 3) * both
        code = codes(call_hashed(tensors), seen.key[0])
        held = torch.stack([row.bincount(minlength=count) for row in code]).float()
        bucket = float((held.pow(2).sum(1) / keys).mean()) / (2 if seen.causal else 1)
        means = count * (2 * width + (both - width if settings["residual"] else 0)) if settings["probes"] else 0
        done += means + window + settings["probes"] * bucket * both
    return done / exact


def call_hashed(tensors: Mapping[str, Tensor]) -> Any:
    """Hash functions from their tensors."""
    from tasks.attention.lsh import Hashed

    return Hashed(**tensors)


def options(
    spec: AttentionSpec, fit_on: Sequence[Seen], generator: torch.Generator
) -> Iterator[list[tuple[dict[str, Any], dict[str, Tensor]]]]:
    """Replacements to try, as groups; within a group each is more exact and more work than the one before it."""
    import torch

    from tasks.attention.chunked import draw_rotations
    from tasks.attention.hashing import fit

    first = fit_on[0]
    groups, width = first.key.shape[1], first.key.shape[3]
    length = max(seen.key.shape[2] for seen in fit_on)
    self_attention = first.causal or all(seen.query.shape[2] == seen.key.shape[2] for seen in fit_on)
    plain = {"probes": 0, "window": 0, "band": 0, "residual": False, "limit": None, "min_length": 0}
    if spec.method == "sliding_window":
        window = spec.local_window or WINDOW
        nothing = {"table": torch.zeros(groups, 1, width), "bias": torch.zeros(groups, 1)}
        if self_attention:
            settings = plain | {"method": "sliding_window", "window": window, "band": window}
            yield [(settings, nothing | {"spread": torch.zeros(groups, 1)})]
        return
    if spec.method == "reformer":
        chunk = spec.chunk or CHUNK
        buckets = spec.buckets or max(2, 2 * (length // (2 * chunk)))
        for rounds in (spec.rounds,) if spec.rounds else (ROUNDS,):
            rotations = draw_rotations(groups, rounds, width, buckets, generator)
            yield [(plain | {"method": "reformer", "chunk": chunk}, {"rotations": rotations})]
        return
    window = spec.local_window or (WINDOW if first.causal else 0)
    keys = torch.cat([_visible(seen) for seen in fit_on], 1)
    for buckets in (spec.buckets,) if spec.buckets else [count for count in BUCKETS if count <= max(16, length // 8)]:
        tensors = tensors_of(fit(spec.hash or "centroid", keys, buckets, generator))
        held = tensors["table"].shape[1]
        few = (spec.probes,) if spec.probes else [count for count in PROBES if count <= max(1, held // 2)]
        settings = plain | {"method": "lsh", "window": window if self_attention else 0}
        settings["residual"] = spec.residual is not False
        yield [(settings | {"probes": min(count, held)}, tensors) for count in few]


def _visible(seen: Seen) -> Tensor:
    """Keys [G, N, D] that are no padding, of all examples of a call."""
    import torch

    if seen.mask is None:
        return seen.key.transpose(0, 1).flatten(1, 2)
    return torch.cat([key[:, mask] for key, mask in zip(seen.key, seen.mask, strict=True)], 1)


def choose(spec: AttentionSpec, calls: Sequence[Seen], bound: float, generator: torch.Generator) -> Choice | None:
    """The replacement of least work whose error keeps ``bound``; where none does the one of least error, and None where
    the method has none for this attention. The first half of the calls fits the hash, the second judges."""
    half = max(1, len(calls) // 2)
    fit_on, judged = calls[:half], calls[half:] or calls
    best: Choice | None = None
    for group in options(spec, fit_on, generator):
        for settings, tensors in group:
            if best is not None and best.error <= bound and work(settings, tensors, judged) >= best.work:
                break
            found = judge(settings, tensors, judged)
            if best is None or _better(found, best, bound):
                best = found
            if found.error <= bound:
                break
    return best if best is None else with_captured(best, judged)


def _better(one: Choice, other: Choice, bound: float) -> bool:
    if one.error <= bound and other.error <= bound:
        return one.work < other.work
    return one.error < other.error
