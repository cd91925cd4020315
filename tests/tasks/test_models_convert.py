"""Tokenizers of trained models in their fast form: the same ids as the tokenizer that the model came with."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    Wav2Vec2CTCTokenizer,
)

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from tasks.context import StepError
from tasks.data import encode
from tasks.models import load, load_tokenizer
from tasks.models.convert import TARGET, own_tokens
from tasks.models.origin import import_model
from tests.support import context, tiny_config, tiny_model, tiny_pairs, tiny_text

ODD = (
    "",
    "a",
    " ",
    "  leading and  double  spaces ",
    "tabs\tand\nlines",
    "naïve 東京 🙂 ok",
    "ﬁ ligature ½ ²",
    "A\u0301 combining, \u200bzero width",
    "— “quotes” …",
    "x" * 300,
    "</s> inside and <unk> too",
)
GERMAN = (
    "ein kleiner Hund läuft über die Wiese",
    "zwei schöne Vögel fliegen über dem See",
    "der große Fuß und die Tür",
)


def pieces(file: Path, texts: Iterable[str], kind: str = "unigram", **ids: Any) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(texts) * 5),
        model_prefix=str(file.with_suffix("")),
        vocab_size=150,
        model_type=kind,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    file.with_suffix(".model").rename(file)
    file.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.fixture(scope="module")
def opus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as OPUS-MT's are: two sentencepiece models, one vocabulary, random weights."""
    folder = tmp_path_factory.mktemp("opus")
    sides = (("source", tiny_text(20)), ("target", list(GERMAN)))
    found = [pieces(folder / f"{side}.spm", texts) for side, texts in sides]
    names = {spm.id_to_piece(number) for spm in found for number in range(spm.get_piece_size())}
    order = ["</s>", "<unk>", *sorted(names - {"<s>", "</s>", "<unk>"}), ">>de<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(order)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    pad = len(order) - 1
    ids = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0, "vocab_size": pad + 1}
    write_model(folder, tiny_config("marian") | ids)
    return folder


def write_model(folder: Path, fields: dict[str, Any]) -> None:
    """Random weights as transformers itself saves them."""
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(folder)


