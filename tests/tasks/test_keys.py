"""Keys: what is in them, what is not, and the words for a change."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specs.schema.base import StepSpec
from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.prune import PruneSpec
from specs.schema.steps.quantize import QuantizeSpec
from specs.schema.steps.select import SelectSpec
from tasks.context import StepError
from tasks.keys import (
    canonical_json,
    digest_json,
    explain,
    library_versions,
    machine,
    source_digest,
    source_modules,
    step_key,
)
from tasks.registry import RegisteredStep

SOURCES = {
    "__init__": "",
    "steps": """
        import json
        from shaped.deep import helper
        from .sibling import value
        # a comment
        def plain(): return value
        def late():
            from shaped import inner
            return inner
        CHILD = ("python", "-m", "shaped.child")
        NOT_A_MODULE = "shaped.nothing"
        """,
    "sibling": "value = 1",
    "inner": "x = 1",
    "child": "from shaped.deep.helper import twice",
    "unused": "x = 1",
    "deep/__init__": "",
    "deep/helper": "from ..further import y\nimport shaped.steps\ntwice = 2",
    "further": "y = 1",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``shaped`` with a step function, imported from a temporary folder."""
    import textwrap

    root = tmp_path / "shaped"
    for name, text in SOURCES.items():
        (root / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "shaped"]:
        del sys.modules[name]


def function_of(package: Path) -> Callable[..., Any]:
    return importlib.import_module("shaped.steps").plain


def edit(path: Path, text: str) -> None:
    path.write_text(text)
    stamp = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(stamp, stamp))


def test_all_that_a_step_imports_counts(package: Path) -> None:
    found = source_modules(function_of(package))
    expected = {
        "shaped",
        "shaped.steps",
        "shaped.sibling",
        "shaped.inner",
        "shaped.child",
        "shaped.deep",
        "shaped.deep.helper",
        "shaped.further",
    }
    assert set(found) == expected
    assert source_digest(function_of(package)) == digest_json(found)


@pytest.mark.parametrize("changed", ["steps", "sibling", "inner", "child", "deep/helper", "further", "deep/__init__"])
def test_a_change_in_any_of_them_changes_its_digest_alone(package: Path, changed: str) -> None:
    function = function_of(package)
    before = source_modules(function)
    path = package / f"{changed}.py"
    edit(path, path.read_text() + "\nadded = 3\n")
    after = source_modules(function)
    name = f"shaped.{changed.replace('/', '.')}".removesuffix(".__init__")
    assert {each for each in before if before[each] != after[each]} == {name}


def test_comments_layout_and_other_modules_do_not_count(package: Path) -> None:
    function = function_of(package)
    before = source_digest(function)
    path = package / "steps.py"
    edit(path, "# another\n\n" + path.read_text().replace("return value", "return (\n        value  # same\n    )"))
    edit(package / "unused.py", "x = 2")
    assert source_digest(function) == before


def test_plumbing_is_left_out_of_the_sources_of_a_step() -> None:
    found = source_modules(step_key)  # tasks.keys itself is plumbing: only as the function's own module is it there
    assert "tasks.keys" in found
    assert not {"tasks.context", "tasks.registry", "tasks.artifacts"} & set(found)
    assert {name.partition(".")[0] for name in found} == {"tasks"}


def test_a_function_without_a_file_is_refused() -> None:
    scope: dict[str, Any] = {"__name__": "nowhere"}
    exec("def lost(): pass", scope)
    with pytest.raises(StepError, match=r"source of lost.*define the step in a \.py file"):
        source_modules(scope["lost"])


def prune(**fields: Any) -> PruneSpec:
    return PruneSpec.model_validate({"uses": "prune", "id": "slim", "sparsity": "50%", "needs": "base", **fields})


def a_step(*inputs: Any, spec: StepSpec, ctx: Any) -> None:
    return None


def key(spec: StepSpec | None = None, **named: Any) -> tuple[str, dict[str, Any]]:
    given = {
        "inputs": ["k1"],
        "data": "d",
        "seed": 0,
        "device": "cpu",
        "registered": RegisteredStep(PruneSpec, a_step, ("pydantic",)),
    }  # type: ignore[arg-type]
    return step_key(spec or prune(), **{**given, **named})


