"""Rows of data files: one reader for each format, each row with its place."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.schema.pipeline import FieldsSpec, parallel_files
from specs.schema.suggest import nearest
from tasks.context import StepError
from tasks.data.bad_rows import BadRow

_MAX_CSV_FIELD = 2**31 - 1
_PARQUET_ROWS = 256
"""Rows that are in memory at a time; a row of audio may have megabytes."""

_MARKS_OF_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Row:
    """The columns of a record, where they stand (for example ``train.jsonl:17``), and the folder of the file."""

    place: str
    columns: Mapping[str, Any]
    folder: Path | None = None


Rows = Iterator[Row | BadRow]
"""A row that cannot be read stands there as its error, so that its reader can go on."""


def files_of(source: str) -> list[Path]:
    """The files that a path, folder, glob or pair of parallel files names; a pair in its order, else sorted by path.

    Raises:
        StepError: there is none, or one is of a format that cannot be read.
    """
    pair = parallel_files(source)
    if pair is not None:
        for name in pair:
            if not Path(name).is_file():
                raise StepError(f"{name}: no such file; {source} names two parallel files, and both must be there")
        return [Path(name) for name in pair]
    path = Path(source)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and file.suffix.lower() in _READERS and not _hidden(file.relative_to(path))
        )
        if not found:
            raise StepError(f"{source}: the folder holds no data file; readable are {', '.join(_READERS)}")
    elif glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        if not found:
            raise StepError(f"{source}: no file matches the pattern")
    else:
        siblings = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        where = nearest(path.name, siblings) if siblings else f"the folder {path.parent} does not exist"
        raise StepError(f"{source}: no such file; {where}")
    for file in found:
        if file.suffix.lower() not in _READERS:
            raise StepError(f"{file}: format {file.suffix or '(none)'} cannot be read; write {', '.join(_READERS)}")
    return found


def rows_of(source: str, fields: FieldsSpec, wanted: Sequence[str]) -> Rows:
    """The rows of all files that ``source`` names.

    Args:
        source: as ``files_of`` takes it.
        fields: what the columns of files without a header are called.
        wanted: the columns that are used; parquet reads no others.

    Raises:
        StepError: a file cannot be read as a whole.
    """
    files = files_of(source)
    if parallel_files(source) is not None:
        yield from _parallel(files[0], files[1], fields, wanted)
        return
    for file in files:
        yield from _READERS[file.suffix.lower()](file, fields, wanted)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line with its own line end, so that a CSV field may hold one.

    Bytes that are not UTF-8 become lone surrogates; ``undecoded`` finds them.
    """
    number = 0
    try:
        with file.open("rb") as stream:
            for line in stream:
                number += 1
                if number == 1:
                    if line.startswith(_MARKS_OF_UTF16):
                        raise StepError(f"{file}:1: not UTF-8 but UTF-16; convert the file to UTF-8")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.decode("utf-8", "surrogateescape")
    except OSError as error:
        raise StepError(f"{file}: cannot be read: {error.strerror}") from error


