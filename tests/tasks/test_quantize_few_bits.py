"""The step ``quantize`` with weight-only, static and mixed integers: what it writes, says and refuses."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from specs.schema.steps.quantize import QuantizeSpec
from tasks.compress import packed, weight_only
from tasks.compress.calibrate import outputs
from tasks.compress.packing import pack_weights
from tasks.compress.quantize import quantize, relative_error, warn
from tasks.compress.selection import select
from tasks.compress.simulate import dynamic_activations, simulated, static_activations
from tasks.context import StepError
from tasks.data import encode
from tasks.evaluate.footprint import of_model
from tasks.models import load
from tests.support import TASKS_OF, as_artifact, context
from tests.tasks import tiny

FAMILIES = ("llama", "gpt2", "bert", "marian", "t5", "whisper", "wav2vec2")


pytestmark = pytest.mark.usefixtures("one_thread")


def _task(family):
    return TASKS_OF.get(family, "text-generation")


def _data(request, family):
    names = {"translation": "pair_data", "speech-recognition": "speech_data", "text-classification": "review_data"}
    return request.getfixturevalue(names.get(_task(family), "text_data")).model_copy(update={"train_limit": 12})


def _run(request, folder, family, **fields):
    ctx = context(folder, _task(family), _data(request, family))
    model = as_artifact(request.getfixturevalue(family))
    return ctx, quantize(model, spec=QuantizeSpec(uses="quantize", id="q", **fields), ctx=ctx)


def _digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


GPTQ = {"precision": "int4", "algorithm": "gptq", "samples": 4}
AWQ = {"precision": "int4", "algorithm": "awq", "samples": 4}
SMOOTH = {"precision": "int8-static", "algorithm": "smoothquant", "samples": 8}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, GPTQ) for family in FAMILIES),
        *((family, AWQ) for family in ("gpt2", "bert", "t5", "whisper")),
        *((family, SMOOTH) for family in ("llama", "gpt2", "marian", "wav2vec2")),
    ],
)
def test_every_family_shrinks_and_comes_back(request, tmp_path, family, fields):
    before = load(request.getfixturevalue(family))
    linear = len(select(before).layers)
    ctx, result = _run(request, tmp_path, family, **fields)
    assert result.kind == "packed"
    assert f"converted {linear} of {linear} linear layers" in result.summary
    assert result.summary.count(fields["algorithm"]) == 1
    assert result.properties["weight_bytes"] < 0.65 * result.properties["weight_bytes_before"]
    assert all("Positional" in reason for reason in result.left.values())
    changed = load(ctx.out)
    modules = [changed.get_submodule(name) for name in result.touched]
    assert all(packed.is_packed(module) or weight_only.is_stored(module) for module in modules)
    stored = load_file(ctx.out / "model.safetensors")
    extras = json.loads((ctx.out / "lathe.json").read_text())
    state = changed.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert set(state) == set(stored) | set(extras["aliases"])
    examples = encode(ctx.data, "train", ctx.task, ctx.out, ctx.store).take(slice(0, 8))
    error = relative_error(outputs(before, examples), outputs(changed, examples))
    assert error == pytest.approx(result.properties["output_error"], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_weight_only_logits_are_those_of_rounded_weights(request, tmp_path, family, precision):
    ctx, result = _run(request, tmp_path, family, precision=precision)
    changed, rounded = load(ctx.out), load(request.getfixturevalue(family))
    with torch.no_grad():
        for name in result.touched:
            module = changed.get_submodule(name)
            rounded.get_submodule(name).weight.copy_(weight_only._rows(module))
    examples = encode(ctx.data, "train", ctx.task, ctx.out, ctx.store).take(slice(0, 8))
    assert torch.equal(outputs(changed, examples), outputs(rounded, examples))
    assert result.properties["bits"] == dict.fromkeys(result.touched, int(precision[3:]))
    assert result.metrics == {}


def test_what_is_tied_is_stored_once(request, tmp_path):
    ctx, _ = _run(request, tmp_path, "gpt2", precision="int4")
    stored = load_file(ctx.out / "model.safetensors")
    tables = [name for name, tensor in stored.items() if tensor.shape[0] >= 300 and name.endswith("_int4")]
    assert tables == ["transformer.wte.weight_int4"]
    model = load(ctx.out)
    assert model.lm_head.weight_int4.data_ptr() == model.transformer.wte.weight_int4.data_ptr()


@pytest.mark.parametrize("precision", ["int4", "int8", "int8-dynamic"])
@pytest.mark.parametrize("what", ["layers", "embeddings"])
def test_a_size_that_the_file_does_not_have_takes_no_memory(request, tmp_path, precision, what):
    ctx, _ = _run(request, tmp_path, "llama", precision=precision)
    file = ctx.out / "lathe.json"
    extras = json.loads(file.read_text())
    (entry,) = [one for one in extras["transforms"] if one.get(what)]
    next(iter(entry[what].values()))["shape"] = [10**7, 10**7]
    file.write_text(json.dumps(extras))
    with pytest.raises(StepError, match="the weights do not fit the recorded transforms"):
        load(ctx.out)


def test_two_runs_give_the_same_bytes(request, tmp_path):
    fields = {"mixed": {"budget": "60 KiB"}, "algorithm": "gptq", "samples": 4}
    folders = [_run(request, tmp_path / name, "llama", **fields)[0].out for name in ("one", "two")]
    assert _digest(folders[0]) == _digest(folders[1])
    assert {"sensitivity.svg", "sensitivity.png"} <= _digest(folders[0]).keys()


def test_the_footprint_counts_weights_not_bytes(request, tmp_path):
    ctx, _ = _run(request, tmp_path, "llama", precision="int4")
    before, after = of_model(request.getfixturevalue("llama")), of_model(ctx.out)
    assert after.parameters == before.parameters
    assert 0.8 * before.nonzero < after.nonzero < before.nonzero


@pytest.mark.parametrize(("family", "algorithm"), [("llama", "rtn"), ("bert", "awq")])
def test_mixed_fills_the_budget_and_never_exceeds_it(request, tmp_path, family, algorithm):
    sums, sizes = [], []
    for budget in (45_000, 90_000):
        fields = {"mixed": {"budget": budget}, "samples": 4, "algorithm": algorithm}
        ctx, result = _run(request, tmp_path / str(budget), family, **fields)
        size = (ctx.out / "model.safetensors").stat().st_size
        assert size == result.properties["weight_bytes"] <= budget
        found = {row["layer"]: row for row in result.properties["sensitivity"]}
        sums.append(sum(row[f"error_{row['bits']}"] ** 2 for row in found.values()))
        sizes.append(size)
        assert set(result.properties["bits"].values()) <= {4, 8, 16}
        assert all(row["error_4"] >= row["error_16"] for row in found.values())
    assert sums == sorted(sums, reverse=True)
    assert sizes == sorted(sizes)
    assert (ctx.out / "sensitivity.svg").read_bytes().startswith(b"<?xml")


def test_a_budget_for_16_bits_everywhere_is_told(request, tmp_path, monkeypatch):
    from tasks.compress import sensitivity

    monkeypatch.setattr(sensitivity, "draw", lambda *_: {})
    _, result = _run(request, tmp_path, "bert", mixed={"budget": "1 MiB"}, samples=1)
    assert set(result.properties["bits"].values()) == {16}
    assert result.warnings == ("mixed: 1048576 bytes hold every layer in 16 bits; write a smaller budget",)


def test_the_sensitivity_is_the_error_with_one_layer_rounded(request, tmp_path):
    ctx, result = _run(request, tmp_path, "llama", precision="int4", sensitivity=True, samples=4)
    from tasks.compress.calibrate import sample

    data = sample(as_artifact(request.getfixturevalue("llama")), 4, ctx)
    name = "model.layers.0.mlp.down_proj"
    network = load(request.getfixturevalue("llama"))
    before = outputs(network, data)
    with torch.no_grad():
        weight = network.get_submodule(name).weight
        weight.copy_(weight_only._rows(load(ctx.out).get_submodule(name)))
    row = next(row for row in result.properties["sensitivity"] if row["layer"] == name)
    assert row["error_4"] == pytest.approx(relative_error(before, outputs(network, data)), rel=1e-3)
    order = [row["error_4"] for row in result.properties["sensitivity"]]
    assert order == sorted(order, reverse=True)


def test_a_static_layer_computes_what_integers_compute():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(40, 12), torch.randn(5, 40)
    weight, scale = packed.quantize_rows(layer.weight)
    low, high = -2.0, 3.0
    static = packed.packed_linear(weight, scale, layer.bias.detach(), None, torch.tensor([low, high]))
    with torch.inference_mode():
        y = static(x)
    top = 127 if packed.reduced_range() else 255
    step = (high - low) / top
    zero = round(-low / step)
    codes = (torch.round(x / step) + zero).clamp(0, top) - zero
    exact = (codes.long() @ weight.long().T).double() * step * scale + layer.bias
    assert relative_error(exact, y.double()) < 1e-3
    huge = static(torch.full((1, 40), 1e6))
    assert torch.allclose(huge, static(torch.full((1, 40), high)), atol=1e-4), "what lies outside is clipped"
    assert torch.allclose(static_activations(low, high)(x), codes * step, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_training_sees_what_will_be_stored(family):
    model = tiny.network(family)
    data = (tiny.sentences if family == "bert" else tiny.language)(count=6)
    selection = select(model)
    groups = {4: 32, 8: None}
    from tasks.compress.grid import round_to

    weights = dict.fromkeys(selection.names, lambda weight: round_to(weight, 4, 32).weight)
    plain = outputs(model, data)
    with simulated(model, weights):
        seen = outputs(model, data)
    assert torch.equal(outputs(model, data), plain), "nothing is left behind"
    stored, _ = pack_weights(model, selection, dict.fromkeys(selection.names, 4), groups)
    assert torch.allclose(seen, outputs(stored, data), atol=1e-6)
    assert relative_error(plain, seen) > 0.01


def test_simulated_activations_are_the_kernels():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(48, 24), torch.randn(6, 48)
    weight, scale = packed.quantize_rows(layer.weight)
    bias = layer.bias.detach()
    with torch.inference_mode():
        kernel = packed.packed_linear(weight, scale, bias)(x)
        ours = torch.nn.functional.linear(dynamic_activations(x), weight * scale[:, None], bias)
    assert relative_error(kernel, ours) < 5e-3
    given = x.clone().requires_grad_()
    dynamic_activations(given).sum().backward()
    assert torch.equal(given.grad, torch.ones_like(x))
    given.grad = None
    static_activations(-1.0, 1.0)(given).sum().backward()
    inside = (x >= -1) & (x <= 1)
    assert ((given.grad != 0) == inside).float().mean() > 0.97


def test_gradients_go_straight_through_to_the_float_weights():
    model = tiny.network("llama")
    data = tiny.language(count=4)
    weights = dict.fromkeys(select(model).names, lambda weight: torch.round(weight * 128) / 128)
    model.requires_grad_(True)
    with simulated(model, weights):
        ids = torch.from_numpy(data.input_ids).long()
        model(input_ids=ids).logits.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize("family", ["bert", "wav2vec2"])
def test_training_with_static_activations_runs(request, tmp_path, family):
    train = {"max_steps": 1, "batch_size": 4, "validation": 0}
    _, result = _run(request, tmp_path, family, precision="int8-static", samples=12, train=train)
    assert result.properties["training"]["steps"] == 1
    assert "trained" in result.summary
    assert result.properties["dynamic_layers"] == []


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"precision": "int4", "error": {"at_most": "0.1%"}}, r"differ.*error allows 0.001 of 1.*gptq may do"),
        (
            "llama",
            {"mixed": {"budget": "9 KiB"}, "samples": 2},
            r"a budget of 9216 bytes is not to be had.*write b",
        ),
        ("bert", {"precision": "int4", "skip": ("*",)}, "no linear layer to convert"),
        ("bert", {"precision": "int4", "skip": ("clasifier",)}, r"did you mean classifier\?"),
    ],
)
def test_what_cannot_be_is_said(request, tmp_path, family, fields, message):
    with pytest.raises(StepError, match=message):
        _run(request, tmp_path, family, **fields)


def test_a_saturated_layer_is_refused(request, tmp_path, monkeypatch):
    from tasks.compress import few_bits

    monkeypatch.setattr(few_bits, "share_outside", lambda *_: {"lm_head": 0.0, "model.layers.0.mlp.up_proj": 0.02})
    with pytest.raises(StepError, match=r"0.mlp.up_proj saturates: 2.0% of its activations.*raise samples"):
        _run(request, tmp_path, "llama", precision="int8-static", samples=4)


def test_the_plan_says_what_it_knows():
    spec = QuantizeSpec(uses="quantize", id="q", precision="int4", algorithm="gptq")
    problems, warnings = warn(spec, {"model_type": "mamba"}, "text-generation", 32)
    assert "the parts of mamba models are not described; write algorithm: rtn" in problems[0]
    assert "not the model faster" in warnings[0]
    assert warn(spec, {"model_type": "llama"}, "text-generation", 32)[0] == []
    assert warn(QuantizeSpec(uses="quantize", id="q"), {"model_type": "mamba"}, "text-generation", 32) == ([], [])