@pytest.mark.parametrize(
    "same",
    [
        {"id": "other"},
        {"needs": "elsewhere"},
        {"retries": 3},
        {"retry_delay": "9 s"},
        {"timeout": "1 h"},
        {"evaluate": False},
        {"sparsity": 0.5},
        {"scope": "layer"},
    ],
)
def test_what_cannot_shape_the_result_is_not_in_the_key(same: dict[str, Any]) -> None:
    assert key(prune(**same))[0] == key()[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": prune(sparsity="60%")}, ["sparsity 0.5 -> 0.6"]),
        ({"spec": prune(scope="global")}, ["scope layer -> global"]),
        ({"inputs": ["k2"]}, ["input base changed"]),
        ({"data": "e"}, ["the data changed"]),
        ({"seed": 1}, ["seed 0 -> 1"]),
        ({"device": "cuda"}, ["device cpu -> cuda"]),
        ({"extra": {"at_least": 0.00005}}, ["at_least is new: 5e-5"]),
    ],
)
def test_what_shapes_the_result_changes_the_key_and_is_explained(change: dict[str, Any], words: list[str]) -> None:
    was, now = key(), key(**change)
    assert was[0] != now[0]
    assert explain(was[1], now[1]) == words
    assert explain(now[1], now[1]) == []


def test_a_nested_field_is_explained_by_its_whole_name() -> None:
    was = key(prune(recover={"learning_rate": 1e-4}))[1]
    assert explain(was, key(prune(recover={"learning_rate": 5e-5}))[1]) == ["recover.learning_rate 1e-4 -> 5e-5"]
    assert explain(was, key()[1]) == ["recover is gone"]
    assert explain(key()[1], was) == ["recover is new"]


def test_libraries_sources_and_kinds_are_explained() -> None:
    was = key()[1]
    now = {
        **was,
        "libraries": {**was["libraries"], "pydantic": "99.0", "torch": "2.14.0"},
        "sources": {**dict.fromkeys(was["sources"], "0" * 64), "tasks.compress.new": "1" * 64},
    }
    assert explain(was, now) == [
        *(f"source of {name} changed" for name in sorted(was["sources"]) if name < "tasks.compress.new"),
        "source of tasks.compress.new is new",
        *(f"source of {name} changed" for name in sorted(was["sources"]) if name > "tasks.compress.new"),
        f"pydantic {was['libraries']['pydantic']} -> 99.0",
        "torch is new: 2.14.0",
    ]
    other = key(QuantizeSpec(uses="quantize", id="slim", needs=("base",)))[1]
    assert "uses prune -> quantize" in explain(was, other)


def test_inputs_of_a_choice_are_named_and_ordered() -> None:
    select = SelectSpec.model_validate({"uses": "select", "id": "best", "from": ["a", "b"], "minimise": "latency_p50"})
    one, recipe = key(select, inputs=["k1", "k2"])
    renamed = SelectSpec.model_validate({**select.model_dump(by_alias=True), "from": ["x", "y"]})
    assert key(renamed, inputs=["k1", "k2"])[0] == one
    assert key(select, inputs=["k2", "k1"])[0] != one
    assert explain(recipe, key(select, inputs=["k1", "k3"])[1]) == ["input b changed"]
    fewer = SelectSpec.model_validate({**select.model_dump(by_alias=True), "from": ["a"]})
    assert explain(recipe, key(fewer, inputs=["k1"])[1]) == ["inputs a, b -> a"]


def test_the_recipe_holds_the_whole_key() -> None:
    made, recipe = key(FinetuneSpec(uses="finetune", id="train", epochs=2.0), extra={"a": (1, 2)})
    shown = {name: recipe.pop(name) for name in ("step", "uses", "names")}
    assert shown == {"step": "train", "uses": "finetune", "names": ["1"]}
    assert digest_json(recipe) == made
    assert recipe["spec"]["epochs"] == 2.0
    assert recipe["libraries"]["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_a_library_that_is_not_installed_is_named() -> None:
    with pytest.raises(StepError, match=r"'no-such-library'.*python -m pip install no-such-library"):
        library_versions(["pydantic", "no-such-library"])


def test_machine_is_the_same_every_time_and_json() -> None:
    assert digest_json(machine()) == digest_json(machine())
    assert machine()["cores"] >= 1


@pytest.mark.parametrize("bad", [{1: "x"}, {"x": object()}, {"x": {2: 3}}, {"x": b""}])
def test_what_json_cannot_say_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError):
        digest_json(bad)


def test_infinite_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json({"x": float("inf")})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_fields_does_not_matter(value: dict[str, Any], chooser: Any) -> None:
    fields = list(value.items())
    chooser.shuffle(fields)
    assert canonical_json(dict(fields)) == canonical_json(value)
    assert digest_json({"x": tuple(fields)}) == digest_json({"x": [list(field) for field in fields]})


@settings(max_examples=100, deadline=None)
@given(VALUES, VALUES)
def test_different_values_have_different_digests(one: Any, other: Any) -> None:
    assert (digest_json(one) == digest_json(other)) == (canonical_json(one) == canonical_json(other))
