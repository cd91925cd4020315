"""Int8 in ONNX graphs, against the definition written out in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.context import StepError
from tasks.export.onnx_convert import _keep_norms, _share, save
from tasks.export.onnx_quantize import apply, plan, quantize_rows

WIDTH, ROWS = 48, 40


def quantized(source: Path, out: Path, reduce_range: bool = True) -> Any:
    import onnx

    model = onnx.load(str(source))
    planned = plan(model, reduce_range)
    apply(model, planned)
    out.write_bytes(model.SerializeToString())
    return planned


def made(nodes: list[Any], constants: dict[str, np.ndarray], inputs: dict[str, Any], output: list[Any]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    kinds = {"ids": TensorProto.INT64}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [
                helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
                for name, shape in inputs.items()
            ],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, output)],
            [numpy_helper.from_array(values, name) for name, values in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return model


def run(model: Any, **inputs: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def dynamic(values: np.ndarray) -> np.ndarray:
    """What is left of activations after ONNX's DynamicQuantizeLinear: 8 bits from the least to the greatest, with 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale


def by_rows(weight: np.ndarray, limit: int) -> np.ndarray:
    """What is left of a weight, row by row."""
    found = np.empty_like(weight)
    for number, row in enumerate(weight):
        scale = np.float32(np.abs(row).max() / limit)
        found[number] = np.clip(np.rint(row / scale), -limit, limit) * scale
    return found


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("reduce_range", [True, False])
def test_a_product_is_that_of_the_rounded_numbers(random: np.random.Generator, reduce_range: bool):
    from onnx import helper

    weight = random.normal(size=(WIDTH, ROWS)).astype(np.float32) * np.linspace(0.1, 3, ROWS, dtype=np.float32)
    model = made(
        [helper.make_node("MatMul", ["x", "w"], ["out"], name="p")], {"w": weight}, {"x": [1, 5, WIDTH]}, [1, 5, ROWS]
    )
    planned = plan(model, reduce_range)
    assert planned.limits == {"w": 64 if reduce_range else 127}
    apply(model, planned)
    values = random.uniform(-0.2, 1, (1, 5, WIDTH)).astype(np.float32)
    expected = dynamic(values) @ by_rows(weight.T, planned.limits["w"]).T
    if reduce_range:  # without VNNI the sums of whole 8 bits overflow
        np.testing.assert_allclose(run(model, x=values), expected, rtol=1e-4, atol=1e-4)
    assert [node.op_type for node in model.graph.node] == [
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "Cast",
        "Mul",
        "Mul",
    ]


@pytest.mark.parametrize("turned", [True, False])
def test_a_product_with_a_bias_is_too(random: np.random.Generator, turned: bool):
    from onnx import helper

    weight = random.normal(size=(ROWS, WIDTH)).astype(np.float32)
    constants = {
        "w": weight if turned else np.ascontiguousarray(weight.T),
        "b": random.normal(size=ROWS).astype(np.float32),
    }
    node = helper.make_node("Gemm", ["x", "w", "b"], ["out"], name="p", transB=int(turned))
    model = made([node], constants, {"x": [5, WIDTH]}, [5, ROWS])
    apply(model, plan(model, True))
    values = random.normal(size=(5, WIDTH)).astype(np.float32)
    expected = dynamic(values) @ by_rows(weight, 64).T + constants["b"]
    np.testing.assert_allclose(run(model, x=values), expected, rtol=1e-4, atol=1e-3)


def test_a_table_that_is_looked_up_and_multiplied_by_is_stored_once(random: np.random.Generator):
    from onnx import helper

    table = random.normal(size=(ROWS, WIDTH)).astype(np.float32) * np.linspace(0.01, 2, ROWS, dtype=np.float32)[:, None]
    nodes = [
        helper.make_node("Gather", ["t", "ids"], ["rows"], name="look"),
        helper.make_node("MatMul", ["rows", "turned"], ["out"], name="p"),
    ]
    model = made(nodes, {"t": table, "turned": np.ascontiguousarray(table.T)}, {"ids": [2, 3]}, [2, 3, ROWS])
    ids = np.array([[0, 5, 39], [1, 1, 2]])
    before = run(model, ids=ids)
    _share(model)
    assert [tensor.name for tensor in model.graph.initializer] == ["t"]
    np.testing.assert_allclose(run(model, ids=ids), before, rtol=1e-5)
    planned = plan(model, True)
    assert planned.limits == {"t": 64}
    apply(model, planned)
    assert sum(tensor.data_type == 3 for tensor in model.graph.initializer) == 1
    left = by_rows(table, 64)
    np.testing.assert_allclose(run(model, ids=ids), dynamic(left[ids]) @ left.T, rtol=1e-4, atol=1e-4)


