"""What a training minimises, as a sum over tokens or examples and the weight of that sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.finetune import TrainingSpec
from tasks.context import StepError
from tasks.data.collate import IGNORED
from tasks.data.encoded import Encoded

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from tasks.models.applications import Family

Loss = Callable[["nn.Module", Mapping[str, "Tensor"]], tuple["Tensor", "Tensor"]]
"""``loss(model, batch) -> (sum, weight)``: the sum of the losses, and how many tokens or examples it is over, so that
batches of any size add up exactly."""


def task_loss(
    task: Task, family: Family | None = None, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Loss:
    """The loss of a task.

    Text-generation takes the next token at every position that is no padding; text-classification the label, or where
    an example has several labels each of them by itself; translation, and speech recognition with a decoder, every
    token of the target; CTC the negative log-likelihood of the transcript over its length.

    Args:
        task: what the model does.
        family: how it works; only speech recognition asks.
        label_smoothing: share of the target probability spread over all classes; CTC has none.
        class_weights: text-classification: what an example of each class counts, [C].
    """
    loss = _LOSSES.get((task, family)) or _LOSSES[task, None]
    return partial(loss, label_smoothing=label_smoothing, class_weights=class_weights)


def weights_of_classes(data: Encoded, spec: TrainingSpec) -> Tensor | None:
    """What an example of each class counts, float32 [C]; None where all count the same."""
    import torch

    from tasks.data.labels import class_weights

    if spec.class_weights == "none" or data.labels is None:
        return None
    return torch.from_numpy(class_weights(data))


def decoder_start(labels: Tensor, config: Any) -> Tensor:
    """What the decoder is given to write ``labels``, int64 [B, T]: its start token, then all labels but the last."""
    given = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) == IGNORED, config.pad_token_id)
    given[:, 0] = config.decoder_start_token_id
    return given


def silent(model: nn.Module, data: Encoded) -> np.ndarray:
    """Which recordings are too short for a model for CTC to write their transcript from, bool [N].

    A character takes a frame, and so does the blank between two that are the same.
    """
    import numpy as np
    import torch

    frames = model._get_feat_extract_output_lengths(torch.from_numpy(data.lengths())).numpy()  # type: ignore[operator]
    ids, mask = np.asarray(data.target_ids), np.asarray(data.target_mask)
    repeats = ((ids[:, 1:] == ids[:, :-1]) & (mask[:, 1:] > 0)).sum(1)
    return frames < mask.sum(1, dtype=np.int64) + repeats


def check(model: nn.Module, data: Encoded, task: Task, family: Family) -> tuple[str, ...]:
    """What the user should know before a training.

    Raises:
        StepError: the model can learn nothing from any example.
    """
    if (task, family) != ("speech-recognition", "ctc"):
        return ()
    short = int(silent(model, data).sum())
    if short == len(data):
        raise StepError(
            "every recording has fewer frames than its transcript has characters, so that CTC can learn nothing; are "
            "the audio files those of the transcripts, and is the model's stride (conv_stride) meant for them?"
        )
    if short:
        return (f"{short} of {len(data)} recordings are too short for their transcripts and were not learned from",)
    return ()


def _next_token(
    model: nn.Module, batch: Mapping[str, Tensor], *, label_smoothing: float, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    from torch.nn.functional import cross_entropy

    ids, mask = batch["input_ids"], batch["attention_mask"]
    scored = mask[:, 1:].bool()
    of_tokens: Any = getattr(model, "get_output_embeddings", None)
    layer: Any = None if of_tokens is None else of_tokens()
    if hasattr(layer, "surprisal") and not label_smoothing:  # an adaptive softmax need not score every token
        with layer.passing():
            hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return layer.surprisal(hidden[:, :-1][scored], ids[:, 1:][scored]).sum(), scored.sum()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    total = cross_entropy(
        logits[:, :-1][scored].float(), ids[:, 1:][scored], reduction="sum", label_smoothing=label_smoothing
    )
    return total, scored.sum()


def _label(
    model: nn.Module, batch: Mapping[str, Tensor], *, label_smoothing: float, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    weights = None if class_weights is None else class_weights.to(logits)
    if labels.ndim == 2:
        wanted = labels.to(logits) * (1 - label_smoothing) + label_smoothing / 2
        losses = binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="none")
        return losses.mean(dim=1).sum(), labels.new_tensor(len(labels))
    losses = cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if weights is None:
        return losses.sum(), labels.new_tensor(len(labels))
    counted = weights[labels]
    return (losses * counted).sum(), counted.sum()


def _target_token(
    model: nn.Module, batch: Mapping[str, Tensor], *, label_smoothing: float, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    from torch.nn.functional import cross_entropy

    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    given = decoder_start(labels, model.config)
    logits = model(**inputs, decoder_input_ids=given, use_cache=False).logits
    scored = labels != IGNORED
    total = cross_entropy(logits[scored].float(), labels[scored], reduction="sum", label_smoothing=label_smoothing)
    return total, scored.sum()


def _ctc(
    model: nn.Module, batch: Mapping[str, Tensor], *, label_smoothing: float, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    losses, heard = ctc_losses(*ctc_logits(model, batch), batch["labels"], model.config.pad_token_id)  # type: ignore
    return losses.sum(), heard.sum()


def ctc_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits of every frame, [B, F, C], and how many frames of each recording are audio, int64 [B]."""
    import torch

    samples = batch["input_values"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with _spans_that_fit(model, samples.shape[1]):
        logits = model(**inputs).logits
    mask = batch.get("attention_mask")
    lengths = torch.full((len(samples),), samples.shape[1], device=samples.device) if mask is None else mask.sum(-1)
    return logits, model._get_feat_extract_output_lengths(lengths).long().clamp(max=logits.shape[1])  # type: ignore


def ctc_losses(logits: Tensor, frames: Tensor, labels: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of each transcript over its length, [B], and whether the recording is long enough
    for it, bool [B]; 0 where it is not.

    Args:
        logits: [B, F, C].
        frames: of audio, int64 [B].
        labels: of the transcripts, ``IGNORED`` where they are padded, int64 [B, T].
        blank: the label of no character.
    """
    import torch

    written = labels != IGNORED
    count = written.sum(1)
    repeats = ((labels[:, 1:] == labels[:, :-1]) & written[:, 1:]).sum(1)
    losses = torch.nn.functional.ctc_loss(  # on the CPU, as the gradient on a GPU is never the same twice
        torch.log_softmax(logits.float(), -1).transpose(0, 1).cpu(),
        labels[written].cpu(),
        frames.cpu(),
        count.cpu(),
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )
    return losses.to(logits.device) / count.clamp(min=1), frames >= count + repeats


_LOSSES: dict[tuple[Task, Family | None], Callable[..., tuple[Tensor, Tensor]]] = {
    ("text-generation", None): _next_token,
    ("text-classification", None): _label,
    ("translation", None): _target_token,
    ("speech-recognition", None): _target_token,
    ("speech-recognition", "ctc"): _ctc,
}
"""By task and family; None is every other family."""


@contextmanager
def _spans_that_fit(model: nn.Module, samples: int) -> Iterator[None]:
    """SpecAugment masks spans of frames, and raises where a batch is shorter than one span."""
    import torch

    config: Any = model.config
    wanted = getattr(config, "mask_time_length", None)
    if wanted is None:
        yield
        return
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(samples)))  # type: ignore[operator]
    config.mask_time_length = max(1, min(wanted, frames))
    try:
        yield
    finally:
        config.mask_time_length = wanted
