"""The rules of the house: who imports whom, and what is imported late."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("specs", "tasks", "flows")
    for path in (ROOT / folder).rglob("*.py")
    if ".lathe" not in path.parts  # what runs of the shipped specs left behind
)
HEAVY = {
    "torch",
    "transformers",
    "tensorflow",
    "mlflow",
    "litert_torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "ai_edge_quantizer",
    "ai_edge_litert",
    "datasets",
    "matplotlib",
    "pyarrow",
    "sklearn",
    "sacrebleu",
    "jiwer",
    "soundfile",
    "soxr",
}
ALLOWED_IN_SPECS = {"pydantic", "pydantic_core", "ruamel", "croniter"}


def imports(path: Path, everywhere: bool = True) -> Iterator[str]:
    """The modules that a file imports, absolute; with ``everywhere`` those inside functions too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else _run_at_import(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _run_at_import(child)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_point_one_way(path: Path):
    roots = {module.split(".")[0] for module in imports(path)}
    layer = named(path).split("/")[0]
    if layer == "specs":
        ours = roots & {"tasks", "flows"}
        assert not ours, f"specs imports {ours}"
        foreign = roots - ALLOWED_IN_SPECS - {"specs"} - set(sys.stdlib_module_names)
        assert not foreign, f"specs imports {foreign}"
    if layer == "tasks":
        assert "flows" not in roots
        if named(path) != "tasks/run_step.py":
            assert "prefect" not in roots
    if not named(path).startswith("tasks/tracking/") and named(path) != "tasks/serving.py":
        assert "mlflow" not in roots


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_heavy_libraries_are_imported_late(path: Path):
    early = {module.split(".")[0] for module in imports(path, everywhere=False)} & HEAVY
    assert not early or named(path) == "tasks/serving.py", f"{early} at the top of {named(path)}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_pickles_and_no_code_from_strangers(path: Path):
    text = path.read_text()
    assert not {"pickle", "cloudpickle", "dill", "joblib"} & {module.split(".")[0] for module in imports(path)}
    assert not re.search(r"trust_remote_code\s*=\s*True|\beval\(|\bexec\(|yaml\.load\(", text.replace(".eval(", "."))
    assert not re.search(r"torch\.load\((?![^)]*weights_only=True)", text)


def test_every_step_has_a_function():
    from specs.schema.pipeline import KINDS
    from tasks.registry import find

    for spec in KINDS.values():
        assert find(spec).spec is spec


def test_finding_the_steps_imports_nothing_heavy():
    code = (
        "import sys; from specs.schema.pipeline import KINDS; from tasks.registry import find\n"
        "[find(spec) for spec in KINDS.values()]\n"
        f"print(sorted(set(sys.modules) & {HEAVY | {'prefect'}!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
