"""Compiling a fully quantised LiteRT file for an Arm Ethos-U with vela, and what vela says about it."""

from __future__ import annotations

import configparser
import csv
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specs.schema.suggest import nearest
from tasks.context import StepError

CONFIG = "Arm/vela.ini"

TARGETS: dict[str, tuple[str, str]] = {
    "ethos-u55-32": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u55-64": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u55-128": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u55-256": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65-256": ("Ethos_U65_High_End", "Dedicated_Sram_384KB"),
    "ethos-u65-512": ("Ethos_U65_High_End", "Dedicated_Sram_384KB"),
    "ethos-u85-128": ("Ethos_U85_SYS_DRAM_Low", "Dedicated_Sram_384KB"),
    "ethos-u85-256": ("Ethos_U85_SYS_DRAM_Low", "Dedicated_Sram_384KB"),
    "ethos-u85-512": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
    "ethos-u85-1024": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
    "ethos-u85-2048": ("Ethos_U85_SYS_DRAM_High", "Dedicated_Sram_384KB"),
}
"""System configuration and memory mode of each target, named in every call: vela's own default is a system that does
not exist, and ``Dedicated_Sram`` without a size stands for one gigabyte of SRAM."""

# PR_SET_PDEATHSIG, SIGKILL: a compiler whose step was killed has nobody left to write for. It is set in the new process
# itself, since code between fork and exec can deadlock in a process that has threads.
_VELA = """
import ctypes, runpy, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
runpy.run_module("ethosu.vela", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class NpuBuild:
    """What vela reported of a compilation.

    Args:
        cpu: the operators left to the CPU, each with vela's reason.
        cycles, seconds: of one inference, estimated.
        sram, flash: bytes; flash is whatever holds the weights, off-chip flash or DRAM.
        summary: every column of vela's own summary.
    """

    target: str
    system_config: str
    memory_mode: str
    vela: str
    npu_operators: int
    cpu_operators: int
    cpu: dict[str, str]
    cycles: int
    seconds: float
    sram: int
    flash: int
    summary: dict[str, str]

    @property
    def share(self) -> float:
        """Operators that run on the NPU, of all."""
        return self.npu_operators / (self.npu_operators + self.cpu_operators)

    def metrics(self) -> dict[str, float]:
        """The figures by the names of ``specs.schema.metrics``."""
        return {
            "npu_operator_share": self.share,
            "npu_cycles": float(self.cycles),
            "npu_latency": self.seconds,
            "npu_sram": float(self.sram),
            "npu_flash": float(self.flash),
        }

    def record(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {**asdict(self), "operator_share": self.share}


@cache
def configurations() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The system configurations and the memory modes that vela ships."""
    package = find_spec("ethosu")
    if package is None or not package.submodule_search_locations:
        raise StepError("vela is not installed; run pip install ethos-u-vela")
    file = Path(next(iter(package.submodule_search_locations))) / "config_files" / CONFIG
    parser = configparser.ConfigParser()
    parser.read(file, encoding="utf-8")
    groups = {"System_Config": [], "Memory_Mode": []}
    for section in parser.sections():
        group, _, name = section.partition(".")
        groups.get(group, []).append(name)
    return tuple(groups["System_Config"]), tuple(groups["Memory_Mode"])


def choose(target: str, system_config: str | None, memory_mode: str | None) -> tuple[str, str]:
    """The system configuration and memory mode for ``target``; given ones replace those of the table.

    Raises:
        StepError: an unknown name, or a system configuration of another family than the target's.
    """
    systems, modes = configurations()
    family = "_".join(target.split("-")[:2]).title()  # ethos-u85-256 is of the family Ethos_U85
    own = [name for name in systems if name.startswith(family)]
    if system_config is not None and system_config not in own:
        raise StepError(f"npu_system_config {system_config!r} is none for {target}; {nearest(system_config, own)}")
    if memory_mode is not None and memory_mode not in modes:
        raise StepError(f"npu_memory_mode {memory_mode!r} is unknown; {nearest(memory_mode, modes)}")
    default_system, default_mode = TARGETS[target]
    if system_config is not None and memory_mode is None and "Flash" in system_config:
        default_mode = "Shared_Sram"  # flash holds constants only, so the rest has to share the SRAM
    return system_config or default_system, memory_mode or default_mode


