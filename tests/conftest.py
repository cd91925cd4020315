"""Every test runs offline and on two threads at most, on one where tests run side by side; tiny models are made once
a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve the test beside this one
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from specs.schema.pipeline import DataSpec
from tests import support


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What the libraries keep is looked at for garbage no more, which took a seventh of the time of the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tests of a module compute on one thread: small models are faster so, and sums have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers for text-generation; copy before you write."""
    return support.tiny_model(tmp_path_factory.mktemp("llama"), "llama", "text-generation")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers for text-generation, with Conv1D layers and tied embeddings; copy before you write."""
    return support.tiny_model(tmp_path_factory.mktemp("gpt2"), "gpt2", "text-generation")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers for text-classification with the labels negative and positive; copy before you write."""
    return support.tiny_model(tmp_path_factory.mktemp("bert"), "bert", "text-classification")


@pytest.fixture(scope="session")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Marian of two layers for translation, its embeddings and head one table; copy before you write."""
    return support.tiny_model(tmp_path_factory.mktemp("marian"), "marian", "translation")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two layers for translation, with relative positions; copy before you write."""
    return support.tiny_model(tmp_path_factory.mktemp("t5"), "t5", "translation")


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BART of two layers for translation; copy before you write."""
    return support.tiny_model(tmp_path_factory.mktemp("bart"), "bart", "translation")


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper of two layers for speech-recognition that hears 1 s in 16 mel bands; copy before you write."""
    return support.tiny_model(tmp_path_factory.mktemp("whisper"), "whisper", "speech-recognition")


@pytest.fixture(scope="session")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wav2vec2 of two layers for speech-recognition by CTC, with 200 frames a second; copy before you write."""
    return support.tiny_model(tmp_path_factory.mktemp("wav2vec2"), "wav2vec2", "speech-recognition")


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Tiny data for text-generation."""
    return support.tiny_data(tmp_path_factory.mktemp("text"), "text-generation")


@pytest.fixture(scope="session")
def review_data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Tiny data for text-classification."""
    return support.tiny_data(tmp_path_factory.mktemp("reviews"), "text-classification")


@pytest.fixture(scope="session")
def pair_data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Tiny data for translation."""
    return support.tiny_data(tmp_path_factory.mktemp("pairs"), "translation")


@pytest.fixture(scope="session")
def speech_data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Tiny data for speech-recognition: recordings of one digit."""
    return support.tiny_data(tmp_path_factory.mktemp("speech"), "speech-recognition")
