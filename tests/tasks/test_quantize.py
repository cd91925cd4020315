import copy

import pytest
import torch

from tasks.compress import packed
from tasks.compress.calibrate import outputs
from tasks.compress.packing import pack_int8
from tasks.compress.quantize import halve, relative_error, weight_bytes
from tasks.compress.selection import select
from tasks.context import StepError
from tasks.models import load, save
from tests.tasks import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def _data(kind):
    return (tiny.sentences if kind == "bert" else tiny.language)(count=8)


def _naive(x, weight, scale, bias, levels):
    """Dynamic int8 by its definition: tokens scaled to 1, one zero point for them all, integer products."""
    largest = x.abs().amax(-1, keepdim=True)
    unit = x / largest
    low, high = min(float(unit.min()), 0.0), max(float(unit.max()), 0.0)
    step = (high - low) / levels
    zero = round(-low / step)
    activations = (torch.round(unit / step) + zero).clamp(0, levels) - zero
    products = activations.to(torch.int64) @ weight.to(torch.int64).T
    y = products.double() * step * scale * largest
    return y + (bias if bias is not None else 0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_integers_compute(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 24, bias=bias)
    x = torch.randn(2, 5, 48) * torch.tensor([1.0, 100.0, 0.01, 1.0, 3.0])[:, None]
    # A range from -1 to 1 has its zero half way between two integers, where each kernel rounds in its own way.
    x = torch.where(x.amax(-1, keepdim=True) < -x.amin(-1, keepdim=True), -x, x)
    weight, scale = packed.quantize_rows(layer.weight)
    offset = layer.bias.detach() if bias else None
    with torch.inference_mode():
        y = packed.packed_linear(weight, scale, offset)(x)
    expected = _naive(x, weight, scale, offset, 127 if packed.reduced_range() else 255)
    assert relative_error(expected, y.double()) < 2e-3  # the kernel nudges its zero point
    rows = ((y - layer(x)).norm(dim=-1) / layer(x).norm(dim=-1)).detach()
    assert rows.max() < 0.03, "a token of large magnitude must not cost the others their resolution"


def test_the_largest_products_do_not_saturate():
    inputs = 512
    for sign in (1, -1):
        weight = torch.full((8, inputs), sign * 127, dtype=torch.int8)
        layer = packed.packed_linear(weight, torch.ones(8), None)
        x = torch.ones(4, inputs)
        x[0] = -1
        with torch.inference_mode():
            y = layer(x)
        expected = torch.tensor([-1.0, 1, 1, 1])[:, None] * sign * 127 * inputs
        assert torch.allclose(y, expected.expand(4, 8), rtol=0.02)


def test_rows_round_to_the_nearest_and_zeros_stay_zeros():
    weight = torch.tensor([[1.27, -0.634, 0.0], [0.0, 0.0, 0.0], [-254.0, 1.0, 3.0]])
    integers, scale = packed.quantize_rows(weight)
    assert integers.tolist() == [[127, -63, 0], [0, 0, 0], [-127, 0, 2]]
    assert scale.tolist() == pytest.approx([0.01, 1.0, 2.0])


@pytest.mark.parametrize(
    ("kind", "tied", "linear", "tables"),
    [("llama", True, 15, 1), ("llama", False, 15, 1), ("gpt2", True, 9, 2), ("bert", False, 14, 3)],
)
def test_every_linear_and_table_is_packed_and_survives_the_file(tmp_path, kind, tied, linear, tables):
    from safetensors.torch import load_file

    model = tiny.network(kind, tie_word_embeddings=tied)
    data = _data(kind)
    reference = outputs(model, data)
    save(model, tmp_path / "float")
    plan = select(model)
    assert (len(plan.layers), len(plan.embeddings), plan.left) == (linear, tables, {})
    model, entry = pack_int8(model, plan)
    modules = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]
    assert modules == []
    save(model, tmp_path / "int8", transforms=[entry])
    loaded = load(tmp_path / "int8")
    assert torch.equal(outputs(loaded, data), outputs(model, data))
    assert relative_error(reference, outputs(loaded, data)) < 0.02
    assert weight_bytes(tmp_path / "int8") < 0.5 * weight_bytes(tmp_path / "float")
    stored = load_file(tmp_path / "int8/model.safetensors")
    integers = [name for name, tensor in stored.items() if tensor.dtype == torch.int8]
    assert len(integers) == linear + tables - tied
    assert all(name.endswith(".weight_int8") for name in integers)
    if tied:
        owner = loaded.get_input_embeddings()
        assert loaded.lm_head.weight_int8.data_ptr() == owner.weight_int8.data_ptr()
        assert torch.equal(loaded.lm_head.weight_scale, owner.weight_scale)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_logits_are_those_of_a_model_with_rounded_weights(kind):
    model = tiny.network(kind, tie_word_embeddings=kind != "bert")
    data = _data(kind)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if hasattr(module, "weight") and module.weight.ndim == 2:
                conv = type(module).__name__ == "Conv1D"
                integers, scale = packed.quantize_rows(module.weight.T if conv else module.weight)
                value = integers * scale[:, None]
                module.weight.copy_(value.T if conv else value)
    packed_model, _ = pack_int8(model, select(model))
    assert relative_error(outputs(rounded, data), outputs(packed_model, data)) < 0.02


