"""Speech models from folders: heads, features and weights as trained models have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specs.schema.pipeline import ModelSpec
from tasks.context import StepError
from tasks.models import check_model, load, load_tokenizer, save
from tasks.models.load import copy_tokenizer
from tests.support import tiny_data, write_jsonl
from tests.tasks.test_models_writers import bring, inputs


def test_a_speech_encoder_gets_a_fresh_head_for_the_characters_of_the_data(tmp_path, wav2vec2, speech_data):
    base = tmp_path / "base"
    save(load(wav2vec2).wav2vec2, base)  # type: ignore[arg-type]
    copy_tokenizer(wav2vec2, base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    source = ModelSpec(source=str(base))
    assert check_model(source, "speech-recognition", speech_data).tokenizer.startswith("characters")
    result, out = bring(tmp_path / "run", "speech-recognition", speech_data, source)
    model: Any = load(out)
    assert model.lm_head.out_features == len(load_tokenizer(out)) == model.config.vocab_size
    assert model.config.pad_token_id == 0
    assert "fresh head for characters" in result.summary
    assert "random weights" in result.warnings[0]
    kept = load(wav2vec2).wav2vec2.encoder.layers[0].attention.q_proj.weight  # type: ignore
    assert torch.equal(model.wav2vec2.encoder.layers[0].attention.q_proj.weight, kept)
    _, again = bring(tmp_path / "again", "speech-recognition", speech_data, source)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_characters_that_the_vocabulary_lacks_are_told(tmp_path, wav2vec2):
    data = tiny_data(tmp_path / "data", "speech-recognition", train=3, eval=1)
    rows = [json.loads(line) for line in Path(data.train).read_text().splitlines()]
    texts = ("One 9", "two ß 9", "three")
    write_jsonl(Path(data.train), [{**row, "text": text} for row, text in zip(rows, texts, strict=True)])
    result, _ = bring(tmp_path / "run", "speech-recognition", data, ModelSpec(source=str(wav2vec2)))
    (warning,) = result.warnings
    assert "2 characters that are not in the vocabulary, where they are all one: 9 ß;" in warning


def test_a_blank_that_is_not_the_padding_is_refused(tmp_path, wav2vec2, speech_data):
    folder = shutil.copytree(wav2vec2, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))
    with pytest.raises(StepError, match="the model's blank is token 5, the tokenizer's padding is 0"):
        bring(tmp_path / "run", "speech-recognition", speech_data, ModelSpec(source=str(folder)))


def test_a_folder_without_features_gets_those_of_its_configuration(tmp_path, whisper, speech_data):
    folder = shutil.copytree(whisper, tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    _, out = bring(tmp_path / "run", "speech-recognition", speech_data, ModelSpec(source=str(folder)))
    name = "preprocessor_config.json"
    assert json.loads((out / name).read_text()) == json.loads((whisper / name).read_text())
    wrong = json.loads((whisper / name).read_text()) | {"feature_size": 80}
    (folder / name).write_text(json.dumps(wrong))
    with pytest.raises(StepError, match="makes 80 mel bands, the model takes 16"):
        bring(tmp_path / "wrong", "speech-recognition", speech_data, ModelSpec(source=str(folder)))


def test_weights_as_older_files_name_them_are_read_and_masks_are_made(tmp_path, wav2vec2, speech_data):
    """wav2vec2-base-960h names the parts of its weight norm otherwise, and has no vector for masked audio."""
    folder = shutil.copytree(wav2vec2, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    mask = state.pop("wav2vec2.masked_spec_embed")
    for old, new in (("original0", "weight_g"), ("original1", "weight_v")):
        place = "wav2vec2.encoder.pos_conv_embed.conv"
        state[f"{place}.{new}"] = state.pop(f"{place}.parametrizations.weight.{old}")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, out = bring(tmp_path / name, "speech-recognition", speech_data, ModelSpec(source=str(folder)), seed=seed)
        made.append((out / "model.safetensors").read_bytes())
        with torch.no_grad():
            assert torch.equal(load(out)(**inputs("wav2vec2")).logits, load(wav2vec2)(**inputs("wav2vec2")).logits)
        assert load_file(out / "model.safetensors")["wav2vec2.masked_spec_embed"].shape == mask.shape
    assert made[0] == made[1] != made[2]
