"""What a student learns from besides the training data: what the teacher and the student write, texts without labels,
and changed copies."""

import json

import numpy as np
import pytest
import torch

from tasks.compress import kept
from tasks.compress.augment import augmented, neighbours_of
from tasks.compress.distill import look
from tasks.compress.lessons import lessons
from tasks.context import StepError
from tasks.data.tokens import open_tokenizer
from tasks.finetune.batches import Batches, Roles
from tasks.models import load
from tests.support import write_jsonl
from tests.tasks import tiny
from tests.tasks.taught import distilled, spec_of, teachers, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Teacher folder and data of each kind."""
    return teachers(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("kind", ["llama", "marian", "whisper"])
def test_the_teacher_writes_what_is_learned(tmp_path, made, kind):
    beams = {"beams": 2} if kind != "llama" else {}
    result, ctx, _ = distilled(tmp_path, made, kind, student={"layers": 1}, data="teacher-generated", **beams)
    assert result.properties["distillation"]["examples"]["teacher-generated"] > 0
    teacher, data = made[kind]
    spec = spec_of(student={"layers": 1}, data="teacher-generated", **beams)
    from tasks.data import encode

    encoded = encode(data, "train", ctx.task, teacher, ctx.store)
    taught = lessons(encoded, load(teacher), kept.identity(teacher), teacher, spec, ctx)
    count = len(encoded)
    assert len(taught.data) == 2 * count
    assert taught.roles.trains.tolist() == [False] * count + [True] * count
    assert taught.roles.measures.tolist() == [True] * count + [False] * count
    if kind == "llama":
        for row in range(count):
            prompt = max(1, int(encoded.lengths()[row]) // 4)
            written = taught.data.input_ids[count + row]
            assert written[:prompt].tolist() == encoded.input_ids[row, :prompt].tolist()
    elif kind == "whisper":
        model, row = load(teacher), 3
        assert np.array_equal(taught.data.features_of(count + row), encoded.features_of(row))
        assert np.array_equal(taught.data.lengths(), np.tile(encoded.lengths(), 2))
        batch = Batches(encoded, 0.0, 1, 0, "cpu").tensors(np.array([row]))
        ids = torch.tensor([[model.config.decoder_start_token_id]])
        found = _beams(model, batch["input_features"], ids, 2, data.max_length)
        length = int(taught.data.target_mask[count + row].sum())
        assert taught.data.target_ids[count + row, :length].tolist() == found[:length]
    else:
        assert np.array_equal(taught.data.input_ids[:count], taught.data.input_ids[count:])
        model, row = load(teacher), 3
        ids = torch.tensor(encoded.input_ids[row : row + 1, : int(encoded.lengths()[row])]).long()
        found = model.generate(input_ids=ids, num_beams=2, do_sample=False, max_new_tokens=data.max_length)[0, 1:]
        length = int(taught.data.target_mask[count + row].sum())
        assert taught.data.target_ids[count + row, :length].tolist() == found[:length].tolist()
    batches = Batches(taught.data, 0.2, 4, 0, "cpu", roles=taught.roles)
    assert set(batches.validation) <= set(range(count))
    assert not set(batches.train) & {count + row for row in batches.validation}
    assert set(batches.train) == {count + row for row in range(count)} - {count + row for row in batches.validation}


def _beams(model, features, ids, beams, limit):
    """The likeliest continuation of ``ids`` by a naive search without cache, by its mean over its tokens."""
    running, done = [(0.0, ids)], []
    end = model.config.eos_token_id
    for _ in range(limit):
        found = []
        for score, text in running:
            with torch.no_grad():
                logs = model(input_features=features, decoder_input_ids=text).logits[0, -1].log_softmax(-1)
            best = logs.topk(2 * beams)
            found += [
                (score + float(log), torch.cat([text, token.view(1, 1)], 1))
                for log, token in zip(best.values, best.indices, strict=True)
            ]
        found.sort(key=lambda pair: -pair[0])
        done += [pair for pair in found[: 2 * beams] if pair[1][0, -1] == end]
        running = [pair for pair in found if pair[1][0, -1] != end][:beams]
    texts = sorted(done + running, key=lambda pair: -pair[0] / (pair[1].shape[1] - 1))
    return texts[0][1][0, 1:].tolist()


@pytest.mark.parametrize("kind", ["llama", "marian", "whisper"])
def test_the_student_writes_for_itself_and_does_so_again(tmp_path, made, kind):
    fields = {"student": {"layers": 1}, "on_policy": {"share": 1.0}, "alpha": 0.0, "validation": 0}
    first = distilled(tmp_path / "a", made, kind, **fields)[1]
    second = distilled(tmp_path / "b", made, kind, **fields)[1]
    never = distilled(tmp_path / "c", made, kind, **{**fields, "on_policy": None})[1]
    assert weights_of(first.out) == weights_of(second.out) != weights_of(never.out)


def test_only_what_the_student_wrote_is_scored():
    from tasks.compress.reading import reader
    from tasks.compress.written import own_batches

    model = tiny.network("llama")
    batch = Batches(tiny.language(4, 12), 0.0, 4, 0, "cpu").tensors(np.arange(4))
    torch.manual_seed(0)
    made = own_batches("text-generation", 1.0)(model, batch)
    prompt = int(batch["attention_mask"].sum(1).min()) // 4
    assert torch.equal(made["input_ids"][:, :prompt], batch["input_ids"][:, :prompt])
    assert not made["scored"][:, : prompt - 1].any()
    reading = reader("text-generation", "decoder")(model, made)
    assert len(reading.owner) == int(made["scored"].sum())
    for ids, mask in zip(made["input_ids"].tolist(), made["attention_mask"].tolist(), strict=True):
        ended = [at for at in range(prompt, len(ids)) if ids[at] == 2]
        assert sum(mask) == (ended[0] + 1 if ended else len(ids))


def test_what_whisper_writes_begins_with_the_marks_of_the_data():
    """Language and task are given, not written; what it samples comes behind them and alone is scored."""
    from tasks.compress.reading import reader
    from tasks.compress.written import own_batches

    model = tiny.writer("whisper")
    model.generation_config.lang_to_id = {"<|en|>": 30}
    model.generation_config.task_to_id = {"transcribe": 31}
    batch = Batches(tiny.recordings("whisper", 4), 0.0, 4, 0, "cpu").tensors(np.arange(4))
    marks = torch.tensor([[30, 31]]).expand(4, 2)
    batch["labels"] = torch.cat([marks, batch["labels"]], 1)
    torch.manual_seed(0)
    made = own_batches("speech-recognition", 1.0)(model, batch)
    assert torch.equal(made["labels"][:, :2], marks)
    assert made["labels"].shape[1] <= batch["labels"].shape[1]
    assert torch.equal(made["input_features"], batch["input_features"])
    reading = reader("speech-recognition", "encoder-decoder")(model, made)
    assert torch.equal(reading.labels, made["labels"][:, 2:][made["labels"][:, 2:] != -100])
    for row in made["labels"].tolist():
        ended = [at for at, token in enumerate(row) if token == 2]
        assert [token for token in row if token != -100] == row[: ended[0] + 1 if ended else len(row)]
    # The same draws as a sampler without cache, which is given all tokens anew each time.
    torch.manual_seed(0)
    text = torch.cat([torch.full((4, 1), model.config.decoder_start_token_id), marks], 1)
    with torch.no_grad():
        for _ in range(made["labels"].shape[1] - 2):
            logits = model(input_features=batch["input_features"], decoder_input_ids=text).logits[:, -1]
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], 1)
    real = made["labels"] != -100
    assert torch.equal(text[:, 1:][real], made["labels"][real])


def test_a_model_of_ctc_writes_nothing(tmp_path, made):
    teacher = json.loads((made["wav2vec2"][0] / "config.json").read_text())
    for name, fields in {"data": {"data": "teacher-generated"}, "on_policy": {"on_policy": {}}}.items():
        problems, _ = look(spec_of(student={"layers": 1}, **fields), teacher, "speech-recognition", 32)
        assert problems == [
            f"{name}: a model of CTC names each frame by itself and writes nothing that it could learn from; leave "
            f"{name} out"
        ]
    with pytest.raises(StepError, match="on_policy: a model of CTC"):
        distilled(tmp_path, made, "wav2vec2", student={"layers": 1}, on_policy={})


@pytest.mark.parametrize("kind", ["llama", "bert", "marian"])
def test_texts_without_labels(tmp_path, made, kind):
    named = {"llama": "more.jsonl", "bert": "more.txt", "marian": "more.jsonl"}[kind]
    path = tmp_path / named
    rows = [{"text": f"a text of number {number} for nobody"} for number in range(9)]
    if named.endswith("txt"):
        path.write_text("\n".join(row["text"] for row in rows) + "\n\n")
    else:
        write_jsonl(path, rows)
    result, ctx, _ = distilled(tmp_path / "run", made, kind, student={"layers": 1}, unlabelled=str(path))
    assert result.properties["distillation"]["examples"]["unlabelled"] == 9
    load(ctx.out)


def test_changed_copies_stay_on_the_side_of_their_original(tmp_path, made):
    result, _, _ = distilled(tmp_path, made, "bert", student={"layers": 1}, augment={"copies": 3})
    assert result.properties["distillation"]["examples"] == {"training": 24, "augmented": 72}
    data = tiny.sentences(10)
    near = np.tile(np.arange(64, dtype=np.int32)[:, None] ^ 1, (1, 2))
    copies, origin = augmented(data, near, 3, 0.5, np.random.default_rng(0))
    assert origin.tolist() == [row for row in range(10) for _ in range(3)]
    real = np.asarray(copies.attention_mask) > 0
    changed = copies.input_ids != data.input_ids[origin]
    assert np.array_equal(copies.input_ids[changed], data.input_ids[origin][changed] ^ 1)
    assert not changed[~real].any()
    assert 0.4 < changed[real].mean() < 0.6
    again, _ = augmented(data, near, 3, 0.5, np.random.default_rng(0))
    assert np.array_equal(again.input_ids, copies.input_ids)
    roles = Roles(np.ones(40, bool), np.arange(40) < 10, np.concatenate([np.arange(10), origin]))
    from tasks.compress.lessons import joined

    batches = Batches(joined([data, copies], tmp_path), 0.3, 4, 0, "cpu", roles=roles)
    assert len(batches.validation) == 3
    assert len(batches.train) == 7 * 4
    assert not set(roles.origin[batches.train]) & set(batches.validation)


def test_neighbours_are_the_nearest_of_their_kind(made):
    tokenizer = open_tokenizer(made["bert"][0]).core
    table = torch.randn(320, 8, generator=torch.Generator().manual_seed(0))
    near = neighbours_of(table, tokenizer, 3)
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    for token in (0, 1, 2, 3, 4):
        assert near[token].tolist() == [token] * 3  # special ones
    word = next(number for number, name in names.items() if name == "Ġthe")
    alike = [n for n, name in names.items() if name.startswith("Ġ") and len(name) > 1 and name[1:].isalpha()]
    cosine = torch.nn.functional.cosine_similarity(table[word], table[alike], dim=-1)
    order = [alike[at] for at in cosine.argsort(descending=True).tolist() if alike[at] != word]
    assert near[word].tolist() == order[:3]


def test_no_text_without_labels(tmp_path, made):
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(StepError, match=r"unlabelled: .*none.txt"):
        distilled(tmp_path / "a", made, "bert", student={"layers": 1}, unlabelled=str(tmp_path / "none.txt"))
    with pytest.raises(StepError, match=r"unlabelled: .*no such file"):
        distilled(tmp_path / "b", made, "bert", student={"layers": 1}, unlabelled=str(tmp_path / "nowhere.txt"))
