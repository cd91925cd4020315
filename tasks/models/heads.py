"""A model from a folder with the head that the task needs, and a fresh one where it has none that fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from specs.schema.base import Task
from tasks.context import StepError
from tasks.models.applications import auto_for

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

_MASK = ".masked_spec_embed"
"""What stands for masked audio in training, which many files of speech models lack."""


def load_for(
    folder: Path, config: PretrainedConfig, task: Task, fresh: bool, generator: torch.Generator
) -> tuple[nn.Module, dict[str, str]]:
    """The model in ``folder`` with the task's head, its weights in the type in which they are stored.

    Args:
        folder: with weights as safetensors.
        config: the folder's, with what the task adds.
        task: decides on the head.
        fresh: whether the head is made anew.
        generator: gives the weights of a fresh head.

    Returns:
        The model, and the weights of the file that it has no place for, each with the reason.

    Raises:
        StepError: weights are missing, or a fresh head cannot be made.
    """
    import torch

    try:
        model, info = auto_for(task, config.model_type).from_pretrained(
            folder,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=fresh,
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise StepError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    base = f"{model.base_model_prefix}."
    masks = [name for name in info["missing_keys"] if name.endswith(_MASK)]
    missing = set(info["missing_keys"]) | {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    # A pooler belongs to the base in name only: language models are saved without it.
    new = {name for name in missing if fresh and (not name.startswith(base) or ".pooler." in name)}
    missing -= {*masks}
    if missing - new:
        raise StepError(
            f"{folder}: {len(missing - new)} weights that the model needs are not in the file, first "
            f"{min(missing - new)}; the folder is incomplete or has no head for {task}"
        )
    for name in masks:
        torch.nn.init.uniform_(model.get_parameter(name), generator=generator)
    if fresh:
        _initialise(model, base, new, generator)
    left = {name: f"{type(model).__name__} has no such weight" for name in sorted(map(str, info["unexpected_keys"]))}
    return model, left


def _initialise(model: nn.Module, base: str, new: set[str], generator: torch.Generator) -> None:
    """Normal weights of the model's own spread and zero biases, for the head and whatever else the file lacks."""
    import torch
    from torch import nn

    spread = getattr(model.config, "initializer_range", None) or 0.02  # type: ignore[union-attr]
    for name, module in model.named_modules():
        own = [f"{name}.{weight}" for weight, _ in module.named_parameters(recurse=False)]
        if not own or (f"{name}.".startswith(base) and new.isdisjoint(own)):
            continue
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                values = torch.normal(0.0, spread, module.weight.shape, generator=generator)
                module.weight.copy_(values)
                if module.bias is not None:
                    module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        else:
            raise StepError(
                f"the head {name} ({type(module).__name__}) cannot be made anew; use a model that is fine-tuned for "
                "this task"
            )
