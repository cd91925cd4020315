"""`lathe data`: a look at the data of a spec."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import typer

from flows.options import AsJson, Set, SpecFile
from flows.terminal import complain, err, out

_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that would steer the terminal: control codes, and what turns the direction of writing."""

if TYPE_CHECKING:
    from specs.schema.pipeline import ModelSpec
    from tasks.data.preflight import DataSummary, Lengths
    from tasks.data.tokens import TextTokenizer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("data")(data)


def data(spec: SpecFile, set_: Set = None, as_json: AsJson = False) -> None:
    """Look at the data: counts, lengths, balance of the labels, duplicates within and between the splits, examples."""
    from flows.errors import PlanError
    from specs.schema.load import load
    from tasks.context import StepError
    from tasks.data.preflight import overview

    loaded = load(spec, set_ or ())
    try:
        with err.status("reading the data") if err.is_terminal else nullcontext():
            splits = overview(loaded.spec.data, loaded.spec.task, _tokenizer(loaded.spec.model))
    except StepError as error:
        raise PlanError(f"error: {error}") from error
    if as_json:
        answer = {"version": 1, "spec": str(spec), "splits": {name: split.as_dict() for name, split in splits.items()}}
        out.print_json(loaded.redact(json.dumps(answer)))
        return
    shown = {str(name): split for name, split in splits.items()}
    _table(shown)
    out.print("* min / median / 90th / 99th percentile / max", style="dim")
    for name, split in shown.items():
        out.print(f"\n{name}, the first records", style="bold")
        for example in split.examples:
            text = " | ".join(f"{role}: {value}" for role, value in example.items())
            out.print(_UNSEEN.sub("�", loaded.redact(text)), markup=False)
    for warning in (warning for split in shown.values() for warning in split.warnings):
        complain(f"warning: {loaded.redact(warning)}")


def _tokenizer(model: ModelSpec) -> TextTokenizer | None:
    """The tokenizer of the spec's model where it lies on this machine; one that is trained or fetched does not."""
    from tasks.data.tokens import open_tokenizer
    from tasks.models.resolve import is_local, resolve

    source = model.tokenizer or model.source
    if source is None or not is_local(source):
        return None
    folder = resolve(source, weights=False).folder
    return open_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def _table(splits: Mapping[str, DataSummary]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in splits:
        table.add_column(name, overflow="fold")
    for title, cells in _rows(list(splits.values())):
        if any(cells):
            table.add_row(Text(title), *(Text(cell or "–") for cell in cells))
    out.print(table)


def _rows(splits: list[DataSummary]) -> Iterable[tuple[str, list[str]]]:
    yield "records", [str(split.records) for split in splits]
    yield "skipped", [_counts(split.skipped) for split in splits]
    yield "filtered", ["known once there is a tokenizer" if s.filtered is None else _counts(s.filtered) for s in splits]
    for number, first in enumerate(splits[0].lengths):
        yield f"{first.what}, {first.unit}*", [_spread(split.lengths[number]) for split in splits]
    for name in dict.fromkeys(name for split in splits for name in split.labels):
        yield f"label {name}", [_share(split.labels.get(name, 0), split.records) for split in splits]
    yield "duplicates", [_twice(split.repeated, split.repeated_alike) for split in splits]
    yield "also in train", ["", *(_twice(split.in_train, split.in_train_alike) for split in splits[1:])]


def _counts(counts: Mapping[str, int]) -> str:
    from tasks.data.bad_rows import told

    return f"{sum(counts.values())} ({told(counts)})" if counts else ""


def _spread(lengths: Lengths) -> str:
    figures = (lengths.min, lengths.p50, lengths.p90, lengths.p99, lengths.max)
    return " / ".join(f"{figure:.2f}" if lengths.unit == "seconds" else f"{figure:.0f}" for figure in figures)


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f}%)"


def _twice(exact: int, alike: int) -> str:
    if not alike:
        return "0"
    return f"{exact}" + (f", {alike} but for case and space" if alike > exact else "")
