"""Every kind of mistake is found, at its place, with what would be right."""

from __future__ import annotations

import os
from pathlib import Path
from socket import AF_UNIX, socket

import pytest

from specs.schema.base import SpecModel
from specs.schema.explain import example_of, keys_of, models_of
from specs.schema.load import SpecErrors, load
from specs.schema.pipeline import PipelineSpec
from tests.specs.writing import GOOD, good, mistakes, place, spoilt, write

CASES = {
    # old text, new text, text whose place is meant (in the spoilt spec), field, message, remedy
    "unknown key": ("epochs: 2", "epoch: 2", "epoch: 2", "steps.student.epoch", "unknown key 'epoch'", "epochs?"),
    "unknown key at the top": ("gates:", "gate:", "gate:", "gate", "unknown key 'gate'", "gates?"),
    "unknown nested key": ("max_length", "maxlength", "maxlength", "data.maxlength", "unknown key", "max_length?"),
    "python name of an alias": ("from: [", "from_: [", "from_", "steps.best.from_", "unknown key 'from_'", "from"),
    "unknown step": ("prune,", "prun,", "prun,", "steps.slim.uses", "'prun' is no kind of step", "prune?"),
    "baseline is not written": ("prune,", "model,", "model,", "steps.slim.uses", "no kind of step", "known: "),
    "no number": ("epochs: 2", "epochs: two", "two", "steps.student.epochs", "not a number", "passes over the tr"),
    "true is no number": ("epochs: 2", "epochs: true", "true,", "steps.student.epochs", "not a number", "passes"),
    "no is text": ("slim, uses", "slim, evaluate: no, uses", "no, uses", "steps.slim.evaluate", "neither", "true"),
    "no whole number": ("h: 64", "h: 64.5", "64.5", "data.max_length", "not a whole number", "max_length: 128"),
    "too small": ("h: 64", "h: 0", "0\nsteps", "data.max_length", "must be more than 0", "max_length: 128 – tokens"),
    "unknown unit": ("50%", "50 parts", "50 parts", "steps.slim.sparsity", "unit 'parts' is unknown", "write 50%"),
    "share too large": ("50%", "150%", "150%", "steps.slim.sparsity", "outside 0% to 100%", "write 50%"),
    "wrong choice": (
        "int4-block32",
        "int4-block31",
        "int4-block31",
        "steps.cpu.precision",
        "not one of",
        "int4-block32?",
    ),
    "wrong unit of a gate": ("99%", "99 ms", "99 ms", "gates[1].at_least", "has unit 'seconds'", "99%"),
    "metric of another task": (
        "metric: accuracy, drop: {at_most: 1.5 points}",
        "metric: perplexity, at_most: 12",
        "perplexity",
        "gates[0].metric",
        "no perpl",
        "accuracy",
    ),
    "unknown metric": ("metric: accuracy", "metric: acuracy", "acuracy", "gates[0].metric", "unknown", "accuracy?"),
    "empty value": ("train: ./train.jsonl", "train:", "train:", "data.train", "empty", "train: ./train.jsonl"),
    "no time zone": (
        "Europe/Berlin",
        "Europe/Berln",
        "Europe/Berln",
        "schedule.timezone",
        "is unknown",
        "Europe/Berlin?",
    ),
    "no cron line": ('"0 3 * * 1"', '"0 3 * *"', '"0 3', "schedule.cron", "not a cron line", "0 3 * * 1"),
    "bad name": ("name: sentiment", "name: 3x", "3x", "name", "not a name", "a letter first"),
    "name is a number": ("name: sentiment", "name: 5", "5", "name", "not text", "name: sentiment"),
    "a list where a mapping": ("{source: org/minilm}", "[a]", "[a]", "model", "not a mapping", "source"),
    "a mapping where a list": ("[cpu, npu]", "{a: b}", "{a: b}", "steps.best.from", "not a list", "[cpu, npu]"),
    "npu needs int8": (
        "precision: int8, npu",
        "precision: float32, npu",
        "ethos",
        "steps.npu.npu",
        "full int8",
        "int8",
    ),
    "unknown data source": ("./train.jsonl", "bultin:docs", "bultin", "data.train", "'bultin:'", "builtin:?"),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mistake_has_its_place_and_remedy(case: str, tmp_path: Path) -> None:
    old, new, needle, field, message, remedy = CASES[case]
    found = spoilt(tmp_path, old, new)
    spoilt_text = GOOD.replace(old, new)
    wanted = place(spoilt_text, needle)
    first = next(mistake for mistake in found if mistake.field == field)
    assert (first.line, first.column) == wanted, first
    assert first.field == field
    assert message in first.message
    assert remedy in first.remedy
    assert str(first).startswith(f"{tmp_path / 'spec.yaml'}:{wanted[0]}:{wanted[1]}: {field}: ")


@pytest.mark.parametrize(
    ("old", "enclosing", "field", "remedy"),
    [
        ("  eval: ../dev.jsonl\n", "train: ./tr", "data.eval", "eval: ./dev.jsonl"),
        ("task: text-classification\n", "name:", "task", "text-generation"),
        ("from: [cpu, npu], ", "{id: best", "steps.best.from", "from: [cpu, npu]"),
        ("id: slim, ", "{uses: prune", "steps[1].id", "id: student"),
        ("uses: prune, ", "{id: slim", "steps.slim.uses", "known: finetune, "),
    ],
)
def test_a_missing_key_is_shown_at_the_mapping_around_it(
    old: str, enclosing: str, field: str, remedy: str, tmp_path: Path
) -> None:
    found = spoilt(tmp_path, old, "")
    missing = next(mistake for mistake in found if mistake.field == field)
    assert missing.message == "missing"
    assert remedy in missing.remedy
    assert (missing.line, missing.column) == place(GOOD.replace(old, ""), enclosing)


def test_what_was_written_is_shown_once(tmp_path: Path) -> None:
    for old, new, shown in (
        (
            "epochs: 2",
            "epochs: 0",
            "must be more than 0 (got 0; write for example epochs: 3 – passes over the training",
        ),
        ("h: 64", "h: -1", "must be more than 0 (got -1; write"),
        ("50%", "1.5", "1.5 is outside 0% to 100% (write"),
        ("50%", "true", "true is not a share (write"),
        ("needs: student", "needs: studnt", "no step has the id 'studnt' (did you mean student?)"),
        ("metric: accuracy, drop: {at_most: 1.5 points}", "metric: f1, at_least: 1.1", "0% to 100% (got 1.1; write"),
        ("50%", "'%'", "'%' is not a share (write"),
    ):
        text = "\n".join(map(str, spoilt(tmp_path, old, new)))
        assert shown in text


def test_every_field_has_something_to_write_and_a_meaning() -> None:
    models: list[type[SpecModel]] = [PipelineSpec]
    for model in models:
        for key, field in keys_of(model).items():
            assert example_of(field), f"{model.__name__}.{key} needs examples=[…]"
            assert field.description or key == "uses", f"{model.__name__}.{key}"
            models.extend(inner for inner in models_of(field.annotation) if inner not in models)
    assert len(models) > 15


def test_a_field_of_several_types_is_wrong_once(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD, ["data.fields.label={a: b}"])
    assert [(m.field, m.message) for m in found] == [("data.fields.label", "neither text nor a list")]
    (short,) = mistakes(tmp_path, GOOD, ["data.fields.label=[a]"])
    assert short.message == "fewer than 2 entries"


def test_all_mistakes_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        GOOD.replace("epochs: 2", "epoch: two")
        .replace("needs: slim}", "needs: slm}", 1)
        .replace("id: npu", "id: cpu")
        .replace("h: 64", "h: many")
        .replace("99%", "99 ms")
        .replace("Europe/Berlin", "Mars")
    )
    found = mistakes(tmp_path, text)
    fields = [mistake.field for mistake in found]
    assert fields[:4] == ["data.max_length", "steps.student.epoch", "steps.packed.needs", "steps.cpu.id"]
    assert {"gates[1].at_least", "schedule.timezone"} <= set(fields)
    assert [(m.line, m.column) for m in found] == sorted((m.line, m.column) for m in found)