def test_a_table_serves_a_product_by_its_rows_and_no_other(random: np.random.Generator):
    from onnx import helper

    table = random.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    look = helper.make_node("Gather", ["t", "ids"], ["rows"], name="look")
    ids = np.array([0, 5, 39])
    left = by_rows(table, 64)
    product = helper.make_node("Gemm", ["rows", "t"], ["out"], name="p", transB=1)
    turned = made([look, product], {"t": table}, {"ids": [3]}, [3, WIDTH])
    apply(turned, plan(turned, True))
    np.testing.assert_allclose(run(turned, ids=ids), dynamic(left[ids]) @ left.T, rtol=1e-4, atol=1e-4)
    product = helper.make_node("MatMul", ["rows", "t"], ["out"], name="p")
    straight = made([look, product], {"t": table}, {"ids": [3]}, [3, WIDTH])
    planned = plan(straight, True)
    assert "the table's rows are not this product's outputs" in planned.left["p"]
    apply(straight, planned)
    np.testing.assert_allclose(run(straight, ids=ids), by_rows(table, 127)[ids] @ table, rtol=1e-4, atol=1e-4)


def test_equal_weights_are_stored_once(random: np.random.Generator):
    from onnx import helper

    weight = random.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"], name="one"),
        helper.make_node("MatMul", ["y", "b"], ["out"], name="two"),
    ]
    model = made(nodes, {"a": weight, "b": weight.copy()}, {"x": [2, WIDTH]}, [2, WIDTH])
    values = random.normal(size=(2, WIDTH)).astype(np.float32)
    before = run(model, x=values)
    _share(model)
    assert len(model.graph.initializer) == 1
    np.testing.assert_array_equal(run(model, x=values), before)


def test_the_sum_before_a_norm_is_not_fused_with_it(random: np.random.Generator, tmp_path: Path):
    import onnx
    import onnxruntime
    from onnx import helper

    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"], name="a"),
        helper.make_node("LayerNormalization", ["sum", "g", "b"], ["out"], name="n"),
    ]
    constants = {"g": np.ones(WIDTH, np.float32), "b": np.zeros(WIDTH, np.float32)}
    model = made(nodes, constants, {"x": [2, 4, WIDTH], "y": [2, 4, WIDTH]}, [2, 4, WIDTH])
    given = {name: random.normal(size=(2, 4, WIDTH)).astype(np.float32) for name in ("x", "y")}
    before = run(model, **given)
    kinds = []
    for change in (lambda one: None, _keep_norms):
        change(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "seen.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kinds.append({node.op_type for node in onnx.load(str(tmp_path / "seen.onnx")).graph.node})
        np.testing.assert_allclose(run(model, **given), before, rtol=1e-5, atol=1e-5)
    assert "SkipLayerNormalization" in kinds[0]
    assert kinds[1] == {"Sum", "LayerNormalization"}


def test_what_stays_float_says_why(random: np.random.Generator):
    from onnx import helper

    nodes = [
        helper.make_node("MatMul", ["x", "small"], ["y"], name="small"),
        helper.make_node("MatMul", ["y", "y"], ["out"], name="both"),
    ]
    model = made(nodes, {"small": np.ones((4, 4), np.float32)}, {"x": [4, 4]}, [4, 4])
    planned = plan(model, True)
    assert planned.changes == ()
    assert planned.left == {"small": "64 bytes stay float32: fewer than 1024 weights gain nothing"}


def test_weights_that_are_no_numbers_are_refused():
    weight = np.ones((3, 3), np.float32)
    weight[1, 1] = np.nan
    with pytest.raises(StepError, match="NaN or infinite; train again"):
        quantize_rows(weight, 64)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([64, 127]), st.floats(1e-20, 1e20))
def test_rounding_errs_by_half_a_step_and_fills_the_range(seed: int, limit: int, size: float):
    weight = (np.random.default_rng(seed).normal(size=(3, 17)) * size).astype(np.float32)
    packed, scale = quantize_rows(weight, limit)
    assert packed.dtype == np.int8
    assert (np.abs(packed.astype(int)).max(1) == limit).all()
    assert (np.abs(packed * scale - weight) <= 0.5001 * scale).all()


def test_zeros_stay_zeros():
    packed, scale = quantize_rows(np.zeros((2, 4), np.float32), 64)
    assert not packed.any()
    assert np.isfinite(scale).all()


def test_a_graph_that_no_file_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from onnx import helper

    from tasks.export import onnx_convert

    monkeypatch.setattr(onnx_convert, "LARGEST", 100)
    model = made([helper.make_node("Identity", ["x"], ["out"])], {}, {"x": [2]}, [2])
    model.doc_string = "x" * 200
    with pytest.raises(StepError, match="an ONNX file holds 2"):
        save({"model.onnx": model}, tmp_path)
