"""Tokenizers that come with a model, brought into the fast form that everything else reads: ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.context import StepError
from tasks.models.load import load_tokenizer
from tasks.models.tokenizer import DELIMITER, characters

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TARGET = "target_tokenizer.json"
"""How targets are tokenised, where that differs from sources; ``tokenizer.json`` decodes both."""

_LANGUAGES = "set_tgt_lang_special_tokens"
"""What tokenizers have that are told the languages."""

_UNIGRAM = 1
_UNKNOWN, _CONTROL = 2, 3

_PENALTY = 10.0
"""How much less than the least likely piece an unknown character scores, in sentencepiece."""


@dataclass(frozen=True)
class Tokens:
    """A model's tokenizer, and the one for targets where they are tokenised in another way than sources."""

    tokenizer: PreTrainedTokenizerBase
    target: Tokenizer | None = None

    def language(self) -> int | None:
        """The token of the language to translate into, which stands before every target; None where there is none."""
        if not hasattr(self.tokenizer, _LANGUAGES):
            return None
        return int(self.tokenizer.convert_tokens_to_ids(self.tokenizer.tgt_lang))  # type: ignore

    def save(self, out: Path) -> None:
        """Write it into the folder ``out``, where ``AutoTokenizer`` loads it."""
        self.tokenizer.save_pretrained(out)
        if self.target is not None:
            self.target.save(str(out / TARGET))


def own_tokens(folder: Path) -> Tokens:
    """The tokenizer in ``folder``, converted where it has no fast form.

    Raises:
        StepError: there is none, it cannot be converted, or it names no languages to translate between.
    """
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        if (folder / "source.spm").is_file():
            return _marian(folder)
        if (folder / "vocab.json").is_file() and not (folder / "merges.txt").is_file():
            return Tokens(_ctc(folder))
    tokenizer = load_tokenizer(folder)
    if hasattr(tokenizer, _LANGUAGES):
        return _with_languages(tokenizer, folder)
    target = Tokenizer.from_file(str(folder / TARGET)) if (folder / TARGET).is_file() else None
    return Tokens(tokenizer, target)


def _with_languages(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Tokens:
    """Multilingual tokenizers (mBART-50, NLLB) mark a source and a target with their languages."""
    from tokenizers import Tokenizer

    switch: Any = tokenizer
    if not switch.tgt_lang:
        raise StepError(
            f"{folder}: the tokenizer names no language to translate into; write src_lang and tgt_lang into its "
            "tokenizer_config.json"
        )
    switch._switch_to_target_mode()
    target = Tokenizer.from_str(switch.backend_tokenizer.to_str())
    switch._switch_to_input_mode()
    tokens = Tokens(tokenizer, target)
    if target.encode("a").ids[:1] != [tokens.language()]:
        raise StepError(
            f"{folder}: {type(tokenizer).__name__} marks the language behind a text, where no model here writes it; "
            "use a model that marks it before, as mBART-50 and NLLB do"
        )
    return tokens


def _ctc(folder: Path) -> PreTrainedTokenizerBase:
    """The tokens of Wav2Vec2CTCTokenizer: ``vocab.json`` has the characters.

    Letters that the vocabulary has only in the other case take it, where the original knows none of them.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    vocabulary = _read(folder / "vocab.json")
    settings = _settings(folder)
    language = settings.get("target_lang")
    if language is not None:
        vocabulary = vocabulary.get(language)
    if not vocabulary or not all(isinstance(number, int) for number in vocabulary.values()):
        raise StepError(
            f"{folder / 'vocab.json'} has a vocabulary for each of several languages; name one as target_lang in "
            "tokenizer_config.json"
        )
    defaults = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    special = {name: _content(settings.get(name, token)) for name, token in defaults.items()}
    special = {name: token for name, token in special.items() if token in vocabulary}
    if not {"pad_token", "unk_token"} <= set(special):
        raise StepError(f"{folder / 'vocab.json'} has no padding or no unknown token; CTC needs both")
    delimiter = settings.get("word_delimiter_token", DELIMITER)
    core = characters(vocabulary, folded=False, unknown=special["unk_token"], delimiter=delimiter)
    several = [token for token in vocabulary if len(token) > 1 and token not in special.values()]
    core.add_tokens([AddedToken(token, lstrip=True, rstrip=True, normalized=False) for token in several])
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def _marian(folder: Path) -> Tokens:
    """The tokens of MarianTokenizer: pieces of ``source.spm`` and ``target.spm``, numbered by ``vocab.json``.

    Two differences: a piece that ``vocab.json`` lacks is spelt by shorter ones, where the original writes it as
    unknown; and of several characters in a row that this language's model does not know, those that the other's knows
    keep their numbers, where the original writes one unknown for them all.
    """
    from transformers import PreTrainedTokenizerFast

    settings = _settings(folder)
    if settings.get("separate_vocabs"):
        raise StepError(
            f"{folder} has a vocabulary for each side, which has no fast form; use a model with one for both"
        )
    vocabulary = _read(folder / "vocab.json")
    defaults = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special = {name: _content(settings.get(name, token)) for name, token in defaults.items()}
    lacking = [token for token in special.values() if token not in vocabulary]
    if lacking:
        raise StepError(f"{folder / 'vocab.json'} has no {', '.join(lacking)}; fetch the model again")
    source, target = (_pieces(folder / f"{side}.spm", vocabulary, special) for side in ("source", "target"))
    length = settings.get("model_max_length", 512)
    return Tokens(PreTrainedTokenizerFast(tokenizer_object=source, model_max_length=length, **special), target)


def _pieces(file: Path, vocabulary: Mapping[str, int], special: Mapping[str, str]) -> Tokenizer:
    """A sentencepiece model whose pieces have the numbers of ``vocabulary``.

    What the vocabulary has and the model has not (the other language's) matches where it is one character, at the price
    of an unknown one. The rest stands there behind a space, which no text has once it is normalised; the decoder takes
    the space off.
    """
    from sentencepiece import sentencepiece_model_pb2 as formats
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    proto = formats.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own kinds of errors
        raise StepError(f"{file} is missing or damaged ({error}); fetch the model again") from error
    if proto.trainer_spec.model_type != _UNIGRAM or proto.trainer_spec.byte_fallback:
        raise StepError(f"{file} is no unigram model, and others have no fast form; use a model whose is")
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type not in (_UNKNOWN, _CONTROL)}
    lowest = min(scores.values())
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in ordered] != list(range(len(ordered))):
        raise StepError(f"{file.with_name('vocab.json')} does not number its tokens from 0 without gaps")
    entries = [(token, scores.get(token, lowest - _PENALTY)) for token in ordered]
    entries = [(token if token in scores or len(token) == 1 else f" {token}", score) for token, score in entries]
    codes = [token for token in ordered if token.startswith(">>") and token.endswith("<<")]
    for token in (*special.values(), *codes):
        entries[vocabulary[token]] = (token, lowest)
    core = Tokenizer(models.Unigram(entries, unk_id=vocabulary[special["unk_token"]], byte_fallback=False))
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special.values()])
    core.add_tokens([AddedToken(code, normalized=False) for code in codes])
    spaces = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    core.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), *spaces] if charsmap else spaces)
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence([decoders.Replace(Regex("^ "), ""), decoders.Metaspace(prepend_scheme="always")])
    end = special["eos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, vocabulary[end])]
    )
    return core


def _settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= _read(folder / name)
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StepError(f"{file} is missing or is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StepError(f"{file} is no JSON object; fetch the model again")
    return content


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
