"""What YAML may not hold is refused at its place, and quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from specs.schema.load import MAX_BYTES, SpecErrors, load
from specs.schema.yaml_tree import MAX_DEPTH, MAX_LINE_LENGTH, MAX_LINES, MAX_NODES, core_scalar
from tests.specs.writing import GOOD, good, mistakes, spoilt


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "message"),
    [
        ("{source: org/minilm}", "&m {source: org/minilm}", 3, 8, "the anchor &m is refused"),
        ("sparsity: 50%", "sparsity: *x", 10, 39, "the alias *x is refused"),
        ("epochs: 2", "epochs: !!int 2", 9, 43, "the tag tag:yaml.org,2002:int is refused"),
        ("epochs: 2", "epochs: !python/object:os.system 2", 9, 43, "the tag !python/object:os.system is refused"),
        ("epochs: 2", "epochs: 2, epochs: 3", 9, 46, "the key 'epochs' stands twice, first at 9:35"),
        ("  max_length: 64", "  <<: {max_length: 64}", 7, 3, "merge keys (<<) are refused"),
        ("  max_length: 64", "  7: 64", 7, 3, "the key 7 is not text"),
        ("  max_length: 64", "  true: 64", 7, 3, "the key true is not text"),
        ("  max_length: 64", "  ? [a]\n  : 64", 7, 5, "a key that is a list or a mapping"),
        ("tracking:", "---\ntracking:", 18, 1, "a second document"),
        ("h: 64", "h: .inf", 7, 15, "numbers are finite here"),
        ("h: 64", "h: 1e999", 7, 15, "numbers are finite here"),
        ("h: 64", f"h: {'9' * 5000}", 7, 15, "the number has more than 400 digits"),
        ("h: 64", "h: 6\x004", 7, 16, "control character U+0000"),
        ("h: 64", "h: 64 # \x1b[31m", 7, 20, "control character U+001B"),
        ("h: 64", "h: a: b", 7, 16, "not valid YAML: a `:` where none may stand"),
        ("  max_length", "\tmax_length", 7, 1, "not valid YAML: a tab"),
        ("h: 64", "h: @64", 7, 15, "not valid YAML: text cannot start with @"),
        ("experiment: sentiment", "experiment: ${X}", 18, 25, "not valid YAML: ${…} inside brackets"),
    ],
)
def test_refused_at_its_place(old: str, new: str, line: int, column: int, message: str, tmp_path: Path) -> None:
    found = spoilt(tmp_path, old, new)
    hit = next((m for m in found if m.message.startswith(message)), None)
    assert hit is not None, [str(m) for m in found]
    assert (hit.line, hit.column) == (line, column)
    assert hit.remedy


def test_directives_are_refused(tmp_path: Path) -> None:
    assert mistakes(tmp_path, f"%YAML 1.1\n---\n{GOOD}")[0].message == "YAML directives are refused"


def test_what_is_refused_hides_no_other_mistake_and_makes_none(tmp_path: Path) -> None:
    text = GOOD.replace("epochs: 2", "epochs: *two").replace("50%", "&half 50%").replace("h: 64", "h: many")
    assert [m.message for m in mistakes(tmp_path, text)] == [
        "not a whole number",
        "the alias *two is refused",
        "the anchor &half is refused",
    ]


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    raw = GOOD.replace("h: 64", "h: X").encode().replace(b"h: X", b"h: \xff")
    (mistake,) = mistakes(tmp_path, raw)
    assert mistake.message == f"not UTF-8: byte 0xff at offset {raw.index(0xFF)}"
    assert (mistake.line, mistake.column) == (7, 15)
    (mistake,) = mistakes(tmp_path, GOOD.encode("utf-16"))
    assert "offset 0" in mistake.message


def _laughs(depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "a billion laughs": _laughs(10),
    "quadratic aliases": "a: &a " + "x" * 9000 + "\nb: [" + ",\n ".join(["*a"] * 5000) + "]\n",
    "self reference": "a: &a [*a]\n",
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "a: " + "{a: " * 2000 + "}" * 2000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(130)) + "\n",
    "deep keys": "? " * 2000 + "a",
    "merge bomb": "a: &a {x: 1}\nb: {<<: [" + ", ".join(["*a"] * 1000) + "]}\n",
    "long tag": "a: !" + "x" * 900_000 + " b\n",
    "long line": "a: " + "word " * 200_000,
    "many lines": "\n" * 1_000_000,
    "digits": "a: " + "9" * 9_000 + "\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_within_a_tenth_of_a_second(bomb: str, tmp_path: Path) -> None:
    mistakes(tmp_path, "a: &a\n")  # imports and first use are not what is timed
    start = time.process_time()
    found = mistakes(tmp_path, BOMBS[bomb])
    seconds = time.process_time() - start
    assert found
    assert len(found) <= 120
    assert seconds < 0.1, f"{seconds:.3f} s"


def test_many_values_are_refused(tmp_path: Path) -> None:
    start = time.process_time()
    found = mistakes(tmp_path, "a: [" + ("1, " * 1000 + "\n") * (MAX_NODES // 1000) + "]\n")
    assert found[-1].message == f"more than {MAX_NODES} values"
    assert time.process_time() - start < 2


def test_limits_are_named(tmp_path: Path) -> None:
    assert f"more than {MAX_LINES} lines" in mistakes(tmp_path, "\n" * (MAX_LINES + 1))[0].message
    assert f"more than {MAX_LINE_LENGTH} characters" in mistakes(tmp_path, "#" * (MAX_LINE_LENGTH + 1))[0].message
    assert f"more than {MAX_DEPTH} deep" in mistakes(tmp_path, "a: " + "[" * (MAX_DEPTH + 1))[-1].message


def test_fifty_megabytes_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    start = time.process_time()
    assert _refusals(path) == [f"{path}: larger than 1 MiB (a spec is a page of text)"]
    assert time.process_time() - start < 0.1


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    line = "# " + "x" * 97 + "\n"
    text = (line * (MAX_BYTES // len(line)))[: MAX_BYTES - len(GOOD)].rpartition("\n")[0] + "\n" + GOOD
    assert MAX_BYTES - 200 < len(text) <= MAX_BYTES
    assert good(tmp_path, text).spec.name == "sentiment"


def _refusals(path: Path) -> list[str]:
    with pytest.raises(SpecErrors) as caught:
        load(path)
    return [str(mistake) for mistake in caught.value.mistakes]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("+3", 3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("true", True),
        ("FALSE", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("~", None),
        ("", None),
        ("Null", None),
        ("12:30:45", "12:30:45"),
        ("2026-11-23", "2026-11-23"),
        ("1e", "1e"),
        ("0b11", "0b11"),
    ],
)
def test_the_core_schema_of_yaml_12(text: str, value: object) -> None:
    assert core_scalar(text) == value
    assert type(core_scalar(text)) is type(value)


def test_an_unreadable_file(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD)
    path.chmod(0)
    assert "cannot be read" in _refusals(path)[0]
