"""The step that takes whole parts out: an ordinary smaller model, as large or as fast as asked for, and what cannot
be."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from specs.schema.steps.finetune import TrainingSpec
from specs.schema.steps.prune import PruneSpec
from specs.schema.units import parse_keep
from tasks.compress import cut, search, structured
from tasks.compress.prune import look, prune, refuses
from tasks.context import StepError
from tasks.data import encode
from tasks.models import load
from tasks.models.applications import auto_for
from tasks.models.layout import tied_weights
from tests.support import TASKS_OF, as_artifact, context
from tests.tasks import tiny
from tests.tasks.test_models_anatomy import TASKS, inputs, make
from tests.tasks.test_models_writers import generated
from tests.tasks.test_models_writers import inputs as spoken

FAMILIES = ("llama", "gpt2", "bert", "marian", "t5", "bart", "whisper", "wav2vec2")


def spec(method: str = "width", **fields: Any) -> PruneSpec:
    return PruneSpec(uses="prune", id="p", **{"method": method, "keep": "50%", **fields})


def data_of(request, family: str) -> tuple[Any, Any]:
    task = TASKS_OF.get(family, "text-generation")
    names = {"text-generation": "text", "text-classification": "review", "translation": "pair"}
    return task, request.getfixturevalue(f"{names.get(task, 'speech')}_data").model_copy(update={"train_limit": 8})


def plain(folder: Any, task: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return auto_for(task, config.model_type).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["width", "depth"])
def test_the_result_is_an_ordinary_smaller_model(request, tmp_path, family, method):
    task, data = data_of(request, family)
    folder = request.getfixturevalue(family)
    ctx = context(tmp_path, task, data)
    by = "taylor" if (family in ("t5", "gpt2", "wav2vec2")) == (method == "width") else "activation"
    hidden = method == "width" and family not in ("marian", "llama")
    parts = {"parts": ("heads", "ffn", "hidden")} if hidden else {}
    recover = TrainingSpec(max_steps=1, batch_size=4, validation=0) if family in ("llama", "whisper") else None
    result = prune(
        as_artifact(folder), spec=spec(method, importance=by, calibration_examples=4, recover=recover, **parts), ctx=ctx
    )
    assert not (ctx.out / "lathe.json").exists()
    whole, ours, theirs = load(folder), load(ctx.out), plain(ctx.out, task)
    given = spoken(family) if family not in ("llama", "gpt2", "bert", "wav2vec2") else inputs(family)
    if family in ("marian", "t5", "bart", "whisper"):
        given = {**given, "decoder_input_ids": torch.tensor([[4, 5, 6]] * 3)}
    with torch.no_grad():
        assert torch.equal(ours(**given).logits, theirs(**given).logits)
    assert {one.partition(".")[2] for one in tied_weights(ours)} == {
        one.partition(".")[2] for one in tied_weights(whole)
    }
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, ctx.out)]
    assert sizes[1] < sizes[0]
    assert result.properties["parameters"] < result.properties["parameters_before"]
    written = json.loads((ctx.out / "config.json").read_text())
    for name, (old, new) in result.properties["shape"].items():
        assert (written[name], new <= old) == (new, True)
    assert result.touched
    if family == "whisper" and method == "depth":  # its sines are not trained
        sines = [model.model.encoder.embed_positions.weight for model in (whole, ours)]
        assert torch.equal(*sines)
    if family in ("llama", "gpt2"):
        ids = torch.tensor([[5, 6, 7]])
        both = [
            model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use)
            for model, use in ((theirs, True), (theirs, False))
        ]
        assert torch.equal(*both)
    elif family not in ("bert", "wav2vec2"):
        generated(theirs, spoken(family))


def test_two_runs_give_the_same_bytes(tmp_path, llama, text_data):
    made = []
    for number in range(2):
        ctx = context(tmp_path / str(number), "text-generation", text_data)
        prune(as_artifact(llama), spec=spec(calibration_examples=4), ctx=ctx)
        made.append((ctx.out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_one_stack_alone_becomes_shallower(tmp_path, bart, pair_data):
    ctx = context(tmp_path, "translation", pair_data)
    result = prune(as_artifact(bart), spec=spec("depth", stacks=["decoder"], calibration_examples=2), ctx=ctx)
    assert result.touched == ("model.decoder.layers",)
    assert result.left == {"model.encoder.layers": "stacks does not name the encoder"}
    config = load(ctx.out).config
    assert (config.encoder_layers, config.decoder_layers) == (2, 1)  # type: ignore[union-attr]
    generated(load(ctx.out), spoken("bart"))


def test_the_result_can_be_quantized(tmp_path, gpt2, text_data):
    from specs.schema.steps.quantize import QuantizeSpec
    from tasks.compress.quantize import quantize

    ctx = context(tmp_path, "text-generation", text_data)
    prune(as_artifact(gpt2), spec=spec(parts=["heads", "ffn", "hidden"], calibration_examples=4), ctx=ctx)
    after = context(tmp_path / "q", "text-generation", text_data)
    quantized = quantize(as_artifact(ctx.out), spec=QuantizeSpec(uses="quantize", id="q"), ctx=after)
    assert quantized.properties["weight_bytes"] < quantized.properties["weight_bytes_before"]


def way(model: Any, **fields: Any) -> structured.Way:
    return structured._WAYS[fields.get("method", "width")](model, spec(**fields))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["width", "depth"])
def test_as_many_parameters_as_fit_stay(method):
    model = make("llama", num_hidden_layers=4, intermediate_size=160)
    smaller = way(model, method=method)
    sizes = [parameters(cut.shell(model, smaller.config(shape))) for shape in search.shapes(smaller)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == parameters(model)
    for target in (sizes[1], sizes[-1], (sizes[1] + sizes[2]) // 2):
        shape = search.by_size(smaller, model, parse_keep(f"{target} parameters"))
        assert parameters(cut.shell(model, smaller.config(shape))) == max(size for size in sizes if size <= target)


def test_the_largest_shape_that_is_fast_enough_stays(monkeypatch, tmp_path):
    model = make("llama", intermediate_size=160)
    smaller = way(model)
    monkeypatch.setattr(search, "_seconds", lambda network, given, ctx: parameters(network) / 1e6)
    ctx = tiny.context(tmp_path)
    scores = smaller.scores(tiny.language(4), ctx)
    sizes = [parameters(cut.shell(model, smaller.config(shape))) for shape in search.shapes(smaller)]
    shape, times = search.by_time(smaller, scores, tiny.language(4), parse_keep(f"{sizes[3] / 1e6} s"), ctx)
    assert shape == search.shapes(smaller)[3]
    assert {"shape": shape, "seconds": sizes[3] / 1e6} in times
    assert len(times) < len(sizes)
    monkeypatch.setattr(search, "_seconds", lambda network, given, ctx: 0.0)  # after a kill it does not measure again
    again = search.by_time(smaller, scores, tiny.language(4), parse_keep("1 s"), ctx)
    assert again == (shape, times)
    (ctx.checkpoints / search.FILE).unlink()
    monkeypatch.setattr(search, "_seconds", lambda network, given, ctx: parameters(network) / 1e6)
    with pytest.raises(StepError, match="the whole model takes"):
        search.by_time(smaller, scores, tiny.language(4), parse_keep("60 s"), ctx)
    with pytest.raises(StepError, match=r"the smallest shape .* takes .* let more parts go"):
        search.by_time(smaller, scores, tiny.language(4), parse_keep("1 us"), ctx)


@pytest.mark.parametrize("method", ["width", "depth"])
def test_the_step_keeps_as_much_as_a_time_allows(monkeypatch, tmp_path, llama, text_data, method):
    """On a machine whose times are known: a microsecond for every thousand parameters."""
    timed = []

    def seconds(network: Any, given: Any, ctx: Any) -> float:
        timed.append(parameters(network))
        return timed[-1] * 1e-9

    monkeypatch.setattr(search, "_seconds", seconds)
    network = load(llama)
    smaller = way(network, method=method)
    sizes = [parameters(cut.shell(network, smaller.config(shape))) for shape in search.shapes(smaller)]
    limit = (sizes[0] + sizes[-1]) // 2
    ctx = context(tmp_path, "text-generation", text_data)
    result = prune(as_artifact(llama), spec=spec(method, keep=f"{limit / 1e6} ms", calibration_examples=4), ctx=ctx)
    best = max(size for size in sizes if size <= limit)
    assert parameters(load(ctx.out)) == best == result.properties["parameters"]
    candidates = result.properties["candidates"]
    assert [one["seconds"] for one in candidates] == sorted((size * 1e-9 for size in set(timed)), reverse=True)
    assert {"shape": {name: new for name, (_, new) in result.properties["shape"].items()}, "seconds": best * 1e-9} in (
        candidates
    )
    assert "another machine, or a busy one, may choose another" in result.warnings[0]


def test_a_time_that_cannot_be_met_leaves_nothing(monkeypatch, tmp_path, llama, text_data):
    monkeypatch.setattr(search, "_seconds", lambda network, given, ctx: parameters(network) * 1e-9)
    ctx = context(tmp_path, "text-generation", text_data)
    with pytest.raises(StepError, match=r"keep: 1 us: the smallest shape .* takes .* ms; write more"):
        prune(as_artifact(llama), spec=spec(keep="1 us", calibration_examples=4), ctx=ctx)
    assert list(ctx.out.iterdir()) == []


def test_a_time_is_measured_alone_and_recorded(tmp_path, llama, text_data):
    held = []

    @contextlib.contextmanager
    def exclusive():
        held.append(True)
        yield

    ctx = replace(context(tmp_path, "text-generation", text_data), exclusive=exclusive)
    network = load(llama)
    given = search._example(encode(text_data, "train", ctx.task, llama, ctx.store), ctx)
    assert given["input_ids"].shape == (1, text_data.max_length)
    assert 0 < search._seconds(network, given, ctx) < 60
    assert held == [True]


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("bert", {"parts": ["heads"]}, "can only go together; write parts: .ffn."),
        ("gpt2", {"parts": ["hidden"]}, "can only go together"),
        ("marian", {"parts": ["heads", "hidden"]}, "marian computes its positions from the hidden size"),
        ("plbart", {"parts": ["heads", "hidden"]}, "scale_embedding: true"),
        ("llama", {"keep": "5M"}, "the model has 3.* parameters, which is no more"),
        ("llama", {"keep": "100 parameters"}, "the smallest shape .* has 2.* parameters"),
        ("llama", {"keep": "99%"}, "rounds to the whole model .* write keep: 9.* or less"),
        ("llama", {"method": "depth", "keep": "90%"}, "rounds to the whole model .* write keep: 74.75% or less"),
        ("llama", {"method": "depth", "stacks": ["encoder"]}, r"has no encoder; write stacks: \[decoder\]"),
    ],
)
def test_the_plan_says_what_cannot_be(kind, fields, reason):
    config = make(kind).config.to_dict()
    problems, warnings = look(spec(**fields), config, TASKS.get(kind, "translation"), 16)
    assert len(problems) == 1
    assert re.search(reason, problems[0]), problems
    assert warnings == []


def test_one_block_cannot_go():
    config = make("llama", num_hidden_layers=1).config.to_dict()
    problems, _ = look(spec("depth"), config, "text-generation", 16)
    assert problems == ["method: depth leaves at least one block, and the decoder has no more; use method: width"]
    scaled = make("gpt2", scale_attn_by_inverse_layer_idx=True).config.to_dict()
    assert "scaled by the number of the block" in look(spec("depth"), scaled, "text-generation", 16)[0][0]
    assert look(spec("depth"), make("llama").config.to_dict(), "text-generation", 16) == ([], [])


def test_the_table_says_what_a_family_has_not():
    assert refuses(None, "ctc", "speech-recognition") is None
    assert refuses(spec(), "ctc", "speech-recognition") is None
    assert "has no decoder" in str(refuses(spec("depth", stacks=["decoder"]), "ctc", "speech-recognition"))
    assert "read text" in str(
        refuses(PruneSpec(uses="prune", id="v", method="vocabulary"), "ctc", "speech-recognition")
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "width"}, "method width needs `keep`; write for example keep: 50%"),
        ({"method": "threshold"}, "method threshold needs `threshold`; write for example threshold: 0.02"),
        (
            {"method": "depth", "keep": 0.5, "parts": ["ffn"]},
            "method depth takes no `parts`; leave it out",
        ),
        (
            {"sparsity": 0.5, "keep": 0.5},
            "takes no `keep`; leave it out, or write method: width or depth",
        ),
        ({"method": "vocabulary", "keep": 0.5}, "method vocabulary takes no `keep`"),
        ({"method": "width", "keep": "100%"}, "neither of them prunes; write for example 50%, 5M or 8 ms"),
        ({"method": "width", "keep": 0}, "neither of them prunes"),
        ({"method": "width", "keep": "0 ms"}, "is not above 0"),
        ({"method": "width", "keep": "8 mb"}, "unit 'mb' is unknown"),
        ({"method": "width", "keep": 0.5, "parts": ["ffn", "ffn"]}, "parts names the same twice"),
        ({"method": "width", "keep": 0.5, "calibration_examples": 0}, "greater than 0"),
    ],
)
def test_a_mistake_names_field_and_method(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneSpec(uses="prune", id="p", **fields)


@pytest.mark.parametrize("keep", ["50%", 0.25, "5M", "1.5B", "20k", "1234 parameters", "8 ms", "2 s"])
def test_what_is_kept_can_be_written_and_read(keep):
    one = spec(keep=keep)
    assert PruneSpec.model_validate(one.model_dump(mode="json")) == one
    assert parse_keep(str(one.keep)) == one.keep
