"""Layers whose weights alone are stored in 4, 8 or 16 bits, and the transform that puts them into a model.

On a CPU the weights are expanded to float32 when a layer is first used, and a layer then computes as any other: the
file is small, the memory and the speed are those of float32. Measured on an EPYC without AVX512, one thread, float32
768 -> 3072 against one token: multiplying by the float weight 0.21 ms, expanding int4 in every call 0.98 ms, torch's
``_weight_int4pack_mm_for_cpu`` 26 ms and ``_weight_int8pack_mm`` 15 ms (both have kernels for AVX512 alone); at 128
tokens 18, 24, 2390 and 1263 ms.

The tensors are called ``weight_int4`` (two codes a byte), ``weight_int8`` or ``weight_fp16``, with ``weight_scale`` as
float16 [rows, groups]; ``input_scale`` [columns] multiplies the inputs where AWQ could not fold it into another layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.compress.grid import Rounded, expand, pack_pairs, unpack_pairs
from tasks.compress.packed import put
from tasks.models.transforms import positive, shape, transform, whole

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "weight-only"


def tensors_of(rounded: Rounded | Tensor) -> dict[str, Tensor]:
    """What is stored of a weight, by name: of one in codes, or of a float matrix as fp16."""
    import torch

    if not isinstance(rounded, Rounded):
        return {"weight_fp16": rounded.detach().to(torch.float16)}
    name = f"weight_int{rounded.bits}"
    codes = pack_pairs(rounded.codes) if rounded.bits == 4 else rounded.codes
    return {name: codes.contiguous(), "weight_scale": rounded.scale.contiguous()}


def stored_linear(
    tensors: Mapping[str, Tensor], columns: int, group: int, bias: Tensor | None, input_scale: Tensor | None
) -> nn.Module:
    """A linear layer of ``columns`` inputs with the weights ``tensors``."""
    return _classes()[0](tensors, columns, group, bias, input_scale)


def stored_embedding(
    tensors: Mapping[str, Tensor], columns: int, group: int, padding_idx: int | None, factor: float
) -> nn.Module:
    """A table with the rows ``tensors``, giving float32 rows of ``columns`` times ``factor``."""
    return _classes()[1](tensors, columns, group, padding_idx, factor)


def is_stored(module: nn.Module) -> bool:
    """Whether ``module`` is one of the layers of this file."""
    return isinstance(module, _classes())


@transform(NAME)
def empty_layers(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Replace the layers that ``entry`` names by ones whose tensors are to be loaded.

    ``layers`` maps the name of a linear layer to ``{"shape": [out, in], "bits": 4 | 8 | 16, "group": inputs, "scale":
    "float16" | "float32", "bias": bool, "input_scale": bool}``; ``embeddings`` the name of a table to ``shape``,
    ``bits``, ``group``, ``scale`` and ``factor``.
    """
    import torch

    with torch.device("meta"):  # the file has the tensors; what an entry says must not take memory
        for name, what in entry["embeddings"].items():
            padding = getattr(model.get_submodule(name), "padding_idx", None)
            tensors, columns, group = _empty(what, name)
            factor = positive(what["factor"], f"the factor of {name}")
            put(model, name, stored_embedding(tensors, columns, group, padding, factor))
        for name, what in entry["layers"].items():
            tensors, columns, group = _empty(what, name)
            bias = torch.zeros(what["shape"][0]) if what["bias"] else None
            inputs = torch.ones(columns) if what["input_scale"] else None
            put(model, name, stored_linear(tensors, columns, group, bias, inputs))


def described(rounded: Rounded | Tensor) -> dict[str, Any]:
    """What ``empty_layers`` must know of a weight."""
    if not isinstance(rounded, Rounded):
        return {"shape": list(rounded.shape), "bits": 16, "group": rounded.shape[1], "scale": "float16"}
    scale = str(rounded.scale.dtype).removeprefix("torch.")
    return {"shape": list(rounded.codes.shape), "bits": rounded.bits, "group": rounded.group, "scale": scale}


