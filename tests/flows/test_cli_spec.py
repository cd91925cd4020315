"""`lathe validate`, `schema`, `steps` and `init`, and what the command does with errors."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft7Validator
from ruamel.yaml import YAML

from flows import cli
from flows.starters import place_schema, starter
from flows.terminal import ExitCode
from specs.schema.base import TASKS
from specs.schema.graph import build
from specs.schema.load import load
from specs.schema.pipeline import KINDS
from specs.schema.publish import json_schema, schema_text
from tasks.context import StepError
from tests.specs.writing import GOOD, write

HEAVY = ("torch", "prefect", "mlflow", "transformers", "numpy", "pandas", "datasets", "tensorflow", "matplotlib")


def lathe(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return int(ended.value.code)


def test_a_good_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GOOD)
    assert lathe("validate", path) == ExitCode.PASSED
    shown = capsys.readouterr()
    assert shown.out == f"{path}: valid (6 steps, 2 gates)\n"
    assert shown.err == ""


def test_every_mistake_is_printed_on_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GOOD.replace("epochs: 2", "epoch: 2").replace("h: 64", "h: many"))
    assert lathe("validate", path, "--set", "seed=x") == ExitCode.SPEC
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f"{path}:7:15: data.max_length: not a whole number "
        "(got 'many'; write for example max_length: 128 – tokens of an example)",
        f"{path}:9:35: steps.student.epoch: unknown key 'epoch' (did you mean epochs?)",
        "--set seed=x: seed: not a whole number "
        "(got 'x'; write for example seed: 0 – every random choice follows from it)",
        "3 mistakes",
    ]


def test_mistakes_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GOOD.replace("epochs: 2", "epoch: 2"))
    assert lathe("validate", path, "--json") == ExitCode.SPEC
    shown = capsys.readouterr()
    assert shown.err == ""
    answer = json.loads(shown.out)
    assert (answer["version"], answer["valid"]) == (1, False)
    assert answer["mistakes"] == [
        {
            "file": str(path),
            "line": 9,
            "column": 35,
            "field": "steps.student.epoch",
            "value": "",
            "message": "unknown key 'epoch'",
            "remedy": "did you mean epochs?",
        }
    ]
    assert lathe("validate", write(tmp_path, GOOD), "--json") == ExitCode.PASSED
    assert json.loads(capsys.readouterr().out) == {"version": 1, "spec": str(path), "valid": True, "mistakes": []}


def test_markup_in_a_spec_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GOOD.replace("50%", "'[red]x[/blue]'"))
    assert lathe("validate", path) == ExitCode.SPEC
    assert "'[red]x[/blue]' is not a share" in capsys.readouterr().err


def test_validate_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(sorted(m for m in sys.modules if '.' not in m)))\n"
        f"from flows.cli import main\nmain(['validate', {str(path)!r}])"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    loaded = done.stdout.splitlines()[-1]
    assert "'pydantic'" in loaded
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []
    assert min(seconds) < 0.7, seconds


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert lathe("schema") == ExitCode.PASSED
    assert capsys.readouterr().out == schema_text()


def test_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert lathe("steps") == ExitCode.PASSED
    shown = capsys.readouterr().out
    assert all(f"\n{kind} " in shown for kind in KINDS)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("kind", KINDS)
def test_one_step(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lathe("steps", kind) == ExitCode.PASSED
    shown = capsys.readouterr().out
    assert shown.startswith(f"{kind}\n")
    for name, field in KINDS[kind].model_fields.items():
        assert name == "uses" or f"\n{field.alias or name} " in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_an_unknown_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert lathe("steps", "prne") == ExitCode.SPEC
    assert capsys.readouterr().err == "'prne' is no kind of step; did you mean prune?\n"


@pytest.mark.parametrize("task", TASKS)
def test_init_writes_a_spec_that_holds(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lathe("init", task) == ExitCode.PASSED
    path = tmp_path / f"{task}.yaml"
    loaded = load(path)
    assert loaded.spec.task == task
    assert len(build(loaded.spec)) >= 3
    assert Draft7Validator(json_schema()).is_valid(YAML(typ="safe", pure=True).load(loaded.text))
    first = loaded.text.splitlines()[0]
    assert first == "# yaml-language-server: $schema=lathe-schema.json"
    assert (path.parent / "lathe-schema.json").read_text() == schema_text()
    assert loaded.text.count(" # ") + loaded.text.count("\n#") >= 4
    assert "specs/" not in loaded.text, "a comment names a file that is not this one"


def test_inside_the_project_a_spec_names_the_shipped_schema() -> None:
    folder = Path(cli.__file__).parents[1] / "examples"
    first, _ = starter("translation", folder / "mine.yaml").split("\n", 1)
    assert first == "# yaml-language-server: $schema=../specs/schema.json"
    assert place_schema(folder / "mine.yaml") is None
    assert not folder.exists()


@pytest.mark.parametrize("content", ['{"title": "Lathe spec", "old": true}', '{"title": "mine"}', "[]", "{"])
def test_a_schema_that_is_not_ours_stays(content: str, tmp_path: Path) -> None:
    beside = tmp_path / "lathe-schema.json"
    beside.write_text(content)
    ours = "Lathe" in content
    assert place_schema(tmp_path / "mine.yaml") == (beside if ours else None)
    assert (beside.read_text() == content) is not ours


def test_init_overwrites_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "mine")
    assert lathe("init", "text-generation", "--out", path) == ExitCode.SPEC
    assert path.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert lathe("init", "text-generation", "--out", path, "--force") == ExitCode.PASSED
    assert path.read_text() != "mine"
    assert lathe("init", "text-generation", "--out", tmp_path / "none" / "x.yaml") == ExitCode.SPEC
    assert lathe("init", "text-generatio") == ExitCode.SPEC
    assert "did you mean text-generation?" in capsys.readouterr().err


def test_wrong_words_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert lathe("valdate", "x") == ExitCode.SPEC
    assert "Did you mean 'validate'?" in capsys.readouterr().err
    assert lathe("validate") == ExitCode.SPEC
    assert capsys.readouterr().err == "Missing argument 'SPEC'.\nHelp: lathe validate --help\n"
    assert lathe("validate", "none.yaml") == ExitCode.SPEC
    assert "no such file" in capsys.readouterr().err
    assert lathe() == ExitCode.PASSED
    assert "validate" in capsys.readouterr().out


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken() -> str:
        raise error

    monkeypatch.setattr("specs.schema.publish.schema_text", broken)


def test_errors_are_one_line_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _raising(monkeypatch, StepError("no room; delete something"))
    assert lathe("schema") == ExitCode.STEP
    assert capsys.readouterr().err == "error: no room; delete something\n"
    _raising(monkeypatch, RuntimeError("odd\nthing"))
    assert lathe("schema") == ExitCode.STEP
    assert capsys.readouterr().err == "unexpected error: RuntimeError: odd thing; run again with --debug\n"
    for words in (("--debug", "schema"), ("schema", "--debug")):
        assert lathe(*words) == ExitCode.STEP
        shown = capsys.readouterr().err
        assert "Traceback" in shown
        assert shown.endswith("unexpected error: RuntimeError: odd thing\n")
    monkeypatch.setattr(cli, "leave", sys.exit)
    _raising(monkeypatch, KeyboardInterrupt())
    assert lathe("schema") == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_piped_output_has_80_columns_and_no_colour(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "steps", "finetune"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        cwd=Path(cli.__file__).parents[1],
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_reader_that_goes_ends_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from flows.terminal import err, out\n"
        "for _ in range(3000): out.print('x' * 60); err.print('y' * 60)\n"
        "pathlib.Path(sys.argv[1]).touch()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "done")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        assert process.wait(60) == 0
    assert (tmp_path / "done").exists()
