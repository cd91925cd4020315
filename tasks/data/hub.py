"""Data sets of the Hugging Face hub, through ``datasets``; no code of a data set is ever run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from specs.schema.suggest import nearest
from tasks.context import StepError
from tasks.data.files import Row

PREFIX = "hub:"

_SOURCE = re.compile(
    r"^hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?$"
)

_DEFAULT = {"train": ("train",), "eval": ("validation", "test")}


def rows(source: str, split: Literal["train", "eval"]) -> Iterator[Row]:
    """The rows of ``hub:org/name[/config][:split][@revision]``; class labels as their names, audio as its bytes.

    Without ``:split`` it is ``train`` for training, ``validation`` (else ``test``) for evaluation.

    Raises:
        StepError: the source is malformed, or cannot be had from here.
    """
    from datasets import Audio, ClassLabel

    builder = _builder(source)
    chosen = _split(source, split, builder)
    try:
        builder.download_and_prepare()
        table = builder.as_dataset(split=chosen)
    except Exception as error:  # network, cache, parsing: the library raises many kinds
        raise StepError(f"{source}: {_reason(error)}") from error
    for name, kind in table.features.items():
        if isinstance(kind, Audio):
            table = table.cast_column(name, Audio(decode=False))
    classes = {name: kind for name, kind in table.features.items() if isinstance(kind, ClassLabel)}
    for number, row in enumerate(table, 1):
        for name, kind in classes.items():
            value = row[name]
            row[name] = None if value is None or value < 0 else kind.int2str(value)
        yield Row(f"{source} {chosen} row {number}", row)


def revision(source: str, split: Literal["train", "eval"]) -> str:
    """What identifies the content: name, configuration, split and the resolved commit.

    Raises:
        StepError: the source is malformed, or cannot be had from here.
    """
    builder = _builder(source)
    found = _parsed(source)
    return f"{found['name']}/{builder.config.name}:{_split(source, split, builder)}@{builder.hash}"


def _parsed(source: str) -> re.Match[str]:
    found = _SOURCE.match(source)
    if found is None:
        raise StepError(f"{source!r} names no data set of the hub; write hub:org/name or hub:org/name/config:split")
    return found


def _builder(source: str) -> Any:
    import datasets

    found = _parsed(source)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(found["name"], name=found["config"], revision=found["revision"])
    except Exception as error:  # network, cache, missing configuration: the library raises many kinds
        raise StepError(f"{source}: {_reason(error)}") from error


def _split(source: str, split: Literal["train", "eval"], builder: Any) -> str:
    asked = _parsed(source)["split"]
    # Before the first download the splits stand only in the list of files.
    known = [str(name) for name in builder.info.splits or builder.config.data_files or {}]
    if asked:
        if known and asked not in known:
            raise StepError(f"{source}: no split {asked!r}; {nearest(asked, known)}")
        return asked
    fitting = [name for name in _DEFAULT[split] if name in known] if known else [_DEFAULT[split][0]]
    if not fitting:
        raise StepError(f"{source}: no split for data.{split}; write {source}:NAME with one of {', '.join(known)}")
    return fitting[0]


def _reason(error: Exception) -> str:
    import os

    from huggingface_hub import constants

    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE"):
        return f"{text}. HF_HUB_OFFLINE is set and the data set is not in the cache; unset it or name a local file"
    return f"{text}. Check the name and the network, or download it and name the local file"
