"""The step: every application from end to end, the student's origins, the data, resuming, and what is refused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from specs.schema.steps.distill import DistillSpec
from tasks.compress import kept
from tasks.compress.augment import augmented, neighbours_of
from tasks.compress.distill import distill, look
from tasks.compress.lessons import lessons
from tasks.context import StepError
from tasks.data.tokens import open_tokenizer
from tasks.finetune.batches import Batches, Roles
from tasks.models import load
from tests.support import as_artifact, context, tiny_config, tiny_data, tiny_model, write_jsonl
from tests.tasks import tiny

CASES = {
    "llama": "text-generation",
    "bert": "text-classification",
    "marian": "translation",
    "whisper": "speech-recognition",
    "wav2vec2": "speech-recognition",
}
KEPT = {"epochs": 2, "top_k": 8, "validation": 0}
FAST = {"max_steps": 3, "batch_size": 8, "validation": 0.2, "learning_rate": 1e-3, "eval_steps": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Teacher folder and data of each kind."""
    root = tmp_path_factory.mktemp("made")
    found = {}
    for kind, task in CASES.items():
        data = tiny_data(root / kind / "data", task, train=24, eval=4)
        found[kind] = (tiny_model(root / kind / "teacher", kind, task), data)
    return found


def _spec(**fields):
    return DistillSpec(**{"uses": "distill", "id": "s", "teacher": "t", **FAST, **fields})


def _run(folder, made, kind, taught=None, **fields):
    teacher, data = made[kind]
    events = []
    ctx = context(folder, CASES[kind], data, emit=events.append)
    inputs = [as_artifact(path) for path in (taught, teacher) if path is not None]
    return distill(*inputs, spec=_spec(**fields), ctx=ctx), ctx, events


def _weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", CASES)
def test_each_application_from_a_part_of_the_teacher(tmp_path, made, kind):
    result, ctx, events = _run(tmp_path, made, kind, student={"layers": 1, "hidden": 16}, hidden={}, relations={})
    network = load(ctx.out)
    assert set(result.touched) <= set(dict(network.named_parameters()))
    assert not any("projection_" in name or "distillation" in name for name in network.state_dict())
    assert type(network) is type(load(made[kind][0]))
    assert "cut out of the teacher" in result.summary
    assert not (ctx.out / "lathe.json").exists()
    assert (
        result.properties["distillation"]["student_parameters"]
        < 0.6 * (result.properties["distillation"]["teacher_parameters"])
    )
    assert {"validation_loss", "train_loss"} <= {event.get("name") for event in events}


@pytest.mark.parametrize("kind", CASES)
def test_each_application_from_a_model_and_with_kept_outputs(tmp_path, made, kind):
    other = tiny_model(tmp_path / "other", kind, CASES[kind], seed=5)
    result, ctx, events = _run(tmp_path / "a", made, kind, taught=other, **KEPT)
    assert result.properties["distillation"]["cached"]
    progress = [event for event in events if event["event"] == "progress" and event["unit"] == "examples"]
    assert progress[-1]["done"] == progress[-1]["total"]
    assert _weights(ctx.out) != _weights(other)
    again = dataclasses.replace(context(tmp_path / "b", CASES[kind], made[kind][1]), store=ctx.store)
    told = []
    distill(
        as_artifact(other),
        as_artifact(made[kind][0]),
        spec=_spec(**KEPT),
        ctx=dataclasses.replace(again, emit=told.append),
    )
    assert {"event": "note", "text": "the teacher's outputs: found in the store"} in told
    assert _weights(again.out) == _weights(ctx.out)  # and two runs give the same bytes


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}),
        ("bert", {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}),
        ("whisper", tiny_config("whisper") | {"d_model": 16, "decoder_layers": 1, "vocab_size": None}),
        ("wav2vec2", tiny_config("wav2vec2") | {"hidden_size": 16, "vocab_size": None}),
    ],
)
def test_a_student_of_its_own_configuration(tmp_path, made, kind, config):
    config = {name: value for name, value in config.items() if value is not None}
    result, ctx, _ = _run(tmp_path, made, kind, config=config)
    network = load(ctx.out)
    assert "random weights" in result.summary
    assert network.config.vocab_size == load(made[kind][0]).config.vocab_size
    assert network.config.model_type == config["model_type"]
    assert (ctx.out / "tokenizer.json").read_bytes() == (made[kind][0] / "tokenizer.json").read_bytes()
    if kind == "bert":
        assert network.config.id2label == {0: "negative", 1: "positive"}
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(ctx.out)
        assert type(plain).__name__ == "DistilBertForSequenceClassification"


