"""Whether a student and a teacher go together, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from tasks.context import StepContext, StepError
from tasks.models.applications import family_of, task_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from tasks.compress.vocabularies import Aligned
    from tasks.data.encoded import Encoded

_HEARING = ("num_mel_bins", "max_source_positions")
"""Fields of a configuration that say what a model hears; both must hear the same."""

_TOKENS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "ctc_loss_reduction",
    "ctc_zero_infinity",
    "apply_spec_augment",
)
"""Fields that follow from the tokenizer, and so from the teacher."""

_LABELS = ("id2label", "label2id", "problem_type")


def student_config(fields: Mapping[str, Any], teacher: Mapping[str, Any], task: Task) -> PretrainedConfig:
    """The configuration of a student with the teacher's tokenizer and labels.

    Args:
        fields: as the spec has them.
        teacher: the teacher's configuration.
        task: what both do.

    Raises:
        StepError: a field is unknown, the two work in different ways, or the vocabulary is another one.
    """
    import torch
    from transformers import CONFIG_MAPPING

    from tasks.models.configuration import build_config, build_model, known_fields

    kind = fields["model_type"]
    known = known_fields(CONFIG_MAPPING[kind]) if kind in CONFIG_MAPPING else set()
    shared = {name: teacher[name] for name in (*_TOKENS, *_HEARING) if name in teacher and name in known | set(_TOKENS)}
    shared |= {name: _numbered(name, teacher[name]) for name in _LABELS if teacher.get(name)}
    size = teacher.get("vocab_size")
    if fields.get("vocab_size", size) != size:
        raise StepError(
            f"config: vocab_size {fields['vocab_size']} is not the teacher's {size}, whose vocabulary the student "
            "takes; leave it out"
        )
    try:
        config = build_config(fields, task, vocab_size=size, **shared)
        with torch.device("meta"):
            config.architectures = [type(build_model(config, task)).__name__]
    except StepError as error:
        raise StepError(str(error).replace("model.config", "config")) from None
    families = family_of(config), family_of(teacher)
    if families[0] != families[1]:
        raise StepError(
            f"config: {kind} is a model of the family {families[0]}, the teacher is {families[1]}; take a model type "
            f"of the same family, for example {teacher['model_type']}"
        )
    return config


def alike(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse two that do different things.

    Raises:
        StepError: they differ in task or family; with both sides' values.
    """
    ours: Any = student.config
    theirs: Any = teacher.config
    tasks = [task_of(config.architectures) for config in (ours, theirs)]
    if tasks[0] != tasks[1]:
        raise StepError(f"the student does {tasks[0]} and the teacher {tasks[1]}; take a teacher that does the same")
    families = family_of(ours), family_of(theirs)
    if families[0] != families[1]:
        raise StepError(
            f"the student is of the family {families[0]} and the teacher {families[1]}; take a teacher that works in "
            "the same way"
        )


def match(student: nn.Module, teacher: nn.Module, aligned: Aligned, data: Encoded, ctx: StepContext) -> None:
    """Refuse a pair of which one cannot learn from the other.

    Raises:
        StepError: they differ in task, family, logits, labels or in what they hear; with both sides' values.
    """
    ours: Any = student.config
    theirs: Any = teacher.config
    if ctx.task == "text-classification":
        label_order(student, teacher)
    else:
        sizes = [config.get_text_config().vocab_size for config in (ours, theirs)]
        wanted = sizes[1] if aligned.writes is None else len(aligned.writes)
        if sizes[0] != wanted:
            raise StepError(
                f"the student gives {sizes[0]} logits a token and the teacher {wanted}; take models whose vocabulary "
                "has the same size"
            )
    for name in _HEARING:
        heard = [getattr(config, name, None) for config in (ours, theirs)]
        if heard[0] != heard[1]:
            raise StepError(f"the student's {name} is {heard[0]} and the teacher's {heard[1]}; they must hear the same")
    if family_of(ours) == "ctc":
        _same_frames(student, teacher, data)


def label_order(student: nn.Module, teacher: nn.Module) -> list[int] | None:
    """The teacher's number of each label of the student; None where they are the same.

    Raises:
        StepError: the teacher does not know the same labels.
    """
    ours, theirs = _labels(student), _labels(teacher)
    if ours == theirs:
        return None
    missing = [name for name in ours if name not in theirs]
    if missing or len(ours) != len(theirs):
        raise StepError(
            f"the teacher knows {len(theirs)} labels ({', '.join(theirs)}) and the student {len(ours)} "
            f"({', '.join(ours)}); take a teacher that was trained on the same labels"
            + (f" (it lacks {', '.join(missing)})" if missing else "")
        )
    return [theirs.index(name) for name in ours]


def _labels(model: nn.Module) -> list[str]:
    names = model.config.id2label  # type: ignore[union-attr]
    return [str(names[number]) for number in sorted(names)]  # type: ignore[arg-type, index, call-overload]


def _same_frames(student: nn.Module, teacher: nn.Module, data: Encoded) -> None:
    import torch

    lengths = torch.from_numpy(data.lengths()[:64])
    ours, theirs = (model._get_feat_extract_output_lengths(lengths) for model in (student, teacher))  # type: ignore
    if not torch.equal(ours, theirs):
        raise StepError(
            "the student makes another number of frames of a recording than the teacher; give both the same "
            "convolutions (conv_stride, conv_kernel)"
        )


def _numbered(name: str, value: Any) -> Any:
    return {int(number): label for number, label in value.items()} if name == "id2label" else value
