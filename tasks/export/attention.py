"""How an exported model attends: the attention function, the masks and the cache layers that convert well.

transformers' own attention repeats key and value heads with BROADCAST_TO, a slow kernel that no Ethos-U has, and its
caches grow. Here the queries of a group are rows of one matrix product, and a cache is a tensor of fixed shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "lathe_export"
PLAIN = "lathe_plain"
"""The attention for exports by its name in transformers: for LiteRT, and in ordinary operations."""

MASKED = -1e4
"""Added to the attention scores of masked positions: finite, so that it survives quantization; exp of it is 0."""

_PADDING: ContextVar[Any] = ContextVar("padding", default=None)


def use_export_attention(model: Any, name: str = NAME) -> None:
    """Let every attention of ``model`` that goes through transformers' interface use the one for exports."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, {NAME: attend, PLAIN: attend_plainly}[name])
    AttentionMaskInterface.register(name, _no_mask)
    model.set_attn_implementation(name)


def _no_mask(*_: Any, **__: Any) -> None:
    """Masks are handed in ready; what a model would make by itself is without padding, and therefore none."""


@contextmanager
def padding(bias: Tensor) -> Iterator[None]:
    """Add ``bias`` [batch, 1, 1, keys] to the scores of every attention that is given no mask of its own."""
    token = _PADDING.set(bias)
    try:
        yield
    finally:
        _PADDING.reset(token)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **fields: Any) -> Any:
    """Attention as transformers calls it, with LiteRT's product of four dimensions; see ``attend_plainly``."""
    from litert_torch.generative.custom_ops.bmm_4d import bmm_4d

    return attend_plainly(module, query, key, value, mask, product=bmm_4d, **fields)


def attend_plainly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    product: Callable[[Tensor, Tensor], Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Query [batch, heads, rows, width], key and value [batch, groups, keys, width] to [batch, rows, heads, width].
    ``product`` multiplies [batch, groups, rows, width] by the transposed [batch, groups, keys, width].

    Raises:
        StepError: the model attends to sinks, which this attention does not know.
    """
    import torch

    if s_aux is not None:
        raise StepError("the model attends to sinks, which cannot be exported; use another architecture")
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    if scale != 1:
        query = query * scale
    grouped = query.reshape(batch, groups, heads // groups * rows, width)
    scores = torch.matmul(grouped, key.transpose(2, 3)) if product is None else product(grouped, key)
    scores = scores.view(batch, heads, rows, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = _PADDING.get() if attention_mask is None else attention_mask
    for bias in (position_bias, mask):
        if bias is not None:
            scores = scores + bias
    shares = torch.softmax(scores, dim=-1).view(batch, groups, heads // groups * rows, keys)
    return torch.matmul(shares, value).view(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


def additive(lookup: bool) -> nn.Module:
    """A module from int32 flags (1 where a score counts, 0 where it is masked) to what is added to the scores.

    With ``lookup`` that is read from a table of two values instead of computed, so that a fully quantised graph needs
    no float arithmetic for it, and the value can be set after the conversion.
    """
    import torch
    from torch import nn

    class Additive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding.from_pretrained(torch.tensor([[MASKED], [0.0]])) if lookup else None

        def forward(self, allowed: Tensor) -> Tensor:
            if self.table is not None:
                return self.table(allowed).view(allowed.shape)
            return (allowed.float() - 1.0) * -MASKED

    return Additive()


def kept_layers(count: int) -> list[Any]:
    """Cache layers that keep the keys and values which they are given, and hand them back."""
    from transformers.cache_utils import DynamicLayer

    return [DynamicLayer() for _ in range(count)]


def given_layers(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
    """Cache layers that hold keys and values [batch, groups, keys, width] which do not change."""
    layers = kept_layers(len(pairs))
    for layer, (key, value) in zip(layers, pairs, strict=True):
        layer.keys, layer.values, layer.is_initialized = key, value, True
    return layers


def written_layers(pairs: Sequence[tuple[Tensor, Tensor]], position: Tensor) -> list[Any]:
    """Cache layers of fixed shape [batch, groups, cache, width] into which new keys and values are written from
    ``position`` (int32 [1]) on."""
    import torch
    from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice
    from transformers.cache_utils import CacheLayerMixin

    zero = torch.zeros((), dtype=torch.int32)
    place = [zero, zero, position.reshape(()), zero]

    class WrittenLayer(CacheLayerMixin):
        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
            self.keys = dynamic_update_slice(self.keys, key_states, place)
            self.values = dynamic_update_slice(self.values, value_states, place)
            return self.keys, self.values

        def get_seq_length(self) -> Any:
            return position

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return query_length, 0

        def get_max_length(self) -> int:
            return -1

    return [WrittenLayer(*pair) for pair in pairs]


def pairs_of(tensors: Mapping[str, Tensor], prefix: str = "") -> list[tuple[Tensor, Tensor]]:
    """The tensors ``{prefix}key_0``, ``{prefix}value_0`` and so on, by layer."""
    count = sum(name.startswith(f"{prefix}key_") for name in tensors)
    return [(tensors[f"{prefix}key_{layer}"], tensors[f"{prefix}value_{layer}"]) for layer in range(count)]


def named(layers: Sequence[Any], prefix: str = "") -> dict[str, Tensor]:
    """Keys and values of cache layers by the names of ``pairs_of``."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        found[f"{prefix}key_{number}"], found[f"{prefix}value_{number}"] = layer.keys, layer.values
    return found
