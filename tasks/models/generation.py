"""What a model needs to write: the ids of its special tokens, in its configuration and in that of its generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from tasks.context import StepError
from tasks.models.applications import SEQ2SEQ_STARTS, head_for
from tasks.models.convert import Tokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

_FORCED = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
"""Defaults of configuration classes that speak of the vocabulary of one trained model."""

_WHISPER_START = "<|startoftranscript|>"


def token_fields(tokenizer: PreTrainedTokenizerBase, task: Task, model_type: str) -> dict[str, Any]:
    """The fields of a new configuration that follow from the tokenizer.

    Raises:
        StepError: a decoder that writes from an encoder's output has no token to begin or to end with.
    """
    fields: dict[str, Any] = {name: getattr(tokenizer, name) for name in _TOKENS[:3]}
    families = head_for(task, model_type).families
    if families == ("ctc",):
        # A recording too short for its transcript counts nothing, and one too short to be masked can be trained on.
        blank = {"pad_token_id": tokenizer.pad_token_id}
        return blank | {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "apply_spec_augment": False}
    if model_type not in SEQ2SEQ_STARTS or "encoder-decoder" not in families:
        return fields
    end = tokenizer.eos_token_id
    if end is None or end not in tokenizer("a").input_ids:
        raise StepError(
            "the tokenizer puts no end mark behind a text, and a decoder that has seen none never ends; name another "
            "one in model.tokenizer, or none to have one trained"
        )
    if fields["bos_token_id"] is None:
        fields["bos_token_id"] = end
    start = fields[f"{SEQ2SEQ_STARTS[model_type]}_token_id"]
    if _WHISPER_START in tokenizer.get_vocab():
        start = tokenizer.convert_tokens_to_ids(_WHISPER_START)
    return fields | {"decoder_start_token_id": start} | dict.fromkeys(_FORCED)


def fill_tokens(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """Give ``config`` the special tokens that it does not name, from ``fields`` as ``token_fields`` makes them."""
    for name in _TOKENS:
        if getattr(config, name, None) is None and fields.get(name) is not None:
            setattr(config, name, fields[name])


def settle(model: nn.Module, tokens: Tokens | None = None) -> None:
    """Make ``model.generate`` know the special tokens of the model's configuration where it has none of its own, and
    the mark of the language to translate into."""
    settings: Any = getattr(model, "generation_config", None)
    config: Any = model.config
    if settings is None:
        return
    language = tokens.language() if tokens is not None else None
    if language is not None:
        settings.forced_bos_token_id = language
    settings._from_model_config = False  # or transformers would read again no more than the usual settings
    for name in _TOKENS:
        if getattr(settings, name, None) is None:
            setattr(settings, name, getattr(config, name, None))


def use_prompt(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[str]:
    """Put the language and task that a trained Whisper writes with before the targets too; warnings."""
    settings: Any = getattr(model, "generation_config", None)
    if not hasattr(tokenizer, "set_prefix_tokens") or not getattr(settings, "lang_to_id", None):
        return []
    language = getattr(settings, "language", None)
    if language is None:
        return [
            "the model names no language: it finds one for each recording, and training cannot say which; write "
            "language into its generation_config.json"
        ]
    task = getattr(settings, "task", None) or "transcribe"
    tokenizer.set_prefix_tokens(language=language.strip("<|>"), task=task, predict_timestamps=False)  # type: ignore[operator]
    return []