def test_the_words_are_ours(tmp_path: Path) -> None:
    text = GOOD.replace("epochs: 2", "epochs: []").replace("h: 64", "h: {}").replace("id: slim", "id: [x]")
    shown = "\n".join(map(str, mistakes(tmp_path, text)))
    assert "nput should" not in shown
    assert "pydantic" not in shown


def test_an_entry_that_is_no_step(tmp_path: Path) -> None:
    found = spoilt(tmp_path, "  - {id: slim, uses: prune, sparsity: 50%}", "  - slim")
    assert (found[0].line, found[0].column, found[0].field, found[0].message) == (10, 5, "steps[1]", "not a mapping")


def test_yaml_12_scalars(tmp_path: Path) -> None:
    text = GOOD.replace("experiment: sentiment", "experiment: no")
    spec = good(tmp_path, text).spec
    assert spec.steps[0].learning_rate == 1e-4  # type: ignore[attr-defined]
    assert spec.tracking.experiment == "no"
    dated = GOOD.replace("experiment: sentiment", "experiment: 2026-01-01")
    assert good(tmp_path, dated).spec.tracking.experiment == "2026-01-01"
    octal = GOOD.replace("h: 64", "h: 010")
    assert good(tmp_path, octal).spec.data.max_length == 10


def test_relative_paths_belong_to_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "specs", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    spec = good(folder).spec
    assert (spec.data.train, spec.data.eval) == (str(folder / "train.jsonl"), str(tmp_path / "dev.jsonl"))
    assert spec.model.source == "org/minilm"
    (folder / "org" / "minilm").mkdir(parents=True)
    assert good(folder).spec.model.source == str(folder / "org" / "minilm")
    text = GOOD.replace("org/minilm", "./missing, tokenizer: ~/tok").replace("./train.jsonl", "builtin:reviews")
    spec = good(folder, text).spec
    assert spec.model.source == str(folder / "missing")
    assert spec.model.tokenizer == os.path.expanduser("~/tok")
    assert spec.data.train == "builtin:reviews"


