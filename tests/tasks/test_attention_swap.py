"""The step ``attention`` and what it puts into models: masks, caches, what falls back, what is recorded and refused."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from specs.schema.graph import GraphError, build
from specs.schema.pipeline import PipelineSpec
from specs.schema.steps.attention import AttentionSpec
from specs.schema.steps.finetune import FinetuneSpec, TrainingSpec
from specs.schema.steps.quantize import QuantizeSpec
from tasks.attention import breakeven, kernel, swap
from tasks.attention.attention import attention, look, refuses
from tasks.attention.hashing import fit
from tasks.compress.quantize import quantize
from tasks.context import StepError
from tasks.finetune.finetune import finetune
from tasks.models import load
from tasks.models.transforms import read_extras
from tests import support
from tests.support import as_artifact, context
from tests.tasks import tiny


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(breakeven, "LENGTHS", (16, 32))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**({"uses": "attention", "id": "a", "samples": 4} | fields))


def _swap(model: Any, probes: int = 4, window: int = 8, limit: float | None = None, min_length: int = 0) -> Any:
    """Every attention of ``model`` in 4 buckets of random centres; with 4 probes it is exact."""
    for module in swap.dispatching(model).values():
        heads, kv = _heads(model.config)
        width = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", 8)
        keys = torch.randn(kv, 64, width, generator=torch.Generator().manual_seed(heads))
        hashed = fit("centroid", keys, 4, torch.Generator().manual_seed(0))
        settings = {"method": "lsh", "probes": probes, "window": window, "band": 0, "residual": True}
        settings |= {"min_length": min_length, "limit": limit}
        swap.put(module, settings, swap.tensors_of(hashed))
    swap.use(model)
    return model.eval()


def _heads(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_attention_heads", None) or config.n_head
    return heads, getattr(config, "num_key_value_heads", heads)


def _tokens(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def _padding(left: bool) -> torch.Tensor:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, slice(0, 9) if left else slice(15, 24)] = 0
    return mask


@pytest.mark.parametrize("padded", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_model_whose_queries_look_into_every_bucket_computes_what_it_did(kind, padded):
    model = tiny.network(kind)
    given = {"input_ids": _tokens()}
    if padded != "none":
        given["attention_mask"] = _padding(padded == "left")
    with torch.no_grad():
        before = model(**given).logits
        after = _swap(model)(**given).logits
    if kind != "bert" and padded != "none":
        before, after = (logits[given["attention_mask"].bool()] for logits in (before, after))
    assert torch.allclose(before, after, atol=1e-4)
    assert swap.counts(model) == {"lsh": 2}
    if padded == "none":
        with torch.no_grad():
            fewer = _swap(tiny.network(kind), probes=1)(**given).logits
        assert not torch.equal(before, fewer)


@pytest.mark.parametrize("kind", ["marian", "whisper", "wav2vec2"])
def test_encoders_cross_attention_and_decoders_are_replaced(kind):
    model = tiny.writer(kind)
    with torch.no_grad():
        if kind == "wav2vec2":
            given = {"input_values": torch.randn(2, 900, generator=torch.Generator().manual_seed(0))}
        elif kind == "whisper":
            given = {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": _tokens() % 32}
        else:
            given = {
                "input_ids": _tokens() % 32,
                "attention_mask": _padding(False),
                "decoder_input_ids": _tokens() % 32,
            }
        before = model(**given).logits
        after = _swap(model)(**given).logits
    assert torch.allclose(before, after, atol=1e-4)
    assert swap.counts(model) == {"lsh": 2 if kind == "wav2vec2" else 6}


def test_prefill_then_decode_is_one_pass():
    model = _swap(tiny.network("llama"), probes=1)
    tokens = _tokens(1, 40)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :24], use_cache=True)
        second = model(tokens[:, 24:39], past_key_values=first.past_key_values, use_cache=True)
        last = model(tokens[:, 39:], past_key_values=second.past_key_values, use_cache=True)
    assert torch.allclose(whole[:, :24], first.logits, atol=1e-4)
    assert torch.allclose(whole[:, 24:39], second.logits, atol=1e-4)
    assert swap.counts(model) == {"exact: one query": 2, "lsh": 6}
    exact = tiny.network("llama")
    with torch.no_grad():
        assert torch.allclose(
            _swap(exact)(tokens).logits[:, -1], tiny.network("llama")(tokens).logits[:, -1], atol=1e-4
        )
    assert last.logits.shape == (1, 1, 64)


def test_what_buckets_cannot_honour_is_exact_and_counted():
    tokens = _tokens()
    packed = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    plain, model = tiny.network("llama"), _swap(tiny.network("llama"), probes=1)
    given = {"input_ids": tokens, "position_ids": packed, "use_cache": False}
    with torch.no_grad():
        assert torch.allclose(plain(**given).logits, model(**given).logits, atol=1e-5)
    assert swap.counts(model) == {"exact: a mask of its own": 2}
    made = [
        network.generate(tokens, max_new_tokens=4, do_sample=False, cache_implementation="static", pad_token_id=0)
        for network in (plain, model)
    ]
    assert torch.equal(*made)
    assert "lsh" not in swap.counts(model)
    short = _swap(tiny.network("llama"), probes=1, min_length=25)
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, short(tokens).logits, atol=1e-5)
    assert swap.counts(short) == {"exact: short": 2}


def test_a_sliding_window_of_the_models_own_is_left_alone():
    import transformers

    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(**fields, num_key_value_heads=2, vocab_size=64, sliding_window=5)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        before = model(_tokens()).logits
        after = _swap(model, probes=1)(_tokens()).logits
    assert torch.allclose(before, after, atol=1e-5)
    assert swap.counts(model) == {"exact: a mask of its own": 2}


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_converted_to_bf16_computes_what_it_did(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(kernel, "usable", lambda call: False)
    plain, model = (network.to(torch.bfloat16) for network in (tiny.network("llama"), _swap(tiny.network("llama"))))
    with torch.no_grad():
        assert torch.allclose(model(_tokens()).logits, plain(_tokens()).logits, atol=0.02)
    assert swap.counts(model) == {"lsh": 2}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_replaced_decoder_knows_no_later_token(kind):
    model = _swap(tiny.network(kind), probes=1)
    tokens = _tokens(2, 39)
    for at in (5, 17, 30):
        later = tokens.clone()
        later[:, at + 1 :] = _tokens(2, 38 - at, seed=9)
        with torch.no_grad():
            assert torch.equal(model(tokens).logits[:, : at + 1], model(later).logits[:, : at + 1])


def test_the_audit_computes_a_wrong_head_anew():
    tokens = _tokens(2, 40)
    strict, loose = (_swap(tiny.network("bert"), probes=1, window=0, limit=limit) for limit in (1e-9, 10.0))
    plain = tiny.network("bert")
    with torch.no_grad():
        assert torch.allclose(strict(tokens).logits, plain(tokens).logits, atol=1e-5)
        loose(tokens)
    assert swap.counts(strict)["exact: heads that the audit found wrong"] == 2 * 2 * 4
    assert swap.counts(loose) == {"lsh": 2}


@pytest.fixture(scope="module")
def made(llama, text_data, tmp_path_factory):
    """A Llama whose attentions were replaced by the step, and what the step said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(breakeven, "LENGTHS", (16, 32))
        ctx = context(tmp_path_factory.mktemp("swapped"), "text-generation", text_data)
        spec = _spec(min_length=1, error={"at_most": "50%"}, local_window=8)
        return attention(as_artifact(llama), spec=spec, ctx=ctx), ctx.out


