"""Tokenizers for models from ``config:``, trained on the training data: byte-level BPE, or characters for CTC."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from specs.schema.base import Task
from tasks.context import StepError
from tasks.models.applications import SEQ2SEQ_STARTS, head_for

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

Style = Literal["decoder", "encoder", "encoder-decoder", "ctc"]

_TEXT_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

SPECIAL_TOKENS: dict[Style, dict[str, str]] = {
    "decoder": _TEXT_TOKENS,
    "encoder": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "encoder-decoder": _TEXT_TOKENS,
    "ctc": {"pad_token": "<pad>", "unk_token": "<unk>"},
}
"""The special tokens of each style in the order of their ids, from 0. CTC's padding token is its blank."""

ABOUT: dict[Style, str] = {
    "decoder": "byte-level BPE",
    "encoder": "byte-level BPE",
    "encoder-decoder": "byte-level BPE",
    "ctc": "characters",
}

BYTES = 256
DEFAULT_SIZE = 4096
DELIMITER = "|"
"""Stands for the space between words in the vocabulary of CTC."""


def style_of(model_type: str, task: Task) -> Style:
    """What a tokenizer for a model type and task is like.

    ``ctc`` and ``encoder-decoder`` follow from the model type, ``encoder`` where a type that is trained with masks
    (BERT and its kin) classifies; else ``decoder``.

    Raises:
        StepError: the type cannot do the task.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if head_for(task, model_type).families == ("ctc",):
        return "ctc"
    if task != "text-generation" and model_type in SEQ2SEQ_STARTS:
        return "encoder-decoder"
    return "encoder" if task == "text-classification" and model_type in MASKED else "decoder"


def least_size(style: Style) -> int:
    """The smallest vocabulary that a tokenizer of this style can have."""
    return len(SPECIAL_TOKENS[style]) + (2 if style == "ctc" else BYTES)


def train_tokenizer(texts: Iterable[str], size: int, style: Style, out: Path, max_length: int) -> int:
    """Train a tokenizer and write it into the folder ``out``, where ``AutoTokenizer`` loads it.

    Byte-level BPE has every byte in its vocabulary, so that no text is unknown to it. An ``encoder``'s puts ``[CLS]``
    before a text and ``[SEP]`` behind it, an ``encoder-decoder``'s puts ``</s>`` behind it, a ``decoder``'s adds
    nothing. ``ctc``'s has the characters of the texts, with ``|`` for the space between words.

    Args:
        texts: the training texts; of translation sources and targets.
        size: entries of the vocabulary at most, special tokens and the 256 bytes included.
        style: which special tokens there are, and where they stand.
        out: an existing folder.
        max_length: tokens that the model takes at most; recorded.

    Returns:
        The entries of the vocabulary.

    Raises:
        StepError: ``size`` is too small.
    """
    from transformers import PreTrainedTokenizerFast

    if size < least_size(style):
        what = "two characters" if style == "ctc" else f"{BYTES} bytes"
        raise StepError(
            f"model.config.vocab_size {size} has no room for {what} and {len(SPECIAL_TOKENS[style])} special tokens; "
            f"write {least_size(style)} or more, or name a tokenizer in model.tokenizer"
        )
    core = characters(_most_frequent(texts, size), folded=True) if style == "ctc" else _byte_pairs(texts, size, style)
    PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=max_length, **SPECIAL_TOKENS[style]
    ).save_pretrained(out)
    return core.get_vocab_size(with_added_tokens=True)


def characters(
    vocabulary: Mapping[str, int], *, folded: bool, unknown: str = "<unk>", delimiter: str = DELIMITER
) -> Tokenizer:
    """A tokenizer whose tokens are characters, as CTC has them.

    Its decoder joins what it is given, as it is: repeats and blanks are taken out before, by whoever knows the frames.

    Args:
        vocabulary: token to id.
        folded: whether texts are brought to NFC, and every stretch of white space becomes one delimiter; else each
            space does.
        unknown: the token for characters that are not in the vocabulary.
        delimiter: the token for the space between words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    core = Tokenizer(models.BPE(dict(vocabulary), [], unk_token=unknown))
    if folded:
        steps = [normalizers.NFC(), normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), delimiter)]
    else:
        steps = [normalizers.Replace(" ", delimiter)]
    core.normalizer = normalizers.Sequence([*steps, *_cases(vocabulary)])
    outer = decoders.Replace(Regex("^ +| +$"), "")
    core.decoder = decoders.Sequence([decoders.Replace(delimiter, " "), decoders.Fuse(), outer])
    return core


def _cases(vocabulary: Mapping[str, int]) -> list[Normalizer]:
    """Letters whose other case alone is in the vocabulary become that, as ``a`` where there is only ``A``."""
    from tokenizers import normalizers

    letters = [token for token in vocabulary if len(token) == 1]
    other = {form: letter for letter in letters for form in (letter.lower(), letter.upper()) if len(form) == 1}
    return [normalizers.Replace(form, letter) for form, letter in other.items() if form not in vocabulary]


def _most_frequent(texts: Iterable[str], size: int) -> dict[str, int]:
    """Special tokens, the delimiter and the most frequent characters, in the order of their code points."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update("".join(unicodedata.normalize("NFC", text).split()))
    del counts[DELIMITER]
    first = [*SPECIAL_TOKENS["ctc"].values(), DELIMITER]
    kept = sorted(counts, key=lambda character: (-counts[character], character))[: size - len(first)]
    return {token: number for number, token in enumerate([*first, *sorted(kept)])}


def _byte_pairs(texts: Iterable[str], size: int, style: Style) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = SPECIAL_TOKENS[style]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    around: dict[Style, tuple[str, str]] = {
        "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        "encoder-decoder": ("$A </s>", "$A </s> $B:1 </s>:1"),
    }
    if style in around:
        single, pair = around[style]
        used = [(token, core.token_to_id(token)) for token in special.values() if token in single]
        core.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
    return core
