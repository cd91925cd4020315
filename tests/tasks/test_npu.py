"""vela on a real int8 file: named configurations, counts that the compiled file confirms, honest failures."""

from __future__ import annotations

import configparser
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import ethosu
import pytest

from specs.schema.steps.export import Npu
from tasks.context import StepError
from tasks.export import graph, npu
from tasks.export.runtime import InputError, LiteRTModel
from tests.tasks import exported


@pytest.fixture(scope="module")
def source() -> Path:
    return exported.export("gpt2", "int8")[0] / "model.tflite"


def compile_for(source: Path, tmp_path: Path, target: str, **fields: str) -> tuple[npu.NpuBuild, Path]:
    compiled = tmp_path / "compiled.tflite"
    return npu.compile_npu(source, compiled, tmp_path, target, **fields), compiled  # type: ignore[arg-type]


def test_every_target_names_a_configuration_that_vela_ships():
    ini = configparser.ConfigParser()
    ini.read(Path(next(iter(ethosu.__path__))) / "config_files" / npu.CONFIG)
    assert set(npu.TARGETS) == set(get_args(Npu))
    for target, (system, mode) in npu.TARGETS.items():
        assert f"System_Config.{system}" in ini
        assert f"Memory_Mode.{mode}" in ini
        assert target.split("-")[1].upper() in system
        assert npu.choose(target, None, None) == (system, mode)


@pytest.mark.parametrize("target", ["ethos-u55-128", "ethos-u65-256", "ethos-u85-256"])
def test_the_share_is_that_of_the_compiled_file(source: Path, tmp_path: Path, target: str):
    build, compiled = compile_for(source, tmp_path, target)
    kinds = [operator.kind for operator in graph.list_operators(compiled)]
    left = [kind for kind in kinds if kind != "ethos-u"]
    assert build.cpu_operators == len(left) == len(build.cpu)
    assert build.npu_operators > 50
    assert build.share == build.npu_operators / (build.npu_operators + len(left))
    assert (build.system_config, build.memory_mode) == npu.TARGETS[target]
    assert build.summary["system_config"] == build.system_config  # vela took what it was given
    assert build.summary["memory_mode"] == build.memory_mode
    assert build.seconds == pytest.approx(build.cycles / float(build.summary["core_clock"]))
    assert build.sram > 1024
    assert build.flash > 10_000
    if target == "ethos-u85-256":
        assert left == []  # the embedding and the mask are GATHERs, which the U85 knows
    else:
        assert left == ["GATHER", "GATHER"]
        assert set(build.cpu.values()) == {"Unsupported opType"}


def test_the_export_carries_build_and_report():
    folder, result = exported.export("gpt2", "int8", npu="ethos-u85-256")
    record = json.loads((folder / "vela.json").read_text())
    assert record["target"] == "ethos-u85-256"
    assert result.metrics["npu_operator_share"] == record["operator_share"] == 1.0
    assert result.metrics["npu_cycles"] == record["cycles"] > 0
    assert result.properties["npu"]["file"] == "model_vela.tflite"
    assert graph.list_operators(folder / "model_vela.tflite")[0].kind == "ethos-u"
    with pytest.raises(InputError, match="compiled for an Ethos-U"):
        LiteRTModel(folder / "model_vela.tflite")
    assert LiteRTModel(folder / "model.tflite").length == exported.LENGTH


def test_other_configurations_are_taken_and_change_the_figures(source: Path, tmp_path: Path):
    slow, _ = compile_for(source, tmp_path, "ethos-u85-256", system_config="Ethos_U85_SYS_Flash_Low")
    assert (slow.system_config, slow.memory_mode) == ("Ethos_U85_SYS_Flash_Low", "Shared_Sram")
    assert float(slow.summary["core_clock"]) == 200e6
    (tmp_path / "again").mkdir()
    fast, _ = compile_for(source, tmp_path / "again", "ethos-u85-256")
    assert float(fast.summary["core_clock"]) == 500e6
    assert slow.seconds > fast.seconds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system_config": "Ethos_U85_SYS_DRAM_Midd"}, "did you mean Ethos_U85_SYS_DRAM_Mid?"),
        ({"system_config": "Ethos_U55_High_End_Embedded"}, "is none for ethos-u85-256"),
        ({"memory_mode": "Shared_Sramm"}, "did you mean Shared_Sram?"),
    ],
)
def test_unknown_configurations_are_refused_with_the_nearest(fields: dict[str, str], message: str):
    with pytest.raises(StepError) as caught:
        npu.choose("ethos-u85-256", fields.get("system_config"), fields.get("memory_mode"))
    assert message in str(caught.value)


def test_a_file_left_float_has_a_low_share(tmp_path: Path):
    folder, _ = exported.export("bert", "float32")
    build, compiled = compile_for(folder / "model.tflite", tmp_path, "ethos-u85-256")
    assert build.share < 0.3
    left = [operator for operator in graph.list_operators(compiled) if operator.kind != "ethos-u"]
    assert build.cpu_operators == len(left) == len(build.cpu) > 50


def test_a_broken_file_shows_velas_own_words(tmp_path: Path):
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"\x18\x00\x00\x00TFL3" + b"\x00" * 64)
    with pytest.raises(StepError, match=r"exit code -?\d+\)"):
        compile_for(broken, tmp_path, "ethos-u55-64")


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death signal is Linux's")
def test_vela_dies_with_its_step():
    script = (
        "import subprocess, sys; from tasks.export.npu import _VELA; "
        "code = _VELA.replace('runpy.run_module', '(lambda *a, **k: __import__(\"time\").sleep(60))'); "
        "child = subprocess.Popen([sys.executable, '-c', code]); print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(1)  # the child sets the signal once its interpreter runs
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.1)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
