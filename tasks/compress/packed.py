"""Layers whose weights are int8, and the transform that puts them into a model.

A linear layer computes ``y = x Wᵀ + b`` with ``W ≈ diag(scale) · weight``: one float32 scale for each output, int8
weights in -127 … 127, no zero point. Activations become int8 as they come. Each token is first divided by its largest
magnitude, so that neither an outlier token nor padding nor the other examples of the batch cost the rest their
resolution; the kernel is PyTorch's own for dynamic int8 (fbgemm). A static layer takes the range of its inputs from
calibration instead: what lies outside is clipped, and no token is looked at before it is multiplied.

The tensors are called ``weight_int8`` and ``weight_scale``, so that plain transformers misses ``weight`` instead of
taking the integers for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.models.transforms import positive, shape, transform

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "int8-dynamic"
STATIC = "int8-static"


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with one scale.

    Args:
        weight: float [rows, columns].

    Returns:
        int8 [rows, columns] in -127 … 127, and float32 scales [rows]; a row of zeros has scale 1.
    """
    import torch

    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8), scale


def packed_linear(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None = None,
    input_range: Tensor | None = None,
) -> nn.Module:
    """A linear layer.

    Args:
        weight: int8 [out, in].
        scale: float32 [out].
        bias: float32 [out].
        input_scale: what the inputs are multiplied with first, float32 [in].
        input_range: the least and the greatest input behind that, float32 [2], for static int8; 0 lies between them.
    """
    return _classes()[0](weight, scale, bias, input_scale, input_range)


def packed_embedding(weight: Tensor, scale: Tensor, padding_idx: int | None, factor: float = 1.0) -> nn.Module:
    """A table with int8 ``weight`` [rows, columns] and ``scale`` [rows], giving float32 rows times ``factor``."""
    return _classes()[1](weight, scale, padding_idx, factor)


def is_packed(module: nn.Module) -> bool:
    """Whether ``module`` is one of the layers of this file."""
    return isinstance(module, _classes())


@transform(NAME)
@transform(STATIC)
def empty_layers(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Replace the layers that ``entry`` names by packed ones whose tensors are to be loaded.

    ``layers`` maps the name of a linear layer to ``{"shape": [out, in], "bias": bool}``, with ``input_scale: true``
    where its inputs are multiplied first and ``static: true`` where their range is stored; ``embeddings`` the name of a
    table to ``{"shape": [rows, columns], "factor": number}``, where the factor may be left out and is 1 then.
    """
    import torch

    with torch.device("meta"):  # the file has the tensors; what an entry says must not take memory
        for name, what in entry["embeddings"].items():
            rows, columns = shape(what, name)
            factor = positive(what.get("factor", 1.0), f"the factor of {name}")
            padding = getattr(model.get_submodule(name), "padding_idx", None)
            weight, scale = torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows)
            put(model, name, packed_embedding(weight, scale, padding, factor))
        for name, what in entry["layers"].items():
            rows, columns = shape(what, name)
            bias = torch.zeros(rows) if what["bias"] else None
            factors = torch.ones(columns) if what.get("input_scale") else None
            limits = torch.ones(2) if what.get("static") else None
            weight, scale = torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows)
            put(model, name, packed_linear(weight, scale, bias, factors, limits))


def put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace the submodule ``name`` of ``model``; the model, or ``module`` where ``name`` is the model itself."""
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
    return model


def reduced_range() -> bool:
    """Whether activations get 7 bits. Without VNNI the kernel adds pairs of products in 16 bits, which 8-bit
    activations overflow in silence."""
    import torch

    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return not has_vnni()


def levels(low: float, high: float) -> tuple[float, int, float, float]:
    """The integers of static activations from ``low`` to ``high``, 0 between them: the step from one to the next, the
    one that stands for 0, and the ends of what they reach."""
    top = 127 if reduced_range() else 255
    step = max((high - low) / top, 1e-30)
    zero = round(-low / step)
    return step, zero, -zero * step, (top - zero) * step


def _kernel(weight: Tensor, scale: Tensor) -> Any:
    """The weights in the order in which the kernel reads them."""
    import torch

    zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        # The type is deprecated without a successor that is as fast on a CPU (pytorch/pytorch#184982).
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        typed = torch._make_per_channel_quantized_tensor(weight, scale, zeros, 0)  # pyright: ignore[reportPrivateImportUsage]
    return torch.ops.quantized.linear_prepack(typed, None)


@cache
def _classes() -> tuple[Any, Any]:
    import torch
    from torch import nn
    from torch.nn.functional import embedding, linear

    class PackedLinear(nn.Module):
        weight_int8: Tensor
        weight_scale: Tensor
        bias: Tensor | None

        input_scale: Tensor | None
        input_range: Tensor | None

        def __init__(
            self,
            weight: Tensor,
            scale: Tensor,
            bias: Tensor | None,
            input_scale: Tensor | None,
            input_range: Tensor | None,
        ) -> None:
            super().__init__()
            self.register_buffer("weight_int8", weight)
            self.register_buffer("weight_scale", scale)
            self.register_buffer("bias", bias)
            self.register_buffer("input_scale", input_scale)
            self.register_buffer("input_range", input_range)
            self.out_features, self.in_features = weight.shape
            self._kernel: Any = None
            self._reduced = reduced_range()

        def forward(self, x: Tensor) -> Tensor:
            if self.input_scale is not None:
                x = x * self.input_scale
            if x.device.type != "cpu":  # the kernel is the CPU's; elsewhere the weights alone are int8
                return linear(x, (self.weight_int8 * self.weight_scale[:, None]).to(x.dtype), self.bias)
            if self._kernel is None:
                self._kernel = _kernel(self.weight_int8, self.weight_scale)
                if self.input_range is not None:
                    self._levels = levels(*self.input_range.tolist())
            if self.input_range is not None:
                step, zero, low, high = self._levels
                y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                    x.clamp(low, high), step, zero, self._kernel
                )
                return y if self.bias is None else y.add_(self.bias)
            largest = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-30)
            y = torch.ops.quantized.linear_dynamic(x / largest, self._kernel, self._reduced)
            return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)

        @property
        def weight(self) -> Tensor:  # some models ask for the dtype of a layer's weight
            return self.weight_int8

        def extra_repr(self) -> str:
            return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    class PackedEmbedding(nn.Module):
        weight_int8: Tensor
        weight_scale: Tensor

        def __init__(self, weight: Tensor, scale: Tensor, padding_idx: int | None, factor: float) -> None:
            super().__init__()
            self.register_buffer("weight_int8", weight)
            self.register_buffer("weight_scale", scale)
            self.num_embeddings, self.embedding_dim = weight.shape
            self.padding_idx = padding_idx
            self.factor = factor

        def forward(self, ids: Tensor) -> Tensor:
            rows = embedding(ids, self.weight_int8) * embedding(ids, self.weight_scale[:, None])
            return rows if self.factor == 1 else rows * self.factor

        @property
        def weight(self) -> Tensor:  # some models ask for the dtype of a layer's weight
            return self.weight_int8

        def extra_repr(self) -> str:
            return f"{self.num_embeddings}, {self.embedding_dim}"

    return PackedLinear, PackedEmbedding
