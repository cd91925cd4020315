"""The script that MLflow runs to serve a registered model: text or audio in, an answer out.

It lies beside the packages and not in ``tasks.tracking``, since the registry of steps imports every module of those.
It travels with the model, so it leans on public libraries alone; only a model that plain Hugging Face cannot load
(``lathe.json`` beside its weights) and an exported file that writes from an encoder's output or from audio ask for
Lathe.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

Scores = np.ndarray
Inputs = Mapping[str, np.ndarray]


def lathe(module: str) -> Any:
    """A module of Lathe.

    Raises:
        RuntimeError: Lathe is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"this model cannot be loaded without Lathe; install Lathe from its source ({error})"
        ) from error


class Torch:
    """A Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        if (folder / "lathe.json").exists():
            self.model = lathe("tasks.models").load(folder)
        else:
            import transformers

            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            auto = getattr(transformers, config.architectures[0])
            self.model = auto.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        config: Any = self.model.config
        self.length = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 512))
        self.written = int(getattr(config, "max_target_positions", None) or self.length)

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Scores:
        return self._logits({"input_ids": input_ids, "attention_mask": attention_mask})

    def write(self, inputs: Inputs, limit: int) -> list[int]:
        import torch

        model: Any = self.model
        if not model.can_generate():
            best = self._logits(inputs)[0].argmax(-1).tolist()
            return [token for token, _ in groupby(best) if token != model.config.pad_token_id]
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            most = min(limit, self.written - 8)  # a start token, and what Whisper is prompted with
            return model.generate(**tensors, num_beams=1, do_sample=False, max_new_tokens=most)[0].tolist()

    def _logits(self, inputs: Inputs) -> Scores:
        import torch

        with torch.inference_mode():
            out = self.model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return out.logits.float().numpy()


class LiteRT:
    """A ``.tflite`` file with a fixed batch and length, run an example at a time."""

    def __init__(self, file: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_path=str(file))
        self.interpreter.allocate_tensors()
        self.inputs = sorted(self.interpreter.get_input_details(), key=lambda item: item["name"])
        self.output = self.interpreter.get_output_details()[0]
        self.batch, self.length = (int(size) for size in self.inputs[0]["shape"])

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Scores:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            for place, detail in enumerate(self.inputs):
                is_mask = "mask" in detail["name"] or ("input_ids" not in detail["name"] and place == 1)
                window = np.zeros((self.batch, self.length), detail["dtype"])
                window[0, : len(ids)] = mask if is_mask else ids
                self.interpreter.set_tensor(detail["index"], window)
            self.interpreter.invoke()
            rows.append(self._logits()[0])
        return np.stack(rows)

    def _logits(self) -> np.ndarray:
        raw = self.interpreter.get_tensor(self.output["index"])
        scale, zero = self.output["quantization"]
        return (raw.astype(np.float32) - zero) * scale if scale else raw.astype(np.float32)


class Onnx:
    """A ``model.onnx`` of free batch and length; a decoder is given an empty cache."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        config = json.loads((file.parent / "config.json").read_text())
        self.length = int(config.get("positions", 512))

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Scores:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        for port in self.session.get_inputs():
            if port.name not in given:
                sizes = (size if isinstance(size, int) else 0 for size in port.shape[1:])
                given[port.name] = np.zeros((len(input_ids), *sizes), np.float32)
        return self.session.run(["logits"], given)[0]  # type: ignore


class Writer:
    """An exported file that writes from an encoder's output or from audio, run by Lathe's own loop."""

    def __init__(self, file: Path) -> None:
        self.model: Any = lathe("tasks.export.runtime").open_export(file)
        self.length = int(self.model.length)

    def write(self, inputs: Inputs, limit: int) -> list[int]:
        return self.model.write(inputs, limit)[0]


class Served(PythonModel):
    """A data frame with the column ``text`` in; ``label`` and ``score``, or the text that follows or its translation,
    out. For speech-recognition the column ``audio`` has the content of audio files, and the text comes out."""

    def load_context(self, context: Any) -> None:
        from transformers import AutoTokenizer

        folder = Path(context.artifacts["model"])
        self.folder = Path(context.artifacts.get("tokenizer", folder))
        self.task = context.model_config["task"]
        self.answer, writes = ANSWERS[self.task]
        files = [folder / name for name in EXPORTS if (folder / name).exists()]
        exported = Writer if writes else EXPORTS.get(files[0].name if files else "")
        # ``length`` is its window in tokens. Calling it gives float logits, [batch, class] or [batch, token, word];
        # where the task writes, ``write`` gives the ids for one input of a translation or for one recording.
        self.network: Any = exported(files[0]) if files and exported else Torch(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        config = self.folder / "config.json"
        self.labels = json.loads(config.read_text()).get("id2label", {}) if config.exists() else {}
        self.features: Any = None
        if (self.folder / "preprocessor_config.json").exists():
            from transformers import AutoFeatureExtractor

            self.features = AutoFeatureExtractor.from_pretrained(self.folder, local_files_only=True)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        count = int((params or {}).get("max_new_tokens", 32))
        return pd.DataFrame([self.answer(self, given, count) for given in model_input.iloc[:, 0]])

    def classify(self, text: str, _: int) -> dict[str, Any]:
        ids = self.tokenizer(text, truncation=True, max_length=self.network.length)["input_ids"]
        logits = self._forward(ids)
        shares = np.exp(logits - logits.max())
        best = int(logits.argmax())
        return {"label": str(self.labels.get(str(best), best)), "score": float(shares[best] / shares.sum())}

    def continue_(self, text: str, count: int) -> dict[str, Any]:
        ids = list(self.tokenizer(text)["input_ids"])
        made: list[int] = []
        for _ in range(count):
            window = (ids + made)[-self.network.length :]
            made.append(int(self._forward(window)[len(window) - 1].argmax()))
            if made[-1] == self.tokenizer.eos_token_id:
                break
        return self._text(made)

    def translate(self, text: str, count: int) -> dict[str, Any]:
        ids = self.tokenizer(text, truncation=True, max_length=self.network.length)["input_ids"]
        tokens = np.array([ids], np.int64)
        return self._text(self.network.write({"input_ids": tokens, "attention_mask": np.ones_like(tokens)}, count))

    def transcribe(self, audio: bytes, count: int) -> dict[str, Any]:
        import soundfile

        samples, rate = soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)
        heard = samples.mean(axis=1)
        if rate != self.features.sampling_rate:
            import soxr

            heard = soxr.resample(heard, rate, self.features.sampling_rate)
        made = self.features(heard, sampling_rate=self.features.sampling_rate, return_tensors="np")
        inputs = {name: np.asarray(made[name]) for name in made}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = inputs["attention_mask"].astype(np.int64)
        return self._text(self.network.write(inputs, count))

    def _text(self, ids: list[int]) -> dict[str, Any]:
        return {"text": str(self.tokenizer.decode(ids, skip_special_tokens=True))}

    def _forward(self, ids: list[int]) -> np.ndarray:
        tokens = np.array([ids], np.int64)
        return self.network(tokens, np.ones_like(tokens))[0]


EXPORTS: dict[str, Any] = {"model.tflite": LiteRT, "model.onnx": Onnx, "encoder_model.onnx": Writer}
"""What runs an exported file, by its name."""

ANSWERS = {
    "text-generation": (Served.continue_, False),
    "text-classification": (Served.classify, False),
    "translation": (Served.translate, True),
    "speech-recognition": (Served.transcribe, True),
}
"""What answers for each task, and whether it writes from an encoder's output or from audio."""

set_model(Served())
