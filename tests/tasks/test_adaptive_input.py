"""The step ``adaptive_input``: what it writes, says and refuses, for every family, and that healing heals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specs.schema.base import FieldError
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.prune import PruneSpec
from specs.schema.steps.quantize import QuantizeSpec
from tasks.adaptive_input.adaptive_input import adaptive_input
from tasks.adaptive_input.preflight import look
from tasks.adaptive_input.table import tables
from tasks.compress.calibrate import outputs
from tasks.compress.prune import prune
from tasks.compress.quantize import quantize, relative_error
from tasks.context import StepError
from tasks.data import encode
from tasks.evaluate.footprint import of_model
from tasks.finetune.finetune import finetune
from tasks.look import look as plan
from tasks.models import load as load_module
from tasks.models.support import supports
from tests.support import TASKS_OF, as_artifact, context, tiny_model, write_jsonl


def load(folder: Path) -> Any:
    return load_module(folder)


FAMILIES = ("llama", "gpt2", "bert", "marian", "t5", "whisper")


pytestmark = pytest.mark.usefixtures("one_thread")


def _task(family):
    return TASKS_OF.get(family, "text-generation")


def _data(request, family):
    names = {"translation": "pair_data", "speech-recognition": "speech_data", "text-classification": "review_data"}
    return request.getfixturevalue(names.get(_task(family), "text_data")).model_copy(update={"train_limit": 24})


def _spec(**fields):
    defaults = {"uses": "adaptive_input", "id": "a", "bits": (16, 4, 1), "bands": 3}
    return AdaptiveInputSpec.model_validate(defaults | fields)


def _run(request, folder, family, **fields):
    ctx = context(folder, _task(family), _data(request, family))
    model = as_artifact(request.getfixturevalue(family))
    return ctx, adaptive_input(model, spec=_spec(**fields), ctx=ctx)


def _examples(ctx, folder):
    return encode(ctx.data, "train", ctx.task, folder, ctx.store).take(slice(0, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_smaller_table_that_loads(request, tmp_path, family):
    ctx, result = _run(request, tmp_path, family, ratio="4x")
    about = result.properties["adaptive_input"]
    assert about["bytes"] <= about["budget"]
    source = request.getfixturevalue(family)
    network = load(ctx.out)
    assert all(torch.isfinite(made.expanded()).all() for made in tables(network))  # what never occurs, too
    before, after = (outputs(load(folder), _examples(ctx, source)) for folder in (source, ctx.out))
    assert torch.isfinite(after).all()
    assert 0 < relative_error(before, after) < 0.6
    if _task(family) != "text-classification":
        ids = torch.tensor([[5, 6, 7]])
        if _task(family) == "text-generation":
            assert network.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 3
    # Nothing dense is left of what was replaced, and the bytes in the file are the bytes that were told.
    rows = network.config.vocab_size
    state = load_file(ctx.out / "model.safetensors")
    dense = [name for name, tensor in state.items() if tensor.shape[:1] == (rows,) and tensor.ndim == 2]
    assert dense == []
    told = sum(tensor.nbytes for name, tensor in state.items() if ".table." in name)
    assert told < about["bytes"] < told + 200 * len([name for name in state if ".table." in name])
    assert result.touched
    assert sum(band["band"]["count"] for band in about["tables"][0]["bands"]) == rows
    assert sum(band["text"] for band in about["tables"][0]["bands"]) == pytest.approx(1)
    assert (ctx.out / "adaptive_input.svg").read_bytes().startswith(b"<?xml")


def test_two_runs_give_the_same_bytes(request, tmp_path):
    digests = []
    for name in ("a", "b"):
        ctx, _ = _run(request, tmp_path / name, "gpt2", ratio="5x", heal={"max_steps": 2, "batch_size": 4})
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in ctx.out.iterdir()})
    assert digests[0] == digests[1]


def test_almost_the_whole_budget_gives_the_dense_table_back(request, tmp_path):
    ctx, _ = _run(request, tmp_path, "gpt2", ratio="1.2x", bits=(16,), bands=1)
    dense = load(request.getfixturevalue("gpt2")).get_input_embeddings().weight
    got = load(ctx.out).get_input_embeddings().weight
    torch.testing.assert_close(got, dense.detach(), rtol=1e-3, atol=1e-4)


def test_parameters_are_counted_as_numbers_and_not_as_bytes(request, tmp_path):
    ctx, result = _run(request, tmp_path, "gpt2", ratio="6x", bits=(4,), bands=1)
    band = result.properties["adaptive_input"]["tables"][0]["bands"][0]["band"]
    network = load(ctx.out)
    rest = sum(parameter.numel() for parameter in network.parameters())
    projection = band["rank"] * 32 if band["projected"] else 0
    assert of_model(ctx.out).parameters == rest + band["count"] * band["rank"] + projection + 32


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("untied"), "llama", "text-generation", tie_word_embeddings=False)


@pytest.mark.parametrize("head", ["joint", "separate", "leave"])
def test_an_output_layer_of_its_own(untied, text_data, tmp_path, head):
    ctx = context(tmp_path, "text-generation", text_data)
    result = adaptive_input(as_artifact(untied), spec=_spec(ratio="5x", head=head), ctx=ctx)
    about = result.properties["adaptive_input"]
    dense = 4 * 320 * 32 * (1 if head == "leave" else 2)
    assert about["bytes_before"] == dense
    assert about["bytes"] <= about["budget"] == dense // 5
    network = load(ctx.out)
    assert len(tables(network)) == (1 if head == "leave" else 2)
    assert isinstance(network.get_output_embeddings(), torch.nn.Linear) == (head == "leave")
    assert ("lm_head" in result.left) == (head == "leave")
    if head == "separate":
        assert all(one["bytes"] <= about["budget"] / 2 for one in about["tables"])


def test_contextual_information_moves_precision(request, tmp_path):
    ctx, result = _run(request, tmp_path, "gpt2", ratio="5x", information="contextual")
    assert result.properties["adaptive_input"]["information"] == "contextual"
    assert torch.isfinite(outputs(load(ctx.out), _examples(ctx, ctx.out))).all()


def test_factors_are_trained_from_scratch(request, tmp_path):
    llama, data = request.getfixturevalue("llama"), request.getfixturevalue("text_data")
    ctx = context(tmp_path / "a", "text-generation", data)
    spec = AdaptiveInputSpec(uses="adaptive_input", id="a", ratio=3.0, method="adaptive", bands=3)
    result = adaptive_input(as_artifact(llama), spec=spec, ctx=ctx)
    about = result.properties["adaptive_input"]
    assert about["bytes"] <= about["budget"]
    after = dataclasses.replace(context(tmp_path / "b", "text-generation", data), store=ctx.store)
    training = FinetuneSpec(uses="finetune", id="t", max_steps=60, batch_size=16, learning_rate=1e-2, validation=0)
    finetune(as_artifact(ctx.out), spec=training, ctx=after)
    first, second = load_file(ctx.out / "model.safetensors"), load_file(after.out / "model.safetensors")
    learned = {name for name in first if name.endswith("_float") and not torch.equal(first[name], second[name])}
    assert learned == {name for name in first if name.endswith("_float")}
    assert _loss(after.out, after) < _loss(ctx.out, ctx) - 1
    network = load(after.out)
    ids = torch.tensor([[5, 6, 7]])
    assert network.generate(ids, max_new_tokens=4, do_sample=True, temperature=0.7, top_k=5).shape[1] > 3
    with torch.inference_mode():
        shares = network(input_ids=ids).logits.softmax(-1).sum(-1)  # one distribution over every token of every band
    torch.testing.assert_close(shares, torch.ones(1, 3))


def test_an_adaptive_softmax_is_one_distribution_that_trains_and_writes(request, tmp_path):
    tied, data = request.getfixturevalue("gpt2"), request.getfixturevalue("text_data")
    ctx = context(tmp_path / "a", "text-generation", data)
    spec = _spec(ratio=1.5, method="adaptive", softmax="adaptive", bits=None)
    about = adaptive_input(as_artifact(tied), spec=spec, ctx=ctx).properties["adaptive_input"]
    assert about["bytes"] <= about["budget"]
    after = dataclasses.replace(context(tmp_path / "b", "text-generation", data), store=ctx.store)
    training = FinetuneSpec(uses="finetune", id="t", max_steps=30, batch_size=16, learning_rate=1e-2, validation=0)
    finetune(as_artifact(ctx.out), spec=training, ctx=after)
    assert _loss(after.out, after) < _loss(ctx.out, ctx) - 1
    network = load(after.out)
    head = network.get_output_embeddings()
    assert len(head.table.layout.bands) > 1
    assert head.table is network.get_input_embeddings().table  # tied: nothing dense stands beside the factors
    ids = torch.arange(320).view(10, 32)
    with torch.inference_mode():
        logs = network(input_ids=ids).logits
        with head.passing():
            hidden = network(input_ids=ids).logits
        told = head.surprisal(hidden.flatten(0, 1), ids.flatten())
        torch.testing.assert_close(logs.logsumexp(-1), torch.zeros(10, 32), atol=1e-5, rtol=0)
        torch.testing.assert_close(told, -logs.gather(-1, ids[..., None]).flatten())
        expected = _by_hand(head, hidden[0, 0])
    torch.testing.assert_close(logs[0, 0], expected)
    written = network.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
    assert written[0, 4] == logs[0, 3].argmax()
    both = network.generate(ids[:1, :4], max_new_tokens=6, num_beams=2, do_sample=True, top_p=0.9, temperature=0.8)
    assert both.shape[1] > 4


def _by_hand(head, x):
    """The log-probability of every token behind ``x``, one after the other, from the definition."""
    table = head.table
    vectors, band = table.expanded(), table.band_of.long()
    first = torch.cat([vectors[band == 0] @ x, head.others @ x])
    logs = torch.empty(len(vectors))
    for token in range(len(vectors)):
        score = vectors[token] @ x
        if band[token] == 0:
            logs[token] = score - first.logsumexp(0)
        else:
            own = head.others[band[token] - 1] @ x - first.logsumexp(0)
            logs[token] = own + score - (vectors[band == band[token]] @ x).logsumexp(0)
    return logs


def test_later_steps_keep_the_tables(request, tmp_path):
    ctx, _ = _run(request, tmp_path / "a", "gpt2", ratio="5x")
    after = dataclasses.replace(context(tmp_path / "b", "text-generation", ctx.data), store=ctx.store)
    training = FinetuneSpec(uses="finetune", id="t", max_steps=2, batch_size=4, learning_rate=1e-3, validation=0)
    finetune(as_artifact(ctx.out), spec=training, ctx=after)
    first, second = load_file(ctx.out / "model.safetensors"), load_file(after.out / "model.safetensors")
    assert first.keys() == second.keys()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert not any(".table." in name for name in changed)
    packed = dataclasses.replace(context(tmp_path / "c", "text-generation", ctx.data), store=ctx.store)
    quantize(as_artifact(after.out), spec=QuantizeSpec(uses="quantize", id="q"), ctx=packed)
    assert torch.isfinite(outputs(load(packed.out), _examples(ctx, ctx.out))).all()
    assert len(tables(load(packed.out))) == len(tables(load(ctx.out)))
    with pytest.raises(StepError, match="in bands already"):
        adaptive_input(as_artifact(after.out), spec=_spec(ratio="5x"), ctx=packed)
    # The plan refuses these, unless the step might have left the model as it was.
    for fields in ({"method": "width", "keep": "50%"}, {"method": "depth", "keep": "50%"}, {"method": "vocabulary"}):
        shape = PruneSpec.model_validate({"uses": "prune", "id": "p"} | fields)
        with pytest.raises(StepError, match="put that step behind this one"):
            prune(as_artifact(after.out), spec=shape, ctx=packed)


def test_bad_budgets_are_refused_before_the_work(request, tmp_path):
    config = json.loads((request.getfixturevalue("gpt2") / "config.json").read_text())
    problems, _ = look(_spec(budget="1 KiB"), config, "text-generation", 32)
    assert "smallest takes" in problems[0]
    assert "write budget: " in problems[0]
    least = int(problems[0].split("smallest takes ")[1].split()[0])
    assert look(_spec(budget=least), config, "text-generation", 32) == ([], [])
    assert look(_spec(budget=least - 1), config, "text-generation", 32)[0]
    ctx, result = _run(request, tmp_path, "gpt2", budget=least, bits=(16, 4, 1))  # and the step can do it
    assert result.properties["adaptive_input"]["bytes"] <= least
    problems, _ = look(_spec(ratio="500x"), config, "text-generation", 32)
    assert "x or less" in problems[0]
    problems, _ = look(_spec(budget="1 MiB"), config, "text-generation", 32)
    assert "nothing is to be done" in problems[0]
    assert "allow_noop" in problems[0]
    assert look(_spec(budget="1 MiB", allow_noop=True), config, "text-generation", 32) == ([], [])
    with pytest.raises(StepError, match="nothing is to be done"):
        _run(request, tmp_path / "b", "gpt2", budget="1 MiB")
    ctx, result = _run(request, tmp_path / "c", "gpt2", budget="1 MiB", allow_noop=True)
    assert "asks for nothing" in result.summary
    assert not tables(load(ctx.out))


def test_audio_and_models_that_foretell_nothing_are_refused():
    assert "no table of tokens" in str(supports(_spec(ratio="2x"), "ctc", "speech-recognition"))
    spec = _spec(ratio="2x", information="contextual")
    assert "write information: unigram" in str(supports(spec, "encoder", "text-classification"))
    assert supports(spec, "decoder", "text-generation") is None


def test_the_scores_of_a_large_vocabulary_are_computed_a_few_at_a_time(request, tmp_path, monkeypatch):
    from tasks.adaptive_input import information

    network, shapes = load(request.getfixturevalue("gpt2")), []
    ctx = context(tmp_path, "text-generation", request.getfixturevalue("text_data"))
    data = _examples(ctx, request.getfixturevalue("gpt2"))
    whole = information.surprise(network, data, 320)
    network.get_output_embeddings().register_forward_hook(lambda module, given, out: shapes.append(len(out)))
    monkeypatch.setattr(information, "_SCORES", 2 * data.length * 320)
    for found, wanted in zip(information.surprise(network, data, 320), whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert shapes == [2, 2]


def test_data_without_tokens_is_refused(request, tmp_path, monkeypatch):
    from tasks.adaptive_input import information

    ctx = context(tmp_path, "text-generation", request.getfixturevalue("text_data"))
    data = encode(ctx.data, "train", ctx.task, request.getfixturevalue("gpt2"), ctx.store)
    empty = dataclasses.replace(data, attention_mask=np.zeros_like(data.attention_mask))
    with pytest.raises(StepError, match="no tokens to count"):
        information.count(empty, 320)


@pytest.mark.parametrize(
    ("text", "filtered", "message"),
    [
        (
            "\u200b\u2060",
            {},
            "data.train: the model's tokenizer makes no token, or unknown ones alone, of all its 12 texts",
        ),
        ("a film", {"min_tokens": 50}, "data.filter: it leaves nothing of the 12 records .*fewer than 50 tokens"),
        ("a film", {}, None),
    ],
)
def test_data_of_which_no_token_is_left_is_refused_in_the_plan(bert, tmp_path, text, filtered, message):
    rows = [{"text": text, "label": "good" if number % 2 else "bad"} for number in range(12)]
    rows = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = shutil.copytree(bert, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    cleans = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
    tokenizer["normalizer"] = cleans | {"strip_accents": None}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = DataSpec.model_validate({"train": str(rows), "eval": str(rows), "max_length": 16, "filter": filtered})

    def seen():
        return plan(ModelSpec(source=str(model)), "text-classification", data, [_spec(ratio="4x")])

    if message is None:
        (said,) = seen()[1]
        assert not [*said.problems, *said.sized]
        return
    with pytest.raises(StepError, match=message):
        seen()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the size is missing"),
        ({"budget": "1 MiB", "ratio": "2x"}, "says it twice"),
        ({"ratio": "1x"}, "makes nothing smaller"),
        ({"ratio": "3 times"}, "unit 'times' is unknown"),
        ({"ratio": "2x", "bits": (4, 4)}, "names a width twice"),
        ({"ratio": "2x", "bits": (7,)}, "Input should be"),
        ({"ratio": "2x", "method": "adaptive"}, "bits does not go with method: adaptive"),
        ({"ratio": "2x", "softmax": "adaptive"}, "write method: adaptive beside it"),
        ({"ratio": "2x", "softmax": "adaptive", "method": "adaptive", "bits": None, "bands": 1}, "leave bands out"),
    ],
)
def test_specs_that_say_no_size_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        _spec(**fields)
    assert issubclass(FieldError, ValueError)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_data, llama):
    """A llama that knows its text."""
    ctx = context(tmp_path_factory.mktemp("trained"), "text-generation", text_data)
    spec = FinetuneSpec(uses="finetune", id="t", max_steps=120, batch_size=16, learning_rate=1e-2, validation=0)
    finetune(as_artifact(llama), spec=spec, ctx=ctx)
    return ctx.out


def _loss(folder, ctx):
    from tasks.finetune.objective import task_loss

    data = encode(ctx.data, "eval", ctx.task, folder, ctx.store)
    batch = {
        "input_ids": torch.from_numpy(np.array(data.input_ids, np.int64)),
        "attention_mask": torch.from_numpy(np.array(data.attention_mask, np.int64)),
    }
    with torch.inference_mode():
        total, weight = task_loss(ctx.task)(load(folder), batch)
    return float(total / weight)


def test_healing_takes_back_most_of_what_was_lost(trained, text_data, tmp_path):
    losses = {}
    for name, heal in (
        ("hurt", None),
        ("healed", {"max_steps": 60, "batch_size": 16, "learning_rate": 5e-3, "trains": "model"}),
    ):
        ctx = context(tmp_path / name, "text-generation", text_data)
        result = adaptive_input(as_artifact(trained), spec=_spec(ratio="15x", bits=(1,), heal=heal), ctx=ctx)
        losses[name] = _loss(ctx.out, ctx)
        about = result.properties["adaptive_input"]
        assert about["bytes"] <= about["budget"]
        surprise = [band["surprise"] for band in about["tables"][0]["bands"] if band["surprise"]]
        assert surprise
        losses["dense"] = _loss(trained, ctx)
    assert losses["hurt"] > losses["dense"] + 0.05
    assert losses["healed"] - losses["dense"] < 0.5 * (losses["hurt"] - losses["dense"])


@pytest.fixture(scope="module")
def damaged(request, tmp_path_factory):
    """Loads a table in bands after a change of its entry in ``lathe.json``, or of its tensors."""
    place = tmp_path_factory.mktemp("damaged")
    ctx, _ = _run(request, place, "gpt2", ratio="5x")
    folder = shutil.copytree(ctx.out, place / "copy")

    def loaded(entry=lambda table: None, tensors=lambda state: None):
        extras, state = json.loads((ctx.out / "lathe.json").read_text()), load_file(ctx.out / "model.safetensors")
        entry(extras["transforms"][0]["tables"][0])
        tensors({name.rpartition(".")[2]: tensor for name, tensor in state.items() if ".table." in name})
        (folder / "lathe.json").write_text(json.dumps(extras))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return load(folder)

    assert tables(loaded())
    return loaded


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("bands", 0, "count"), 10**13, "tokens, the table 320"),
        (("bands", 0, "count"), -5, "band 0 has no tokens"),
        (("bands", 0, "count"), float("inf"), "does not fit the model"),
        (("bands", 0, "levels"), [], "band 0 has no tokens, or no columns"),
        (("bands", 0, "levels"), [[7, 8]], r"band 0 has the bits \[7\]"),
        (("bands", 0, "levels"), [[1, 4], [4, 4]], "band 0 has the bits"),
        (("bands", 0, "levels"), [[16, 4], [4, 4]], "band 0 has 8 columns of"),
        (("bands", 0, "levels"), [[4, 10**12]], "band 0 has 1000000000000 columns"),
        (("bands",), [], "1 to 16 bands"),
        (("bands",), 5, "does not fit the model"),
        (("rows",), 10**13, "tokens, the table 10000000000000"),
    ],
)
def test_a_damaged_layout_is_refused_in_words(damaged, path, value, message):
    def change(table):
        at = table["layout"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    with pytest.raises(StepError, match=f"adaptive-input.*{message}.*make the artifact again"):
        damaged(change)


def test_a_table_for_other_modules_than_there_are_is_refused(damaged):
    def grow(table):
        table["layout"]["rows"] += 10**13
        table["layout"]["bands"][0]["count"] += 10**13

    with pytest.raises(StepError, match="is 320 x 32, its bands 10000000000320 x 32; make the artifact again"):
        damaged(grow)
    with pytest.raises(StepError, match=r"does not fit the model.*make the artifact again"):
        damaged(lambda table: table["embeddings"].update({"transformer.nothing": 1.0}))


def test_damaged_tensors_of_a_table_are_refused(damaged):
    with pytest.raises(StepError, match=r"do not fit.*index gives the bands other tokens"):
        damaged(tensors=lambda state: state["index"].add_(1))
    with pytest.raises(StepError, match=r"do not fit.*mean0_half holds values that are not finite"):
        damaged(tensors=lambda state: state["mean0_half"].fill_(float("nan")))
