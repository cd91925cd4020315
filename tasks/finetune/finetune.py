"""The step ``finetune``."""

from __future__ import annotations

from typing import Any

from specs.schema.steps.finetune import FinetuneSpec
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.data.encoded import Encoded
from tasks.finetune.loop import Trained, train
from tasks.registry import step


@step(FinetuneSpec, libraries=("numpy", "tokenizers", "torch", "transformers"))
def finetune(model: Artifact, *, spec: FinetuneSpec, ctx: StepContext) -> StepResult:
    """Train the model on the spec's training data and keep the weights with the lowest validation loss.

    Args:
        model: a Hugging Face folder.
        spec: how to train.
        ctx: where and on what.

    Raises:
        StepError: the data does not fit the model, or the training diverged; see ``tasks.finetune.loop.train``.
    """
    from tasks.models import load, save

    network = load(model.path, ctx.device)
    ctx.note("encoding the training data")
    data = training_data(network, model, ctx)
    ctx.note("training")
    trained = train(network, data, spec, ctx)
    network.to("cpu")
    save(network, ctx.out, tokenizer_from=model.path)
    return StepResult(
        kind=model.kind,
        touched=tuple(name for name, parameter in network.named_parameters() if parameter.requires_grad),
        left={name: "frozen" for name, parameter in network.named_parameters() if not parameter.requires_grad},
        summary=summary(trained),
        properties=properties(trained) | {"zeros_kept": zeros_kept(trained)},
        warnings=warnings(trained),
    )


def training_data(network: Any, model: Artifact, ctx: StepContext) -> Encoded:
    """The encoded training split for a loaded model.

    Raises:
        StepError: the data has more labels than the model's head.
    """
    from tasks.data import encode

    data = encode(ctx.data, "train", ctx.task, model.path, ctx.store)
    classes = getattr(network.config, "num_labels", None)
    if ctx.task == "text-classification" and len(data.label_names) > (classes or 0):
        raise StepError(
            f"the training data has {len(data.label_names)} labels ({', '.join(data.label_names)}) and the model's "
            f"head has {classes}; take a model whose head fits, or leave out the labels that are too many"
        )
    return data


def summary(trained: Trained) -> str:
    """One line about a training, for the report."""
    progress = trained.progress
    passes, steps = (_counted(number, noun) for number, noun in ((progress.epochs, "epoch"), (progress.step, "step")))
    text = f"trained {_count(trained.parameters)} parameters for {passes} ({steps})"
    if progress.best_loss is not None:
        text += f", validation loss {progress.first_loss:.3f} -> {progress.best_loss:.3f}"
        text += f", best at step {progress.best_step}"
    if zeros := zeros_kept(trained):
        text += f", kept {zeros} zeros in {len(trained.kept)} layers"
    return text


def zeros_kept(trained: Trained) -> int:
    """How many weights stayed 0 because they were pruned."""
    return sum(int((~mask).sum()) for mask in trained.kept.values())


def properties(trained: Trained) -> dict[str, Any]:
    """What a training records about itself."""
    progress = trained.progress
    return {
        "training": {
            "steps": progress.step,
            "planned_steps": progress.total,
            "epochs": progress.epochs,
            "best_step": progress.best_step,
            "validation_loss_before": progress.first_loss,
            "validation_loss": progress.best_loss,
            "precision": trained.precision,
        }
    }


def warnings(trained: Trained) -> tuple[str, ...]:
    """What the user should know about a training."""
    if trained.progress.best_loss is not None and trained.progress.best_step == 0:
        worse = (
            "no validation was better than the model as it came in, so its weights were kept; lower learning_rate or "
            "train for longer"
        )
        return (*trained.warnings, worse)
    return trained.warnings


def _counted(number: float, noun: str) -> str:
    shown = f"{number:.3g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun}{'' if shown == '1' else 's'}"


def _count(number: int) -> str:
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
