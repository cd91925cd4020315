"""Students and teachers of different vocabularies: what one says in the other's tokens, where that is sound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specs.schema.steps.distill import DistillSpec
from tasks.context import StepContext, StepError

if TYPE_CHECKING:
    from tasks.data.encoded import Encoded

_REMEDY = "take a teacher with the student's tokenizer, or write student or config instead of needs"


@dataclass(frozen=True)
class Aligned:
    """How a teacher is asked about the student's examples.

    Args:
        reads: the teacher's token for each of the student's that it reads, int64 [V]; None where they are the same.
        writes: the same of the tokens that it says, in whose order its logits are taken.
        data: the examples as the teacher's own tokenizer reads them; None where the student's are given to it.
        about: what was done, for the summary; empty where the vocabularies are the same.
    """

    reads: np.ndarray | None = None
    writes: np.ndarray | None = None
    data: Encoded | None = None
    about: str = ""


def align(student: Path, teacher: Path, data: Encoded, spec: DistillSpec, ctx: StepContext) -> Aligned:
    """How the teacher is asked.

    Where texts are classified the classes are the same whatever the tokens, and each model reads the texts by its own
    tokenizer. Everywhere else a word is compared for every token: that is sound only where both cut the texts into the
    same tokens, each of the student's has the same name in the teacher's vocabulary, and no more is different than
    their numbers and what the teacher has besides (a vocabulary that ``prune`` has made smaller). What the teacher
    gives to tokens that the student lacks is left out, so that it is asked for the student's tokens given that it is
    one of them.

    Args:
        student, teacher: folders with the tokenizers.
        data: the training split, as the student's tokenizer encodes it.
        spec: what else is to be learned from.
        ctx: the data and the store.

    Raises:
        StepError: what they say cannot be compared.
    """
    from tasks.data import encode
    from tasks.data.tokens import open_tokenizer

    both = [open_tokenizer(folder) for folder in (student, teacher)]
    tables = {}
    for side in ("core", "writes"):
        ours, theirs = (getattr(one, side).get_vocab(with_added_tokens=True) for one in both)
        if ours != theirs:
            tables[side] = (ours, theirs)
    if not tables:
        return Aligned()
    differs = _difference(*next(iter(tables.values())))
    if ctx.task == "text-classification":
        _refuse(differs, _apart(spec))
        read = encode(ctx.data, "train", ctx.task, teacher, ctx.store)
        if not np.array_equal(np.asarray(read.document), np.asarray(data.document)):
            raise StepError(f"{differs}, and they do not read the same examples; {_REMEDY}")
        return Aligned(data=read, about="each reads by its own tokenizer")
    _refuse(differs, _unchecked(spec))
    found = {side: _table(ours, theirs, differs) for side, (ours, theirs) in tables.items()}
    reads, writes = found.get("core"), found.get("writes")
    read = encode(ctx.data, "train", ctx.task, teacher, ctx.store)
    sides = (("input_ids", "attention_mask", reads), ("target_ids", "target_mask", writes))
    if not all(_same(data, read, ids, mask, table) for ids, mask, table in sides):
        raise StepError(
            f"{differs}, and they cut the training data into different tokens, so that no token of the one is one of "
            f"the other; {_REMEDY}"
        )
    return Aligned(reads, writes, about=f"{len(next(iter(found.values())))} of the teacher's tokens are compared")


def _difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    strange = min((token for token in ours if theirs.get(token) != ours[token]), key=lambda t: ours[t], default="")
    detail = f", first token {ours[strange]} {strange!r}" if strange else ""
    return f"the student's vocabulary ({len(ours)} tokens) is not the teacher's ({len(theirs)}{detail})"


def _apart(spec: DistillSpec) -> str | None:
    """Why two that read by themselves cannot learn so."""
    if spec.hidden is not None or spec.relations is not None:
        return "hidden and relations compare token with token; leave them out"
    if spec.augment is not None or spec.unlabelled is not None:
        name = "augment" if spec.augment is not None else "unlabelled"
        return f"{name} gives the teacher the student's tokens; leave it out"
    if not spec.cached:
        return "the teacher's own reading of a text is kept beside it; leave cache out"
    return None


def _unchecked(spec: DistillSpec) -> str | None:
    """Why tokens of texts that only the run brings cannot be known to be the same."""
    if spec.data != "training":
        return "the teacher would write tokens that the student has not; write data: training"
    if spec.unlabelled is not None:
        return "unlabelled texts may need tokens that the student has not; leave unlabelled out"
    return None


def _refuse(differs: str, reason: str | None) -> None:
    if reason is not None:
        raise StepError(f"{differs}, and {reason}, or {_REMEDY}")


def _table(ours: dict[str, int], theirs: dict[str, int], differs: str) -> np.ndarray:
    """The teacher's number of each of the student's tokens, int64 [V]."""
    missing = [token for token in ours if token not in theirs]
    if missing:
        raise StepError(
            f"{differs}: {len(missing)} of its tokens the teacher has not ({missing[0]!r}), so that their logits "
            f"cannot be compared; {_REMEDY}"
        )
    names = {number: token for token, number in ours.items()}
    if sorted(names) != list(range(len(names))):
        raise StepError(f"{differs}, and some of its numbers have no token; {_REMEDY}")
    return np.array([theirs[names[number]] for number in range(len(names))], np.int64)


def _same(ours: Encoded, theirs: Encoded, ids: str, mask: str, table: np.ndarray | None) -> bool:
    """Whether a text of the examples is the same tokens for both."""
    arrays: list[list[Any]] = [[getattr(one, name) for name in (ids, mask)] for one in (ours, theirs)]
    if arrays[0][0] is None:
        return True
    kept = [np.asarray(one[1], bool) for one in arrays]
    if not np.array_equal(kept[0].sum(1), kept[1].sum(1)):
        return False
    found = np.asarray(arrays[0][0])[kept[0]]
    return np.array_equal(found if table is None else table[found], np.asarray(arrays[1][0])[kept[1]])