def test_the_step_records_the_swap_as_data_and_it_loads_bit_for_bit(made, llama):
    from safetensors.torch import load_file

    result, folder = made
    assert result.kind == "swapped"
    assert len(result.touched) == 2
    entry = read_extras(folder).transforms[0]
    assert entry["name"] == swap.NAME
    stored = load_file(folder / "model.safetensors")
    model = load(folder)
    for name, layer in swap.swapped(model).items():
        table = stored[f"{name}.{swap.LAYER}.table"]
        assert torch.equal(layer.table, table)
        assert table.abs().max() > 0
    tokens = _tokens()
    with torch.no_grad():
        assert torch.equal(load(folder)(tokens).logits, model(tokens).logits)
    assert swap.counts(model) == {"lsh": 2}
    assert all(weight.requires_grad for weight in model.parameters())
    record = result.properties["attentions"][result.touched[0]]
    assert record["error"] <= 0.5
    assert set(record["seconds_exact"]) == {"16", "32"}
    assert result.properties["calls"] == {"lsh": 2}
    assert (folder / "attention.svg").read_bytes().startswith(b"<?xml")


def test_the_same_seed_gives_the_same_bytes(made, llama, text_data, tmp_path):
    ctx = context(tmp_path, "text-generation", text_data)
    spec = _spec(min_length=1, error={"at_most": "50%"}, local_window=8)
    attention(as_artifact(llama), spec=spec, ctx=ctx)
    for name in ("model.safetensors", "lathe.json"):
        assert (ctx.out / name).read_bytes() == (made[1] / name).read_bytes()


