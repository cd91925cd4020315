"""ONNX exports compute and write what torch does, for any batch and length."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specs.schema.steps.export import ExportOnnxSpec
from tasks.evaluate import footprint
from tasks.export.onnx_models import OnnxCtc, OnnxSeq2Seq, OnnxText
from tasks.export.onnx_preflight import check_export
from tasks.export.runtime import InputError, open_export
from tests import support
from tests.tasks import exported
from tests.tasks.test_export_ctc import collapsed, padded, torch_logits
from tests.tasks.test_export_generation import torch_writes
from tests.tasks.test_export_seq2seq import inputs, targets, tensors
from tests.tasks.test_export_seq2seq import torch_writes as torch_translates


def opened(family: str, precision: str = "float32") -> Any:
    return open_export(exported.onnx_export(family, precision)[0], threads=2)


def graph(folder: Path, name: str = "model.onnx") -> Any:
    import onnx

    return onnx.load(str(folder / name), load_external_data=False)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (2, exported.LENGTH)])
def test_any_batch_and_length_gives_what_torch_gives(family: str, batch: int, length: int):
    text = opened(family)
    assert isinstance(text, OnnxText)
    ids, mask = (values[:batch, :length] for values in exported.examples(family))
    mask = np.maximum(mask, np.arange(length) == 0)
    expected = exported.torch_logits(family, ids, mask)
    given = text.run(ids, mask)
    assert given.shape == expected.shape
    counts = mask > 0 if family == "llama" else slice(None)
    assert np.abs(given - expected)[counts].max() < 1e-4 * np.abs(expected[counts]).max()


def test_it_writes_what_torch_writes():
    text = opened("llama")
    texts = []
    for length in (1, 2, 7, 40, 63, 64):
        prompt = np.random.default_rng(length).integers(5, 300, length).tolist()
        expected = torch_writes("llama", prompt, min(12, 65 - length))
        assert text.generate(prompt, 12) == expected
        texts.append(tuple(expected))
    assert len(set(texts)) == len(texts)
    whole = text.generate([5, 6, 7], 1000)
    assert len(whole) == 64 + 1 - 3  # the last token needs no position
    assert text.generate([5, 6, 7], 0) == []
    end = next(token for place, token in enumerate(whole) if token not in whole[:place] and place)
    assert text.generate([5, 6, 7], 1000, end) == whole[: whole.index(end)]


def test_a_text_goes_on_from_an_earlier_place():
    text = opened("llama")
    text.prefill([5, 6, 7, 8])
    text.decode(9, 4)
    again = text.decode(11, 2)
    np.testing.assert_allclose(again, text.prefill([5, 6, 11]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["marian", "whisper"])
def test_encoder_decoders_write_what_torch_writes(family: str):
    import torch

    model = opened(family)
    assert isinstance(model, OnnxSeq2Seq)
    batch, ids = inputs(family), targets(family)
    assert model.write(batch, 9) == torch_translates(exported.torch_model(family), batch, 9)
    with torch.inference_mode():
        decoder = torch.from_numpy(ids)
        expected = exported.torch_model(family)(**tensors(batch), decoder_input_ids=decoder).logits.numpy()
    for rows, tokens in ((len(ids), ids.shape[1]), (1, 1)):
        some = {name: values[:rows] for name, values in batch.items()}
        given = model.logits(some, ids[:rows, :tokens])
        assert np.abs(given - expected[:rows, :tokens]).max() < 1e-4 * np.abs(expected).max()


def test_recordings_of_any_length_are_heard_as_torch_hears_them_without_padding():
    ctc, model = opened("wav2vec2"), exported.torch_model("wav2vec2")
    assert isinstance(ctc, OnnxCtc)
    rows = exported.encoded("wav2vec2")
    samples = [np.array(rows.features_of(row)) for row in range(4)]
    samples[1] = samples[1][:1000]
    for some, width in ((samples, max(map(len, samples)) + 77), (samples[1:2], 1000)):
        batch = padded(some, width)
        for one, given, text in zip(some, ctc.logits(batch), ctc.write(batch, 1000), strict=True):
            expected = torch_logits(model, one)
            assert np.abs(given[: len(expected)] - expected).max() < 1e-4 * np.abs(expected).max()
            assert text == collapsed(expected, model.config.pad_token_id)
    with pytest.raises(InputError, match="shorter than a frame"):
        ctc.logits({"input_values": np.zeros((1, 3), np.float32)})


def test_the_free_sizes_have_names_and_nothing_tells_of_the_machine():
    folder, result = exported.onnx_export("llama")
    shapes = {
        port.name: [size.dim_param or size.dim_value for size in port.type.tensor_type.shape.dim]
        for port in (*graph(folder).graph.input, *graph(folder).graph.output)
    }
    assert shapes["input_ids"] == ["batch", "length"]
    assert shapes["attention_mask"] == ["batch", "total"]
    assert shapes["past_key_values.0.key"] == ["batch", 2, "past", 16]
    assert shapes["present.1.value"] == ["batch", 2, "total", 16]
    assert shapes["logits"] == ["batch", "length", 320]
    assert b"stack_trace" not in (folder / "model.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in (folder / "model.onnx").read_bytes()
    assert result.touched == ("model.onnx",)
    assert result.properties["inputs"]["model.onnx"]["input_ids"] == [None, None]


def test_two_exports_are_equal_byte_for_byte():
    one, two = exported.onnx_export("bert")[0], exported.onnx_export("bert", name="-again")[0]
    assert (one / "model.onnx").read_bytes() == (two / "model.onnx").read_bytes()


def test_an_encoder_and_a_decoder_share_their_table():
    folder, result = exported.onnx_export("marian")
    assert result.properties["files"] == ["decoder_model.onnx", "encoder_model.onnx", "weights.bin"]
    places = set()
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        for tensor in graph(folder, name).graph.initializer:
            if sorted(tensor.dims) == [64, 320]:
                places.add(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    assert len(places) == 1  # the encoder's lookup, the decoder's, and the output layer
    weighed = footprint.of_export(folder, result.properties["files"], result.properties["file"])
    model = exported.torch_model("marian")
    stored = {weight.data_ptr(): weight.numel() for weight in model.parameters()}
    assert weighed.parameters == pytest.approx(sum(stored.values()), rel=0.1)
    assert weighed.size == sum((folder / name).stat().st_size for name in result.properties["files"])


def test_int8_stores_a_tied_table_once_and_computes_nearly_the_same():
    folder, result = exported.onnx_export("gpt2", "int8-dynamic")
    tables = [tensor for tensor in graph(folder).graph.initializer if sorted(tensor.dims) == [64, 320]]
    assert [tensor.data_type for tensor in tables] == [3]  # int8
    weighed = footprint.of_export(folder, result.properties["files"], result.properties["file"])
    assert weighed.dtypes["int8"] > 4 * weighed.dtypes["float32"]
    assert result.properties["tied"]
    assert result.properties["quantized_operators"] == 2 + 1 + 4 * 2  # lookups, the output layer, two blocks
    assert result.properties["operators"]["MatMulInteger"] == 9
    assert result.properties["error"] < 0.1  # of random weights; a trained model's bound is tested below
    assert weighed.size < 0.5 * result.properties["float_size"]
    assert "products of two activations" in " ".join(result.left)
    text = OnnxText(opened("gpt2", "int8-dynamic")._file)
    ids, mask = exported.examples("gpt2")
    expected = exported.torch_logits("gpt2", ids, mask)
    error = np.linalg.norm((text.run(ids, mask) - expected)[mask > 0]) / np.linalg.norm(expected[mask > 0])
    assert error < 0.05


def test_a_file_runs_without_torch():
    folder, _ = exported.onnx_export("bert")
    code = (
        "import sys, numpy as np; from tasks.export.runtime import open_export; "
        f"print(open_export({str(folder)!r}).run(np.ones((2, 5), int), np.ones((2, 5), int)).shape, "
        "sorted({'torch', 'transformers', 'onnx', 'pydantic', 'ai_edge_litert'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 2) []"


def test_wrong_inputs_are_refused_with_the_remedy(tmp_path: Path):
    text = opened("bert")
    ones = np.ones((2, 5), int)
    for ids, mask, said in (
        (ones * 320, ones, "has the id 320; this file knows 0 to 319"),
        (ones, ones * 2, "values from 2 to 2"),
        (ones, ones[:1], r"\[1, 5\] and input_ids \[2, 5\]"),
        (ones[0], ones[0], r"it takes \[examples, tokens\]"),
        (ones.astype(float), ones, "it takes integers"),
        (np.ones((1, 65), int), np.ones((1, 65), int), "65 tokens and the model 64 positions"),
    ):
        with pytest.raises(InputError, match=said):
            text.run(ids, mask)
    with pytest.raises(InputError, match="is a classifier"):
        text.prefill([1])
    with pytest.raises(InputError, match=r"has the shape \[3\]; model\.onnx takes \['any', 'any'\]"):
        text._file.run({"input_ids": np.ones(3), "attention_mask": ones})
    with pytest.raises(InputError, match="attention_mask is missing"):
        text._file.run({"input_ids": ones})
    with pytest.raises(InputError, match=r"no exported file; give one that ends in \.tflite or \.onnx"):
        open_export(tmp_path / "model.bin")
    with pytest.raises(InputError, match="is not a file"):
        open_export(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="ONNX Runtime cannot load"):
        open_export(tmp_path)
    shutil.copy(exported.onnx_export("bert")[0] / "model.onnx", tmp_path)
    with pytest.raises(InputError, match=r"config\.json is missing"):
        open_export(tmp_path)


def test_a_spec_and_a_plan_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="has no range; leave it out"):
        ExportOnnxSpec(uses="export_onnx", id="o", reduce_range=False)
    spec = ExportOnnxSpec(uses="export_onnx", id="o")
    problems, _ = check_export(spec, {"model_type": "opt"}, "text-generation", 32)
    assert "no ready-made attention mask" in problems[0]
    problems, _ = check_export(spec, {"model_type": "mamba"}, "text-generation", 32)
    assert "generation: false" in problems[0]
    config = {"model_type": "mistral", "sliding_window": 16, "max_position_embeddings": 64}
    problems, _ = check_export(spec, config, "text-generation", 32)
    assert problems == ["data.max_length is 32 and the model attends within 16 tokens; write 16 or less"]
    problems, _ = check_export(spec, {"model_type": "gpt2", "n_positions": 16}, "text-generation", 32)
    assert "has positions for 16 tokens" in problems[0]


def test_a_cpu_without_vnni_is_warned_of_the_whole_range(monkeypatch: pytest.MonkeyPatch):
    from tasks.export import onnx_preflight

    fields = {"uses": "export_onnx", "id": "o", "precision": "int8-dynamic"}
    whole = ExportOnnxSpec.model_validate({**fields, "reduce_range": False})
    default = ExportOnnxSpec.model_validate(fields)
    monkeypatch.setattr(onnx_preflight.platform, "machine", lambda: "x86_64")
    for vnni, spec, said in ((False, whole, "overflow"), (True, default, "more exact")):
        monkeypatch.setattr(onnx_preflight, "has_vnni", lambda vnni=vnni: vnni)
        assert said in check_export(spec, {}, "text-classification", 8)[1][0]
    for vnni, spec in ((True, whole), (False, default)):
        monkeypatch.setattr(onnx_preflight, "has_vnni", lambda vnni=vnni: vnni)
        assert check_export(spec, {}, "text-classification", 8)[1] == []


def test_a_trained_model_keeps_its_answers_in_int8(tmp_path: Path):
    from tests.tasks import tiny
    from tests.tasks.test_export_onnx_quantize import quantized

    network = tiny.network("bert", hidden_size=64, intermediate_size=128)
    rows = tiny.sentences(256)
    folder = _trained(network, rows, tmp_path)
    ids, mask = np.array(rows.input_ids[:128], np.int64), np.array(rows.attention_mask[:128], np.int64)
    plain = open_export(folder).run(ids, mask)
    small = tmp_path / "small"
    shutil.copytree(folder, small)
    quantized(folder / "model.onnx", small / "model.onnx")
    packed = open_export(small).run(ids, mask)
    assert (plain.argmax(1) == np.array(rows.labels[:128])).mean() > 0.9
    assert (plain.argmax(1) == packed.argmax(1)).mean() > 0.98
    assert np.linalg.norm(plain - packed) < 0.03 * np.linalg.norm(plain)


def _trained(network: Any, rows: Any, folder: Path) -> Path:
    """The float file of the model after some training."""
    import torch

    from tasks.export.attention import PLAIN, use_export_attention
    from tasks.export.onnx_convert import save, to_onnx
    from tasks.export.onnx_graphs import graphs

    ids, mask, labels = (
        torch.from_numpy(np.array(values, np.int64)) for values in (rows.input_ids, rows.attention_mask, rows.labels)
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(60):
        optimiser.zero_grad()
        network(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimiser.step()
    use_export_attention(network, PLAIN)
    out = folder / "float"
    out.mkdir()
    save({graph.file: to_onnx(graph) for graph in graphs(network, "encoder", "text-classification")}, out)
    (out / "config.json").write_text(json.dumps({"vocab_size": 64, "positions": 64}))
    return out


def test_an_evaluation_takes_it_as_it_takes_any_export():
    from tasks.evaluate.measure import deployed_files
    from tasks.evaluate.runners import Runner, Writer, open_runner

    for family, kind in (("bert", Runner), ("marian", Writer), ("wav2vec2", Writer)):
        folder, result = exported.onnx_export(family)
        artifact = support.as_artifact(folder, "export", **result.properties)
        runner = open_runner(artifact, exported.TASKS[family], 1, "cpu")
        assert isinstance(runner, kind)
        assert runner.batch is None
        assert runner.length is None
        assert deployed_files(artifact) == result.properties["files"]
