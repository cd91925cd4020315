"""What can be known of a model without loading its weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec, ModelSpec
from tasks.context import StepError
from tasks.models.configuration import build_config, build_model, check_causal, check_length, is_speech
from tasks.models.features import features_for
from tasks.models.load import INDEX, WEIGHTS, check_weights, has_tokenizer, load_config, quiet, read_config
from tasks.models.resolve import is_local, resolve
from tasks.models.tokenizer import ABOUT, DEFAULT_SIZE, least_size, style_of

if TYPE_CHECKING:
    from torch import nn

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}

_LARGEST_HEADER = 100_000_000

_CHARACTERS = 64
"""What the plan takes for the characters of transcripts that it does not count."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder: how many numbers, how many of each type, and the bytes that they take."""

    parameters: int
    dtypes: Mapping[str, int]
    bytes: int


@dataclass(frozen=True)
class ModelSummary:
    """What the plan shows of a model. ``bytes`` is that of the weights on the disk; ``config`` is config.json."""

    architecture: str
    parameters: int
    bytes: int
    tokenizer: str
    config: Mapping[str, Any] = field(repr=False)


def check_model(model: ModelSpec, task: Task, data: DataSpec) -> ModelSummary:
    """Look at the model that a spec names: its configuration and the headers of its files, or a count from ``config:``.

    Raises:
        StepError: it cannot be had, read, or used for the task and the data.
    """
    quiet()
    if model.config is not None:
        return _from_config(model, task, data)
    source = model.source or ""
    found = resolve(source, model.revision, weights=is_local(source))
    config = load_config(found.folder)
    style = style_of(config.model_type, task)
    if task == "text-generation":
        check_causal(config, source)
    check_length(config, data, from_config=False)
    if is_local(source):
        check_weights(found.folder)
        weights = weights_in(found.folder)
    else:
        weights = _weights_on_hub(source, model.revision)
    bare = model.tokenizer is None and not has_tokenizer(found.folder)
    if bare and style != "ctc":
        raise StepError(f"{source} has no tokenizer; name the one that belongs to it in model.tokenizer")
    architectures = config.architectures if isinstance(config.architectures, list) else []
    architecture = str(next(iter(architectures), config.model_type))
    tokenizer = _tokenizer(model.tokenizer) if model.tokenizer else "its own"
    if bare:
        tokenizer = f"{ABOUT['ctc']}, from the training data"
    return ModelSummary(architecture, weights.parameters, weights.bytes, tokenizer, read_config(found.folder))


def weights_in(folder: Path) -> Weights:
    """Count the tensors in a folder from the headers of its safetensors files.

    Raises:
        StepError: a file is damaged.
    """
    return _sum(_tensors(folder))


def grown(before: Weights, after: Weights) -> tuple[str, ...]:
    """A warning where a file that was stored in fewer bits is larger now, as its weights are float32."""
    if after.bytes <= before.bytes:
        return ()
    sizes = f"{before.bytes / 1e6:.3g} to {after.bytes / 1e6:.3g} MB"
    return (f"the file grew from {sizes}: its weights came in fewer bits and are float32 now; quantize afterwards",)


def _tensors(folder: Path) -> Iterable[Mapping[str, Any]]:
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise StepError(f"{folder / INDEX} is damaged: {error}") from error
        names = sorted(set(map(str, listed)))
    for name in names:
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise StepError(f"{folder}: the weights {name} are missing; fetch the model again")
        yield from _header(file).values()


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 0 < size <= _LARGEST_HEADER:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for entry in header.values():
            if not isinstance(entry["dtype"], str) or math.prod(map(int, entry["shape"])) < 0:
                raise ValueError(f"a tensor of type {entry['dtype']!r} and shape {entry['shape']!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StepError(f"{file} is not a safetensors file ({error}); fetch the model again") from error
    if file.stat().st_size != 8 + size + end:
        raise StepError(f"{file} is cut short or damaged: {file.stat().st_size} bytes instead of {8 + size + end}")
    return header


def _sum(tensors: Iterable[Mapping[str, Any]]) -> Weights:
    counts: Counter[str] = Counter()
    size = 0
    for tensor in tensors:
        counts[tensor["dtype"]] += math.prod(tensor["shape"])
        size += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    return Weights(sum(counts.values()), dict(sorted(counts.items())), size)


def _weights_on_hub(source: str, revision: str | None) -> Weights:
    from huggingface_hub import constants, get_safetensors_metadata

    if constants.HF_HUB_OFFLINE:
        folder = resolve(source, revision).folder
        check_weights(folder)
        return weights_in(folder)
    try:
        counts = get_safetensors_metadata(source, revision=revision).parameter_count
    except Exception as error:  # network, rights, no safetensors: the library raises many kinds
        raise StepError(f"{source}: no safetensors weights on the hub ({str(error).splitlines()[0]})") from error
    size = sum(count * _BITS.get(dtype, 32) // 8 for dtype, count in counts.items())
    return Weights(sum(counts.values()), {str(dtype): count for dtype, count in counts.items()}, size)


def _from_config(model: ModelSpec, task: Task, data: DataSpec) -> ModelSummary:
    import torch

    fields = model.config or {}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    build_config(fields, task, **ids)
    style = style_of(fields["model_type"], task)
    size = fields.get("vocab_size", _CHARACTERS if style == "ctc" else DEFAULT_SIZE)
    least = least_size(style)
    if model.tokenizer is None and isinstance(size, int) and size < least:
        raise StepError(f"model.config.vocab_size {size} is too small for its tokenizer; write {least} or more")
    config = build_config(fields, task, vocab_size=size, **ids)
    if task == "text-generation":
        check_causal(config, "model.config")
    check_length(config, data, from_config=True)
    if is_speech(config):
        features_for(config)
    with torch.device("meta"):
        built = build_model(config, task)
    count = stored_parameters(built)
    tokenizer = _tokenizer(model.tokenizer) if model.tokenizer else f"{ABOUT[style]}, from the training data"
    described = {**config.to_dict(), "architectures": [type(built).__name__]}
    return ModelSummary(type(built).__name__, count, 4 * count, tokenizer, described)


def stored_parameters(model: nn.Module) -> int:
    """Numbers that the model's file will hold: weights that are shared once, and those that are computed not at all."""
    computed = getattr(model, "_keys_to_ignore_on_save", None) or ()
    kept = [parameter for name, parameter in model.named_parameters() if name not in computed]
    names = model.state_dict().keys()
    return sum(
        tensor.numel() for tensor in [*kept, *(buffer for name, buffer in model.named_buffers() if name in names)]
    )


def _tokenizer(source: str) -> str:
    folder = resolve(source, weights=False).folder
    if not has_tokenizer(folder):
        raise StepError(f"model.tokenizer: {source} has no tokenizer; name a folder with a tokenizer.json")
    return source