@pytest.mark.parametrize("kind", ["llama", "marian", "whisper"])
def test_the_teacher_writes_what_is_learned(tmp_path, made, kind):
    beams = {"beams": 2} if kind != "llama" else {}
    result, ctx, _ = _run(tmp_path, made, kind, student={"layers": 1}, data="teacher-generated", **beams)
    assert result.properties["distillation"]["examples"]["teacher-generated"] > 0
    teacher, data = made[kind]
    spec = _spec(student={"layers": 1}, data="teacher-generated", **beams)
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
    first = _run(tmp_path / "a", made, kind, **fields)[1]
    second = _run(tmp_path / "b", made, kind, **fields)[1]
    never = _run(tmp_path / "c", made, kind, **{**fields, "on_policy": None})[1]
    assert _weights(first.out) == _weights(second.out) != _weights(never.out)


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
        problems, _ = look(_spec(student={"layers": 1}, **fields), teacher, "speech-recognition", 32)
        assert problems == [
            f"{name}: a model of CTC names each frame by itself and writes nothing that it could learn from; leave "
            f"{name} out"
        ]
    with pytest.raises(StepError, match="on_policy: a model of CTC"):
        _run(tmp_path, made, "wav2vec2", student={"layers": 1}, on_policy={})


@pytest.mark.parametrize("kind", ["llama", "bert", "marian"])
def test_texts_without_labels(tmp_path, made, kind):
    named = {"llama": "more.jsonl", "bert": "more.txt", "marian": "more.jsonl"}[kind]
    path = tmp_path / named
    rows = [{"text": f"a text of number {number} for nobody"} for number in range(9)]
    if named.endswith("txt"):
        path.write_text("\n".join(row["text"] for row in rows) + "\n\n")
    else:
        write_jsonl(path, rows)
    result, ctx, _ = _run(tmp_path / "run", made, kind, student={"layers": 1}, unlabelled=str(path))
    assert result.properties["distillation"]["examples"]["unlabelled"] == 9
    load(ctx.out)


def test_changed_copies_stay_on_the_side_of_their_original(tmp_path, made):
    result, _, _ = _run(tmp_path, made, "bert", student={"layers": 1}, augment={"copies": 3})
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


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from specs.schema.steps.distill import DistillSpec
from tasks.compress import kept
from tasks.compress.distill import distill
from tests.support import as_artifact, context
from specs.schema.pipeline import DataSpec

folder, teacher, spec, data, at = sys.argv[1:]
kept.PIECE = 8

