"""Tokens that the data never uses go: the text is encoded as before, and the model gives what it gave."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from specs.schema.steps.finetune import TrainingSpec
from specs.schema.steps.prune import PruneSpec
from tasks.compress import pieces, vocabulary
from tasks.compress.prune import prune
from tasks.context import StepError
from tasks.data import encode
from tasks.models import load, load_tokenizer
from tasks.models.layout import tied_weights
from tests.support import TASKS_OF, as_artifact, context, tiny_model, tiny_text
from tests.tasks.test_models_writers import generated
from tests.tasks.test_models_writers import inputs as spoken

TEXTS = tiny_text()
SPEC = PruneSpec(uses="prune", id="v", method="vocabulary")


def cut_tokenizer(core: Tokenizer, texts: list[str]) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer with what ``texts`` need alone, and the new number of each id."""
    content = json.loads(core.to_str())
    used = {number for text in texts for number in core.encode(text).ids}
    kept = vocabulary.plan({"tokenizer.json": content}, used, (), core.get_vocab_size())
    numbers = {old: new for new, old in enumerate(kept)}
    return Tokenizer.from_str(json.dumps(pieces.smaller(content, numbers))), numbers


def byte_level(**options: Any) -> Tokenizer:
    core = Tokenizer(models.BPE(**options))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return core


def word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=["[UNK]", "[SEP]"]))
    core.post_processor = processors.BertProcessing(("[SEP]", 1), ("[UNK]", 0))
    return core


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=140, special_tokens=["<pad>", "<unk>"], unk_token="<unk>")
    )
    return core


KINDS = {"bytes": byte_level, "word pieces": word_piece, "unigram": unigram}


@pytest.fixture(scope="module")
def cores():
    return {name: made() for name, made in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(picked=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4))
def test_what_was_seen_is_encoded_as_before(cores, kind, picked):
    core = cores[kind]
    small, numbers = cut_tokenizer(core, picked)
    assert small.get_vocab_size() <= core.get_vocab_size()
    for text in [*picked, *" ".join(picked).split()]:
        found = small.encode(text)
        if text in picked:
            assert found.ids == [numbers[number] for number in core.encode(text).ids]
        assert all(token is not None for token in found.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_go_and_every_text_is_still_encodable(cores, kind):
    core = cores[kind]
    small, _ = cut_tokenizer(core, TEXTS[:1])
    assert small.get_vocab_size() < core.get_vocab_size()
    unknown = {"bytes": None, "word pieces": "[UNK]", "unigram": "<unk>"}[kind]
    for text in TEXTS:
        encoding = small.encode(text)
        assert unknown is None or unknown not in encoding.tokens[: -1 if kind == "word pieces" else None][1:]
        if kind == "bytes":
            assert small.decode(encoding.ids, skip_special_tokens=True) == text
    if kind == "bytes":
        assert small.decode(small.encode("ß 漢字 🙂").ids, skip_special_tokens=True) == "ß 漢字 🙂"


def test_a_token_needs_the_pieces_it_is_merged_from_in_their_order():
    merges = {pair: rank for rank, pair in enumerate([("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")])}
    assert pieces.made_of("abc", merges) == {"a", "b", "c", "bc", "abc"}
    assert pieces.made_of("ab", merges) == {"a", "b", "ab"}
    assert pieces.made_of("xyz", merges) == {"x", "y", "z", "xyz"}


def test_bytes_stand_for_characters_that_go():
    names = ["<unk>", *(f"<0x{number:02X}>" for number in range(256)), "a", "b", "ab", "ü"]
    core = Tokenizer(
        models.BPE(
            {name: number for number, name in enumerate(names)}, [("a", "b")], byte_fallback=True, unk_token="<unk>"
        )
    )
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    small, numbers = cut_tokenizer(core, ["ab"])
    assert sorted(set(core.get_vocab()) - set(small.get_vocab())) == ["ü"]
    assert small.encode("ab").ids == [numbers[259]]
    assert small.decode(small.encode("ü").ids) == "ü"


def test_the_least_likely_piece_stays_for_the_score_of_the_unknown():
    entries = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -2.5), ("rare", -9.0)]
    core = Tokenizer(models.Unigram(entries, unk_id=0))
    small, _ = cut_tokenizer(core, ["b"])
    assert set(small.get_vocab()) == {"<unk>", "a", "b", "rare"}


def test_a_tokenizer_that_marks_the_end_of_words_is_refused():
    core = Tokenizer(models.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(StepError, match="marks the inside or the end of words"):
        cut_tokenizer(core, ["a"])


def data_of(request, family: str) -> tuple[Any, Any]:
    task = TASKS_OF.get(family, "text-generation")
    name = {"text-generation": "text", "text-classification": "review", "translation": "pair"}[task]
    return task, request.getfixturevalue(f"{name}_data")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "marian", "t5", "bart"])
