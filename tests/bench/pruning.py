"""Perplexity of one small decoder pruned by magnitude, Wanda and SparseGPT, in one run.

    python -m tests.bench.pruning --train NOVELS/train/war-and-peace.txt --eval NOVELS/valid/les-miserables.txt

A small Llama is trained on the one text, by the step ``finetune``; each method prunes it to 50 %, 60 % and 2:4 without
training afterwards, by the step ``prune``; the perplexity is that of the other text. Intervals (95 %) are a bootstrap
over its windows; against magnitude both models are resampled with the same draws. The methods that calibrate run once
for each of ``--seeds`` draws of training examples, and the median of the draws counts. Prints a table in Markdown, and
progress on stderr. ``--quick`` shows that all of it runs, on a model that has learned next to nothing: no evidence.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.prune import PruneSpec
from tasks.context import Artifact, StepContext
from tasks.evaluate.bootstrap import ratio_of_sums, replicates
from tests.bench.common import RESAMPLES, teller, with_interval

AMOUNTS: tuple[dict[str, Any], ...] = ({"sparsity": "50%"}, {"sparsity": "60%"}, {"pattern": "2:4"})
METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and what the model is trained and judged on."""

    root: Path
    model: ModelSpec
    data: DataSpec

    def context(self, name: str, seed: int = 0) -> StepContext:
        """A context whose artifact goes into a folder of this name."""
        for part in ("out", "work", "checkpoints"):
            (self.root / name / part).mkdir(parents=True, exist_ok=True)
        return StepContext(
            step_id=name,
            task="text-generation",
            model=self.model,
            data=self.data,
            out=self.root / name / "out",
            work=self.root / name / "work",
            checkpoints=self.root / name / "checkpoints",
            store=self.root / "store",
            seed=seed,
            emit=teller(name),
        )

    def losses(self, folder: Path, windows: int) -> tuple[np.ndarray, np.ndarray]:
        """Nats and tokens of windows spread over the evaluation text, [N] each."""
        from tasks.data import encode
        from tasks.evaluate.torch_runners import TorchRunner
        from tasks.models import load

        rows = encode(self.data, "eval", "text-generation", folder, self.root / "store")
        rows = rows.take(np.unique(np.linspace(0, len(rows) - 1, windows).astype(int)))
        runner = TorchRunner(load(folder), "cpu")
        ids, mask = np.asarray(rows.input_ids), np.asarray(rows.attention_mask)
        batches = [slice(at, at + 32) for at in range(0, len(ids), 32)]
        return np.concatenate([runner.nll(ids[at], mask[at]) for at in batches]), mask.sum(1) - 1.0


def as_artifact(folder: Path) -> Artifact:
    """The folder as a step takes it."""
    return Artifact("0" * 64, "model", "0" * 64, folder, {"properties": {}})


def trained(bench: Bench, steps: int, rate: float) -> Artifact:
    """The dense model."""
    from tasks.finetune.finetune import finetune
    from tasks.models.origin import import_model

    start = bench.context("start")
    import_model(spec=BaselineSpec(uses="model", id="baseline", model=bench.model), ctx=start)
    ctx = bench.context("dense")
    training = {"max_steps": steps, "batch_size": 32, "learning_rate": rate, "lr_scheduler": "cosine"}
    spec = FinetuneSpec.model_validate({"uses": "finetune", "id": "dense", "validation": 0.01, **training})
    print(finetune(as_artifact(start.out), spec=spec, ctx=ctx).summary, flush=True)
    return as_artifact(ctx.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="a text file")
    parser.add_argument("--eval", type=Path, required=True, help="another text file")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps of the dense model")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--examples", type=int, default=128, help="calibration examples")
    parser.add_argument("--windows", type=int, default=400, help="evaluation windows of 64 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="40 steps, one draw of 16 examples, 60 windows")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.seeds, given.examples, given.windows = 40, 1, 16, 60

    import torch

    from tasks.compress.prune import prune

    torch.set_num_threads(given.threads)
    shape = {"hidden_size": given.width, "intermediate_size": 2 * given.width, "num_hidden_layers": given.layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = {"model_type": "llama", "vocab_size": 1024, "tie_word_embeddings": True, **shape, **heads}
    with tempfile.TemporaryDirectory() as folder:
        data = DataSpec(train=str(given.train.resolve()), eval=str(given.eval.resolve()), max_length=64)
        bench = Bench(Path(folder), ModelSpec(config=model), data)
        dense = trained(bench, given.steps, given.learning_rate)
        nats, tokens = bench.losses(dense.path, given.windows)
        print("\n| zeros | method | perplexity | against dense | against magnitude | pruned in |")
        print("| --- | --- | --- | --- | --- | --- |")
        print(f"| none | dense | {shown(nats, np.zeros_like(nats), tokens, '.2f')} | | | |", flush=True)
        for amount in AMOUNTS:
            peer: np.ndarray | None = None
            for method in METHODS:
                runs, seconds = [], []
                for seed in range(1 if method == "magnitude" else given.seeds):
                    ctx = bench.context(f"{method}-{'-'.join(amount.values()).replace(':', '')}-{seed}", seed)
                    extra = {} if method == "magnitude" else {"calibration_examples": given.examples}
                    spec = PruneSpec.model_validate({"uses": "prune", "id": "p", "method": method, **amount, **extra})
                    began = time.perf_counter()
                    prune(dense, spec=spec, ctx=ctx)
                    seconds.append(time.perf_counter() - began)
                    runs.append(bench.losses(ctx.out, given.windows)[0])
                middle = sorted(runs, key=lambda run: run.sum())[(len(runs) - 1) // 2]
                peer = middle if peer is None else peer
                against = "1" if middle is peer else shown(middle, peer, tokens, ".3f")
                cells = (shown(middle, np.zeros_like(nats), tokens, ".2f"), shown(middle, nats, tokens, ".3f"), against)
                name, took = next(iter(amount.values())), f"{statistics.median(seconds):.1f} s"
                print(f"| {name} | {method} | {' | '.join(cells)} | {took} |", flush=True)


def shown(nats: np.ndarray, other: np.ndarray, tokens: np.ndarray, form: str) -> str:
    """The perplexity as a multiple of another one (nats of 0: of 1), with its interval."""
    ratio = replicates(ratio_of_sums(nats - other, tokens), len(tokens), RESAMPLES, 0)
    return with_interval(math.exp(float((nats - other).sum() / tokens.sum())), np.exp(ratio), form)


if __name__ == "__main__":
    main()
