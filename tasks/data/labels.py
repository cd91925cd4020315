"""The labels of a classification data set and the numbers that a model gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.suggest import nearest
from tasks.data.bad_rows import BadRow

if TYPE_CHECKING:
    import numpy as np

    from tasks.data.encoded import Encoded


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in their order: by number where all are whole numbers, else by name."""
    distinct = set(names)
    if all(_is_number(name) for name in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))


def model_labels(config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The label names of a sequence classifier by its configuration, in order; None for any other model."""
    if config is None or not any("ForSequenceClassification" in name for name in config.get("architectures") or ()):
        return None
    names = config.get("id2label") or {str(number): f"LABEL_{number}" for number in range(config.get("num_labels", 2))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def agree(found: tuple[str, ...], of_model: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The model's own names in the model's order where they are those of the data, else None.

    They agree where the names are the same but for case, or where the data has numbers and the model gives each of
    them a name. A model whose names are only ``LABEL_0``… takes the names of the data in their order.
    """
    if of_model is None:
        return None
    if set(found) == set(of_model):
        return of_model
    theirs = {name.casefold() for name in of_model}
    if {name.casefold() for name in found} == theirs and len(found) == len(theirs) == len(of_model):
        return of_model
    numbers = all(_is_number(name) and 0 <= int(name) < len(of_model) for name in found)
    if numbers and len(found) == len(of_model):
        return of_model
    nameless = all(name == f"LABEL_{number}" for number, name in enumerate(of_model))
    return found if nameless and len(found) == len(of_model) else None


def numbers_of(found: tuple[str, ...], names: tuple[str, ...]) -> dict[str, int]:
    """Label as it stands in the data -> its number, given the labels of the data and the names in use."""
    exact = {name: number for number, name in enumerate(names)}
    if all(name in exact for name in found):
        return {name: exact[name] for name in found}
    by_name = {name.casefold(): number for number, name in enumerate(names)}
    if all(name.casefold() in by_name for name in found):
        return {name: by_name[name.casefold()] for name in found}
    return {name: int(name) for name in found}


def unseen(label: str, place: str, known: Iterable[str]) -> BadRow:
    """The error for a label of the evaluation data that the training data does not have."""
    return BadRow(
        f"{place}: label {label!r} is not among those of the training data; {nearest(label, known)}",
        "label not in the training data",
    )


def class_weights(encoded: Encoded) -> np.ndarray:
    """What the loss of an example counts, so that every class counts as much as any other; float32 [C].

    With one label an example it is one over the frequency of its class, times a factor that makes the mean over the
    examples 1. With several it is the weight of an example that has the label, against one that has not.
    """
    import numpy as np

    labels = np.asarray(encoded.labels)
    if labels.ndim == 2:
        having = labels.sum(axis=0, dtype=np.int64)
        return ((len(labels) - having) / np.maximum(having, 1)).astype(np.float32)
    counts = np.bincount(labels, minlength=len(encoded.label_names))
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0).astype(np.float32)


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
