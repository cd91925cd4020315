"""How a transformers model gets another attention: through its attention interface and its mask interface.

The mask that a model would build by itself has as many numbers as the length squared. Here a plain mask, causal or not,
stays the padding of two dimensions; any other, for packed sequences, windows of the model's own or a cache of fixed
size, is built in full, and attention with it is exact.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.attention.lsh import Call, Hashed
from tasks.context import StepError
from tasks.models.transforms import transform

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "lathe_buckets"
"""The attention's name in transformers and in ``lathe.json``."""

FLEX = "flex_attention"
"""transformers' name of torch's FlexAttention, and that of the transform."""

TRANSFORMS = (NAME, FLEX)

LAYER = "attention_swap"
"""Under this name an attention module holds what replaces its exact attention."""

AUDITED_ROWS = 32
"""Queries of each head whose exact output is computed beside a call without causality."""


@dataclass(frozen=True)
class Seen:
    """One call of an attention, as ``watched`` shows it: the module, what it was given, and why it must be exact."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    obstacle: str | None

    def exact(self, dropout: float = 0.0, fields: Mapping[str, Any] | None = None) -> Tensor:
        """transformers' SDPA, with the mask that it needs for what was left out of ``mask``."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        rows, keys = self.query.shape[2], self.key.shape[2]
        mask = self.mask
        if mask is None and self.causal and rows != keys:
            mask = self.query.new_ones(1, 1, rows, keys, dtype=bool).tril(keys - rows)  # type: ignore[call-overload]
        elif mask is not None and mask.ndim == 2:
            mask = mask[:, None, None].expand(-1, 1, rows, -1)
            if self.causal:
                mask = mask & mask.new_ones(rows, keys).tril(keys - rows)
        return sdpa_attention_forward(
            self.module,
            self.query,
            self.key,
            self.value,
            mask,
            dropout=dropout,
            scaling=self.scale,
            is_causal=self.causal,
            **dict(fields or {}),
        )[0]