def undecoded(text: str) -> bool:
    """Whether ``text`` has bytes that were not UTF-8."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def _not_utf8(place: str) -> BadRow:
    return BadRow(f"{place}: not UTF-8; convert the file to UTF-8", "not UTF-8")


def _jsonl(file: Path, fields: FieldsSpec, wanted: Sequence[str]) -> Rows:
    for number, line in _lines(file):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        if undecoded(line):
            yield _not_utf8(place)
            continue
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; this is JSON over several lines, write one record a line" if line.strip() in ("[", "{") else ""
            yield BadRow(f"{place}: broken JSON: {error}{hint}", "broken JSON")
            continue
        if isinstance(columns, dict):
            yield Row(place, columns, file.parent)
        else:
            yield BadRow(f"{place}: {shown(columns)} is not a record; write one JSON object a line", "not a record")


def _csv(file: Path, fields: FieldsSpec, wanted: Sequence[str]) -> Rows:
    yield from _separated(file, delimiter=",", strict=True)


def _tsv(file: Path, fields: FieldsSpec, wanted: Sequence[str]) -> Rows:
    """Tab-separated values know no quoting: a quotation mark is a character like any other."""
    yield from _separated(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(file: Path, **dialect: Any) -> Rows:
    csv.field_size_limit(_MAX_CSV_FIELD)
    reader = csv.reader((line for _, line in _lines(file)), **dialect)
    names: list[str] | None = None
    while True:
        place = f"{file}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if names is None or "unexpected end of data" in str(error):
                raise StepError(f"{place}: broken CSV: {error}; a quotation mark that opens here has no end") from error
            yield BadRow(f"{place}: broken CSV: {error}", "broken CSV")
            continue
        if names is None:
            names = values
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise StepError(f"{file}:1: column {twice[0]!r} stands twice in the header; rename one")
        elif any(map(undecoded, values)):
            yield _not_utf8(place)
        elif values and len(values) != len(names):
            yield BadRow(
                f"{place}: {len(values)} values for {len(names)} columns ({', '.join(names)})", "too few or many values"
            )
        elif values:
            yield Row(place, dict(zip(names, values, strict=True)), file.parent)


def _parquet(file: Path, fields: FieldsSpec, wanted: Sequence[str]) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            known = table.schema_arrow.names
            columns = [name for name in wanted if name in known]
            if len(columns) < len(wanted):
                columns = known[:64]  # the row then lacks the column, and the message lists what there is
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{file} row {number}", row, file.parent)
    except (pa.ArrowException, OSError) as error:
        raise StepError(f"{file}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _text(file: Path, fields: FieldsSpec, wanted: Sequence[str]) -> Rows:
    """A text file is one document."""
    if list(wanted) != [fields.text]:
        raise StepError(
            f"{file}: plain text has no labels, pairs or audio; write jsonl, csv, tsv or parquet with the columns "
            f"{', '.join(wanted)}"
        )
    lines = []
    for number, line in _lines(file):
        if undecoded(line):
            raise StepError(f"{file}:{number}: not UTF-8; convert the file to UTF-8")
        lines.append(line)
    yield Row(str(file), {fields.text: "".join(lines)}, file.parent)


def _parallel(source: Path, target: Path, fields: FieldsSpec, wanted: Sequence[str]) -> Rows:
    """Line n of one file and line n of the other are a pair; pairs that are blank on both sides are passed over."""
    if list(wanted) != [fields.source, fields.target]:
        raise StepError(f"{source} and {target}: two parallel files are for translation; name one file")
    counts = [_count_lines(file) for file in (source, target)]
    if counts[0] != counts[1]:
        longer = source if counts[0] > counts[1] else target
        raise StepError(
            f"{longer}:{min(counts) + 1}: this line has no partner: {source} has {counts[0]} lines and {target} has "
            f"{counts[1]}; line n of one must be the translation of line n of the other"
        )
    for (number, ours), (_, theirs) in zip(_lines(source), _lines(target), strict=True):
        place = f"{source}:{number}"
        if undecoded(ours) or undecoded(theirs):
            yield _not_utf8(f"{target if undecoded(theirs) else source}:{number}")
        elif ours.strip() or theirs.strip():
            yield Row(place, {fields.source: ours.rstrip("\r\n"), fields.target: theirs.rstrip("\r\n")}, source.parent)


def _count_lines(file: Path) -> int:
    count, last = 0, b"\n"
    try:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                count += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise StepError(f"{file}: cannot be read: {error.strerror}") from error
    return count + (last != b"\n")


def shown(value: Any) -> str:
    """A value as messages quote it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_READERS: dict[str, Callable[[Path, FieldsSpec, Sequence[str]], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
    ".text": _text,
    ".md": _text,
    ".rst": _text,
}
