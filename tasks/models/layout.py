"""Where a model's linear layers, embeddings and tied weights are, so that steps need not know model types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LinearLayer:
    """A layer that multiplies by a weight matrix.

    Args:
        name: its dotted name; empty where the model itself is the layer.
        kind: ``linear`` keeps the weight as [out, in], ``conv1d`` (GPT-2's) as [in, out].
        tied: the name of the parameter that its weight is, where another module owns it.
    """

    name: str
    module: nn.Module
    kind: Literal["linear", "conv1d"]
    tied: str | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in], whichever way it is stored; a view, so that writing into it changes the layer."""
        return self.weight if self.kind == "linear" else self.weight.T

    @property
    def weight_name(self) -> str:
        """The name of the weight in the model's state dict."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs), whichever way the weight is stored."""
        rows, columns = self.weight.shape
        return (rows, columns) if self.kind == "linear" else (columns, rows)


@dataclass(frozen=True)
class Embedding:
    """A table that is indexed by ids. ``tied`` names the modules that use the same weights."""

    name: str
    module: nn.Module
    tied: tuple[str, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    @property
    def factor(self) -> float | None:
        """What the rows are multiplied with on their way out, 1 for most; None where the table does more than give the
        rows of ids, as tables of positions do."""
        from torch import nn

        if type(self.module) is nn.Embedding:
            return 1.0
        scaled = type(self.module).__name__.endswith("ScaledWordEmbedding")
        return float(self.module.embed_scale) if scaled else None  # type: ignore[arg-type]


def check_finite(network: nn.Module) -> None:
    """Refuse weights that are not numbers: whatever is made of them is none either.

    Raises:
        StepError: one is not.
    """
    import torch

    for name, parameter in network.named_parameters():
        # Unlike isfinite it needs no memory, which a measurement of the model would count.
        ends = torch.stack(parameter.detach().aminmax()) if parameter.numel() else torch.zeros(2)
        if not bool(ends.isfinite().all()):
            raise StepError(f"{name} holds weights that are not finite; take a model from before its training broke")


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """Every ``nn.Linear`` and ``Conv1D``, in the order of the model; a model that is itself one is named ``""``."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    tied = tied_weights(model)
    found: list[LinearLayer] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weight = f"{name}.weight" if name else "weight"
            kind = "linear" if isinstance(module, nn.Linear) else "conv1d"
            found.append(LinearLayer(name, module, kind, tied.get(weight)))
    return found


def embeddings(model: nn.Module) -> list[Embedding]:
    """Every ``nn.Embedding``, in the order of the model."""
    from torch import nn

    owners = tied_weights(model)
    return [
        Embedding(
            name,
            module,
            tuple(
                tied.removesuffix(".weight") for tied, owner in owners.items() if owner.removesuffix(".weight") == name
            ),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]


def output_head(model: nn.Module) -> set[str]:
    """The names of the linear layers that give the output: what stands outside the model's body, and the layer that
    transformers itself names."""
    inside = getattr(model, "base_model_prefix", "")
    outside = f"{inside}." if inside and hasattr(model, inside) else None
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore
    return {
        layer.name
        for layer in linear_layers(model)
        if layer.module is output or (outside is not None and not layer.name.startswith(outside))
    }


def convolutions(model: nn.Module) -> list[str]:
    """The names of the convolutions, in the order of the model."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, (nn.Conv1d, nn.Conv2d))]


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Parameter name to the name of the parameter that it is.

    The owner is an embedding table where one is among the names, else the first name in the order of the model.
    """
    from torch import nn

    names: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Two parameters may share one storage without being one object, as after load_state_dict(assign=True).
        stored = parameter.device.type != "meta" and parameter.numel() > 0
        identity = (parameter.data_ptr(), parameter.shape) if stored else id(parameter)
        names.setdefault(identity, []).append(name)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    tied: dict[str, str] = {}
    for group in names.values():
        if len(group) > 1:
            owner = next((name for name in group if name in tables), group[0])
            tied.update({name: owner for name in group if name != owner})
    return tied
