"""Every precision on models whose mask matters: the file computes what torch computes, and counts what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specs.schema.base import Task
from tasks.context import StepError
from tasks.export import graph, preflight
from tasks.export.precision import weights_only
from tasks.export.runtime import LiteRTModel
from tests import support
from tests.tasks import exported

# The largest error of a logit relative to the spread of the logits, and the share of equal top predictions.
TOLERANCES = {
    ("bert", "float32"): (1e-4, 1.0),
    ("bert", "int8-dynamic"): (0.1, 0.9),
    ("bert", "int8"): (0.4, 0.8),
    ("gpt2", "float32"): (1e-4, 1.0),
    ("gpt2", "int8-dynamic"): (0.1, 0.85),
    ("gpt2", "int8"): (0.4, 0.6),
    ("llama", "float32"): (1e-4, 1.0),
    ("llama", "int8"): (0.4, 0.6),
}


def compare(family: str, precision: str) -> tuple[float, float]:
    folder, _ = exported.export(family, precision)
    ids, mask = exported.examples(family)
    expected, given = exported.torch_logits(family, ids, mask), exported.lite_logits(folder, ids, mask)
    assert given.dtype == np.float32
    assert given.shape == expected.shape
    if family != "bert":
        expected, given = expected[mask > 0], given[mask > 0]
    error = np.sqrt(np.mean((given - expected) ** 2)) / expected.std()
    return float(error), float((given.argmax(-1) == expected.argmax(-1)).mean())


@pytest.mark.parametrize(("family", "precision"), TOLERANCES)
def test_the_file_computes_what_torch_computes(family: str, precision: str):
    error, agreement = compare(family, precision)
    largest, least = TOLERANCES[family, precision]
    assert error <= largest
    assert agreement >= least
    if precision != "float32":
        assert error > 1e-5, "the file was not quantised"


def test_int4_is_what_rounding_each_block_of_a_row_gives():
    import torch

    from tasks.models import load

    folder, result = exported.export("bert", "int4-block32")
    model = load(exported.model("bert"))
    rounded = 0
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "position" not in name and "token_type" not in name:
            blocks = weight.data.view(weight.shape[0], -1, 32)
            scale = blocks.abs().amax(-1, keepdim=True) / 7
            weight.data = torch.where(scale > 0, (blocks / scale).round() * scale, 0).view_as(weight)
            rounded += 1
    ids, mask = exported.examples("bert")
    with torch.inference_mode():
        expected = model(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        ).logits.numpy()
    given = exported.lite_logits(folder, ids, mask)
    assert np.sqrt(np.mean((given - expected) ** 2)) < 0.2 * expected.std()
    weights = [w for op in graph.list_operators(folder / "model.tflite") for w in op.weights]
    assert len([w for w in weights if w.dtype == "int4"]) == rounded
    assert 0 < len(result.touched) <= rounded  # query, key and value of a block have one name


@pytest.mark.parametrize("block", [32, None])
def test_pruned_blocks_and_rows_load_and_stay_zero(tmp_path: Path, block: int | None):
    model = graph.read(exported.export("bert", "float32")[0] / "model.tflite")
    pruned = 0
    for operator, _ in graph.operators(model):
        if operator.kind == "FULLY_CONNECTED" and operator.weights[0].shape == (64, 64):
            weight = graph.constant(model, operator.weights[0]).copy()
            weight[:, :32] = weight[3] = 0
            graph.set_constant(model, operator.weights[0], weight)
            pruned += 1
    assert pruned == 2 * 4 + 1
    for name in ("float", "small"):
        (tmp_path / name).mkdir()
    graph.write(model, tmp_path / "float" / "model.tflite")
    weights_only(tmp_path / "float" / "model.tflite", tmp_path / "small" / "model.tflite", block)
    for operator, _ in graph.operators(model):
        if operator.kind in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP") and operator.weights:
            table = operator.weights[0]
            graph.set_constant(model, table, round_weights(graph.constant(model, table), block))
    graph.write(model, tmp_path / "float" / "model.tflite")
    ids, mask = exported.examples("bert")
    expected, given = (exported.lite_logits(tmp_path / name, ids, mask) for name in ("float", "small"))
    assert np.sqrt(np.mean((given - expected) ** 2)) < 0.2 * np.sqrt(np.mean(expected**2))


def round_weights(weights: np.ndarray, block: int | None) -> np.ndarray:
    """Symmetric rounding to int4 with one scale a block, or to int8 with one a row."""
    blocks = weights.reshape(len(weights), -1, block or weights.shape[1])
    scale = np.abs(blocks).max(-1, keepdims=True) / (7 if block else 127)
    steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    return (np.round(steps) * scale).reshape(weights.shape)


@pytest.mark.parametrize(("family", "precision"), [*TOLERANCES, ("bert", "int4-block32")])
def test_what_is_masked_changes_nothing(family: str, precision: str):
    folder, _ = exported.export(family, precision)
    ids, mask = exported.examples(family)
    other = np.where(mask > 0, ids, np.random.default_rng(0).integers(5, 300, ids.shape)).astype(np.int32)
    assert (other != ids).any()
    one, two = (exported.lite_logits(folder, values, mask) for values in (ids, other))
    if family != "bert":
        one, two = one[mask > 0], two[mask > 0]
    # Dynamic kernels take one scale for a whole tensor, so that padding moves the rounding of the rest a little.
    allowed = {"float32": 1e-5, "int8": 0.0}.get(precision, 0.15) * float(np.abs(one).max())
    assert np.abs(one - two).max() <= allowed
    # And the mask does matter: without it the padding counts.
    if family == "bert":
        bare = exported.lite_logits(folder, other, np.ones_like(mask))
        assert np.abs(bare - one)[::2].max() > np.abs(one - two).max() + 0.05 * np.abs(one).max()


_BARELY_MASKED = pytest.mark.xfail(reason="text far from the calibration data lifts a masked score above zero in int8")


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=_BARELY_MASKED)])
def test_a_token_sees_no_later_one_in_static_int8(family: str):
    folder, _ = exported.export(family, "int8")
    ids, _ = exported.examples(family)
    mask = np.ones_like(ids)
    later = ids.copy()
    later[:, exported.LENGTH // 2 :] = 7
    one, two = (exported.lite_logits(folder, values, mask) for values in (ids, later))
    half = exported.LENGTH // 2
    assert np.array_equal(one[:, :half], two[:, :half])
    assert not np.array_equal(one[:, half:], two[:, half:])


@pytest.mark.parametrize("precision", ["float32", "int8-dynamic", "int4-block32", "int8"])
def test_inputs_are_int32_and_nothing_is_int64(precision: str):
    folder, _ = exported.export("bert", precision)
    operators = graph.list_operators(folder / "model.tflite")
    dtypes = {tensor.dtype for operator in operators for tensor in (*operator.inputs, *operator.outputs)}
    assert "int64" not in dtypes
    model = graph.read(folder / "model.tflite")
    inputs = [model.subgraphs[0].tensors[index] for index in model.subgraphs[0].inputs]
    assert [(list(tensor.shape), tensor.type) for tensor in inputs] == [([1, exported.LENGTH], 2)] * 2  # 2 is INT32


def test_int8_is_int8_throughout_and_its_output_is_dequantised():
    folder, result = exported.export("bert", "int8")
    operators = graph.list_operators(folder / "model.tflite")
    assert not [op for op in operators if any(tensor.is_float for tensor in (*op.inputs, *op.outputs))]
    assert operators[-1].outputs[0].dtype == "int8"
    assert result.left == {}
    assert result.properties["float_operators"] == 0
    ids, mask = exported.examples("bert")
    logits = exported.lite_logits(folder, ids, mask)
    assert np.abs(logits).max() < 60  # raw int8 would reach 127
    assert len(np.unique(logits)) > 2
    # The embedding is int8 too, not a float table with a QUANTIZE behind it.
    tables = [op.weights[0] for op in operators if op.kind == "GATHER" and op.weights[0].shape[0] == 320]
    assert [table.dtype for table in tables] == ["int8"]


def test_the_counts_are_those_of_the_file():
    folder, result = exported.export("gpt2", "int8-dynamic")
    parts = graph.list_by_signature(folder / "model.tflite")
    operators = [op for part in parts.values() for op in part]
    weighted = {
        name: [op for op in part if any(weight.dtype == "int8" for weight in op.weights)]
        for name, part in parts.items()
    }
    assert result.properties["quantized_operators"] == sum(map(len, weighted.values()))
    # Two blocks of four Conv1D each, the embedding and the output layer; with a cache positions are looked up too.
    assert {name: len(found) for name, found in weighted.items()} == {
        "serving_default": 10,
        "prefill": 11,
        "decode": 11,
    }
    assert set(result.touched) == {f"{op.kind} {op.where}".strip() for found in weighted.values() for op in found}
    assert "EMBEDDING_LOOKUP transformer.wte" in result.touched
    assert any(name.startswith("FULLY_CONNECTED transformer.h.1") or "mlp" in name for name in result.touched)
    assert any("float32" in reason for reason in result.left.values())  # the positions are a constant of an ADD
    assert sum(result.properties["operators"].values()) == len(operators)


def test_tied_embeddings_are_stored_once_or_it_is_said():
    folder, result = exported.export("gpt2", "int8-dynamic")
    parts = graph.list_by_signature(folder / "model.tflite").values()
    tables = [w for part in parts for op in part for w in op.weights if w.shape == (320, 64)]
    assert len(tables) == 3 * 2
    assert len({table.buffer for table in tables}) == 1
    assert not [text for text in result.warnings if "tied" in text]
    _, static = exported.export("gpt2", "int8")
    assert [text for text in static.warnings if "tied" in text and f"{320 * 64} bytes" in text]
    assert static.properties["tied"] == {"lm_head.weight": "transformer.wte.weight"}


@pytest.mark.parametrize(("precision", "ratio"), [("int8-dynamic", 0.6), ("int4-block32", 0.6), ("int8", 0.7)])
def test_files_shrink(precision: str, ratio: float):
    folder, result = exported.export("bert", precision)
    size = (folder / "model.tflite").stat().st_size
    assert size < ratio * result.properties["float_size"]
    assert f"{size / 1e6:.2f} MB" in result.summary


def test_the_same_model_gives_the_same_bytes():
    one, _ = exported.export("gpt2", "int8")
    two, _ = exported.export("gpt2", "int8", name="again")
    assert (one / "model.tflite").read_bytes() == (two / "model.tflite").read_bytes()


def test_the_folder_is_usable_alone():
    folder, result = exported.export("bert", "float32")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder)("a gripping film")["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == ["negative", "positive"] == result.properties["labels"]
    assert result.properties["file"] == "model.tflite"
    assert (result.properties["batch"], result.properties["length"]) == (1, exported.LENGTH)
    assert result.touched == ("model.tflite",)
    assert LiteRTModel(folder / "model.tflite").vocab == result.properties["vocab"] == 320


def test_a_batch_is_exported_with_its_mask():
    from tasks.export.tflite import export_tflite

    ctx = exported.context("bert", "batch")
    export_tflite(support.as_artifact(exported.model("bert")), spec=exported.spec("int8", batch=3, length=12), ctx=ctx)
    ids, mask = (values[:3, :12] for values in exported.examples("bert"))
    given = LiteRTModel(ctx.out / "model.tflite", threads=2).run(ids, mask)
    expected = exported.torch_logits("bert", ids, mask)
    assert np.abs(given - expected).max() < 0.5 * np.abs(expected).max()


def test_a_classifier_that_reads_the_last_token_finds_it_by_the_mask(tmp_path: Path):
    from tasks.export.tflite import export_tflite
    from tasks.models import load

    source = support.tiny_model(tmp_path / "model", "gpt2", "text-classification", initializer_range=0.1)
    data = support.tiny_data(tmp_path / "data", "text-classification", max_length=12)
    ctx = support.context(tmp_path, "text-classification", data)
    export_tflite(support.as_artifact(source), spec=exported.spec(), ctx=ctx)
    ids = np.arange(5, 17, dtype=np.int32)[None]
    model = load(source)
    seen = []
    for count in (3, 12):
        mask = (np.arange(12) < count).astype(np.int32)[None]
        given = exported.lite_logits(ctx.out, ids, mask)
        expected = model(input_ids=torch_ids(ids[:, :count])).logits.detach().numpy()
        assert np.allclose(given, expected, atol=1e-4)
        seen.append(given)
    assert not np.allclose(seen[0], seen[1], atol=1e-2)


def torch_ids(ids: np.ndarray):
    import torch

    return torch.from_numpy(ids).long()


def test_a_length_beyond_the_positions_is_refused():
    from tasks.export.tflite import export_tflite

    ctx = exported.context("bert", "long")
    with pytest.raises(StepError, match="length is 65 and the model has 64 positions; write length: 64 or less"):
        export_tflite(support.as_artifact(exported.model("bert")), spec=exported.spec(length=65), ctx=ctx)


def check(task: Task = "text-generation", length: int = 32, **fields: object) -> tuple[list[str], list[str]]:
    config = {"max_position_embeddings": 64, "hidden_size": 48, "vocab_size": 1000}
    return preflight.check_export(exported.spec(**fields), config, task, length)  # type: ignore[arg-type]


def test_preflight_finds_before_training_what_the_export_would_refuse():
    assert check() == ([], [])
    assert any("64 positions" in text for text in check(length=65)[0])
    assert any(
        "did you mean Ethos_U85_SYS_DRAM_Mid?" in text
        for text in check(precision="int8", npu="ethos-u85-512", npu_system_config="Ethos_U85_SYS_DRAM_Mit")[0]
    )
    assert any("48 does not divide by 32" in text for text in check(precision="int4-block32")[1])
    assert any("left to the CPU" in text for text in check(precision="int8", npu="ethos-u55-128")[1])
    window = {"sliding_window": 16, "layer_types": ["sliding_attention"]}
    assert any(
        "within 16 tokens" in text for text in preflight.check_export(exported.spec(), window, "text-generation", 32)[0]
    )
    everywhere = window | {"layer_types": ["full_attention"]}
    assert preflight.check_export(exported.spec(), everywhere, "text-generation", 32) == ([], [])
    roberta = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert preflight.positions_of(roberta) == 512


def test_positions_of_the_new_families_are_checked():
    marian = {"model_type": "marian", "max_position_embeddings": 64, "is_encoder_decoder": True}
    problems, _ = preflight.check_export(exported.spec(cache=65), marian, "translation", 32)
    assert problems == ["cache is 65 and the model has 64 positions; write cache: 64 or less"]
    problems, _ = preflight.check_export(exported.spec(length=65), marian, "translation", 32)
    assert problems == ["length is 65 and the model has 64 positions; write length: 64 or less"]
    whisper = {"model_type": "whisper", "max_target_positions": 64, "max_source_positions": 1500}
    assert preflight.check_export(exported.spec(), whisper, "speech-recognition", 64) == ([], [])
    problems, _ = preflight.check_export(exported.spec(), whisper, "speech-recognition", 65)
    assert problems == ["cache is 65 and the model has 64 positions; write cache: 64 or less"]
    t5 = {"model_type": "t5", "n_positions": 512, "relative_attention_num_buckets": 32}
    assert preflight.check_export(exported.spec(length=600), t5, "translation", 32) == ([], [])
    wav2vec2 = {"model_type": "wav2vec2", "hidden_size": 32}
    assert preflight.check_export(exported.spec(), wav2vec2, "speech-recognition", 10_000) == ([], [])
    problems, _ = preflight.check_export(
        exported.spec(cache=80), {"max_position_embeddings": 64}, "text-generation", 32
    )
    assert problems == ["cache is 80 and the model has 64 positions; write cache: 64 or less"]


@pytest.mark.parametrize(
    ("fields", "family", "task", "message"),
    [
        ({"npu": "ethos-u85-256"}, "encoder-decoder", "translation", "compiles one graph"),
        ({"npu": "ethos-u85-256"}, "encoder-decoder", "speech-recognition", "a model for CTC where it is speech"),
        ({"npu": "ethos-u85-256"}, "encoder-decoder", "text-classification", None),
        ({"npu": "ethos-u85-256"}, "ctc", "speech-recognition", None),
        ({}, "encoder-decoder", "translation", "write precision: int8-dynamic"),
        ({"precision": "int8-dynamic"}, "encoder-decoder", "translation", None),
        ({"generation": False}, "decoder", "text-generation", None),
        ({"generation": True}, "encoder", "text-classification", "generation is for text-generation"),
        ({"cache": 9}, "decoder", "text-classification", "cache is for"),
        ({"cache": 9}, "ctc", "speech-recognition", "cache is for"),
        ({"cache": 9, "precision": "int8-dynamic"}, "encoder-decoder", "speech-recognition", None),
        ({"length": 9}, "ctc", "speech-recognition", "length is for"),
        ({"duration": "2 s", "precision": "float32"}, "encoder-decoder", "speech-recognition", "duration is for"),
        ({"duration": "2 s"}, "ctc", "speech-recognition", None),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    fields: dict[str, Any], family: Any, task: Task, message: str | None
):
    reason = preflight.refuses(exported.spec(**{"precision": "int8", **fields}), family, task)
    assert (reason is None) if message is None else (reason is not None and message in reason)
    assert preflight.refuses(None, family, task) is None


def test_architectures_that_do_not_export_are_known():
    for kind in preflight.UNFAITHFUL:
        problems, _ = preflight.check_export(exported.spec(), {"model_type": kind}, "speech-recognition", 32)
        assert problems == [text for text in problems if f"{kind} models cannot be exported" in text] != []
    problems, _ = preflight.check_export(exported.spec(), {"model_type": "mamba"}, "text-generation", 32)
    assert problems == ["mamba keeps no keys and values of every layer in a cache; write generation: false"]
    assert (
        preflight.check_export(exported.spec(generation=False), {"model_type": "mamba"}, "text-generation", 32)[0] == []
    )


def test_an_npu_compiles_no_generation():
    with pytest.raises(ValueError, match="compiles one graph"):
        exported.spec("int8", npu="ethos-u85-256", generation=True)
    assert exported.spec("int8").generates
    assert not exported.spec("int8", npu="ethos-u85-256").generates