def in_a_row(text: str, tokenizer: Any, spm: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether characters stand together that this side's model does not know, and the vocabulary knows one of them."""
    letters = unicodedata.normalize("NFKC", text)
    unknown = {letter for letter in letters if spm.piece_to_id(letter) == spm.unk_id()}
    return any({*pair} <= unknown and not {*pair}.isdisjoint(tokenizer.encoder) for pair in pairwise(letters))


def test_marian_pieces_have_the_ids_of_marians_tokenizer(opus):
    slow, fast = MarianTokenizer.from_pretrained(opus), own_tokens(opus)
    assert fast.target is not None
    compared = 0
    for text in [*tiny_text(20), *GERMAN, *ODD, ">>de<< a small text", ">>de<<the fox"]:
        if not in_a_row(text, slow, slow.spm_source):
            compared += 1
            assert fast.tokenizer(text).input_ids == slow(text).input_ids, text
        target = slow(text_target=text).input_ids
        if not in_a_row(text, slow, slow.spm_target):
            compared += 1
            assert fast.target.encode(text).ids == target, text
        if slow.unk_token_id not in target:
            decoded = slow.decode(target, skip_special_tokens=True, use_source_tokenizer=False)
            assert fast.tokenizer.decode(target, skip_special_tokens=True) == decoded
            compared += 1
    assert compared > 50
    assert fast.tokenizer("ä").input_ids == slow("ä").input_ids != [slow.unk_token_id, slow.eos_token_id]


def test_foreign_characters_in_a_row_keep_their_ids(opus):
    slow, fast = MarianTokenizer.from_pretrained(opus), own_tokens(opus).tokenizer
    assert slow.convert_ids_to_tokens(slow("süße").input_ids)[-3:] == ["<unk>", "e", "</s>"]
    assert fast.convert_ids_to_tokens(fast("süße").input_ids)[-4:] == ["ü", "ß", "e", "</s>"]


def test_a_marian_folder_is_imported_and_encodes_each_side_as_its_own(tmp_path, opus):
    slow = MarianTokenizer.from_pretrained(opus)
    rows = [{"source": source, "target": target} for source, target in zip(tiny_text(3), GERMAN, strict=True)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(train=str(tmp_path / "data.jsonl"), eval=str(tmp_path / "data.jsonl"), max_length=64)
    model = ModelSpec(source=str(opus))
    ctx = context(tmp_path, "translation", data, model)
    result = import_model(spec=BaselineSpec(model=model), ctx=ctx)
    assert result.warnings == ()
    encoded = encode(data, "eval", "translation", ctx.out, ctx.store)
    assert encoded.target_ids is not None
    assert encoded.target_mask is not None
    for number, row in enumerate(rows):
        ids = encoded.input_ids[number][encoded.attention_mask[number] == 1].tolist()
        assert ids == slow(row["source"], truncation=True, max_length=64).input_ids
        written = encoded.target_ids[number][encoded.target_mask[number] == 1].tolist()
        assert written == slow(text_target=row["target"]).input_ids
    again = own_tokens(ctx.out)
    assert again.target is not None
    assert again.target.to_str() == Tokenizer.from_file(str(ctx.out / TARGET)).to_str()
    built: Any = load(ctx.out)
    assert built.generation_config.decoder_start_token_id == built.config.pad_token_id == slow.pad_token_id


def spoil_vocabulary(folder: Path, change) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    change(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenizer_config.json").write_text('{"separate_vocabs": true}'), "a vocabulary for each side"),
        (lambda f: pieces(f / "target.spm", list(GERMAN), "bpe"), "target.spm is no unigram model"),
        (lambda f: (f / "source.spm").write_bytes(b"\xff\xff\xff"), "source.spm is missing or damaged"),
        (lambda f: (f / "target.spm").unlink(), "target.spm is missing or damaged"),
        (lambda f: spoil_vocabulary(f, lambda v: v.pop("<unk>")), "vocab.json has no <unk>"),
        (lambda f: spoil_vocabulary(f, lambda v: v.update(far=10_000)), "from 0 without gaps"),
        (lambda f: (f / "vocab.json").write_text("[1]"), "no JSON object"),
    ],
)
def test_marian_folders_that_cannot_be_converted_are_told(tmp_path, opus, spoil, message):
    folder = shutil.copytree(opus, tmp_path / "opus")
    spoil(folder)
    with pytest.raises(StepError, match=message):
        own_tokens(folder)


def test_t5s_pieces_have_the_ids_of_sentencepiece(tmp_path):
    spm = pieces(tmp_path / "spiece.model", tiny_text(20), pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("t5")))
    tokens = own_tokens(tmp_path)
    assert tokens.target is None
    tokens.save(tmp_path / "out")
    fast = load_tokenizer(tmp_path / "out")
    for text in [*tiny_text(20), "naïve 東京 ok", "a"]:
        assert fast(text).input_ids == [*spm.encode(text), spm.eos_id()]


CHARACTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]


def ctc(folder: Path, tokens: Any, **settings: Any) -> Path:
    """A folder as wav2vec2's are."""
    folder.mkdir(exist_ok=True)
    numbered = tokens if isinstance(tokens, dict) else {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbered))
    settings = {"tokenizer_class": "Wav2Vec2CTCTokenizer", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("tokens", "settings"),
    [
        (CHARACTERS, {}),
        ([*"abcdefghijklmnopqrstuvwxyzäöüß", "|", "[UNK]", "[PAD]"], {"unk_token": "[UNK]", "pad_token": "[PAD]"}),
        (["<pad>", "<unk>", " ", *"abcdefghijklmno"], {"word_delimiter_token": " "}),
        (["<pad>", "<unk>", "|", *"ABCDE"], {"do_lower_case": True}),
        ({"deu": {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}}, {"target_lang": "deu"}),
    ],
)
def test_characters_have_the_ids_of_wav2vec2s_tokenizer(tmp_path, tokens, settings):
    folder = ctc(tmp_path / "model", tokens, **settings)
    slow = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    fast = own_tokens(folder).tokenizer
    known = set(fast.get_vocab())
    case = str.upper if "A" in known and not settings.get("do_lower_case") else str.lower
    texts = [text.replace("ß", "s") for text in (*tiny_text(4), *GERMAN, "a  b", " c ", "abba")]  # ß has no capital
    same_case = [case(text) for text in texts]
    for text in [*same_case, "1 2", "", "東京"]:
        assert fast(text).input_ids == slow(text).input_ids, text
        if " " not in known:  # the original loses the spaces then
            plain: Any = slow.decode(slow(text).input_ids, group_tokens=False, skip_special_tokens=True)
            plain = plain.upper() if settings.get("do_lower_case") else plain
            assert fast.decode(slow(text).input_ids, skip_special_tokens=True) == plain
    assert (fast.pad_token_id, fast.unk_token_id) == (slow.pad_token_id, slow.unk_token_id)


