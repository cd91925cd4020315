"""A decoder's file writes with its cache what torch writes, and stores its weights once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.context import StepError
from tasks.export import graph
from tasks.export.generation import CHUNK
from tasks.export.runtime import InputError, LiteRTModel, open_export
from tests.tasks import exported

CACHE = exported.CACHE


def opened(family: str) -> LiteRTModel:
    lite = open_export(exported.export(family)[0], threads=2)
    assert isinstance(lite, LiteRTModel)
    return lite


def torch_writes(family: str, prompt: list[int], limit: int, eos: int | None = None) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": eos}
    found = exported.torch_model(family).generate(ids, max_new_tokens=limit, do_sample=False, num_beams=1, **given)
    return found[0, len(prompt) :].tolist()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(5, 300, length).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_writes_what_torch_writes(family: str):
    lite = opened(family)
    assert lite.cache == CACHE
    texts = []
    # One token, one chunk and its neighbours, more than a chunk, all but one place, and a full cache.
    for length in (1, 5, CHUNK - 1, CHUNK, CHUNK + 1, CACHE - 3, CACHE - 1, CACHE):
        expected = torch_writes(family, prompt(length), min(12, CACHE + 1 - length))
        assert lite.generate(prompt(length), 12) == expected
        texts.append(tuple(expected))
    assert len(set(texts)) == len(texts)


def test_it_ends_at_the_limit_at_the_end_mark_and_where_the_cache_is_full():
    lite = opened("llama")
    whole = lite.generate(prompt(5), 1000)
    assert len(whole) == CACHE + 1 - 5  # the last token needs no place, nothing is written behind it
    assert lite.generate(prompt(5), 7) == whole[:7]
    assert lite.generate(prompt(5), 0) == []
    texts = {length: lite.generate(prompt(length), 1000) for length in range(3, 12)}
    length, place = next(
        (length, at) for length, text in texts.items() for at in range(1, len(text)) if text[at] not in text[:at]
    )
    until = texts[length][:place]
    assert lite.generate(prompt(length), 1000, texts[length][place]) == until
    assert lite.generate(prompt(length), 1000, [texts[length][place], 1]) == until


def test_a_text_does_not_depend_on_the_one_before_it():
    lite = opened("gpt2")
    alone = lite.generate(prompt(4, seed=1), 10)
    lite.generate(prompt(CACHE, seed=2), 1)
    assert lite.generate(prompt(4, seed=1), 10) == alone


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_stored_once(family: str):
    folder, result = exported.export(family)
    model = graph.read(folder / "model.tflite")
    by_shape: dict[str, dict[tuple[int, ...], set[int]]] = {}
    for name, operators in graph.list_by_signature(folder / "model.tflite").items():
        products = [op.weights[0] for op in operators if op.kind == "FULLY_CONNECTED"]
        by_shape[name] = {}
        for weight in products:
            by_shape[name].setdefault(weight.shape, set()).add(weight.buffer)
    assert set(by_shape) == {"serving_default", "prefill", "decode"}
    assert by_shape["serving_default"] == by_shape["prefill"] == by_shape["decode"]
    stored = sum(len(buffer.data) for buffer in model.buffers if buffer.data is not None)
    parameters = sum(parameter.numel() for parameter in exported.torch_model(family).parameters())
    assert stored < 4 * parameters * 1.15  # beside the weights the masks, and rotations or the positions of the scorer
    assert result.properties["cache"] == CACHE


def test_the_file_may_be_without():
    folder, _ = exported.export("gpt2", "int8")
    lite = LiteRTModel(folder / "model.tflite", threads=2)
    assert lite.cache is None
    with pytest.raises(InputError, match="generation: true"):
        lite.prefill([5])
    # It then writes by scoring the whole text for every token, until the file's length is full.
    ids, mask = (np.zeros((1, exported.LENGTH), np.int32) for _ in range(2))
    text = prompt(4)
    while len(text) < exported.LENGTH + 1:
        ids[0, : len(text)], mask[0, : len(text)] = text, 1
        text.append(int(lite.run(ids, mask)[0, len(text) - 1].argmax()))
    assert lite.generate(prompt(4), 100) == text[4:]
    assert lite.generate(prompt(4), 3) == text[4:7]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "takes 1 to 40 token ids"),
        (list(range(5, 46)), r"shape \[41\]; this file takes 1 to 40"),
        ([5, 320], "knows 0 to 319"),
        ([[5]], r"shape \[1, 1\]"),
        ([0.5], "takes 1 to 40 token ids"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(ids: list[Any], message: str):
    with pytest.raises(InputError, match=message):
        opened("llama").generate(ids, 4)


@pytest.mark.parametrize(("family", "precision", "error"), [("gpt2", "int8-dynamic", 0.1), ("llama", "int8", 0.75)])
def test_quantised_files_write_as_they_score(family: str, precision: str, error: float):
    folder, result = exported.export(family, precision)
    lite = LiteRTModel(folder / "model.tflite", threads=2)
    ids, mask = exported.examples(family)
    scored, written = [], []
    for row in range(1, 12, 2):
        text = ids[row, : mask[row].sum()]
        if len(text) < 6:
            continue
        logits = lite.run(ids[row : row + 1], mask[row : row + 1])[0]
        steps = [lite.prefill(text[:5].tolist()), *(lite.decode(int(text[at]), at) for at in range(5, len(text)))]
        scored.append(logits[4 : len(text)])
        written.append(np.stack(steps))
    first, second = np.concatenate(scored), np.concatenate(written)
    assert np.sqrt(np.mean((first - second) ** 2)) < error * first.std()
    assert len(set(lite.generate(prompt(6), 12))) > 1
    if precision == "int8":
        operators = graph.list_by_signature(folder / "model.tflite")["decode"]
        states = [tensor for op in operators if op.kind == "DYNAMIC_UPDATE_SLICE" for tensor in op.outputs]
        assert {tensor.dtype for tensor in states} == {"int8"}
        assert result.properties["quantized_operators"] > 20 * result.properties["float_operators"]


def test_a_model_without_keys_and_values_is_refused_with_the_remedy(tmp_path: Path):
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    from tasks.export.generation import generation

    with torch.random.fork_rng():
        mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(StepError, match=r"mamba keeps no keys and values of every layer.*generation: false"):
        generation(mamba, 8, lookup=False)