def test_the_model_gives_what_it_gave(request, tmp_path, family):
    task, data = data_of(request, family)
    folder = request.getfixturevalue(family)
    few = data.model_copy(update={"train_limit": 6})
    recover = TrainingSpec(max_steps=1, batch_size=4, validation=0) if family == "gpt2" else None
    ctx = context(tmp_path, task, few)
    result = prune(as_artifact(folder), spec=SPEC.model_copy(update={"recover": recover}), ctx=ctx)
    old, new = load(folder), load(ctx.out)
    before, after = load_tokenizer(folder), load_tokenizer(ctx.out)
    assert len(after) == new.config.vocab_size == result.properties["tokens"] < len(before)  # type: ignore[union-attr]
    assert tied_weights(new).keys() == tied_weights(old).keys()
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, ctx.out)]
    assert sizes[1] < sizes[0]
    for name in ("pad", "eos", "bos", "unk"):
        assert getattr(after, f"{name}_token") == getattr(before, f"{name}_token")
    ours: Any = new
    for named in (ours.config, ours.generation_config if family != "bert" else ours.config):
        if named.pad_token_id is not None:
            assert named.pad_token_id == after.pad_token_id
    one, other = (encode(few, "train", task, place, ctx.store) for place in (folder, ctx.out))
    words = [before.convert_ids_to_tokens(row.tolist()) for row in np.asarray(one.input_ids)]
    assert [after.convert_ids_to_tokens(row.tolist()) for row in np.asarray(other.input_ids)] == words
    unseen = "Zwölf völlig neue Wörter, 🙂!"
    assert after.decode(after(unseen).input_ids, skip_special_tokens=True) == before.decode(
        before(unseen).input_ids, skip_special_tokens=True
    )
    if family in ("marian", "t5", "bart"):
        generated(new, {name: tensor.clamp(max=9) for name, tensor in spoken(family).items()})
    if recover is None and family in ("llama", "bert"):
        ids = [torch.from_numpy(np.asarray(rows.input_ids)[:2, :8]).long() for rows in (one, other)]
        with torch.no_grad():
            expected, found = old(input_ids=ids[0]).logits, new(input_ids=ids[1]).logits
        if family == "llama":
            names = after.convert_ids_to_tokens(list(range(len(after))))
            expected = expected[..., before.convert_tokens_to_ids(names)]
        assert torch.allclose(expected, found, atol=1e-6)


def test_settings_that_name_tokens_follow(tmp_path, pair_data):
    from tasks.models import save

    folder = tiny_model(tmp_path / "model", "marian", "translation")
    model: Any = load(folder)
    tokens = load_tokenizer(folder)
    rare = len(tokens) - 1
    model.generation_config.bad_words_ids = [[rare]]
    model.generation_config.forced_eos_token_id = model.config.eos_token_id
    with torch.no_grad():
        model.final_logits_bias.copy_(torch.arange(len(tokens))[None] / 100)
    save(model, folder)
    ctx = context(tmp_path, "translation", pair_data.model_copy(update={"train_limit": 4}))
    prune(as_artifact(folder), spec=SPEC, ctx=ctx)
    small: Any = load(ctx.out)
    after = load_tokenizer(ctx.out)
    name = tokens.convert_ids_to_tokens(rare)
    assert small.generation_config.bad_words_ids == [[after.convert_tokens_to_ids(name)]]
    kept = tokens.convert_tokens_to_ids(after.convert_ids_to_tokens(list(range(len(after)))))
    assert torch.allclose(small.final_logits_bias[0], torch.tensor(kept) / 100)
    assert small.config.decoder_vocab_size == small.config.vocab_size == len(after)


def test_a_tokenizer_that_encodes_otherwise_is_found_out(tmp_path, llama, text_data, monkeypatch):
    whole = pieces.smaller

    def without_merges(content: Any, numbers: Any) -> Any:
        changed = whole(content, numbers)
        changed["model"]["merges"] = changed["model"]["merges"][5:]
        return changed

    monkeypatch.setattr(vocabulary, "smaller", without_merges)
    ctx = context(tmp_path, "text-generation", text_data.model_copy(update={"train_limit": 6}))
    with pytest.raises(StepError, match="encodes the training data in another way"):
        prune(as_artifact(llama), spec=SPEC, ctx=ctx)


def test_where_every_token_is_used_nothing_can_go(tmp_path, llama, text_data, monkeypatch):
    monkeypatch.setattr(vocabulary, "_used", lambda data: set(range(320)))
    monkeypatch.setattr(vocabulary, "plan", lambda files, used, named, size: list(range(size)))
    ctx = context(tmp_path, "text-generation", text_data)
    with pytest.raises(StepError, match="leave this step out"):
        prune(as_artifact(llama), spec=SPEC, ctx=ctx)


def test_speech_is_refused(tmp_path, whisper, speech_data):
    with pytest.raises(StepError, match="method: vocabulary is for models that read text"):
        prune(as_artifact(whisper), spec=SPEC, ctx=context(tmp_path, "speech-recognition", speech_data))


def test_more_tokens_than_rows_are_refused():
    content = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 7}, "unk_token": "a"}, "added_tokens": []}
    with pytest.raises(StepError, match="has the token 7, and the model rows for 5"):
        vocabulary.plan({"tokenizer.json": content}, {7}, (), 5)