def dispatching(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions of a model that go through transformers' attention interface, by name.

    Raises:
        StepError: the model has none.
    """
    found = {name: module for name, module in model.named_modules() if _dispatches(type(module))}
    setting = getattr(model, "_can_set_attn_implementation", None)
    if not found or setting is None or not setting():
        raise StepError(
            f"{type(model).__name__} does not call its attention through transformers' attention interface, so that it "
            "cannot be replaced; take a model that does, such as Llama, Qwen2, BERT or Whisper"
        )
    return found


def _dispatches(kind: type[nn.Module]) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def obstacle_of(module: nn.Module) -> str | None:
    """Why an attention cannot be replaced, as far as the module itself shows it; None where it can."""
    if hasattr(module, "has_relative_attention_bias") or hasattr(module, "relative_attention_num_buckets"):
        return "adds a bias of positions to its scores"
    window = _window_of(module)
    if window:
        return f"attends within a window of {window} tokens of its own"
    if getattr(module, "sinks", None) is not None:
        return "attends to sinks"
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "caps its scores"
    return None


def _window_of(module: nn.Module) -> int | None:
    """The window of a module's own; some modules know it only by their model's config."""
    if hasattr(module, "sliding_window"):
        window: Any = module.sliding_window
        return window if isinstance(window, int) else None
    config, number = getattr(module, "config", None), getattr(module, "layer_idx", None)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) and isinstance(window, int)
    if kinds and isinstance(number, int):
        slides = slides and kinds[number] == "sliding_attention"
    return window if slides else None


@cache
def layer_class() -> type[nn.Module]:
    """The class of what is put into an attention module; late, for it is a torch module."""
    import torch
    from torch import nn

    class Swapped(nn.Module):
        """What replaces one exact attention.

        Args:
            settings: ``method`` (lsh, reformer or sliding_window), ``shapes`` of the tensors, ``probes``, ``window``,
                ``residual``, ``rounds``, ``chunk``, ``min_length``, ``limit`` (the error above which an audited head is
                computed anew, None for no audit).
        """

        def __init__(self, settings: Mapping[str, Any]) -> None:
            super().__init__()
            self.settings = dict(settings)
            self.counts: Counter[str] = Counter()
            for name, shape in settings["shapes"].items():
                self.register_buffer(name, torch.zeros(shape))

        def hashed(self) -> Hashed:
            """In float32, whatever the model was converted to."""
            names = ("table", "bias", "spread", "shift", "radius")
            found = {name: getattr(self, name).float() for name in names if hasattr(self, name)}
            return Hashed(**found)

    return Swapped


def put(module: nn.Module, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Let an attention module use another attention; ``settings`` as the class of ``layer_class`` takes them, without
    ``shapes``."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    layer = layer_class()({**settings, "shapes": shapes})
    layer.load_state_dict(dict(tensors))
    setattr(module, LAYER, layer)


def tensors_of(hashed: Hashed) -> dict[str, Tensor]:
    """What of hash functions is saved."""
    found = {"table": hashed.table, "bias": hashed.bias, "spread": hashed.spread}
    found |= {"shift": hashed.shift, "radius": hashed.radius}
    return {name: tensor.clone().contiguous() for name, tensor in found.items() if tensor is not None}


def swapped(model: nn.Module) -> dict[str, Any]:
    """The attentions that are replaced, by name, to what replaces them."""
    return {name: getattr(module, LAYER) for name, module in model.named_modules() if hasattr(module, LAYER)}


def entry_of(model: nn.Module) -> dict[str, Any]:
    """What ``lathe.json`` records of the swap."""
    return {"name": NAME, "layers": {name: layer.settings for name, layer in swapped(model).items()}}


@transform(NAME, trains=True)
def replay_swap(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Replace the attentions that ``entry`` names; the tensors of their hash functions come from the weights' file."""
    for name, settings in entry["layers"].items():
        setattr(model.get_submodule(name), LAYER, layer_class()(settings))
    use(model)


@transform(FLEX, trains=True)
def replay_flex(model: Any, entry: Mapping[str, Any]) -> None:
    """Let every attention be torch's FlexAttention."""
    model.set_attn_implementation(FLEX)


def use(model: Any) -> None:
    """Let ``model`` call this attention.

    Raises:
        StepError: it does not take another attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, plain_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise StepError(f"{type(model).__name__} does not take another attention; take a model of another type")


def without_dropout(config: Mapping[str, Any]) -> str | None:
    """What a training with replaced attention leaves out of a model of this config; None where that is nothing."""
    rates = [value for name, value in config.items() if "att" in name and "drop" in name]
    most = max((rate for rate in rates if isinstance(rate, (int, float))), default=0)
    if not most:
        return None
    return (
        f"the model's attention dropout of {most:g} is not applied in replaced attentions: a training with them has "
        "that much less regularisation; hold back validation data, and stop early"
    )


def counts(model: nn.Module) -> dict[str, int]:
    """How often each way was taken since the model was loaded, over all replaced attentions."""
    total: Counter[str] = Counter()
    for layer in swapped(model).values():
        total += layer.counts
    return dict(sorted(total.items()))


def plain_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **fields: Any,
) -> Tensor | None:
    """transformers' mask function: None or bool [B, Lk] for a mask that is only causal or not and padded, else bool
    [B, 1, Lq, Lk]."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    plain = plain and kv_offset == 0 and isinstance(q_offset, int) and not fields.get("use_vmap")
    if mask_function is causal_mask_function:
        plain = plain and q_offset + q_length == kv_length
    if plain and attention_mask is None:
        return None
    if plain and attention_mask is not None and attention_mask.shape[-1] == kv_length:
        return None if bool(attention_mask.all()) else attention_mask.bool()
    fields |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **fields)


_WATCHING: list[Callable[[Seen], None]] = []


