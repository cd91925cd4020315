"""Trained models with replaced attention: a small decoder at a long context, and a classifier as it came.

    python -m tests.bench.long_context novels --train NOVELS/train/war-and-peace.txt \\
        --eval NOVELS/valid/les-miserables.txt --work FOLDER
    python -m tests.bench.long_context reviews --model MINILM_FOLDER --data SST2_FOLDER --work FOLDER

``novels`` trains a small Llama at ``--length`` tokens by the step ``finetune``, replaces its attention by the step
``attention`` with every bound of ``--bounds``, with and without recovery, and prints perplexity on the other text
(bootstrap over its windows, paired with the exact model) and the time of a prefill. ``reviews`` trains a classifier on
SST-2 and replaces its attention without training; sentences have no more than 64 tokens, so that the replacement is
made to compute at every length.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.base import Task
from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.attention import AttentionSpec
from specs.schema.steps.finetune import FinetuneSpec
from tasks.attention import swap
from tasks.attention.lengths import NEVER, at_every_length
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.evaluate.bootstrap import interval, ratio_of_sums, replicates
from tasks.registry import find

RESAMPLES = 2000


def done(spec: Any, inputs: list[Path], root: Path, task: Task, model: ModelSpec, data: DataSpec) -> StepResult | None:
    """Carry out a step in ``root/ID``, unless its artifact is there; what it said, None where it was there."""
    folder = root / spec.id
    if (folder / "done").exists():
        return None
    for name in ("out", "work", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ctx = StepContext(
        step_id=spec.id,
        task=task,
        model=model,
        data=data,
        out=folder / "out",
        work=folder / "work",
        checkpoints=folder / "checkpoints",
        store=root / "store",
        threads=2,
    )
    kinds = ["swapped" if (path / "lathe.json").exists() else "model" for path in inputs]
    taken = [
        Artifact("0" * 64, kind, "0" * 64, path, {"properties": {}}) for kind, path in zip(kinds, inputs, strict=True)
    ]  # type: ignore[arg-type]
    result = find(type(spec)).function(*taken, spec=spec, ctx=ctx)
    (folder / "done").write_text(json.dumps({"summary": result.summary, "left": dict(result.left)}, indent=1))
    print(f"{spec.id}: {result.summary}", flush=True)
    return result


def novels(given: argparse.Namespace) -> None:
    config = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = ModelSpec(config=config | {"max_position_embeddings": given.length})
    data = DataSpec(train=str(given.train), eval=str(given.eval), max_length=given.length)
    task: Task = "text-generation"
    done(BaselineSpec(model=model), [], given.work, task, model, data)
    training = {"max_steps": given.steps, "batch_size": 2, "learning_rate": 3e-3, "lr_scheduler": "cosine"}
    exact = FinetuneSpec(uses="finetune", id="exact", validation=0, **training)
    done(exact, [given.work / "baseline" / "out"], given.work, task, model, data)
    base = given.work / "exact" / "out"
    print(f"\n| attention | bound | replaced | perplexity | against exact | prefill of {given.length} |")
    print("| --- | --- | --- | --- | --- | --- |")
    losses, seconds, _ = _scored(base, data, given, True)
    print(_line("exact", "", "", losses, losses, seconds), flush=True)
    recover = {"max_steps": given.recover, "batch_size": 2, "learning_rate": 3e-4, "validation": 0}
    for bound in given.bounds:
        for trained in (False, True):
            name = f"lsh-{bound}{'-recovered' if trained else ''}"
            fields: dict[str, Any] = {"error": {"at_most": f"{bound}%"}, "samples": 4, "min_length": 1}
            spec = AttentionSpec(uses="attention", id=name, recover=recover if trained else None, **fields)
            try:
                done(spec, [base], given.work, task, model, data)
            except StepError as error:
                print(f"| {name} | {bound} % | none | | {error} | |", flush=True)
                break
            mine, seconds, count = _scored(given.work / name / "out", data, given, False)
            print(
                _line("lsh, recovered" if trained else "lsh", f"{bound} %", f"{count} of 3", mine, losses, seconds),
                flush=True,
            )


def _line(name: str, bound: str, count: str, mine: np.ndarray, exact: np.ndarray, seconds: float) -> str:
    difference = ratio_of_sums(mine - exact, np.ones(len(mine)))
    low, high = interval(replicates(difference, len(mine), RESAMPLES, 0), 0.95) or (math.nan, math.nan)
    change = math.exp(float((mine - exact).mean()))
    return (
        f"| {name} | {bound} | {count} | {math.exp(float(mine.mean())):.2f} | {change - 1:+.2%} "
        f"[{math.exp(low) - 1:+.2%}, {math.exp(high) - 1:+.2%}] | {1e3 * seconds:.0f} ms |"
    )


def _scored(folder: Path, data: DataSpec, given: argparse.Namespace, exact: bool) -> tuple[np.ndarray, float, int]:
    """Mean loss of each window in nats, the median time of a prefill, and how many attentions are replaced."""
    import torch

    from tasks.data import encode
    from tasks.models import load

    torch.set_num_threads(2)
    network: Any = load(folder)
    rows = encode(data, "eval", "text-generation", folder, given.work / "store")
    whole = [
        row for row in np.linspace(0, len(rows) - 1, given.windows).astype(int) if rows.lengths()[row] == given.length
    ]
    losses, seconds = [], []
    with torch.no_grad(), at_every_length(network, NEVER if exact else 0):
        for row in whole:
            ids = torch.from_numpy(np.asarray(rows.input_ids[row])).long()[None]
            started = time.perf_counter()
            logits = network(ids, use_cache=True).logits
            seconds.append(time.perf_counter() - started)
            losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])))
    return np.array(losses), statistics.median(seconds), len(swap.swapped(network))


def reviews(given: argparse.Namespace) -> None:
    import torch

    from tasks.data import encode
    from tasks.models import load

    model = ModelSpec(source=str(given.model))
    task: Task = "text-classification"
    data = DataSpec(train=str(given.data / "train.jsonl"), eval=str(given.data / "dev.jsonl"), max_length=64)
    done(BaselineSpec(model=model), [], given.work, task, model, data)
    training = {"max_steps": given.steps, "batch_size": 32, "learning_rate": 1e-4, "validation": 0}
    done(
        FinetuneSpec(uses="finetune", id="exact", **training),
        [given.work / "baseline" / "out"],
        given.work,
        task,
        model,
        data,
    )
    base = given.work / "exact" / "out"
    labels: dict[str, np.ndarray] = {}
    print("\n| attention | bound | replaced | accuracy | same answers |\n| --- | --- | --- | --- | --- |")
    for bound in (None, *given.bounds):
        name = "exact" if bound is None else f"lsh-{bound}"
        if bound is not None:
            fields: dict[str, Any] = {"error": {"at_most": f"{bound}%"}, "samples": 64, "min_length": 1}
            try:
                spec = AttentionSpec(uses="attention", id=name, buckets=given.buckets, **fields)
                done(spec, [base], given.work, task, model, data)
            except StepError as error:
                print(f"| {name} | {bound} % | none | | {error} |", flush=True)
                continue
        network: Any = load(given.work / name / "out")
        rows = encode(data, "eval", task, base, given.work / "store")
        answers = []
        with torch.no_grad(), at_every_length(network):
            for row in range(len(rows)):
                length = int(rows.lengths()[row])
                ids = torch.from_numpy(np.asarray(rows.input_ids[row][:length])).long()[None]
                answers.append(int(network(ids).logits.argmax()))
        labels[name] = np.array(answers)
        right = float((labels[name] == rows.labels).mean())
        same = float((labels[name] == labels["exact"]).mean())
        count = f"{len(swap.swapped(network))} of {len(swap.dispatching(network))}"
        print(f"| {name} | {'' if bound is None else f'{bound} %'} | {count} | {right:.4f} | {same:.2%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["novels", "reviews"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--recover", type=int, default=15)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--buckets", type=int, default=8)
    parser.add_argument("--bounds", type=int, nargs="+", default=[5, 10, 20])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    {"novels": novels, "reviews": reviews}[given.what](given)


if __name__ == "__main__":
    main()
