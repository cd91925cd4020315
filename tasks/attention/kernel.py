"""Builds and calls the C++ of bucketed attention (``tasks.attention.kernel_source``), with the machine's own compiler
for its own processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.attention.kernel_forward import FORWARD
from tasks.attention.kernel_gradient import BACKWARD
from tasks.attention.kernel_source import COMMON

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.attention.lsh import Call

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wno-psabi", "-fno-math-errno")
OFF = "LATHE_NO_KERNEL"
"""Where this variable of the environment is set, nothing is compiled and plain torch computes."""

_POINTER = ctypes.c_void_p
_NUMBERS = ("batch", "heads", "groups", "rows", "keys", "width", "out_width", "buckets", "features", "probes", "window")
_SETTINGS = ("band", "offset", "causal", "residual")


class _Job(ctypes.Structure):
    """As ``Job`` in the source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_NUMBERS, *_SETTINGS, "threads")),
        ("scale", ctypes.c_float),
        *((name, _POINTER) for name in ("q", "k", "v", "x")),
        *((name, ctypes.c_int64 * 3) for name in ("qs", "ks", "vs", "xs")),
        *((name, _POINTER) for name in ("seen", "table", "bias", "spread", "code", "probe", "out", "lse")),
        *((name, _POINTER) for name in ("grad", "dq", "dk", "dv")),
    )


def compiler() -> str | None:
    """The C++ compiler of this machine; None where there is none or the environment says not to use it."""
    return None if os.environ.get(OFF) else shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where nothing can be compiled.

    The file is kept in the user's own cache folder, by the digest of source, compiler and processor, and is taken from
    there only where nobody else may write.
    """
    program = compiler()
    if program is None:
        return None
    source = COMMON + FORWARD + BACKWARD
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    name = hashlib.sha256("\0".join((source, *FLAGS, version, _processor())).encode()).hexdigest()[:32]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lathe" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / f"{name}.so"
        if not (file.is_file() and _ours(file) and _ours(folder)):
            if not _ours(folder):
                return None
            _build(program, source, file)
        return ctypes.CDLL(str(file))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def _ours(path: Path) -> bool:
    stat = path.stat()
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def _build(program: str, source: str, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made, text = Path(folder) / "kernel.so", Path(folder) / "kernel.cpp"
        text.write_text(source, encoding="utf-8")
        subprocess.run([program, *FLAGS, str(text), "-o", str(made)], check=True, capture_output=True, timeout=120)
        made.chmod(0o700)
        made.replace(file)


def usable(call: Call) -> bool:
    """Whether the compiled functions can carry out ``call``: on the CPU, with values of 512 numbers at most."""
    return call.query.device.type == "cpu" and call.value.shape[-1] <= 512 and library() is not None


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs [B, Lq, Hq, E], log-sum-exp [B, Hq, Lq], codes int32 [B, Hkv, Lk] and probes int32 [B, Hq, Lq, P]."""
    import torch

    batch, heads, rows, _ = call.query.shape
    groups, keys = call.key.shape[1:3]
    out = torch.empty(batch, rows, heads, call.value.shape[-1])
    lse = torch.empty(batch, heads, rows)
    code = torch.empty(batch, groups, keys, dtype=torch.int32)
    probe = torch.empty(batch, heads, rows, call.probes, dtype=torch.int32)
    _run("lathe_forward", call, out=out, lse=lse, code=code, probe=probe)
    return out, lse, code, probe


def backward(
    call: Call, out: Tensor, lse: Tensor, code: Tensor, probe: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, from what ``forward`` gave and the gradient ``grad`` of its output."""
    import torch

    made = [torch.zeros(given.shape) for given in (call.query, call.key, call.value)]
    tensors = {"out": out, "lse": lse, "code": code, "probe": probe, "grad": grad.float().contiguous()}
    _run("lathe_backward", call, **tensors, dq=made[0], dk=made[1], dv=made[2])
    return made[0], made[1], made[2]


def _run(function: str, call: Call, **tensors: Tensor) -> None:
    import torch

    found = library()
    assert found is not None
    hashed = call.hashed
    given = {"q": call.query, "k": call.key, "v": call.value, "x": hashed.features(call.key)}
    given = {name: _rows(tensor) for name, tensor in given.items()}
    seen = None if call.seen is None else call.seen.to(torch.uint8).contiguous()
    fixed = {"table": hashed.table, "bias": hashed.bias, "spread": hashed.spread}
    fixed = {name: tensor.float().contiguous() for name, tensor in fixed.items()}
    batch, heads, rows, width = call.query.shape
    sizes = (batch, heads, *(call.key.shape[1], rows, call.key.shape[2], width, call.value.shape[-1]))
    numbers: dict[str, Any] = dict(
        zip(_NUMBERS, (*sizes, *hashed.table.shape[1:], call.probes, call.window), strict=True)
    )
    numbers |= {name: getattr(call, name) for name in (*_SETTINGS, "scale")}
    job = _Job(threads=torch.get_num_threads(), seen=None if seen is None else seen.data_ptr(), **numbers)
    for name, tensor in given.items():
        setattr(job, f"{name}s", (ctypes.c_int64 * 3)(*tensor.stride()[:3]))
    for name, tensor in {**given, **fixed, **tensors}.items():
        setattr(job, name, tensor.data_ptr())
    getattr(found, function)(ctypes.byref(job))


def _rows(tensor: Tensor) -> Tensor:
    """As float32 whose last dimension is contiguous."""
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