@contextmanager
def watched(model: Any, see: Callable[[Seen], None]) -> Iterator[None]:
    """Show ``see`` every call of an attention of ``model``, which is exact meanwhile."""
    before = model.config._attn_implementation
    use(model)
    _WATCHING.append(see)
    try:
        yield
    finally:
        _WATCHING.remove(see)
        model.set_attn_implementation(before)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **fields: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D] to [B, Lq, Hq, D].

    Without a layer under ``LAYER``, for one query, below ``min_length`` and where the call asks for what buckets cannot
    honour it is exact; the layer counts which. Dropout of attention weights is left out where buckets are used.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    obstacle = _obstacle(query, key, attention_mask, causal, fields)
    seen = Seen(module, query, key, value, attention_mask, causal, scale, obstacle)
    if _WATCHING:
        for show in _WATCHING:
            show(seen)
        return seen.exact(dropout, fields), None
    layer = getattr(module, LAYER, None)
    if layer is None:
        return seen.exact(dropout, fields), None
    why = obstacle or ("one query" if query.shape[2] == 1 else None)
    if why is None and key.shape[2] < layer.settings["min_length"]:
        why = "short"
    if why is not None:
        layer.counts[f"exact: {why}"] += 1
        return seen.exact(dropout, fields), None
    out = run(layer, seen)
    layer.counts[layer.settings["method"]] += 1
    if layer.settings["limit"] is not None and not causal:
        out = _audited(layer, seen, out)
    return out, None


def run(layer: Any, seen: Seen) -> Tensor:
    """The output [B, Lq, Hq, D] of a replaced attention."""
    from tasks.attention.chunked import attend_in_chunks
    from tasks.attention.lsh import attend

    settings = layer.settings
    if settings["method"] == "reformer":
        return attend_in_chunks(
            seen.query, seen.key, seen.value, layer.rotations.float(), settings["chunk"], seen.mask, seen.scale
        )
    return attend(call_of(layer, seen))[0]


def call_of(layer: Any, seen: Seen) -> Call:
    """What buckets are to compute in place of an exact attention."""
    settings = layer.settings
    return Call(
        seen.query,
        seen.key,
        seen.value,
        layer.hashed(),
        seen=seen.mask,
        probes=settings["probes"],
        window=settings["window"],
        band=settings["band"],
        causal=seen.causal,
        offset=seen.key.shape[2] - seen.query.shape[2] if seen.causal else 0,
        residual=settings["residual"],
        scale=seen.scale,
    )


def _obstacle(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, fields: Mapping[str, Any]) -> str | None:
    if fields.get("position_bias") is not None:
        return "position bias"
    if fields.get("softcap") is not None or fields.get("s_aux") is not None:
        return "capped scores or sinks"
    if fields.get("output_attentions"):
        return "attention weights asked for"
    if mask is not None and mask.ndim != 2:
        return "a mask of its own"
    if fields.get("cache") is not None:
        return "paged cache"
    if causal and query.shape[2] > key.shape[2]:
        return "more queries than keys"
    return None


def _audited(layer: Any, seen: Seen, out: Tensor) -> Tensor:
    """``out`` with those heads computed exactly whose sampled rows are further from it than the layer's limit.

    Only without causality: which way a head goes depends on the whole sequence.
    """
    import torch

    with torch.no_grad():
        bad = audit(seen, out) > layer.settings["limit"]
    if not bool(bad.any()):
        return out
    layer.counts["exact: heads that the audit found wrong"] += int(bad.sum())
    return torch.where(bad[:, None, :, None], seen.exact(), out)


def audit(seen: Seen, out: Tensor, rows: int = AUDITED_ROWS) -> Tensor:
    """The relative error [B, Hq] of ``out`` [B, Lq, Hq, D] on evenly spread rows."""
    import torch

    length = seen.query.shape[2]
    at = torch.linspace(0, length - 1, min(rows, length)).long()
    per = seen.query.shape[1] // seen.key.shape[1]
    query = seen.query[:, :, at].unflatten(1, (-1, per)).flatten(2, 3).float()
    scores = query @ seen.key.float().transpose(2, 3) * seen.scale
    if seen.mask is not None:
        scores = scores.masked_fill(~seen.mask[:, None, None], -1e30)
    exact = (scores.softmax(-1) @ seen.value.float()).unflatten(2, (per, -1)).flatten(1, 2)
    far = out[:, at].transpose(1, 2).float() - exact
    if seen.mask is not None and seen.mask.shape[-1] == length:
        far = far * seen.mask[:, None, at, None]  # what padding says is nobody's error
    return far.flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1).clamp_min(1e-12)