def test_the_other_case_is_taken_where_a_vocabulary_has_one_only(tmp_path):
    upper = own_tokens(ctc(tmp_path / "upper", CHARACTERS)).tokenizer
    assert upper("it's a Fox").input_ids == upper("IT'S A FOX").input_ids
    assert upper.unk_token_id not in upper("it's a Fox").input_ids
    both = own_tokens(ctc(tmp_path / "both", ["<pad>", "<unk>", "|", *"aA"])).tokenizer
    assert both.convert_ids_to_tokens(both("aA").input_ids) == ["a", "A"]


def test_nothing_and_spaces_alone_can_be_decoded(tmp_path):
    fast = own_tokens(ctc(tmp_path / "model", CHARACTERS)).tokenizer
    assert [fast.decode(ids) for ids in ([], [4], [4, 4], [4, 5, 4])] == ["", "", "", "A"]


def test_tokens_of_several_characters_are_one(tmp_path):
    folder = ctc(tmp_path / "model", [*CHARACTERS, "CH"])
    slow, fast = Wav2Vec2CTCTokenizer.from_pretrained(folder), own_tokens(folder).tokenizer
    assert fast("MACHT").input_ids == slow("MACHT").input_ids
    assert fast.convert_ids_to_tokens(fast("MACHT").input_ids) == ["M", "A", "CH", "T"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"deu": {"a": 0}, "fra": {"a": 0}}, "several languages; name one as target_lang"),
        (["<pad>", "|", "a"], "no padding or no unknown token"),
    ],
)
def test_character_vocabularies_that_do_not_serve_are_told(tmp_path, tokens, message):
    with pytest.raises(StepError, match=message):
        own_tokens(ctc(tmp_path / "model", tokens))


def test_a_wav2vec2_folder_is_imported_with_its_characters(tmp_path, speech_data):
    folder = tiny_model(tmp_path / "model", "wav2vec2", "speech-recognition", vocab_size=len(CHARACTERS))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    ctc(folder, CHARACTERS)
    model = ModelSpec(source=str(folder))
    ctx = context(tmp_path / "run", "speech-recognition", speech_data, model)
    result = import_model(spec=BaselineSpec(model=model), ctx=ctx)
    assert result.warnings == ()
    encoded = encode(speech_data, "eval", "speech-recognition", ctx.out, ctx.store)
    slow = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    assert encoded.target_ids is not None
    assert encoded.target_mask is not None
    for number, text in enumerate(encoded.references):
        written = encoded.target_ids[number][encoded.target_mask[number] == 1].tolist()
        assert written == slow(text.upper()).input_ids


@pytest.fixture
def multilingual(tmp_path):
    words = {f"▁{word}" for row in tiny_pairs(20) for text in row.values() for word in text.split()}
    letters = set("".join(chain.from_iterable(row.values() for row in tiny_pairs(20)))) | {"▁"}
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    scores += [(word, -3.0) for word in sorted(words)] + [(letter, -8.0) for letter in sorted(letters - {" "})]

    def make(kind: str, **languages: str) -> Path:
        maker = {"mbart": MBartTokenizer, "mbart50": MBart50Tokenizer}[kind]
        tokenizer: Any = maker(vocab=scores, **languages)
        ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
        config = tiny_config("bart", model_type="mbart", vocab_size=len(tokenizer)) | ids
        folder = tmp_path / kind
        write_model(folder, config)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_languages_stand_before_sources_and_targets(tmp_path, multilingual, pair_data):
    folder = multilingual("mbart50", src_lang="en_XX", tgt_lang="de_DE")
    model = ModelSpec(source=str(folder))
    ctx = context(tmp_path / "run", "translation", pair_data, model)
    import_model(spec=BaselineSpec(model=model), ctx=ctx)
    own: Any = load_tokenizer(folder)
    encoded = encode(pair_data, "eval", "translation", ctx.out, ctx.store)
    assert encoded.target_ids is not None
    (source, target), reference = (own.convert_tokens_to_ids(["en_XX", "de_DE"]), encoded.references[0])
    assert encoded.input_ids[0, 0] == source
    expected = own(text_target=reference).input_ids
    assert encoded.target_ids[0, : len(expected)].tolist() == expected
    assert (expected[0], expected[-1]) == (target, own.eos_token_id)
    built: Any = load(ctx.out)
    assert built.generation_config.forced_bos_token_id == target
    ids = torch.from_numpy(encoded.input_ids[:1]).long()
    assert built.generate(input_ids=ids, num_beams=1, do_sample=False, max_new_tokens=3)[0, 1] == target
    assert own_tokens(ctx.out).language() == target


