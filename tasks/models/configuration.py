"""A transformers configuration from the ``config:`` of a spec, and what a configuration says about a model's limits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec
from specs.schema.suggest import nearest
from tasks.context import StepError
from tasks.models.applications import auto_for, family_of, head_for, types_for
from tasks.models.features import audio_limit

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

_NOT_TO_WRITE = {"self", "transformers_version", "architectures", "return_dict", "id2label", "label2id", "dtype"}
"""Fields that follow from the task and the data; or that a configuration is given by transformers itself."""


def build_config(fields: Mapping[str, Any], task: Task, **derived: Any) -> PretrainedConfig:
    """The configuration that ``model.config`` describes.

    Args:
        fields: as the spec has them, ``model_type`` among them.
        task: what the model is to do.
        derived: what follows from the data and the tokenizer; what the spec says itself has precedence.

    Raises:
        StepError: the model type or a field is unknown, a value is unfit, or the type cannot do the task.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = fields["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise StepError(f"model.config.model_type {model_type!r} is unknown; {nearest(model_type, types_for(task))}")
    try:
        head_for(task, model_type)
    except StepError as error:
        raise StepError(f"model.config.model_type {error}") from None
    known = known_fields(CONFIG_MAPPING[model_type])
    for name in fields:
        if name not in known and name != "model_type":
            raise StepError(f"model.config.{name} is no field of {model_type}; {nearest(name, sorted(known))}")
    given = {name: value for name, value in fields.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(model_type, **{**derived, **given})
    except Exception as error:  # every configuration class checks in its own way
        reason = " ".join(str(error).split())
        raise StepError(f"model.config: {reason}; correct the value") from error


def build_model(config: PretrainedConfig, task: Task) -> nn.Module:
    """A model as ``config`` describes it, with the task's head and random weights from torch's generator.

    Raises:
        StepError: the values do not go together.
    """
    try:
        return auto_for(task, config.model_type).from_config(config, trust_remote_code=False)
    except LookupError as error:
        raise StepError(f"model.config cannot be built: it knows no {error}; correct the value") from error
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError, AttributeError, AssertionError) as error:
        raise StepError(f"model.config cannot be built: {' '.join(str(error).split())}") from error


def known_fields(config_class: type[PretrainedConfig]) -> set[str]:
    """The names that a configuration of this class may have in a spec."""
    parameters = set(inspect.signature(config_class.__init__).parameters)
    return (parameters | set(config_class.attribute_map)) - _NOT_TO_WRITE


def check_causal(config: PretrainedConfig, source: str) -> None:
    """Refuse an encoder for text-generation: its tokens see what comes after them, and a perplexity means nothing.

    Raises:
        StepError: the model is BERT or of its kin, without ``is_decoder``.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    # The causal forms of sequence-to-sequence models (BART) turn themselves into decoders.
    decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if config.model_type in MASKED and not decoder:
        raise StepError(
            f"{source}: {config.model_type} is an encoder and cannot do text-generation; use a decoder, for example "
            "llama or gpt2"
        )


def check_length(config: PretrainedConfig, data: DataSpec, from_config: bool) -> None:
    """Refuse examples that the model has no positions for.

    Raises:
        StepError: the text, the translation, the transcript or the audio may be longer than the model takes.
    """
    asked = {"max_length": data.max_length}
    if is_speech(config):
        limits = {"max_length": target_positions(config)}
    elif family_of(config) == "encoder-decoder":
        limits = {"max_length": positions(config), "max_target_length": target_positions(config)}
        asked["max_target_length"] = data.max_target_length or data.max_length
    else:
        limits = {"max_length": positions(config)}
    for name, limit in limits.items():
        if limit is not None and asked[name] > limit:
            field = "max_target_positions" if is_speech(config) else "max_position_embeddings"
            remedy = f" or raise model.config.{field}" if from_config else ""
            raise StepError(
                f"data.{name} {asked[name]} exceeds the {limit} positions of the model; lower data.{name}{remedy}"
            )
    heard = audio_limit(config)
    if heard is not None and data.max_duration > heard:
        remedy = " or raise model.config.max_source_positions" if from_config else ""
        raise StepError(
            f"data.max_duration {data.max_duration:g} s exceeds the {heard:g} s that the model hears at once; lower "
            f"data.max_duration{remedy}"
        )


def is_speech(config: PretrainedConfig) -> bool:
    """Whether the model's input is audio."""
    return config.model_type in types_for("speech-recognition")


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens of text the model takes as its input; None where it sets no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # RoBERTa and its kin count positions from the one after the padding token.
    shifted = config.model_type in {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}
    return limit - ((config.pad_token_id or 0) + 1) if shifted else limit


def target_positions(config: PretrainedConfig) -> int | None:
    """How many tokens the decoder of an encoder-decoder writes at most; None where there is no limit."""
    limit = getattr(config, "max_target_positions", None)
    return limit if isinstance(limit, int) and limit > 0 else positions(config)
