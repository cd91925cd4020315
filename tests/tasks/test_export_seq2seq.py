"""Encoder-decoders in LiteRT write what torch writes: Marian, T5, BART and Whisper."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specs.schema.steps.export import ExportTfliteSpec
from tasks.data.collate import collate
from tasks.export import graph
from tasks.export.precision import weights_only
from tasks.export.preflight import check_export, refuses
from tasks.export.runtime import InputError, LiteRTSeq2Seq, open_export
from tests.tasks import exported

FAMILIES = ["marian", "t5", "bart", "whisper"]
COUNT = 7


def float_export(family: str) -> Path:
    return exported.export(family)[0]


def opened(folder: Path) -> LiteRTSeq2Seq:
    lite = open_export(folder, threads=2)
    assert isinstance(lite, LiteRTSeq2Seq)
    return lite


def inputs(family: str, rows: Any = slice(0, COUNT)) -> dict[str, np.ndarray]:
    """Examples of several lengths, cut to what the file takes."""
    chosen = np.arange(len(exported.encoded(family)))[rows]
    batch = collate(exported.encoded(family), chosen, None if family == "whisper" else exported.LENGTH)
    batch.pop("labels")
    if "attention_mask" in batch:
        batch["attention_mask"][::2, exported.LENGTH // 2 :] = 0
    return batch


def targets(family: str) -> np.ndarray:
    """What the decoder is given, int64 [COUNT, tokens]."""
    start = exported.torch_model(family).config.decoder_start_token_id
    labels = np.array(exported.encoded(family).target_ids[:COUNT, : exported.LENGTH - 1], np.int64)
    return np.concatenate([np.full((COUNT, 1), start), labels], axis=1)


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    kinds = {name: np.float32 if values.dtype.kind == "f" else np.int64 for name, values in batch.items()}
    return {name: torch.from_numpy(values.astype(kinds[name])) for name, values in batch.items()}


def torch_writes(model: Any, batch: dict[str, np.ndarray], limit: int) -> list[list[int]]:
    """What ``generate`` writes for each example by itself, without padding, start and end."""
    marks = {model.config.decoder_start_token_id, model.config.pad_token_id, model.config.bos_token_id}
    texts = []
    for row in range(len(next(iter(batch.values())))):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        if "attention_mask" in one:
            one = {name: values[:, : int(one["attention_mask"].sum())] for name, values in one.items()}
        ids = model.generate(**tensors(one), num_beams=1, do_sample=False, max_new_tokens=limit)[0].tolist()
        ids = ids[1:] if ids[0] == model.config.decoder_start_token_id else ids
        end = model.config.eos_token_id
        texts.append([token for token in ids[: ids.index(end) if end in ids else None] if token not in marks])
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_torch_writes(family: str):
    lite = opened(float_export(family))
    batch = inputs(family)
    expected = torch_writes(exported.torch_model(family), batch, exported.LENGTH)
    written = lite.write(batch, 1000)
    assert lite.target_length == exported.LENGTH
    assert written == expected
    # It reads what it is given; an untrained Whisper hardly tells one noise from another.
    assert len({tuple(text) for text in written}) >= (2 if family == "whisper" else COUNT - 2)
    assert lite.write(batch, 3) == torch_writes(exported.torch_model(family), batch, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_logits_are_those_of_torch_when_it_is_told_what_to_write(family: str):
    import torch

    lite = opened(float_export(family))
    batch, ids = inputs(family), targets(family)
    with torch.inference_mode():
        decoder = torch.from_numpy(ids)
        expected = exported.torch_model(family)(**tensors(batch), decoder_input_ids=decoder).logits.numpy()
    given = lite.logits(batch, ids)
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["marian", "t5", "bart"])
def test_what_is_masked_changes_nothing(family: str):
    lite = opened(float_export(family))
    batch, ids = inputs(family), targets(family)
    noise = np.random.default_rng(0).integers(5, 300, batch["input_ids"].shape)
    other = {**batch, "input_ids": np.where(batch["attention_mask"] > 0, batch["input_ids"], noise)}
    assert (other["input_ids"] != batch["input_ids"]).any()
    one, two = lite.logits(batch, ids), lite.logits(other, ids)
    assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
    bare = {**other, "attention_mask": np.ones_like(noise)}
    assert np.abs(lite.logits(bare, ids) - one)[::2].max() > 0.01 * np.abs(one).max()


def test_tied_embeddings_are_stored_once():
    operators = graph.list_by_signature(float_export("marian") / "model.tflite")
    tables = [
        op.weights[0].buffer
        for part in operators.values()
        for op in part
        for weight in op.weights
        if weight.shape == (320, 64)
    ]
    assert len(tables) == 3  # the encoder's lookup, the decoder's, and the output layer
    assert len(set(tables)) == 1


def test_the_folder_says_what_the_file_is():
    folder, result = exported.export("marian")
    assert result.properties["signatures"]["decode"]["inputs"]["decoder_input_ids"] == [3, 1]
    assert result.properties["signatures"]["encode"]["outputs"]["cross_key_0"] == [3, 4, exported.LENGTH, 16]
    assert (result.properties["length"], result.properties["target_length"]) == (exported.LENGTH, exported.LENGTH)
    lite = opened(folder)
    assert (lite.batch, lite.length, lite.vocab) == (3, exported.LENGTH, 320)
    heard = opened(float_export("whisper"))
    assert heard.length == 100
    assert (float_export("whisper") / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": list(range(5, 200))},
        {"begin_suppress_tokens": list(range(5, 300))},
        {"forced_bos_token_id": 77},
        {"forced_eos_token_id": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_rules_of_the_model_for_writing_are_kept(settings: dict[str, Any], tmp_path: Path):
    folder = exported.copied("bart", tmp_path / "copy", **settings)
    model = copy.deepcopy(exported.torch_model("bart"))
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    expected = torch_writes(model, inputs("bart"), 6)
    assert opened(folder).write(inputs("bart"), 6) == expected
    assert expected != torch_writes(exported.torch_model("bart"), inputs("bart"), 6)


def test_a_prompt_before_the_text_is_neither_written_nor_counted(tmp_path: Path):
    folder = exported.copied("whisper", tmp_path / "copy", forced_decoder_ids=[[1, 40], [2, 50]])
    import torch

    model = exported.torch_model("whisper")
    batch, start = inputs("whisper"), model.config.decoder_start_token_id
    written = opened(folder).write(batch, 4)
    for row, text in enumerate(written):
        ids = [start, 40, 50]
        features = torch.from_numpy(batch["input_features"][row : row + 1])
        for _ in range(4):
            with torch.inference_mode():
                logits = model(input_features=features, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        ends = [place for place, token in enumerate(ids) if token == model.config.eos_token_id and place > 2]
        assert text == [token for token in ids[3 : min(ends, default=None)] if token not in (0, start)]


def test_how_a_model_writes_is_read_from_it():
    from tasks.export.decoding import decoding

    model = copy.deepcopy(exported.torch_model("marian"))
    model.generation_config.bad_words_ids = [[9], [3, 4]]
    model.generation_config.no_repeat_ngram_size = 3
    described, warnings = decoding(model, tensors(inputs("marian", slice(0, 1))))
    assert described["decoder_start_token_id"] == model.config.decoder_start_token_id
    assert described["eos_token_id"] == model.config.eos_token_id
    assert described["suppress_tokens"] == [9]
    assert "forced_decoder_ids" not in described
    assert ["no_repeat_ngram_size: 3" in warning for warning in warnings] == [True, False]


def broken(**changes: Any) -> dict[str, np.ndarray]:
    return {**inputs("marian"), **changes}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (broken(input_ids=np.ones((2, 17), int), attention_mask=np.ones((2, 17), int)), "this file takes 16 at most"),
        (broken(input_ids=np.full((7, 16), 320)), "has the id 320; this file knows 0 to 319"),
        (broken(input_ids=np.ones((3, 16), int)), "the other inputs have not as many"),
        (broken(attention_mask=np.full((7, 16), 2)), "attention_mask has values from 2 to 2"),
        ({"input_ids": np.ones((1, 16), int)}, "this file takes"),
        (broken(input_ids=np.ones(16, int)), r"input_ids has the shape \[16\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(given: dict[str, np.ndarray], message: str):
    with pytest.raises(InputError, match=message):
        opened(float_export("marian")).write(given, 4)


def test_a_file_without_its_configuration_is_refused(tmp_path: Path):
    shutil.copy(float_export("marian") / "model.tflite", tmp_path / "model.tflite")
    with pytest.raises(InputError, match=r"config\.json is missing"):
        open_export(tmp_path / "model.tflite")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not say how the decoder begins and ends"):
        open_export(tmp_path)
    with pytest.raises(InputError, match="at most 16 tokens"):
        opened(float_export("marian")).logits(inputs("marian"), np.ones((COUNT, 17), int))


def compare(folder: Path, family: str) -> tuple[float, float]:
    batch, ids = inputs(family), targets(family)
    expected, given = (opened(path).logits(batch, ids) for path in (float_export(family), folder))
    error = float(np.sqrt(np.mean((given - expected) ** 2)) / expected.std())
    return error, float((given.argmax(-1) == expected.argmax(-1)).mean())


@pytest.mark.parametrize(("block", "largest", "least"), [(None, 0.1, 0.75), (32, 0.6, 0.3)])
def test_small_weights_serve_both_signatures(tmp_path: Path, block: int | None, largest: float, least: float):
    folder, source = tmp_path, float_export("marian")
    shutil.copy(source / "config.json", folder / "config.json")
    weights_only(source / "model.tflite", folder / "model.tflite", block)
    error, agreement = compare(folder, "marian")
    assert 1e-3 < error <= largest
    assert agreement >= least
    parts = graph.list_by_signature(folder / "model.tflite").values()
    weights = [weight for part in parts for op in part for weight in op.weights]
    assert ("int4" if block else "int8") in {weight.dtype for weight in weights}
    assert len({weight.buffer for weight in weights if weight.shape == (320, 64)}) == 1


def test_full_int8_is_refused_before_anything_is_trained():
    config = exported.torch_model("marian").config.to_dict()
    static = ExportTfliteSpec(uses="export_tflite", id="npu", precision="int8")
    assert "write precision: int8-dynamic" in str(refuses(static, "encoder-decoder", "translation"))
    problems, _ = check_export(ExportTfliteSpec(uses="export_tflite", id="cpu"), config, "translation", 8)
    assert not problems
