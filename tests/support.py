"""What the tests share: tiny data written on the spot, tiny models with tokenizers trained on it, contexts."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from specs.schema.base import Kind, Task
from specs.schema.pipeline import DataSpec, ModelSpec
from tasks.context import Artifact, StepContext
from tasks.data import reviews, tone_digits, toy_language

Family = Literal["llama", "gpt2", "bert", "marian", "t5", "bart", "whisper", "wav2vec2"]

LENGTH = 32
"""Tokens of an example of the tiny data."""

SHORT = 28
"""Characters of either side of a tiny pair: no more than that in tokens."""

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "a small model learns a small text by heart",
    "colourless green ideas sleep furiously at night",
    "every step proves that it did something",
    "the naïve café serves crème brûlée to the señor",
    "numbers such as 1 and 22 and 333 stand in the text",
)


def tiny_text(documents: int = 40) -> list[str]:
    """Documents with enough repetition that a tiny model learns them; some letters take two bytes."""
    return [
        " . ".join(SENTENCES[(number + offset * (1 + number % 5)) % len(SENTENCES)] for offset in range(3 + number % 4))
        for number in range(documents)
    ]


def tiny_reviews(count: int = 80, split: Literal["train", "eval"] = "train") -> list[dict[str, Any]]:
    """The first synthetic reviews, both labels equally often."""
    return [{"text": text, "label": label} for text, label in reviews.read(split)[:count]]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_pairs(count: int = 80, split: Literal["train", "eval"] = "train") -> list[dict[str, Any]]:
    """The first short sentences of the toy language with their translations."""
    short = (pair for pair in toy_language.read(split) if max(map(len, pair)) <= SHORT)
    return [{"source": source, "target": target} for source, target in islice(short, count)]


def tiny_speech(folder: Path, count: int = 80, split: Literal["train", "eval"] = "train") -> list[dict[str, Any]]:
    """The first recordings of one digit, as wav files of less than a second in ``folder/SPLIT``."""
    import soundfile

    (folder / split).mkdir(parents=True, exist_ok=True)
    single = ((recording, text) for recording, text in tone_digits.utterances(split) if " " not in text)
    rows = []
    for number, (recording, text) in enumerate(islice(single, count)):
        rows.append({"audio": f"{split}/{number}.wav", "text": text})
        soundfile.write(folder / rows[-1]["audio"], recording.samples, recording.rate)
    return rows


def tiny_data(folder: Path, task: Task, *, train: int = 80, eval: int = 40, max_length: int = LENGTH) -> DataSpec:
    """A data block whose jsonl files, and audio files, are written into ``folder``."""
    made = {
        "text-generation": lambda: [{"text": text} for text in tiny_text(train + eval)],
        "text-classification": lambda: tiny_reviews(train) + tiny_reviews(eval, "eval"),
        "translation": lambda: tiny_pairs(train) + tiny_pairs(eval, "eval"),
        "speech-recognition": lambda: tiny_speech(folder, train) + tiny_speech(folder, eval, "eval"),
    }
    rows = made[task]()
    return DataSpec(
        train=str(write_jsonl(folder / "train.jsonl", rows[:train])),
        eval=str(write_jsonl(folder / "eval.jsonl", rows[train:])),
        max_length=max_length,
        max_duration=1.0,
    )


def tiny_config(family: Family, **overrides: Any) -> dict[str, Any]:
    """The ``config:`` of a model of two layers and width 32; Whisper hears 1 s, wav2vec2 gives 200 frames a second."""
    both = {
        name: value
        for side in ("encoder", "decoder")
        for name, value in ((f"{side}_layers", 2), (f"{side}_attention_heads", 4), (f"{side}_ffn_dim", 64))
    }
    configs: dict[str, dict[str, Any]] = {
        "llama": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "vocab_size": 320,
        },
        "gpt2": {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": 320,
        },
        "bert": {
            "model_type": "bert",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "vocab_size": 320,
        },
        "marian": {
            "model_type": "marian",
            "d_model": 32,
            **both,
            "max_position_embeddings": 64,
            "scale_embedding": True,
            "vocab_size": 320,
        },
        "t5": {
            "model_type": "t5",
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 320,
        },
        "bart": {
            "model_type": "bart",
            "d_model": 32,
            **both,
            "max_position_embeddings": 64,
            "vocab_size": 320,
        },
        "whisper": {
            "model_type": "whisper",
            "d_model": 32,
            **both,
            "num_mel_bins": 16,
            "max_source_positions": 50,
            "max_target_positions": 64,
            "vocab_size": 320,
        },
        "wav2vec2": {
            "model_type": "wav2vec2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "conv_dim": [16, 16, 16],
            "conv_stride": [5, 4, 4],
            "conv_kernel": [10, 8, 8],
            "feat_extract_norm": "layer",
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    }
    return {**configs[family], **overrides}


TASKS_OF: dict[str, Task] = {
    "bert": "text-classification",
    "marian": "translation",
    "t5": "translation",
    "bart": "translation",
    "whisper": "speech-recognition",
    "wav2vec2": "speech-recognition",
}
"""What each family does, where it is not text-generation."""


def tiny_tokenizer(folder: Path, family: Family, size: int = 320) -> Path:
    """A tokenizer trained on the tiny texts in ``folder``: byte-level BPE, or characters for ``wav2vec2``."""
    from tasks.models.tokenizer import style_of, train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    texts = tiny_text() + [row["text"] for row in tiny_reviews()]
    train_tokenizer(texts, size, style_of(family, TASKS_OF.get(family, "text-generation")), folder, 64)
    return folder


def tiny_model(folder: Path, family: Family, task: Task, *, labels: int = 2, seed: int = 0, **overrides: Any) -> Path:
    """A model with random weights, its tokenizer and features, saved as a Hugging Face folder.

    Overrides go into the config. Encoder-decoders get weights with which they write something else for every input.
    """
    import torch

    from tasks.models import load_tokenizer, save
    from tasks.models.anatomy import anatomy
    from tasks.models.configuration import build_config, build_model
    from tasks.models.features import write_features
    from tasks.models.generation import settle, token_fields
    from tasks.models.load import quiet

    quiet()
    tiny_tokenizer(folder, family, overrides.get("vocab_size", 320))
    tokens = load_tokenizer(folder)
    derived: dict[str, Any] = {"vocab_size": len(tokens), **token_fields(tokens, task, family)}
    if task == "text-classification":
        names = ("negative", "positive") if labels == 2 else tuple(f"class{number}" for number in range(labels))
        derived["id2label"] = dict(enumerate(names))
        derived["label2id"] = {name: number for number, name in enumerate(names)}
    wide = {"init_std": 0.2} if family in ("marian", "bart", "whisper") else {}
    config = build_config({**tiny_config(family), **wide, **overrides}, task, **derived)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config, task)
    for attention in (part for block in anatomy(model).blocks for part in block.attentions if part.cross):
        for name in (attention.value, attention.output):
            model.get_submodule(name).weight.data.mul_(4)  # type: ignore[operator, union-attr]
    settle(model)
    save(model, folder)
    if task == "speech-recognition":
        write_features(config, folder)
    return folder


def as_artifact(path: Path, kind: Kind = "model", key: str | None = None, **properties: Any) -> Artifact:
    """A folder as the artifact of a step, without a store."""
    return Artifact(key or ("0" * 63 + "1"), kind, "0" * 64, path, {"kind": kind, "properties": properties})


def context(folder: Path, task: Task, data: DataSpec, model: ModelSpec | None = None, **overrides: Any) -> StepContext:
    """A context whose folders lie under ``folder``; ``out`` is empty. Overrides replace its fields."""
    folders = {name: folder / name for name in ("out", "work", "checkpoints", "store")}
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "step_id": "step",
        "task": task,
        "model": model or ModelSpec(config=tiny_config("llama")),
        "data": data,
        "emit": json.dumps,  # events travel as JSON: what cannot must not pass here either
        **folders,
    }
    return StepContext(**{**fields, **overrides})
