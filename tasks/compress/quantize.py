"""The step ``quantize``: fewer bits for the weights of a torch model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.steps.quantize import QuantizeSpec
from specs.schema.suggest import nearest
from tasks.compress import packed
from tasks.compress.calibrate import outputs
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.registry import step

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKED_EXAMPLES = 8
"""Training examples on which the outputs are compared with the float model's."""

LARGE_ERROR = 0.1


@step(QuantizeSpec, libraries=("numpy", "tokenizers", "torch", "transformers"))
def quantize(model: Artifact, *, spec: QuantizeSpec, ctx: StepContext) -> StepResult:
    """Store the model's weights as int8 with one scale a row, or as fp16 or bf16.

    Args:
        model: a Hugging Face folder.
        spec: the precision, and what stays as it is.
        ctx: where, and the training data on which the error is measured.

    Raises:
        StepError: a pattern in ``skip`` matches nothing, no layer can be converted, a weight does not fit the type, or
            the file did not shrink.
    """
    from tasks.data import encode
    from tasks.models import load, save

    if spec.skip and spec.precision != "int8-dynamic":
        raise StepError(f"skip does not go with precision: {spec.precision}, which converts the whole file")
    network = load(model.path)
    data = encode(ctx.data, "train", ctx.task, model.path, ctx.store).take(slice(0, CHECKED_EXAMPLES))
    before = outputs(network, data)
    if spec.precision == "int8-dynamic":
        plan = plan_int8(network, spec.skip, spec.embeddings)
        if not plan.layers:
            raise StepError(f"quantize found no linear layer to convert: {_reasons(plan.left)}")
        packed_network, entry = pack(network, plan)
        save(packed_network, ctx.out, tokenizer_from=model.path, transforms=[entry])
        touched, left = (*plan.layers, *plan.embeddings), plan.left
        summary = f"converted {len(plan.layers)} of {plan.linear} linear layers"
        summary += f" and {len(plan.embeddings)} of {plan.tables} embeddings to int8"
        properties: dict[str, Any] = {"reduced_activation_range": packed.reduced_range()}
    else:
        touched, left = halve(network, spec.precision), {}
        save(network, ctx.out, tokenizer_from=model.path, compute_dtype="float32")
        summary = f"stored {len(touched)} tensors as {spec.precision}"
        properties = {}
    sizes = weight_bytes(model.path), weight_bytes(ctx.out)
    if sizes[1] >= sizes[0]:
        raise StepError(
            f"the weights take {sizes[1]} bytes as {spec.precision} and took {sizes[0]} before; they are stored in as "
            "few bits already, or too little was converted: leave this step out"
        )
    error = relative_error(before, outputs(load(ctx.out), data))
    warnings = []
    if not error <= LARGE_ERROR:
        warnings.append(
            f"the outputs differ from the float model's by {error:.1%} on {len(data)} training examples; keep "
            "sensitive layers as they are with skip, or use fp16"
        )
    if left:
        summary += f"; {_reasons(left)}"
    return StepResult(
        kind="packed" if spec.precision == "int8-dynamic" else "model",
        touched=touched,
        left=left,
        summary=f"{summary}; weights {sizes[0] / 1e6:.3g} -> {sizes[1] / 1e6:.3g} MB, output error {error:.2%}",
        properties=properties
        | {
            "precision": spec.precision,
            "output_error": error,
            "weight_bytes": sizes[1],
            "weight_bytes_before": sizes[0],
        },
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class Int8Plan:
    """Names of the linear layers and embeddings to pack, what is left with the reason, and how many there are.

    ``owner`` gives for each of them the parameter that holds its weights: those of one owner share their integers.
    ``factors`` are what the rows of each table are multiplied with.
    """

    layers: tuple[str, ...]
    embeddings: tuple[str, ...]
    left: Mapping[str, str]
    owner: Mapping[str, str]
    linear: int
    tables: int
    transposed: frozenset[str] = field(default=frozenset())
    factors: Mapping[str, float] = field(default_factory=dict)


def plan_int8(network: nn.Module, skip: Sequence[str] = (), tables: bool = True) -> Int8Plan:
    """Decide what becomes int8. Modules that share a weight are packed together or not at all: were one of them packed
    alone, the other would need the float weight as well, and the file would grow.

    Args:
        network: a float model.
        skip: shell-style patterns of module names that stay as they are.
        tables: whether embeddings are packed.

    Raises:
        StepError: a pattern matches no linear layer and no embedding.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from tasks.models.layout import embeddings, linear_layers, tied_weights

    linear, found_tables = linear_layers(network), embeddings(network)
    modules: dict[str, Any] = {found.name: found.module for found in (*linear, *found_tables)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise StepError(f"skip: {pattern!r} matches no linear layer and no embedding; {nearest(pattern, modules)}")
    ties = tied_weights(network)
    owner = {name: ties.get(_weight(name), _weight(name)) for name in modules}
    rows_times = {table.name: table.factor for table in found_tables}
    left: dict[str, str] = {}
    for name, module in modules.items():
        pattern = next((pattern for pattern in skip if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            left[name] = f"skip: {pattern}"
        elif type(module) not in (nn.Linear, Conv1D) and rows_times.get(name) is None:
            left[name] = f"{type(module).__name__} may use its weight in other ways"
        elif name in rows_times and not tables:
            left[name] = "embeddings: false"
        elif module.weight.is_meta or not module.weight.is_floating_point():
            left[name] = f"its weight is {module.weight.dtype}"
    kept = {owner[name]: name for name in left}
    for name in modules:
        if name not in left and owner[name] in kept:
            left[name] = f"tied to {kept[owner[name]]}, which stays float"
    return Int8Plan(
        layers=tuple(layer.name for layer in linear if layer.name not in left),
        embeddings=tuple(table.name for table in found_tables if table.name not in left),
        left=left,
        owner=owner,
        linear=len(linear),
        tables=len(found_tables),
        transposed=frozenset(layer.name for layer in linear if layer.kind == "conv1d"),
        factors={name: factor for name, factor in rows_times.items() if factor is not None},
    )


def pack(network: nn.Module, plan: Int8Plan) -> tuple[nn.Module, dict[str, Any]]:
    """Carry out ``plan`` in place.

    Returns:
        The model (another one only where the model itself was the layer), and the transform that ``load`` replays.
    """
    rows: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
    entry: dict[str, Any] = {"name": packed.NAME, "layers": {}, "embeddings": {}}

    def integers(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        transposed = name in plan.transposed
        place = (plan.owner[name], transposed)
        if place not in rows:
            rows[place] = packed.quantize_rows(weight.T.contiguous() if transposed else weight)
        return rows[place]

    for name in plan.embeddings:
        table: Any = network.get_submodule(name)
        weight, scale = integers(name, table.weight)
        factor = plan.factors[name]
        network = packed.put(network, name, packed.packed_embedding(weight, scale, table.padding_idx, factor))
        entry["embeddings"][name] = {"shape": list(weight.shape), "factor": factor}
    for name in plan.layers:
        layer: Any = network.get_submodule(name)
        weight, scale = integers(name, layer.weight)
        bias = None if layer.bias is None else layer.bias.detach().float()
        network = packed.put(network, name, packed.packed_linear(weight, scale, bias))
        entry["layers"][name] = {"shape": list(weight.shape), "bias": bias is not None}
    converted = sum(packed.is_packed(module) for module in network.modules())
    if converted != len(plan.layers) + len(plan.embeddings):
        raise RuntimeError(f"{converted} layers were packed of {len(plan.layers) + len(plan.embeddings)} planned")
    return network, entry


def halve(network: nn.Module, precision: str) -> tuple[str, ...]:
    """Convert the model to fp16 or bf16 in place; the names of the tensors converted.

    Raises:
        StepError: a weight is beyond fp16's range.
    """
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    names = []
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if largest > torch.finfo(dtype).max:
                raise StepError(f"{name} holds {largest:.3g}, beyond the range of {precision}; write precision: bf16")
            names.append(name)
    network.to(dtype)
    return tuple(names)


def relative_error(reference: Tensor, other: Tensor) -> float:
    """``‖other − reference‖ / ‖reference‖``."""
    return ((other - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a model's folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _weight(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def _reasons(left: Mapping[str, str]) -> str:
    shown = [f"{name}: {reason}" for name, reason in list(left.items())[:3]]
    more = len(left) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