def _swapped(folder: Any) -> Any:
    return as_artifact(folder, "swapped")


def test_training_quantizing_and_taking_back_go_on_from_it(made, llama, text_data, tmp_path):
    folder = made[1]
    ctx = context(tmp_path / "trained", "text-generation", text_data)
    training = FinetuneSpec(uses="finetune", id="t", max_steps=2, batch_size=4, validation=0, learning_rate=1e-2)
    dropping = shutil.copytree(folder, tmp_path / "dropping")
    config = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    result = finetune(_swapped(dropping), spec=training, ctx=ctx)
    assert result.kind == "swapped"
    assert any("attention dropout of 0.2 is not applied" in warning for warning in result.warnings)
    trained = load(ctx.out)
    assert len(swap.swapped(trained)) == 2
    assert not torch.equal(trained.lm_head.weight, load(folder).lm_head.weight)
    ctx = context(tmp_path / "packed", "text-generation", text_data)
    assert quantize(_swapped(folder), spec=QuantizeSpec(uses="quantize", id="q"), ctx=ctx).kind == "packed"
    assert len(swap.swapped(load(ctx.out))) == 2
    ctx = context(tmp_path / "half", "text-generation", text_data)
    halved = quantize(_swapped(folder), spec=QuantizeSpec(uses="quantize", id="q", precision="bf16"), ctx=ctx)
    assert halved.kind == "swapped"
    assert load(ctx.out).lm_head.weight.dtype == torch.float32
    ctx = context(tmp_path / "back", "text-generation", text_data)
    assert (
        attention(_swapped(folder), spec=AttentionSpec(uses="attention", id="a", method="sdpa"), ctx=ctx).kind
        == "model"
    )
    assert not (ctx.out / "lathe.json").exists()
    with torch.no_grad():
        assert torch.equal(load(ctx.out)(_tokens()).logits, load(llama)(_tokens()).logits)


def test_recovery_trains_with_the_replacement_at_every_length(llama, text_data, tmp_path):
    ctx = context(tmp_path, "text-generation", text_data)
    recover = TrainingSpec(max_steps=2, batch_size=4, validation=0, learning_rate=1e-2)
    spec = _spec(min_length=500, error={"at_most": "50%"}, local_window=8, recover=recover)
    result = attention(as_artifact(llama), spec=spec, ctx=ctx)
    assert result.properties["recovery"]["steps"] == 2
    model = load(ctx.out)
    assert not torch.equal(model.lm_head.weight, load(llama).lm_head.weight)
    assert {layer.settings["min_length"] for layer in swap.swapped(model).values()} == {500}
    assert result.properties["calls"] == {"exact: short": 2}


@pytest.mark.parametrize("method", ["reformer", "sliding_window"])
def test_other_methods_stand_behind_the_same_spec(bert, review_data, tmp_path, method):
    ctx = context(tmp_path, "text-classification", review_data)
    fields = {"local_window": 16} if method == "sliding_window" else {"chunk": 8}
    spec = _spec(method=method, min_length=1, error={"at_most": "99%"}, **fields)
    result = attention(as_artifact(bert), spec=spec, ctx=ctx)
    model = load(ctx.out)
    with torch.no_grad():
        model(_tokens())
    assert result.touched
    assert set(swap.counts(model)) == {method}


def test_a_bound_that_cannot_be_kept_names_the_attention(llama, text_data, tmp_path):
    ctx = context(tmp_path, "text-generation", text_data)
    fields = {"probes": 1, "buckets": 4, "local_window": 2, "residual": False, "min_length": 1}
    with pytest.raises(
        StepError, match=r"layers: model\.layers\.1\.self_attn: its error is .* above the bound of 0\.1%"
    ):
        attention(as_artifact(llama), spec=_spec(layers=[1], error={"at_most": "0.1%"}, **fields), ctx=ctx)
    with pytest.raises(StepError, match=r"no attention is replaced by lsh: model\.layers\.0\.self_attn: its error"):
        attention(as_artifact(llama), spec=_spec(error={"at_most": "0.1%"}, **fields), ctx=ctx)


def test_what_is_never_faster_stays_exact_unless_the_spec_insists(monkeypatch, llama, text_data, tmp_path):
    slow = breakeven.Timings({16: 1.0, 32: 1.0}, {16: 0.5, 32: 2.0})
    monkeypatch.setattr(breakeven, "measure", lambda *_: slow)
    ctx = context(tmp_path, "text-generation", text_data)
    with pytest.raises(StepError, match="exact attention was as fast at every length measured, up to 32 tokens"):
        attention(as_artifact(llama), spec=_spec(error={"at_most": "50%"}), ctx=ctx)
    result = attention(as_artifact(llama), spec=_spec(error={"at_most": "50%"}, layers=[0]), ctx=ctx)
    assert any("nothing is gained" in warning for warning in result.warnings)
    assert result.properties["calls"] == {"exact: short": 1}


