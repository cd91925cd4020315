"""The runtimes of exported files, by how a file's name ends. Needs numpy and the file's own runtime only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.export import lite_constants, onnx_constants
from tasks.export.constants import Constant
from tasks.export.errors import InputError
from tasks.export.lite_ctc import LiteRTCtc
from tasks.export.lite_file import LiteFile
from tasks.export.lite_seq2seq import LiteRTSeq2Seq
from tasks.export.lite_text import LiteRTModel
from tasks.export.names import ENCODE, FILE, ONNX_DECODER, ONNX_ENCODER, ONNX_FILE, SAMPLES
from tasks.export.onnx_file import OnnxFile
from tasks.export.onnx_models import OnnxCtc, OnnxSeq2Seq, OnnxText

__all__ = ["InputError", "LiteRTCtc", "LiteRTModel", "LiteRTSeq2Seq", "Runtime", "open_export", "runtime_of"]

Exported = LiteRTModel | LiteRTSeq2Seq | LiteRTCtc | OnnxText | OnnxSeq2Seq | OnnxCtc


@dataclass(frozen=True)
class Runtime:
    """What runs the exported files of one format.

    Args:
        name: as people call it.
        library: the distribution that runs the files.
        files: the first file of an export, whichever there is.
        open: the export whose first file is given, on so many threads.
        constants: what is stored in the export whose first file is given.
        snippet: Python that loads a file by public libraries alone; ``{}`` is its path.
    """

    name: str
    library: str
    files: tuple[str, ...]
    open: Callable[[Path, int], Exported]
    constants: Callable[[Path], Iterator[Constant]]
    snippet: str


def _open_lite(path: Path, threads: int) -> Exported:
    file = LiteFile(path, threads)
    if ENCODE in file.entries:
        return LiteRTSeq2Seq(file)
    if SAMPLES in next(iter(file.entries.values())).inputs:
        return LiteRTCtc(file)
    return LiteRTModel(file)


def _open_onnx(path: Path, threads: int) -> Exported:
    file = OnnxFile(path, threads)
    if path.name == ONNX_ENCODER:
        return OnnxSeq2Seq(file, OnnxFile(path.with_name(ONNX_DECODER), threads))
    return OnnxCtc(file) if SAMPLES in file.inputs else OnnxText(file)


RUNTIMES = {
    ".tflite": Runtime(
        "LiteRT",
        "ai-edge-litert",
        (FILE,),
        _open_lite,
        lite_constants.constants,
        "from ai_edge_litert.interpreter import Interpreter\nmodel = Interpreter({})",
    ),
    ".onnx": Runtime(
        "ONNX Runtime",
        "onnxruntime",
        (ONNX_FILE, ONNX_ENCODER),
        _open_onnx,
        onnx_constants.constants,
        "import onnxruntime\nmodel = onnxruntime.InferenceSession({})",
    ),
}
"""By suffix."""


def runtime_of(file: Path | str) -> Runtime:
    """The runtime of an exported file.

    Raises:
        InputError: no runtime runs files of that name.
    """
    suffix = Path(file).suffix
    if suffix not in RUNTIMES:
        raise InputError(f"{Path(file).name} is no exported file; give one that ends in {' or '.join(RUNTIMES)}")
    return RUNTIMES[suffix]


def first_file(folder: Path) -> Path | None:
    """The first file of the export in ``folder``; None where there is none."""
    files = (folder / name for runtime in RUNTIMES.values() for name in runtime.files)
    return next((file for file in files if file.is_file()), None)


def open_export(path: Path | str, threads: int = 1) -> Any:
    """The export in the folder ``path``, or whose first file that is, with ``config.json`` beside it.

    Args:
        path: the folder of an export, or its ``model.tflite``, ``model.onnx`` or ``encoder_model.onnx``.
        threads: CPU threads.

    Raises:
        InputError: no export, or one for an NPU.
    """
    path = Path(path)
    file = (first_file(path) or path / FILE) if path.is_dir() else path
    return runtime_of(file).open(file, threads)