def test_paths_from_the_command_line_belong_to_the_current_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = tmp_path / "specs", tmp_path / "here"
    folder.mkdir()
    (here / "model").mkdir(parents=True)
    (here / "mine.jsonl").touch()
    monkeypatch.chdir(here)
    spec = good(folder, overrides=["data.train=mine.jsonl", "data.eval=other.jsonl", "model.source=model"]).spec
    assert spec.data.train == str(here / "mine.jsonl")
    assert spec.data.eval == str(folder / "other.jsonl")
    assert spec.model.source == str(here / "model")
    spec = good(folder, overrides=["data={train: mine.jsonl, eval: mine.jsonl}"]).spec
    assert spec.data.eval == str(here / "mine.jsonl")


def test_the_environment_is_read_and_kept_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATHE_TEST_SECRET", "hunter2hunter2")
    text = f"description: 'x-${{LATHE_TEST_SECRET}}-$${{HOME}}'\n{GOOD}"
    loaded = good(tmp_path, text)
    assert loaded.spec.description == "x-hunter2hunter2-${HOME}"
    assert loaded.secrets == {"hunter2hunter2"}
    assert "hunter2" not in loaded.redact("token hunter2hunter2 was sent to http://me:pass@host")
    assert "pass" not in loaded.redact("token hunter2hunter2 was sent to http://me:pass@host")
    assert "hunter2" not in repr(loaded).replace(repr(loaded.spec), "")
    for old, new in (
        ("50%", "'${LATHE_TEST_SECRET}'"),
        ("int4-block32", "'${LATHE_TEST_SECRET}'"),
        ("h: 64", "h: '${LATHE_TEST_SECRET}'"),
    ):
        shown = "\n".join(map(str, spoilt(tmp_path, old, new)))
        assert "hunter2" not in shown, shown


def test_numbers_and_choices_from_the_environment_are_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATHE_TEST_EPOCHS", "512")
    monkeypatch.setenv("LATHE_TEST_PRECISION", "float32")
    monkeypatch.setenv("LATHE_TEST_SHARE", "40.25%")
    text = GOOD.replace("epochs: 2", "epochs: '${LATHE_TEST_EPOCHS}'")
    text = text.replace("int4-block32", "'${LATHE_TEST_PRECISION}'").replace("50%", "'${LATHE_TEST_SHARE}'")
    loaded = good(tmp_path, text)
    assert loaded.spec.steps[0].epochs == 512  # type: ignore[attr-defined]
    assert loaded.variables == frozenset()
    both = good(tmp_path, f"description: '${{LATHE_TEST_PRECISION}}'\n{text}")
    assert both.variables == {"LATHE_TEST_PRECISION"}


FIXED = {
    "task": ("text-classification", "task"),
    "name": ("sentiment\n", "name"),
    "id": ("slim,", "steps.${LATHE_TEST_VALUE}.id"),
    "uses": ("prune", "steps.slim.uses"),
    "needs": ("needs: slim}\n  - {id: cpu", "steps.packed.needs"),
    "from": ("cpu, npu", "steps.best.from[0]"),
    "minimise": ("latency_p50", "steps.best.minimise"),
    "step": ("npu, metric", "gates[1].step"),
    "metric": ("npu_operator_share", "gates[1].metric"),
    "relative_to": ("accuracy,", "gates[0].relative_to"),
    "experiment": ("sentiment,", "tracking.experiment"),
    "register": ("minilm,", "tracking.register"),
    "register_step": ("best}\nschedule", "tracking.register_step"),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_records_are_found_by_takes_nothing_from_the_environment(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, field = FIXED[name]
    variable = "'${LATHE_TEST_VALUE}'"
    values = {"needs": "slim", "from": "cpu", "step": "npu", "relative_to": "baseline"}
    value = values.get(name, old.rstrip(",\n").partition("}")[0])
    monkeypatch.setenv("LATHE_TEST_VALUE", value)
    new = f"accuracy, relative_to: {variable}," if name == "relative_to" else old.replace(value, variable, 1)
    at = GOOD.index(old)
    text = GOOD[:at] + new + GOOD[at + len(old) :]
    found = [mistake for mistake in mistakes(tmp_path, text) if mistake.message == "takes nothing from the environment"]
    assert [mistake.field for mistake in found] == [field]
    assert (found[0].line, found[0].column) == place(text, variable)
    assert len(mistakes(tmp_path, text)) == 1
    setting = found[0].remedy.partition("--set ")[2].replace("VALUE", value)
    assert good(tmp_path, text, [setting]).spec == good(tmp_path, text.replace(variable, value)).spec


def test_a_missing_variable_is_a_mistake_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATHE_TEST_NONE", raising=False)
    monkeypatch.setenv("LATHE_TEST_NEAR_ONE", "x")
    found = spoilt(tmp_path, "./train.jsonl", "'${LATHE_TEST_NONE}'")
    assert [(m.line, m.column, m.field) for m in found] == [(5, 10, "data.train")]
    assert "no variable LATHE_TEST_NONE" in found[0].message
    found = spoilt(tmp_path, "./train.jsonl", "'${LATHE_TEST_NEAR_ON}'")
    assert "LATHE_TEST_NEAR_ONE?" in found[0].remedy
    found = spoilt(tmp_path, "./train.jsonl", "'${oh no}'")
    assert "does not begin the name" in found[0].message


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "{}\n"])
def test_an_empty_file(content: str, tmp_path: Path) -> None:
    found = mistakes(tmp_path, content)
    assert found[0].message in ("the file is empty", "missing")
    assert found[0].line == 1


