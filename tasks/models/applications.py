"""What the tasks ask of a model, said once: the class that loads it, the model types that can do it, their families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from specs.schema.base import Task
from specs.schema.suggest import nearest
from tasks.context import StepError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Family = Literal["encoder", "decoder", "encoder-decoder", "ctc"]
"""How a model works: an encoder whose output is classified, a decoder that continues, an encoder with a decoder that
writes from its output, or an encoder that names a character (or none) for every frame of audio."""

FAMILIES: tuple[Family, ...] = get_args(Family)

Start = Literal["pad", "bos", "eos"]
"""The special token with which a decoder begins."""

SEQ2SEQ_STARTS: Mapping[str, Start] = {
    "bart": "eos",
    "blenderbot": "bos",
    "m2m_100": "eos",
    "marian": "pad",
    "mbart": "eos",
    "mt5": "pad",
    "pegasus": "pad",
    "plbart": "eos",
    "t5": "pad",
    "umt5": "pad",
    "whisper": "bos",
}
"""The encoder-decoders that can be used, and the token with which a decoder from ``config:`` begins; one that comes
trained keeps its own."""

CTC_TYPES = (
    "data2vec-audio",
    "hubert",
    "sew",
    "unispeech",
    "unispeech-sat",
    "wav2vec2",
    "wav2vec2-conformer",
)
"""The models for CTC that can be used. They take samples of audio: for frames of another kind (wav2vec2-bert, parakeet)
``tasks.data`` makes no features. WavLM and SEW-D take the weights of their layers in hand, so that these cannot be
packed."""


@dataclass(frozen=True)
class Head:
    """One way to do a task.

    Args:
        auto: transformers' class that loads such models.
        names: transformers' table from model type to class, in ``modeling_auto``.
        families: what such a model may be.
        types: the model types that can be used; None for all in the table.
        without: those of the table that cannot.
    """

    auto: str
    names: str
    families: tuple[Family, ...]
    types: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()

    def classes(self) -> dict[str, str]:
        """Model type to the name of its class."""
        from transformers.models.auto import modeling_auto

        known = getattr(modeling_auto, self.names)
        fit = set(known if self.types is None else self.types) - set(self.without)
        return {kind: name for kind, name in sorted(known.items()) if kind in fit}


HEADS: dict[Task, tuple[Head, ...]] = {
    "text-generation": (Head("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", ("decoder",)),),
    "text-classification": (
        Head(
            "AutoModelForSequenceClassification",
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            ("encoder", "decoder"),
            # They read the class off the end mark, and refuse a text that was cut before it.
            without=tuple(SEQ2SEQ_STARTS),
        ),
    ),
    "translation": (
        Head(
            "AutoModelForSeq2SeqLM",
            "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
            ("encoder-decoder",),
            tuple(kind for kind in SEQ2SEQ_STARTS if kind != "whisper"),
        ),
    ),
    "speech-recognition": (
        Head("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES", ("ctc",), CTC_TYPES),
        Head(
            "AutoModelForSpeechSeq2Seq",
            "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
            ("encoder-decoder",),
            ("whisper",),
        ),
    ),
}

_EXAMPLES: dict[Task, str] = {
    "text-generation": "llama, qwen2 or gpt2",
    "text-classification": "bert, distilbert or llama",
    "translation": "marian, t5 or bart",
    "speech-recognition": "whisper or wav2vec2",
}


def pairs() -> tuple[tuple[Task, Family], ...]:
    """Every task with every family that can do it."""
    return tuple((task, family) for task, heads in HEADS.items() for head in heads for family in head.families)


def types_for(task: Task) -> list[str]:
    """The model types that can do ``task``."""
    return sorted(kind for head in HEADS[task] for kind in head.classes())


def head_for(task: Task, model_type: str) -> Head:
    """The way in which a model type does a task.

    Raises:
        StepError: it cannot, with types that can.
    """
    for head in HEADS[task]:
        if model_type in head.classes():
            return head
    near = nearest(model_type, types_for(task))
    hint = f"; {near}" if near.startswith("did you mean") else ""
    raise StepError(f"{model_type} cannot do {task}; use for example {_EXAMPLES[task]}{hint}")


def auto_for(task: Task, model_type: str) -> Any:
    """transformers' class that loads a model of this type for ``task``.

    Raises:
        StepError: the type cannot do the task.
    """
    import transformers

    return getattr(transformers, head_for(task, model_type).auto)


def auto_name(task: Task, model_type: str) -> str:
    """The name of that class, found without transformers; of a type that cannot do the task, some class for it."""
    heads = HEADS[task]
    return next((head.auto for head in heads if head.types is None or model_type in head.types), heads[0].auto)


def task_of(architectures: Sequence[str] | None) -> Task | None:
    """What the head of a model does, from ``architectures`` in its configuration; None for a model without a head."""
    name = architectures[0] if architectures else ""
    return next((task for task, heads in HEADS.items() for head in heads if name in head.classes().values()), None)


def family_of(config: PretrainedConfig | Mapping[str, Any]) -> Family:
    """How the model works that a configuration (as an object or as config.json) describes."""
    from transformers.models.auto import modeling_auto

    fields = config if isinstance(config, Mapping) else config.to_dict()
    name = next(iter(fields.get("architectures") or ()), "")
    kind = fields["model_type"]
    if name in modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES.values() or kind in modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES:
        return "ctc"
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "decoder"
    if fields.get("is_encoder_decoder") or kind in SEQ2SEQ_STARTS:
        return "encoder-decoder"
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not fields.get("is_decoder")
    return "encoder" if masked else "decoder"