@pytest.mark.parametrize(
    ("exact", "replaced", "expected"),
    [([1, 2, 4], [2, 1, 1], 2), ([1, 2, 4], [2, 1, 5], None), ([2, 2, 2], [1, 1, 1], 1)],
)
def test_break_even_is_where_every_longer_length_is_faster(exact, replaced, expected):
    lengths = (1, 2, 3)
    times = breakeven.Timings(dict(zip(lengths, exact, strict=True)), dict(zip(lengths, replaced, strict=True)))
    assert times.break_even == expected


def _config(folder: Any) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_the_plan_says_what_cannot_be_and_what_is_not_gained(llama, t5):
    problems, warnings = look(_spec(), _config(llama), "text-generation", 64)
    assert problems == []
    assert any("not exported" in warning for warning in warnings)
    assert any("data.max_length is 64" in warning for warning in warnings)
    assert not any("max_length" in warning for warning in look(_spec(), _config(llama), "text-generation", 4096)[1])
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_head": 4, "n_layer": 1, "vocab_size": 64}
    assert "transformers' attention interface" in look(_spec(), bloom, "text-generation", 64)[0][0]
    assert "adds a bias of positions" in look(_spec(), _config(t5), "translation", 64)[0][0]
    mistral = {**_config(llama), "model_type": "mistral", "sliding_window": 5}
    assert "a window of 5 tokens of its own" in look(_spec(), mistral, "text-generation", 64)[0][0]
    assert look(_spec(), {**mistral, "sliding_window": None}, "text-generation", 64)[0] == []
    assert "2 attentions, 0 to 1, and no 7" in look(_spec(layers=[7]), _config(llama), "text-generation", 64)[0][0]
    assert "depends on later tokens" in str(refuses(_spec(method="reformer"), "decoder", "text-generation"))
    assert refuses(_spec(method="reformer"), "encoder", "text-classification") is None


def test_what_a_training_leaves_out_is_said(llama):
    config = {**_config(llama), "attention_dropout": 0.2}
    recovered, plain = (
        look(_spec(**fields), config, "text-generation", 4096)[1] for fields in ({"recover": {"max_steps": 2}}, {})
    )
    assert any("attention dropout of 0.2 is not applied" in warning for warning in recovered)
    assert not any("dropout" in warning for warning in plain)
    assert swap.without_dropout({"attention_dropout": 0.0, "hidden_dropout_prob": 0.1}) is None


def test_the_plan_says_where_nothing_can_be_compiled(monkeypatch, llama):
    monkeypatch.setenv("LATHE_NO_KERNEL", "1")
    assert any("no C++ compiler" in warning for warning in look(_spec(), _config(llama), "text-generation", 4096)[1])
    flex = AttentionSpec(uses="attention", id="a", method="flex")
    assert "needs a C++ compiler" in look(flex, _config(llama), "text-generation", 4096)[0][0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"buckets": 0}, "greater than 0"),
        ({"probes": 9, "buckets": 8}, "there are 8 buckets"),
        ({"method": "sliding_window"}, "needs its length"),
        ({"method": "sdpa", "probes": 2}, "does nothing for method: sdpa"),
        ({"method": "flex", "recover": {"epochs": 1}}, "nothing to recover"),
        ({"layers": []}, "names no attention"),
        ({"rounds": 4}, "belongs to reformer"),
    ],
)
def test_fields_that_mean_nothing_are_mistakes(fields, message):
    with pytest.raises(ValidationError, match=message):
        AttentionSpec(uses="attention", id="a", **fields)


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        ({"uses": "export_tflite", "precision": "int8-dynamic"}, "can neither be exported nor pruned"),
        ({"uses": "prune", "sparsity": "50%"}, "can neither be exported nor pruned"),
    ],
)
def test_what_takes_no_replaced_attention_is_refused_before_anything_runs(text_data, uses, message):
    steps = [{"uses": "attention", "id": "a"}, {"id": "next", **uses}]
    spec = {"name": "n", "task": "text-generation", "model": {"config": support.tiny_config("llama")}}
    with pytest.raises(GraphError, match=message):
        build(PipelineSpec.model_validate({**spec, "data": text_data.model_dump(), "steps": steps}))
