"""Models for CTC in LiteRT: what torch hears without padding, whatever the padding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.context import StepError
from tasks.data.collate import collate
from tasks.export import graph
from tasks.export.attention import use_export_attention
from tasks.export.convert import to_litert
from tasks.export.ctc import ctc
from tasks.export.precision import weights_only
from tasks.export.runtime import InputError, LiteRTCtc, open_export
from tests import support
from tests.tasks import exported

COUNT = 8


def opened(folder: Path) -> LiteRTCtc:
    lite = open_export(folder, threads=2)
    assert isinstance(lite, LiteRTCtc)
    return lite


def recordings(length: int) -> list[np.ndarray]:
    """Recordings of several lengths, the first as long as can be."""
    rows = exported.encoded("wav2vec2")
    found = [np.array(rows.features_of(row)[:length]) for row in range(COUNT)]
    return [np.resize(found[0], length), found[1][:1000], *found[2:]]


def padded(samples: list[np.ndarray], width: int) -> dict[str, np.ndarray]:
    values, mask = np.zeros((len(samples), width), np.float32), np.zeros((len(samples), width), np.int32)
    for row, one in enumerate(samples):
        values[row, : len(one)], mask[row, : len(one)] = one, 1
    return {"input_values": values, "attention_mask": mask}


def torch_logits(model: Any, samples: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(samples)[None]).logits[0].numpy()


def collapsed(logits: np.ndarray, blank: int) -> list[int]:
    found: list[int] = []
    last = blank
    for best in logits.argmax(-1).tolist():
        if best not in (last, blank):
            found.append(best)
        last = best
    return found


def test_it_hears_what_torch_hears_without_padding():
    lite, model = opened(exported.export("wav2vec2")[0]), exported.torch_model("wav2vec2")
    samples = recordings(lite.length)
    batch = padded(samples, lite.length)
    logits, texts = lite.logits(batch), lite.write(batch, 1000)
    for one, given, text in zip(samples, logits, texts, strict=True):
        expected = torch_logits(model, one)
        assert lite.frames(len(one)) == len(expected)
        assert np.abs(given[: len(expected)] - expected).max() < 1e-4 * np.abs(expected).max()
        assert text == collapsed(expected, model.config.pad_token_id)
    assert len({tuple(text) for text in texts}) > COUNT - 3
    assert [text[:2] for text in texts] == lite.write(batch, 2)


def test_the_length_is_that_of_the_longest_training_recording():
    from tasks.data import encode

    folder, result = exported.export("wav2vec2")
    ctx = exported.context("wav2vec2", "examples")
    longest = int(encode(ctx.data, "train", ctx.task, exported.model("wav2vec2"), ctx.store).lengths().max())
    assert longest <= opened(folder).length < longest + 5  # a multiple of the first stride
    assert result.properties["length"] == opened(folder).length
    assert (folder / "preprocessor_config.json").is_file()


def test_batches_come_out_the_same_and_padding_is_the_runtimes_own():
    lite = opened(exported.export("wav2vec2")[0])
    encoded = exported.encoded("wav2vec2")
    batch = collate(encoded, np.arange(4))  # as wide as its longest
    assert batch["input_values"].shape[1] < lite.length
    whole = collate(encoded, np.arange(4), lite.length)
    assert np.array_equal(lite.logits(batch), lite.logits(whole))
    bare = {"input_values": whole["input_values"][:1]}
    assert not np.allclose(lite.logits(bare), lite.logits(whole)[:1])  # without a mask all of it counts


@pytest.mark.parametrize("kind", ["group", "stable"])
def test_other_kinds_of_norms(kind: str, tmp_path: Path):
    fields = {
        "group": {"feat_extract_norm": "group", "conv_bias": False},
        "stable": {"do_stable_layer_norm": True, "conv_bias": True},
    }
    source = support.tiny_model(tmp_path / "model", "wav2vec2", "speech-recognition", **fields[kind])
    from tasks.models import load

    model = load(source)
    samples = recordings(4000)
    expected = [torch_logits(model, one) for one in samples]
    use_export_attention(model)
    to_litert(ctc(model, 2, 4000, lookup=False), tmp_path / "model.tflite")
    shutil.copy(source / "config.json", tmp_path / "config.json")
    for given, wanted in zip(opened(tmp_path).logits(padded(samples, 4000)), expected, strict=True):
        assert np.abs(given[: len(wanted)] - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_group_norms_channels_are_evened_out_without_changing_what_it_gives():
    import torch
    from torch import nn

    from tasks.export.ctc import _even_out, _norm_of_channels

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 6, 4, bias=False)
            self.layer_norm = nn.GroupNorm(6, 6)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.layer_norm(self.conv(hidden))

    generator = torch.Generator().manual_seed(0)
    layer = Layer()
    sizes = torch.logspace(-3, 2, 6)[:, None, None]
    layer.conv.weight.data = torch.randn(6, 1, 4, generator=generator) * sizes
    samples = torch.randn(5, 400, generator=generator)
    expected = layer(samples[:, None])
    found = _even_out([layer], list(samples.numpy()))
    hidden = layer.conv(samples[:, None])
    assert hidden.std((0, 2)).sub(1).abs().max() < 0.05
    flags = torch.ones(5, 1, 1, hidden.shape[-1])
    given = _norm_of_channels(hidden[:, :, None], flags, layer.layer_norm, found[0])[:, :, 0]
    assert torch.allclose(given, expected, atol=1e-4)


@pytest.mark.parametrize(("block", "largest"), [(None, 0.15), (32, 0.6)])
def test_small_weights(tmp_path: Path, block: int | None, largest: float):
    source, _ = exported.export("wav2vec2")
    shutil.copy(source / "config.json", tmp_path / "config.json")
    left = weights_only(source / "model.tflite", tmp_path / "model.tflite", block)
    error, _ = compare(tmp_path)
    assert 1e-3 < error < largest
    kinds = {op.weights[0].dtype for op in graph.list_operators(tmp_path / "model.tflite") if op.kind == "CONV_2D"}
    assert kinds == {"int8"}
    assert bool(left) == bool(block)
    assert all("convolution" in reason for reason in left.values())


def compare(folder: Path) -> tuple[float, float]:
    first, second = opened(exported.export("wav2vec2")[0]), opened(folder)
    batch = padded(recordings(first.length), first.length)
    frames = first.frames(batch["attention_mask"].sum(1))
    expected, given = (
        np.concatenate([row[:count] for row, count in zip(lite.logits(batch), frames, strict=True)])
        for lite in (first, second)
    )
    error = float(np.sqrt(np.mean((given - expected) ** 2)) / expected.std())
    return error, float((given.argmax(-1) == expected.argmax(-1)).mean())


def test_it_is_int8_throughout_and_runs_on_an_ethos_u55():
    folder, result = exported.export("wav2vec2", "int8", npu="ethos-u55-256")
    error, agreement = compare(folder)
    assert 1e-3 < error < 0.35
    assert agreement > 0.7
    operators = graph.list_operators(folder / "model.tflite")
    assert not [op for op in operators if any(tensor.is_float for tensor in (*op.inputs, *op.outputs))]
    assert result.metrics["npu_operator_share"] >= 0.99
    # The mask is of whole numbers, and its two tables are lookups, which the U55 leaves to the CPU.
    assert {name.split()[0] for name in result.properties["npu"]["cpu"]} == {"STRIDED_SLICE", "GATHER"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_values": np.zeros((1, 9000), np.float32)}, "at most: cut it, or export with a greater"),
        ({"input_features": np.zeros((1, 80, 10), np.float32)}, "this file takes .*input_values"),
        (
            {"input_values": np.zeros(100, np.float32), "attention_mask": np.ones((1, 100), np.int32)},
            r"input_values has the shape \[100\]",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(given: dict[str, np.ndarray], message: str):
    with pytest.raises(InputError, match=message):
        opened(exported.export("wav2vec2")[0]).logits(given)


def test_models_whose_padding_would_be_heard_are_refused():
    import torch
    from transformers import Data2VecAudioConfig, Data2VecAudioForCTC

    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        model = Data2VecAudioForCTC(Data2VecAudioConfig(vocab_size=32, conv_dim=[16] * 7, **fields))
    with pytest.raises(StepError, match="no single convolution"):
        ctc(model, 1, 4000, lookup=False)
