"""The step ``quantize``: fewer bits for the weights of a torch model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.quantize import QuantizeSpec
from tasks.compress.calibrate import outputs
from tasks.compress.few_bits import few_bits
from tasks.compress.selection import banded, reasons
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.registry import step

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKED_EXAMPLES = 8
"""Training examples on which the outputs are compared with the float model's."""

LARGE_ERROR = 0.1

NO_SPEED = (
    "weights alone in few bits make the file smaller and not the model faster: on a CPU they are expanded to float32 "
    "when first used; int8-dynamic and an export compute with integers"
)


def warn(spec: QuantizeSpec, config: Mapping[str, Any], task: Task, max_length: int) -> tuple[list[str], list[str]]:
    """What stops a quantization, and what the plan says of it, before it is done."""
    from tasks.models.patterns import PATTERNS

    problems, kind = [], str(config.get("model_type"))
    if spec.algorithm != "rtn" and kind not in PATTERNS:
        problems.append(
            f"algorithm: {spec.algorithm} goes through a model block by block, and the parts of {kind} models are not "
            f"described; write algorithm: rtn, or take one of {', '.join(sorted(PATTERNS))}"
        )
    return problems, [NO_SPEED] if spec.weight_only else []


@step(QuantizeSpec, libraries=("numpy", "tokenizers", "torch", "transformers"), preflight=warn)
def quantize(model: Artifact, *, spec: QuantizeSpec, ctx: StepContext) -> StepResult:
    """Store the model's weights in fewer bits.

    Args:
        model: a Hugging Face folder.
        spec: how many bits, how they are found, and what stays as it is.
        ctx: where, and the training data that calibrates and on which the error is measured.

    Raises:
        StepError: a pattern in ``skip`` matches nothing, no layer can be converted, a weight is not finite or does not
            fit the type, a layer saturates, the file did not shrink or is above the budget, or the outputs are further
            from the float model's than ``error`` allows.
    """
    from tasks.data import encode
    from tasks.models import load, save
    from tasks.models.transforms import read_extras

    network = load(model.path)
    data = encode(ctx.data, "train", ctx.task, model.path, ctx.store).take(slice(0, CHECKED_EXAMPLES))
    before = outputs(network, data)
    earlier, properties, warnings = read_extras(model.path).transforms, {}, []
    if spec.halves:
        touched, left = halve(network, spec.stored), banded(network)
        save(network, ctx.out, tokenizer_from=model.path, transforms=earlier, compute_dtype="float32")
        summary = f"stored {len(touched)} tensors as {spec.stored}"
    else:
        made = few_bits(network, model, data, spec, ctx)
        save(made.network, ctx.out, tokenizer_from=model.path, transforms=[*earlier, made.entry])
        for name, content in made.files.items():
            (ctx.out / name).write_bytes(content)
        touched, left, summary = made.touched, made.left, made.summary
        properties, warnings = dict(made.properties), list(made.warnings)
    sizes = weight_bytes(model.path), weight_bytes(ctx.out)
    if spec.mixed is not None and sizes[1] > spec.mixed.budget:
        raise StepError(
            f"mixed: the file takes {sizes[1]} bytes, above the budget of {spec.mixed.budget}: scales that fp16 cannot "
            f"hold take more than was planned; write budget: {-(-sizes[1] // 1024)} KiB, or algorithm: rtn"
        )
    if sizes[1] >= sizes[0]:
        raise StepError(
            f"the weights take {sizes[1]} bytes as {spec.stored} and took {sizes[0]} before; they are stored in as "
            "few bits already, or too little was converted: leave this step out"
        )
    error = relative_error(before, outputs(load(ctx.out), data))
    warnings += _judge(error, len(data), spec)
    if left:
        summary += f"; {reasons(left)}"
    return StepResult(
        kind=model.kind if spec.halves else "packed",
        touched=touched,
        left=left,
        summary=f"{summary}; weights {sizes[0] / 1e6:.3g} -> {sizes[1] / 1e6:.3g} MB, output error {error:.2%}",
        properties=properties
        | {
            "precision": spec.stored,
            "output_error": error,
            "weight_bytes": sizes[1],
            "weight_bytes_before": sizes[0],
        },
        warnings=tuple(warnings),
    )


def halve(network: nn.Module, precision: str) -> tuple[str, ...]:
    """Convert the model to fp16 or bf16 in place; the names of the tensors converted. Tables in bands keep their types.

    Raises:
        StepError: a weight is beyond fp16's range.
    """
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    names = []
    kept = tuple(f"{name}.table." for name in banded(network))
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not name.startswith(kept):
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


def _judge(error: float, examples: int, spec: QuantizeSpec) -> list[str]:
    """What to say of the error; training moves the outputs for the better, so that there only a stated bound counts.

    Raises:
        StepError: it is above the bound that the spec states.
    """
    remedy = "keep sensitive layers as they are with skip (sensitivity: true shows which), or use more bits"
    if spec.weight_only and spec.algorithm == "rtn":
        remedy = f"algorithm: gptq may do, or a smaller group_size; {remedy}"
    differs = f"the outputs differ from the float model's by {error:.1%} on {examples} training examples"
    if spec.error is not None:
        if not error <= spec.error.at_most:
            raise StepError(f"{differs}, and error allows {spec.error.at_most:.3g} of 1 at most; {remedy}")
        return []
    return [] if error <= LARGE_ERROR or spec.train is not None else [f"{differs}; {remedy}"]
