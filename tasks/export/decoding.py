"""How a model begins, goes on and ends when it writes greedily, as the runtime reads it from ``config.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.context import StepError
from tasks.export.names import DECODER_IDS

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = ("pad_token_id", "bos_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id")

_LISTS = ("suppress_tokens", "begin_suppress_tokens")

_BEYOND = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "sequence_bias": None,
}
"""Settings of ``generate`` that change what is written greedily and that the runtime does not know, with the values at
which they do nothing."""


def decoding(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The fields of ``config.json`` that say how the decoder of ``model`` writes, and warnings.

    Args:
        model: an encoder-decoder.
        inputs: one example of what it reads.

    Raises:
        StepError: the model does not say how the decoder begins or ends.
    """
    settings = model.generation_config
    found = {name: getattr(settings, name, None) for name in (*_KEPT, *_LISTS)}
    if found["eos_token_id"] is None:
        raise StepError(
            "the model names no eos_token_id, so that nothing ends what it writes; set it in its config.json"
        )
    begin = _first_tokens(model, inputs)
    found["decoder_start_token_id"] = begin[0]
    found["forced_decoder_ids"] = [[place, token] for place, token in enumerate(begin[1:], 1)]
    if found["pad_token_id"] is None:
        found["pad_token_id"] = begin[0]
    bad = getattr(settings, "bad_words_ids", None) or []
    found["suppress_tokens"] = sorted({*(found["suppress_tokens"] or ()), *(word[0] for word in bad if len(word) == 1)})
    warnings = [
        f"generation_config.json sets {name}: {getattr(settings, name)}, which the file's own writing ignores"
        for name, nothing in _BEYOND.items()
        if getattr(settings, name, None) not in (None, nothing)
    ]
    if any(len(word) > 1 for word in bad):
        warnings.append("generation_config.json sets bad_words_ids of several tokens, which the file's writing ignores")
    return {name: value for name, value in found.items() if value not in (None, [])}, warnings


def _first_tokens(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """What the decoder is given before it writes its first token, seen in a run of ``generate``."""
    import torch

    seen: list[list[int]] = []

    def look(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        if arguments.get(DECODER_IDS) is not None:
            seen.append(arguments[DECODER_IDS][0].tolist())

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.inference_mode():
            model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=1, use_cache=True)
    except (ValueError, RuntimeError, IndexError) as error:
        raise StepError(f"the model cannot write: {str(error).splitlines()[0]}") from error
    finally:
        hook.remove()
    return seen[-1]
