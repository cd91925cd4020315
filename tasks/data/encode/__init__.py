"""Records to what models take, once for every combination of data, tokenizer and length, kept in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec
from tasks.context import StepResult
from tasks.data.encode import classification, generation, speech, translation
from tasks.data.encode.classification import data_labels, label_names
from tasks.data.encode.features import FILE as FEATURES
from tasks.data.encode.job import Job
from tasks.data.encode.targets import config_of
from tasks.data.encoded import Encoded, open_encoded, save_encoded
from tasks.data.fingerprint import fingerprint
from tasks.data.readers import Split
from tasks.data.tokens import open_tokenizer

__all__ = ["Job", "data_labels", "encode", "label_names", "tokenise"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "target_tokenizer.json",
    FEATURES,
)

_TEXT = ("numpy", "tokenizers")
_LIBRARIES: dict[Task, tuple[str, ...]] = {
    "text-generation": _TEXT,
    "text-classification": _TEXT,
    "translation": _TEXT,
    "speech-recognition": (*_TEXT, "soundfile", "soxr", "torch", "transformers"),
}
"""The libraries that shape encoded data."""

_SHAPING = ("decoder_start_token_id", "max_source_positions")
"""What of a model's configuration shapes its data."""

_ENCODERS: dict[Task, Callable[[Job], Encoded]] = {
    "text-generation": generation.encode,
    "text-classification": classification.encode,
    "translation": translation.encode,
    "speech-recognition": speech.encode,
}


def encode(data: DataSpec, split: Split, task: Task, tokenizer: Path, store: Path) -> Encoded:
    """The encoded split, from the store where it is there. How each task is encoded stands in ``tasks.data.encode``.

    Args:
        data: where the records are; paths absolute.
        split: which of its two splits.
        task: what the model does.
        tokenizer: the folder of the model (its labels and its features count too) or of the tokenizer alone.
        store: the root of the artifact store.

    Raises:
        StepError: the data or the tokenizer is unfit, with the place and the remedy.
    """
    from tasks.artifacts import Store
    from tasks.artifacts.files import hash_file
    from tasks.keys import digest_json, library_versions, source_digest

    names = label_names(data, tokenizer) if task == "text-classification" else ()
    config = config_of(tokenizer)
    shaping = [path for name in _TOKENIZER_FILES if (path := tokenizer / name).is_file()]
    recipe = {
        "step": f"data.{split}",
        "uses": "data",
        "data": fingerprint(data, split, task),
        "max_length": data.max_length,
        "task": task,
        "labels": names,
        "tokenizer": {path.name: hash_file(path.resolve()) for path in shaping},
        "config": {name: config[name] for name in _SHAPING if name in config},
        "source": source_digest(encode),
        "libraries": library_versions(_LIBRARIES[task]),
    }
    key = digest_json(recipe)
    shelf = Store(store)
    artifact = shelf.find(key)
    if artifact is None:
        with shelf.lock(key):
            artifact = shelf.find(key)
            if artifact is None:
                with shelf.scratch() as folder:
                    job = Job(data, split, task, open_tokenizer(tokenizer), names, folder)
                    encoded = tokenise(job)
                    save_encoded(encoded, folder)
                    artifact = shelf.commit(
                        folder,
                        key=key,
                        kind="data",
                        recipe=recipe,
                        result=StepResult("data", (split,), f"{len(encoded)} examples", warnings=encoded.warnings),
                        properties=_properties(encoded, job),
                    )
    return open_encoded(artifact.path)


def tokenise(job: Job) -> Encoded:
    """What ``encode`` keeps, made anew.

    Raises:
        StepError: as ``encode``.
    """
    encoded = _ENCODERS[job.task](job)
    return replace(encoded, warnings=job.warnings)


def _properties(encoded: Encoded, job: Job) -> Mapping[str, Any]:
    return {
        "examples": len(encoded),
        "length": encoded.length,
        "split": job.split,
        "skipped": dict(job.bad.counts),
        "filtered": dict(job.filtered),
        "cut": {what: count for what, count in job.cut.items() if count},
    }