@pytest.mark.parametrize("content", ["- a\n", "text\n", "5\n", "'x'\n"])
def test_a_top_level_that_is_no_mapping(content: str, tmp_path: Path) -> None:
    found = mistakes(tmp_path, content)
    assert [m.message for m in found] == ["a spec is a mapping of keys to values"]


@pytest.mark.timeout(20)
def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    monkeypatch.chdir(tmp_path)  # the name of a socket may have no more than a hundred characters
    with socket(AF_UNIX) as listener:
        listener.bind("socket")
    for name, message, remedy in (
        ("spce.yaml", "no such file", "spec.yaml?"),
        ("none/spec.yaml", "no such file", "there is no folder"),
        (".", "a folder", "spec.yaml?"),
        ("a\0b", "cannot be read", ""),
        ("pipe", "a pipe, not a file", "save the spec to a file"),
        ("socket", "a socket, not a file", "save the spec to a file"),
        ("/dev/zero", "a device, not a file", "save the spec to a file"),
        ("link", "a pipe, not a file", "save the spec to a file"),
    ):
        with pytest.raises(SpecErrors) as caught:
            load(tmp_path / name)
        (mistake,) = caught.value.mistakes
        assert message in mistake.message
        assert remedy in mistake.remedy
        assert str(mistake).startswith(f"{tmp_path / name}: ")


def test_the_shape_of_what_is_loaded(tmp_path: Path) -> None:
    loaded = good(tmp_path)
    assert loaded.path == tmp_path / "spec.yaml"
    assert loaded.text == GOOD
    assert loaded.positions.value(("steps", 1, "sparsity")).line == 10
    assert loaded.positions.key(("steps", 1, "sparsity")).column == place(GOOD, "sparsity")[1]
    assert loaded.positions.value(("steps", 1, "nothing")) == loaded.positions.value(("steps", 1))


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbf" + GOOD.replace("h: 64", "h: many").replace("\n", "\r\n").encode()
    found = mistakes(tmp_path, raw)
    assert [(m.line, m.column) for m in found] == [(7, 15)]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_a_line_ends_as_editors_end_it(tmp_path: Path, end: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(f'name: a{end}task: "b{end}'.encode())
    with pytest.raises(SpecErrors) as caught:
        load(path)
    assert (caught.value.mistakes[0].line, caught.value.mistakes[0].message[:14]) == (3, "not valid YAML")


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029"])
def test_separators_that_no_editor_shows_are_refused_in_their_place(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"name: a\ntask: b{separator}c\n", encoding="utf-8")
    with pytest.raises(SpecErrors) as caught:
        load(path)
    assert (caught.value.mistakes[0].line, caught.value.mistakes[0].column) == (2, 8)
    assert f"U+{ord(separator):04X}" in caught.value.mistakes[0].message


def test_a_bad_byte_behind_a_carriage_return_is_in_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"name: a\rtask: \x80")
    with pytest.raises(SpecErrors) as caught:
        load(path)
    assert (caught.value.mistakes[0].line, caught.value.mistakes[0].column) == (2, 7)


def test_a_root_with_a_tag_is_judged_all_the_same(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "!\n" + GOOD + "nonsense: 1\n")
    assert [(mistake.line, mistake.column) for mistake in found] == [(1, 1), (GOOD.count("\n") + 2, 1)]
    assert "nonsense" in found[1].message
