"""The runtime says what is wrong with a file or an input, and gives floats whatever the file holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.export.runtime import InputError, LiteRTModel
from tests.tasks import exported


@pytest.fixture(scope="module")
def lite() -> LiteRTModel:
    folder, _ = exported.export("bert", "float32")
    return LiteRTModel(folder / "model.tflite", threads=2)


def test_a_file_knows_its_shape(lite: LiteRTModel):
    assert (lite.batch, lite.length, lite.vocab) == (1, exported.LENGTH, 320)


def ones(length: int = exported.LENGTH) -> np.ndarray:
    return np.ones((1, length), np.int32)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (ones(7), ones(), r"input_ids has the shape \[1, 7\]; this file takes \[1, 16\]"),
        (ones(), ones()[0], r"attention_mask has the shape \[16\]"),
        (ones() * 0.5, ones(), "input_ids is float64; it takes integers"),
        (ones() * 320, ones(), "has the id 320; this file knows 0 to 319"),
        (ones() * -1, ones(), "has the id -1"),
        (ones(), ones() * 2, "attention_mask has values from 2 to 2"),
    ],
)
def test_a_wrong_input_is_refused_with_the_remedy(lite: LiteRTModel, ids: np.ndarray, mask: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        lite.run(ids, mask)


def test_ids_and_masks_of_any_integer_type_are_taken(lite: LiteRTModel):
    ids, mask = (values[:1] for values in exported.examples("bert"))
    expected = lite.run(ids, mask)
    assert np.array_equal(lite.run(ids.astype(np.int64), mask.astype(bool)), expected)
    assert np.array_equal(lite.run(ids.tolist(), mask.astype(np.uint8)), expected)


def test_results_do_not_share_memory_with_the_interpreter(lite: LiteRTModel):
    ids, mask = exported.examples("bert")
    first = lite.run(ids[:1], mask[:1])
    kept = first.copy()
    lite.run(ids[1:2], mask[1:2])
    assert np.array_equal(first, kept)


def test_files_that_are_no_exports_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="is not a file"):
        LiteRTModel(tmp_path / "none.tflite")
    (tmp_path / "text.tflite").write_text("not a model at all")
    with pytest.raises(InputError, match="TFL3 is missing"):
        LiteRTModel(tmp_path / "text.tflite")
    whole = (exported.export("bert", "float32")[0] / "model.tflite").read_bytes()
    (tmp_path / "half.tflite").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(InputError):
        LiteRTModel(tmp_path / "half.tflite")


def test_it_needs_neither_torch_nor_tensorflow():
    folder, _ = exported.export("bert", "int8")
    code = (
        "import sys; from tasks.export.runtime import LiteRTModel; import numpy as np; "
        f"m = LiteRTModel({str(folder / 'model.tflite')!r}); x = np.ones((1, m.length), np.int32); "
        "assert m.run(x, x).shape == (1, 2); "
        "sys.exit(','.join({'torch', 'tensorflow', 'transformers', 'pydantic'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