def emit(event):
    if at == "train" and event.get("name") == "train_loss" and event["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if at == "teacher" and event.get("unit") == "examples" and event["done"] == 16:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
ctx = context(Path(folder), "text-generation", DataSpec.model_validate_json(data), emit=emit)
distill(as_artifact(Path(teacher)), spec=DistillSpec.model_validate_json(spec), ctx=ctx)
"""


@pytest.mark.parametrize("at", ["train", "teacher"])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, made, monkeypatch, at):
    teacher, data = made["llama"]
    spec = _spec(
        student={"layers": 1, "hidden": 16},
        max_steps=7,
        save_every=0.0,
        eval_steps=2,
        **({"on_policy": {"share": 0.5}, "hidden": {}} if at == "train" else {}),
    )
    arguments = [str(tmp_path / "killed"), str(teacher), spec.model_dump_json(), data.model_dump_json(), at]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr(kept, "PIECE", 8)
    ends = {}
    for name in ("killed", "whole"):
        events = []
        folder = tmp_path / name
        for part in ("out", "work"):
            shutil.rmtree(folder / part, ignore_errors=True)
        ctx = context(folder, "text-generation", data, emit=events.append)
        distill(as_artifact(teacher), spec=spec, ctx=ctx)
        ends[name] = (_weights(ctx.out), events)
    assert ends["killed"][0] == ends["whole"][0]
    steps = [event["step"] for event in ends["killed"][1] if event.get("name") == "train_loss"]
    assert steps == ([5, 6, 7] if at == "train" else [1, 2, 3, 4, 5, 6, 7])


def test_a_damaged_piece_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "PIECE", 4)
    ctx = tiny.context(tmp_path)
    calls = []

    def make(rows):
        calls.append(rows.tolist())
        if len(calls) == 3:
            raise StepError("killed")
        return {"x": np.repeat(rows, 2).astype(np.float32), "ends": 2 * np.arange(1, len(rows) + 1)}

    with pytest.raises(StepError, match="killed"):
        kept.keep("it", {"a": 1}, make, 10, ctx, test_a_damaged_piece_is_made_again)
    pieces = sorted((tmp_path / "store").rglob("piece-*.safetensors"))
    assert len(pieces) == 2
    content = bytearray(pieces[1].read_bytes())
    content[-1] ^= 1
    pieces[1].write_bytes(content)
    found = kept.keep("it", {"a": 1}, make, 10, ctx, test_a_damaged_piece_is_made_again)
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [4, 5, 6, 7], [8, 9]]
    assert found.rows(np.array([9, 0, 5]))["x"].tolist() == [9, 9, 0, 0, 5, 5]
    assert kept.keep("it", {"a": 1}, make, 10, ctx, test_a_damaged_piece_is_made_again).rows(np.array([2]))
    assert len(calls) == 5


def _edited(source, folder, **fields):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_pairs_that_do_not_go_together(tmp_path, made):
    three = tiny_model(tmp_path / "three", "bert", "text-classification", labels=3)
    with pytest.raises(StepError, match=r"knows 2 labels \(negative, positive\) and the student 3 \(class0, "):
        _run(tmp_path / "a", made, "bert", taught=three)
    strange = tiny_model(tmp_path / "strange", "llama", "text-generation", vocab_size=300)
    with pytest.raises(StepError, match=r"vocabulary \(300 tokens\) is not the teacher's \(320.*instead of needs"):
        _run(tmp_path / "b", made, "llama", taught=strange)
    writes = tiny_model(tmp_path / "writes", "llama", "text-generation")
    with pytest.raises(StepError, match="the student does text-generation and the teacher text-classification"):
        _run(tmp_path / "c", made, "bert", taught=writes)
    decoder = tiny_model(tmp_path / "decoder", "llama", "text-classification", pad_token_id=0)
    with pytest.raises(StepError, match="family decoder and the teacher encoder"):
        _run(tmp_path / "d", made, "bert", taught=decoder)
    wider = tiny_model(tmp_path / "wav", "wav2vec2", "speech-recognition", conv_stride=[5, 4, 2])
    with pytest.raises(StepError, match="another number of frames"):
        _run(tmp_path / "e", made, "wav2vec2", taught=wider)


@pytest.mark.parametrize("broken", ["teacher", "student"])
def test_weights_that_are_no_numbers_teach_and_learn_nothing(tmp_path, made, broken):
    from tasks.models import save

    teacher, data = made["bert"]
    network = load(teacher)
    with torch.no_grad():
        network.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    save(network, tmp_path / "broken", tokenizer_from=teacher)
    pair = {"teacher": teacher, "student": teacher, broken: tmp_path / "broken"}
    events = []
    ctx = context(tmp_path / "run", "text-classification", data, emit=events.append)
    with pytest.raises(StepError, match=r"layer\.0\.output\.dense\.weight holds weights that are not finite"):
        distill(as_artifact(pair["student"]), as_artifact(pair["teacher"]), spec=_spec(), ctx=ctx)
    assert events == []
    assert list(ctx.out.iterdir()) == []


def test_labels_in_another_order_are_put_in_order(tmp_path, made):
    teacher, _ = made["bert"]
    turned = _edited(
        teacher,
        tmp_path / "turned",
        id2label={"0": "positive", "1": "negative"},
        label2id={"positive": 0, "negative": 1},
    )
    from tasks.compress.fit import label_order

    assert label_order(load(turned), load(teacher)) == [1, 0]
    assert label_order(load(teacher), load(teacher)) is None
    result, _, _ = _run(tmp_path / "a", made, "bert", taught=turned)
    assert result.touched


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("llama", {"model_type": "llama", "vocab_size": 50}, "config: vocab_size 50 is not the teacher's 320"),
        ("llama", {"model_type": "lama"}, "config.model_type 'lama' is unknown; did you mean"),
        ("llama", {"model_type": "llama", "layers": 2}, "config.layers is no field of llama"),
        ("bert", {"model_type": "llama"}, "family decoder, the teacher is encoder; .* for example bert"),
    ],
)
def test_configurations_that_the_plan_refuses(made, kind, config, message):
    teacher = json.loads((made[kind][0] / "config.json").read_text())
    problems, _ = look(_spec(config=config), teacher, CASES[kind], 32)
    import re

    assert len(problems) == 1
    assert re.search(message, problems[0]), problems


def test_sizes_that_the_plan_refuses(made):
    teacher = json.loads((made["whisper"][0] / "config.json").read_text())
    shape = {"layers": 2, "decoder_layers": 3, "hidden": 64}
    problems, _ = look(_spec(student=shape), teacher, "speech-recognition", 32)
    assert problems == [
        "student.hidden 64 is more than the model's 32; write at most 32",
        "student.decoder_layers 3 is more than the model's 2; write at most 2",
    ]
    assert look(_spec(student={"layers": 1}), teacher, "speech-recognition", 32) == ([], [])
    bert = json.loads((made["bert"][0] / "config.json").read_text())
    problems, _ = look(_spec(student={"decoder_layers": 1, "hidden": 16, "heads": 3}), bert, CASES["bert"], 32)
    assert problems == [
        "student.decoder_layers: a bert model has no decoder; write layers",
        "student.heads: 3 heads do not divide the width 16; write a divisor of it",
    ]


def test_no_text_without_labels(tmp_path, made):
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(StepError, match=r"unlabelled: .*none.txt"):
        _run(tmp_path / "a", made, "bert", student={"layers": 1}, unlabelled=str(tmp_path / "none.txt"))
    with pytest.raises(StepError, match=r"unlabelled: .*no such file"):
        _run(tmp_path / "b", made, "bert", student={"layers": 1}, unlabelled=str(tmp_path / "nowhere.txt"))