def test_padding_and_other_examples_hardly_change_the_logits():
    model = tiny.network("bert")
    model, _ = pack_int8(model, select(model))
    data = _data("bert")
    together = outputs(model, data)
    alone = torch.cat([outputs(model, data.take(slice(at, at + 1))) for at in range(8)])
    assert relative_error(alone, together) < (0.04 if packed.reduced_range() else 0.02)


def test_a_model_that_is_itself_a_linear_layer_is_converted():
    layer = torch.nn.Linear(16, 8)
    plan = select(layer)
    assert plan.layers == ("",)
    model, entry = pack_int8(layer, plan)
    assert packed.is_packed(model)
    assert entry["layers"] == {"": {"shape": [8, 16], "bias": True}}
    x = torch.randn(3, 16)
    assert relative_error(layer(x), model(x)) < 0.03


def test_conv1d_is_transposed():
    model = tiny.network("gpt2")
    expected = model.transformer.h[0].mlp.c_fc(torch.ones(1, 32))
    model, entry = pack_int8(model, select(model))
    assert entry["layers"]["transformer.h.0.mlp.c_fc"] == {"shape": [128, 32], "bias": True}
    assert relative_error(expected, model.transformer.h[0].mlp.c_fc(torch.ones(1, 32))) < 0.02


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_embeddings_a_tied_head_stays_float_and_tied(tmp_path, kind):
    from safetensors.torch import load_file

    model = tiny.network(kind, tie_word_embeddings=True)
    table = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}[kind]
    plan = select(model, tables=False)
    assert plan.left["lm_head"] == f"tied to {table}, which stays float"
    assert plan.left[table] == "embeddings: false"
    model, entry = pack_int8(model, plan)
    save(model, tmp_path, transforms=[entry])
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.shape == (64, 32) and tensor.dtype == torch.float32 for tensor in stored.values()) == 1
    data = _data(kind)
    assert torch.equal(outputs(load(tmp_path), data), outputs(model, data))


def test_a_skipped_head_keeps_the_table_it_is_tied_to():
    plan = select(tiny.network("llama", tie_word_embeddings=True), skip=("lm_head", "*.q_proj"))
    assert plan.left == {
        "lm_head": "skip: lm_head",
        "model.layers.0.self_attn.q_proj": "skip: *.q_proj",
        "model.layers.1.self_attn.q_proj": "skip: *.q_proj",
        "model.embed_tokens": "tied to lm_head, which stays float",
    }
    assert len(plan.layers) == 12


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name():
    with pytest.raises(StepError, match=r"skip: 'lm_heed' matches no linear layer.*did you mean lm_head\?"):
        select(tiny.network("llama"), skip=("lm_heed",))


def test_a_subclass_of_linear_is_left_with_the_reason():
    class Special(torch.nn.Linear):
        pass

    plan = select(torch.nn.Sequential(torch.nn.Linear(4, 4), Special(4, 4)))
    assert plan.layers == ("0",)
    assert plan.left == {"1": "Special may use its weight in other ways"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_halves_the_file_and_plain_transformers_loads_it(tmp_path, precision):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = tiny.network("llama", tie_word_embeddings=True)
    data = _data("llama")
    reference = outputs(model, data)
    save(model, tmp_path / "float")
    halve(model, precision)
    save(model, tmp_path / "half", compute_dtype="float32")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    assert {tensor.dtype for tensor in load_file(tmp_path / "half/model.safetensors").values()} == {dtype}
    assert weight_bytes(tmp_path / "half") < 0.6 * weight_bytes(tmp_path / "float")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == dtype
    loaded = load(tmp_path / "half")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert relative_error(reference, outputs(loaded, data)) < (1e-3 if precision == "fp16" else 1e-2)


def test_a_weight_beyond_fp16_is_refused():
    model = tiny.network("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(StepError, match=r"lm_head.weight holds 1e\+05.*write precision: bf16"):
        halve(model, "fp16")