def _empty(what: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], int, int]:
    """The tensors of the module ``name`` that are to be loaded, its columns, and how many of them share a scale."""
    import torch

    rows, columns = shape(what, name)
    group = whole(what["group"], f"the group of {name}", most=columns)
    if what["bits"] not in (4, 8, 16) or what["scale"] not in ("float16", "float32"):
        raise ValueError(f"{name} has {what['bits']!r} bits and scales in {what['scale']!r}")
    if what["bits"] == 16:
        return {"weight_fp16": torch.zeros(rows, columns, dtype=torch.float16)}, columns, group
    width, dtype = ((columns + 1) // 2, torch.uint8) if what["bits"] == 4 else (columns, torch.int8)
    groups = -(-columns // group)
    tensors = {
        f"weight_int{what['bits']}": torch.zeros(rows, width, dtype=dtype),
        "weight_scale": torch.ones(rows, groups, dtype=getattr(torch, what["scale"])),
    }
    return tensors, columns, group


def _hold(module: Any, tensors: Mapping[str, Tensor], columns: int, group: int) -> None:
    """Give ``module`` a weight, however it is stored."""
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    module.columns, module.group = columns, group
    module.bits = next(bits for bits in (4, 8, 16) if any(name.endswith(str(bits)) for name in tensors))


def _rows(module: Any, ids: Tensor | None = None) -> Tensor:
    """The weight of ``module`` as float32: all rows, or those of ``ids``, [..., columns]."""
    from torch.nn.functional import embedding

    def chosen(tensor: Tensor) -> Tensor:
        return tensor if ids is None else embedding(ids.reshape(-1), tensor)

    if module.bits == 16:
        found = chosen(module.weight_fp16).float()
    else:
        codes = chosen(module.weight_int4 if module.bits == 4 else module.weight_int8)
        codes = unpack_pairs(codes, module.columns) if module.bits == 4 else codes
        found = expand(codes, chosen(module.weight_scale), module.group)
    return found if ids is None else found.view(*ids.shape, module.columns)


def _asked_for_dtype(module: Any) -> Tensor:
    """What stands for ``weight`` where a model asks for its dtype: int8 is what T5 knows as quantized."""
    import torch

    if module.bits == 16:
        return torch.empty(0)
    return module.weight_int4.view(torch.int8) if module.bits == 4 else module.weight_int8


@cache
def _classes() -> tuple[Any, Any]:
    from torch import nn
    from torch.nn.functional import linear

    class StoredLinear(nn.Module):
        bias: Tensor | None
        input_scale: Tensor | None
        weight = property(_asked_for_dtype)

        def __init__(
            self,
            tensors: Mapping[str, Tensor],
            columns: int,
            group: int,
            bias: Tensor | None,
            input_scale: Tensor | None,
        ) -> None:
            super().__init__()
            _hold(self, tensors, columns, group)
            self.out_features, self.in_features = len(next(iter(tensors.values()))), columns
            self.register_buffer("bias", bias)
            self.register_buffer("input_scale", input_scale)
            self._expanded: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self._expanded is None or self._expanded.device != x.device:
                rows = _rows(self)
                self._expanded = rows if self.input_scale is None else rows * self.input_scale
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return linear(x, self._expanded.to(x.dtype), bias)

        def extra_repr(self) -> str:
            return f"in_features={self.columns}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"

    class StoredEmbedding(nn.Module):
        weight = property(_asked_for_dtype)

        def __init__(
            self, tensors: Mapping[str, Tensor], columns: int, group: int, padding_idx: int | None, factor: float
        ) -> None:
            super().__init__()
            _hold(self, tensors, columns, group)
            self.num_embeddings, self.embedding_dim = len(next(iter(tensors.values()))), columns
            self.padding_idx = padding_idx
            self.factor = factor

        def forward(self, ids: Tensor) -> Tensor:
            rows = _rows(self, ids)
            return rows if self.factor == 1 else rows * self.factor

        def extra_repr(self) -> str:
            return f"{self.columns}, bits={self.bits}, group={self.group}"

    return StoredLinear, StoredEmbedding
