"""What the step ``adaptive_input`` refuses: before the work, and of damaged artifacts."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specs.schema.base import FieldError
from specs.schema.graph import build
from specs.schema.pipeline import DataSpec, ModelSpec, PipelineSpec
from tasks.adaptive_input.preflight import look
from tasks.adaptive_input.table import tables
from tasks.context import StepError
from tasks.data import encode
from tasks.look import look as plan
from tasks.models.support import supports
from tasks.models.transforms import Extras, replay
from tests.support import context, tiny_config, write_jsonl
from tests.tasks.banded import load, run, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bad_budgets_are_refused_before_the_work(request, tmp_path):
    config = json.loads((request.getfixturevalue("gpt2") / "config.json").read_text())
    problems, _ = look(spec_of(budget="1 KiB"), config, "text-generation", 32)
    assert "smallest takes" in problems[0]
    assert "write budget: " in problems[0]
    least = int(problems[0].split("smallest takes ")[1].split()[0])
    assert look(spec_of(budget=least), config, "text-generation", 32) == ([], [])
    assert look(spec_of(budget=least - 1), config, "text-generation", 32)[0]
    ctx, result = run(request, tmp_path, "gpt2", budget=least, bits=(16, 4, 1))  # and the step can do it
    assert result.properties["adaptive_input"]["bytes"] <= least
    problems, _ = look(spec_of(ratio="500x"), config, "text-generation", 32)
    assert "x or less" in problems[0]
    problems, _ = look(spec_of(budget="1 MiB"), config, "text-generation", 32)
    assert "nothing is to be done" in problems[0]
    assert "allow_noop" in problems[0]
    assert look(spec_of(budget="1 MiB", allow_noop=True), config, "text-generation", 32) == ([], [])
    with pytest.raises(StepError, match="nothing is to be done"):
        run(request, tmp_path / "b", "gpt2", budget="1 MiB")
    ctx, result = run(request, tmp_path / "c", "gpt2", budget="1 MiB", allow_noop=True)
    assert "asks for nothing" in result.summary
    assert not tables(load(ctx.out))


@pytest.mark.parametrize(
    ("width", "bytes"),
    [
        ({"model_type": "albert", "embedding_size": 32, "hidden_size": 128}, 81_920),
        ({"model_type": "roformer", "embedding_size": None, "hidden_size": 128}, 327_680),
        (
            {"model_type": "rembert", "input_embedding_size": 32, "output_embedding_size": 64, "hidden_size": 128},
            81_920,
        ),
        ({"model_type": "opt", "word_embed_proj_dim": 32, "hidden_size": 128}, 81_920),
        ({"model_type": "xlm", "emb_dim": 32}, 81_920),
    ],
)
def test_the_plan_knows_the_width_of_the_table_where_it_is_not_the_models(width, bytes):
    config = {"vocab_size": 640} | width
    assert look(spec_of(budget=bytes - 1), config, "text-classification", 32) == ([], [])
    problems, _ = look(spec_of(budget=bytes), config, "text-classification", 32)
    assert "nothing is to be done" in problems[0]


def test_the_plan_knows_an_output_layer_of_another_width_than_the_table():
    config = {"vocab_size": 640, "input_embedding_size": 32, "output_embedding_size": 64, "tie_word_embeddings": False}
    assert look(spec_of(budget=4 * 640 * 96 - 1), config, "text-generation", 32) == ([], [])
    assert look(spec_of(budget=4 * 640 * 96), config, "text-generation", 32)[0]


def test_the_plan_says_where_factors_do_not_pay():
    config = {"vocab_size": 4096, "hidden_size": 64, "tie_word_embeddings": True}
    adaptive = {"ratio": 3.0, "method": "adaptive", "bits": None}
    problems, (remark,) = look(spec_of(**adaptive), config, "text-generation", 32)
    assert problems == []
    assert "worse than a dense table after as long a training" in remark
    assert "write softmax: adaptive" in remark
    assert look(spec_of(**adaptive, softmax="adaptive"), config, "text-generation", 32) == ([], [])
    assert look(spec_of(**adaptive, head="leave"), config, "text-generation", 32) == ([], [])
    assert look(spec_of(**adaptive), config, "text-classification", 32) == ([], [])


@pytest.mark.parametrize(
    ("behind", "warned"),
    [
        ([], True),
        ([{"id": "q", "uses": "quantize"}], True),
        ([{"id": "t", "uses": "finetune", "needs": "baseline"}], True),
        ([{"id": "t", "uses": "finetune"}], False),
        ([{"id": "q", "uses": "prune", "sparsity": 0.5, "recover": {"max_steps": 2}}], False),
        ([{"id": "s", "uses": "distill", "teacher": "a", "needs": "baseline"}], True),
    ],
)
def test_the_plan_says_where_nothing_trains_the_factors(review_data, tmp_path, monkeypatch, behind, warned):
    from flows import preflight

    monkeypatch.setattr(preflight, "_model", lambda *given: None)
    steps = [{"id": "a", "uses": "adaptive_input", "ratio": "2x", "method": "adaptive"}, *behind]
    fields = {"name": "a", "task": "text-classification", "model": {"config": tiny_config("bert")}}
    spec = PipelineSpec.model_validate(fields | {"data": review_data.model_dump(), "steps": steps})
    found = preflight.inspect(spec, list(build(spec)), "cpu", 1, tmp_path / "log")
    assert any("a: no step behind it trains the factors" in text for text in found.warnings) == warned


def test_audio_and_models_that_foretell_nothing_are_refused():
    assert "no table of tokens" in str(supports(spec_of(ratio="2x"), "ctc", "speech-recognition"))
    spec = spec_of(ratio="2x", information="contextual")
    assert "write information: unigram" in str(supports(spec, "encoder", "text-classification"))
    assert supports(spec, "decoder", "text-generation") is None


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
        return plan(ModelSpec(source=str(model)), "text-classification", data, [spec_of(ratio="4x")])

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
        spec_of(**fields)
    assert issubclass(FieldError, ValueError)


@pytest.fixture(scope="module")
def damaged(request, tmp_path_factory):
    """Loads a table in bands after a change of its entry in ``lathe.json``, or of its tensors."""
    place = tmp_path_factory.mktemp("damaged")
    ctx, _ = run(request, place, "gpt2", ratio="5x")
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
        (("bands", 0, "count"), -5, "tokens of band 0 is -5 and not a whole number"),
        (("bands", 0, "count"), float("inf"), "does not fit the model"),
        (("bands", 0, "levels"), [], "band 0 has no columns"),
        (("bands", 0, "levels"), [[7, 8]], r"band 0 has the bits \[7\]"),
        (("bands", 0, "levels"), [[1, 4], [4, 4]], "band 0 has the bits"),
        (("bands", 0, "levels"), [[16, 4], [4, 4]], "band 0 has 8 columns of"),
        (("bands", 0, "levels"), [[4, 10**12]], "band 0 has 1000000000000 columns"),
        (("bands", 0, "count"), 20.5, "tokens of band 0 is 20.5 and not a whole number"),
        (("bands", 0, "count"), True, "tokens of band 0 is True and not a whole number"),
        (("bands", 0, "projected"), "no", "projected of band 0 is 'no' and neither true nor false"),
        (("bands", 0, "levels", 0, 1), 8.5, "columns of band 0 is 8.5 and not a whole number"),
        (("width",), "32", "the width is '32' and not a whole number"),
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


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0, -1.0, "abc", [2.0], None, True, 10**400])
def test_a_damaged_factor_is_refused_in_words(damaged, factor):
    with pytest.raises(StepError, match=r"does not fit the model: .*; make the artifact again"):
        damaged(lambda table: table["embeddings"].update({"transformer.wte": factor}))


@pytest.mark.parametrize("value", ["weird", "full", True, 1, ["adaptive"]])
def test_an_unknown_softmax_is_refused_in_words(damaged, value):
    with pytest.raises(StepError, match=r"bands has the softmax .*; make the artifact again"):
        damaged(lambda table: table.update({"softmax": value}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("factor", float("inf"), "the factor of tokens is inf and not a number above 0"),
        ("factor", "abc", "the factor of tokens is 'abc' and not"),
        ("factor", [1.0], "the factor of tokens is .* and not"),
        ("shape", [-6, 8], "the number of rows of tokens is -6 and not a whole number"),
        ("group", 0, "the group of tokens is 0 and not a whole number from 1 to 8"),
        ("group", 4.5, "the group of tokens is 4.5 and not"),
        ("group", 9, "the group of tokens is 9 and not"),
        ("bits", 7, "tokens has 7 bits"),
        ("scale", "int8", "tokens has 4 bits and scales in 'int8'"),
    ],
)
def test_a_damaged_entry_of_packed_layers_is_refused_in_words(field, value, message):
    what = {"shape": [6, 8], "bits": 4, "group": 4, "scale": "float16", "factor": 2.0}
    for name in ["weight-only"] + ["int8-dynamic"] * (field in ("factor", "shape")):
        model = torch.nn.ModuleDict({"tokens": torch.nn.Embedding(6, 8)})
        replay(model, Extras(({"name": name, "embeddings": {"tokens": what}, "layers": {}},)))
        with pytest.raises(StepError, match=f"says of '{name}' does not fit the model: {message}"):
            replay(model, Extras(({"name": name, "embeddings": {"tokens": what | {field: value}}, "layers": {}},)))


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
