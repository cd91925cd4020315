"""Registered models that write: text or audio files in, the model's own text out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from specs.schema.base import Task
from tasks.models import load, load_tokenizer
from tasks.tracking import harden_environment
from tasks.tracking.models import save_model
from tests.support import tiny_pairs
from tests.tasks.test_models_writers import text_of

COUNT = {"max_new_tokens": 5}


def served(folder: Path, out: Path, task: Task, rows: dict[str, list[Any]]) -> list[str]:
    harden_environment()
    import mlflow.pyfunc
    import pandas

    save_model(out, {"model": folder}, task)
    model = mlflow.pyfunc.load_model(str(out))
    return list(model.predict(pandas.DataFrame(rows), params=COUNT)["text"])


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_translations_are_those_of_the_model(request, tmp_path, family):
    folder = request.getfixturevalue(family)
    model: Any = load(folder)
    tokenizer = load_tokenizer(folder)
    sources = [row["source"] for row in tiny_pairs(3)]
    expected = []
    for source in sources:
        ids = tokenizer(source, return_tensors="pt").input_ids
        row = model.generate(input_ids=ids, num_beams=1, do_sample=False, max_new_tokens=5)[0].tolist()
        expected.append(tokenizer.decode(text_of(row, model.config), skip_special_tokens=True))
    assert served(folder, tmp_path / "out", "translation", {"text": sources}) == expected
    assert all(expected)
    assert family == "t5" or len(set(expected)) > 1


def wav(samples: np.ndarray, rate: int, form: str = "WAV") -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=form)
    return content.getvalue()


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_recordings_are_heard_as_the_model_hears_them(request, tmp_path, family):
    from transformers import AutoFeatureExtractor

    folder = request.getfixturevalue(family)
    model: Any = load(folder)
    tokenizer = load_tokenizer(folder)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    time = np.arange(8000) / 16_000
    sounds = [np.sin(2 * np.pi * pitch * time).astype(np.float32) / 2 for pitch in (300, 900)]
    expected = []
    for sound in sounds:
        pcm, _ = soundfile.read(io.BytesIO(wav(sound, 16_000)), dtype="float32")
        made = extractor(pcm, sampling_rate=16_000, return_tensors="pt")
        if family == "whisper":
            row = model.generate(**made, num_beams=1, do_sample=False, max_new_tokens=5)[0].tolist()
            ids = text_of(row, model.config)
        else:
            with torch.no_grad():
                best = model(**made).logits[0].argmax(-1).tolist()
            ids = [token for at, token in enumerate(best) if token and (at == 0 or best[at - 1] != token)]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True))
    files = [wav(sound, 16_000) for sound in sounds]
    assert served(folder, tmp_path / "out", "speech-recognition", {"audio": files}) == expected
    assert any(expected)
    stereo = wav(np.stack([sounds[0], sounds[0]], 1).repeat(2, 0), 32_000, "FLAC")
    assert served(folder, tmp_path / "again", "speech-recognition", {"audio": [stereo]})
