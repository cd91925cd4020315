"""Small models, data and contexts for the tests of steps that train or change weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.base import Kind, Task
from specs.schema.pipeline import DataSpec, ModelSpec
from tasks.context import Artifact, StepContext
from tasks.data.encoded import Encoded


def context(folder: Path, task: Task = "text-generation", **fields: Any) -> StepContext:
    for name in ("out", "work", "checkpoints", "store"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "model": ModelSpec(config={"model_type": "llama"}),
        "data": DataSpec(train="builtin:none", eval="builtin:none"),
        "threads": 2,
    }
    return StepContext(
        step_id="step",
        task=task,
        out=folder / "out",
        work=folder / "work",
        checkpoints=folder / "checkpoints",
        store=folder / "store",
        **(defaults | fields),
    )


def artifact(path: Path, kind: Kind = "model") -> Artifact:
    """The folder ``path`` as a step takes it."""
    return Artifact("0" * 64, kind, "0" * 64, path, {"properties": {}})


def network(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A tiny ``llama``, ``gpt2`` or ``bert`` (classifier) in eval mode with random weights."""
    import torch
    import transformers

    common: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            **common
            | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"num_key_value_heads": 2, "max_position_embeddings": 64}
            | fields
        )
        model: Any = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            **common | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40} | fields
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            **common
            | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"max_position_embeddings": 64, "num_labels": 2}
            | fields
        )
        model = transformers.BertForSequenceClassification(config)
    model.config.architectures = [type(model).__name__]  # save_pretrained writes it, load asks for it
    return model.eval()


def language(count: int = 96, length: int = 16, vocabulary: int = 64, seed: int = 0) -> Encoded:
    """Sequences in which each token mostly follows from the one before it, of various lengths."""
    rng = np.random.default_rng(seed)
    successor = np.random.default_rng(99).permutation(np.arange(3, vocabulary))
    ids = np.zeros((count, length), np.int32)
    ids[:, 0] = rng.integers(3, vocabulary, count)
    for at in range(1, length):
        follows = successor[ids[:, at - 1] - 3]
        ids[:, at] = np.where(rng.random(count) < 0.8, follows, rng.integers(3, vocabulary, count))
    mask = (np.arange(length) < rng.integers(length // 2, length + 1, count)[:, None]).astype(np.uint8)
    return Encoded(ids * mask, mask, None, np.arange(count, dtype=np.int32), np.zeros(count, np.int32))


def sentences(count: int = 96, length: int = 16, vocabulary: int = 64, seed: int = 0) -> Encoded:
    """Two classes: sequences mostly of low or mostly of high tokens."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    middle = vocabulary // 2
    high = rng.random((count, length)) < np.where(labels[:, None] == 1, 0.7, 0.3)
    ids = np.where(high, rng.integers(middle, vocabulary, (count, length)), rng.integers(3, middle, (count, length)))
    mask = (np.arange(length) < rng.integers(length // 2, length + 1, count)[:, None]).astype(np.uint8)
    numbers = np.arange(count, dtype=np.int32)
    return Encoded(ids.astype(np.int32) * mask, mask, labels, numbers, np.zeros(count, np.int32), ("low", "high"))


def writer(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A tiny ``marian``, ``t5``, ``whisper`` or ``wav2vec2`` in eval mode with random weights."""
    import torch
    import transformers

    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"forced_eos_token_id": None}
    both = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "marian": (
            transformers.MarianConfig,
            transformers.MarianMTModel,
            common | both | {"d_model": 32, "max_position_embeddings": 40, "decoder_start_token_id": 0},
        ),
        "t5": (
            transformers.T5Config,
            transformers.T5ForConditionalGeneration,
            common
            | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
            | {"decoder_start_token_id": 0},
        ),
        "whisper": (
            transformers.WhisperConfig,
            transformers.WhisperForConditionalGeneration,
            common
            | both
            | {"d_model": 32, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 24}
            | {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
            | {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_time_length": 4},
        ),
        "wav2vec2": (
            transformers.Wav2Vec2Config,
            transformers.Wav2Vec2ForCTC,
            {"vocab_size": 32, "pad_token_id": 0, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            | {"num_attention_heads": 4, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8]}
            | {"feat_extract_norm": "layer", "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
            | {"mask_time_prob": 0.5, "mask_time_length": 10, "layerdrop": 0.3},
        ),
    }
    config, model_class, defaults = kinds[kind]
    model = model_class(config(**defaults | fields))
    model.config.architectures = [type(model).__name__]
    return model.eval()


def _targets(random: np.random.Generator, count: int, end: int | None) -> dict[str, Any]:
    """Targets of 3 to 8 tokens; with the token ``end`` behind them where there is one."""
    lengths = random.integers(3, 9, count)
    mask = (np.arange(9) < lengths[:, None] + (end is not None)).astype(np.uint8)
    ids = random.integers(3, 32, (count, 9)).astype(np.int32)
    if end is not None:
        ids[np.arange(count), lengths] = end
    ids *= mask
    texts = (" ".join(map(str, row[:length])) for row, length in zip(ids, lengths, strict=True))
    return {"target_ids": ids, "target_mask": mask, "references": tuple(texts)}


def pairs(count: int = 48, seed: int = 0) -> Encoded:
    """Translations: each target is its source backwards, with an end mark."""
    random = np.random.default_rng(seed)
    targets = _targets(random, count, 2)
    ids, mask = targets["target_ids"], targets["target_mask"]
    backwards = ids.copy()
    for row, length in enumerate(mask.sum(1) - 1):
        backwards[row, :length] = ids[row, :length][::-1]
    return Encoded(backwards, mask, None, np.arange(count, dtype=np.int32), np.zeros(count, np.int32), **targets)


def recordings(kind: str, count: int = 32, seed: int = 0) -> Encoded:
    """Sounds in which each token of the target has its own pitch: samples for ``wav2vec2``, else frames of 16 bands."""
    random = np.random.default_rng(seed)
    samples = kind == "wav2vec2"
    targets = _targets(random, count, None if samples else 2)
    features = []
    for ids, mask in zip(targets["target_ids"], targets["target_mask"], strict=True):
        tokens = ids[: mask.sum()]
        if samples:
            time = np.arange(120)
            features.append(np.concatenate([np.sin(2 * np.pi * token / 120 * time) for token in tokens]))
        else:
            features.append(np.eye(16)[np.repeat(tokens % 16, 4)])
    numbers = np.arange(count, dtype=np.int32)
    ends = np.cumsum([len(part) for part in features])
    return Encoded(
        None,
        None,
        None,
        numbers,
        np.zeros(count, np.int32),
        **targets,
        features=np.concatenate(features).astype(np.float32),
        feature_ends=ends.astype(np.int64),
        seconds=(np.diff(ends, prepend=0) / (1000 if samples else 100)).astype(np.float32),
        feature_input="input_values" if samples else "input_features",
        feature_frames=None if samples else 40,
    )