def compile_npu(
    source: Path,
    compiled: Path,
    work: Path,
    target: str,
    system_config: str | None = None,
    memory_mode: str | None = None,
    timeout: float | None = None,
) -> NpuBuild:
    """Compile ``source`` into ``compiled``.

    Args:
        source: a fully quantised LiteRT file.
        compiled: where the compiled file goes.
        work: a folder for vela's own output.
        target: the accelerator configuration, for example ethos-u85-256.
        system_config: vela's system configuration; None takes the target's.
        memory_mode: vela's memory mode; None takes the target's.
        timeout: seconds after which vela is ended; None waits.

    Raises:
        StepError: vela failed, took too long, or compiled nothing.
    """
    from tasks.export.graph import list_operators

    system, mode = choose(target, system_config, memory_mode)
    command = [
        *(sys.executable, "-c", _VELA, str(source), "--output-dir", str(work)),
        *("--accelerator-config", target, "--config", CONFIG, "--system-config", system, "--memory-mode", mode),
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StepError(
            f"vela took longer than {timeout:.0f} s for {target}; a shorter length compiles faster"
        ) from error
    built = work / f"{source.stem}_vela.tflite"
    summary = work / f"{source.stem}_summary_{system}.csv"
    if done.returncode != 0 or not built.is_file() or not summary.is_file():
        tail = "\n".join(done.stdout.strip().splitlines()[-3:])
        raise StepError(
            f"vela cannot compile this file for {target}, {system}, {mode} (exit code {done.returncode}):\n{tail}"
        )
    operators = list_operators(built)
    left = [operator for operator in operators if operator.kind != "ethos-u"]
    if len(left) == len(operators):
        raise StepError(f"vela put no operator on {target}: the file is not fully quantised, or nothing in it fits")
    build = NpuBuild(
        target,
        system,
        mode,
        _version(),
        _count(done.stdout, "NPU"),
        _count(done.stdout, "CPU"),
        _reasons(done.stdout, left),
        **_summary(summary),
    )
    built.replace(compiled)
    return build


def _count(output: str, kind: str) -> int:
    match = re.search(rf"^{kind} operators = (\d+)", output, re.MULTILINE)
    if match is None:
        raise StepError(f"this vela ({_version()}) does not report its {kind} operators; install the version pinned")
    return int(match[1])


def _reasons(output: str, left: list[Any]) -> dict[str, str]:
    """Each operator in ``left`` with the reason that vela printed for its output tensor."""
    given = dict(re.findall(r"operator: \w+, ofm: '([^']*)'\nReason: (.*)", output))
    reasons: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for operator in left:
        name = f"{operator.kind} {operator.where}".strip()
        counts[name] += 1
        unique = name if counts[name] == 1 else f"{name} ({counts[name]})"
        reasons[unique] = given.get(operator.outputs[0].name, "vela gives no reason")
    return reasons


def _summary(path: Path) -> dict[str, Any]:
    with path.open(newline="", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream))
    kibibytes = {
        name: float(row[f"{name}_memory_used"]) for name in ("sram", "dram", "on_chip_flash", "off_chip_flash")
    }
    return {
        "cycles": int(float(row["cycles_total"])),
        "seconds": float(row["inference_time"]),
        "sram": int(kibibytes["sram"] * 1024),
        "flash": int((kibibytes["dram"] + kibibytes["on_chip_flash"] + kibibytes["off_chip_flash"]) * 1024),
        "summary": dict(row),
    }


def _version() -> str:
    from importlib.metadata import version

    return version("ethos-u-vela")