def test_languages_that_are_missing_or_stand_elsewhere_are_told(multilingual):
    with pytest.raises(StepError, match="names no language to translate into; write src_lang and tgt_lang"):
        own_tokens(multilingual("mbart50", src_lang="en_XX"))
    with pytest.raises(StepError, match="marks the language behind a text"):
        own_tokens(multilingual("mbart", src_lang="en_XX", tgt_lang="de_DE"))


def trained_whisper(folder: Path, **settings: Any) -> Path:
    """A folder as OpenAI's multilingual Whisper: its special tokens, and in its generation settings their ids."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForSpeechSeq2Seq, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    letters = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer: Any = WhisperTokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    marks = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    special = [f"<|{name}|>" for name in ("startoftranscript", *LANGUAGES, *marks)]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.set_prefix_tokens(predict_timestamps=False)
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    start, end = ids["<|startoftranscript|>"], tokenizer.eos_token_id
    config = tiny_config("whisper", vocab_size=len(tokenizer)) | {"decoder_start_token_id": start}
    config |= {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "begin_suppress_tokens": None}
    torch.manual_seed(0)
    model: Any = AutoModelForSpeechSeq2Seq.from_config(AutoConfig.for_model(**config))
    own: dict[str, Any] = {
        "is_multilingual": True,
        "lang_to_id": {f"<|{name}|>": ids[f"<|{name}|>"] for name in LANGUAGES},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
    }
    model.generation_config._from_model_config = False  # else transformers reads none of them again
    for name, value in (own | settings).items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_trained_whisper_keeps_its_language_and_writes_it_before_targets(tmp_path, speech_data):
    folder = trained_whisper(tmp_path / "model", language="german", task="transcribe")
    model = ModelSpec(source=str(folder))
    ctx = context(tmp_path / "run", "speech-recognition", speech_data, model)
    result = import_model(spec=BaselineSpec(model=model), ctx=ctx)
    assert result.warnings == ()
    built: Any = load(ctx.out)
    assert (built.generation_config.language, built.generation_config.task) == ("german", "transcribe")
    encoded = encode(speech_data, "eval", "speech-recognition", ctx.out, ctx.store)
    assert encoded.target_ids is not None
    tokens = load_tokenizer(ctx.out).convert_ids_to_tokens(encoded.target_ids[0].tolist())
    assert tokens[:3] == ["<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    frames = torch.randn(1, 16, 100, generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[built.config.decoder_start_token_id, *encoded.target_ids[0, :3].tolist()]])
    with torch.no_grad():
        first = built(input_features=frames, decoder_input_ids=prompt).logits[0, -1].argmax()
    made = built.generate(input_features=frames, num_beams=1, do_sample=False, max_new_tokens=1)
    assert made[0, -1] == first


def test_a_whisper_that_names_no_language_is_told(tmp_path, speech_data):
    folder = trained_whisper(tmp_path / "model")
    model = ModelSpec(source=str(folder))
    ctx = context(tmp_path / "run", "speech-recognition", speech_data, model)
    (warning,) = import_model(spec=BaselineSpec(model=model), ctx=ctx).warnings
    assert "names no language" in warning
    tokens = load_tokenizer(ctx.out)
    assert tokens.convert_ids_to_tokens(tokens("a").input_ids) == [
        "<|startoftranscript|>",
        "<|notimestamps|>",
        "a",
        "<|endoftext|>",
    ]
