"""Running an exported file with LiteRT. Needs numpy and ai_edge_litert only."""

from __future__ import annotations

from pathlib import Path

from tasks.export.lite_ctc import LiteRTCtc
from tasks.export.lite_file import InputError, LiteFile, Watch
from tasks.export.lite_seq2seq import LiteRTSeq2Seq
from tasks.export.lite_text import LiteRTModel
from tasks.export.names import ENCODE, FILE, SAMPLES

__all__ = ["InputError", "LiteRTCtc", "LiteRTModel", "LiteRTSeq2Seq", "open_export"]


def open_export(
    path: Path | str, threads: int = 1, watch: Watch | None = None
) -> LiteRTModel | LiteRTSeq2Seq | LiteRTCtc:
    """The export in the folder ``path``, or the file itself with ``config.json`` beside it, by its signatures.

    Args:
        path: the folder of an export, or its ``model.tflite``.
        threads: CPU threads.
        watch: is told the signature and the inputs of every call.

    Raises:
        InputError: no export, or one for an NPU.
    """
    path = Path(path)
    file = LiteFile(path / FILE if path.is_dir() else path, threads, watch)
    if ENCODE in file.entries:
        return LiteRTSeq2Seq(file)
    if SAMPLES in next(iter(file.entries.values())).inputs:
        return LiteRTCtc(file)
    return LiteRTModel(file)
