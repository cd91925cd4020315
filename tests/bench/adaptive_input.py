"""Quality against bytes of a trained model's table of tokens: bands against peers, and the time of a lookup.

    python -m tests.bench.adaptive_input --train NOVELS/train --eval NOVELS/valid --work FOLDER
    python -m tests.bench.adaptive_input --train WIKITEXT/valid.txt --eval WIKITEXT/test.txt --work FOLDER
    python -m tests.bench.adaptive_input --train SST2/train.jsonl --eval SST2/dev.jsonl --model MINILM --work FOLDER

A tied decoder of 0.9 M weights (``--vocabulary``, ``--width`` and ``--blocks`` make others) is trained on plain text,
or with ``--model`` a classifier on sentences with labels (kept in ``--work`` for the next time). Then its table is
stored by each method in as many bytes, ``--ratios`` times fewer than float32, and the model is judged on the evaluation
data. The peers: rounding of rows to 8, 4 and 2 bits; plain SVD and GroupReduce (weighted by frequency, bands and ranks
by the same exact allocation) with factors in float16; product quantization with 256 vectors for every part of a row;
quotient-remainder hashing fitted to the table. All in one run; nothing is random but the seed's choice. Prints tables
in Markdown and draws ``adaptive_input.png`` into ``--work``.

    python -m tests.bench.adaptive_input --from-scratch 600 --ratios 8 --vocabulary 16384 --train NOVELS/train \\
        --eval NOVELS/valid --work FOLDER

trains the decoder from random weights instead: dense, with an adaptive input, and with an adaptive softmax too, each
for as many seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import embedding, pad

from specs.schema.base import Task
from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from specs.schema.steps.finetune import FinetuneSpec
from tasks.adaptive_input import rounding, table
from tasks.adaptive_input.adaptive_input import adaptive_input, stored_table
from tasks.adaptive_input.bands import Measured
from tasks.adaptive_input.curves import metric
from tasks.adaptive_input.information import count, unigram
from tasks.compress.calibrate import outputs
from tasks.data import encode
from tasks.data.encoded import Encoded
from tasks.data.tokens import open_tokenizer
from tasks.evaluate.format import size
from tasks.finetune.finetune import finetune
from tasks.models import load
from tasks.models.origin import import_model
from tests.bench.quantization import losses_of
from tests.support import as_artifact, context

LENGTH = 64
"""Tokens of an example."""

LOOKUPS = 200

PACE = 4
"""Optimiser steps by which the pace of a training is measured."""

ROUNDS = 30
"""Of alternating least squares."""


def decoder(given: argparse.Namespace) -> dict[str, Any]:
    """The configuration of a tied Llama of the size that was asked for."""
    return {
        "model_type": "llama",
        "vocab_size": given.vocabulary,
        "hidden_size": given.width,
        "intermediate_size": given.width * 11 // 4,
        "num_hidden_layers": given.blocks,
        "num_attention_heads": given.width // 32,
        "num_key_value_heads": given.width // 64,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
    }


def svd(weight: torch.Tensor, budget: int) -> tuple[torch.Tensor, int]:
    """The best factors of a rank, in float16."""
    rows, width = weight.shape
    rank = max(1, min(width, budget // (2 * (rows + width))))
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    made = (left[:, :rank] * values[:rank]).half().double() @ right[:rank].half().double()
    return made.float(), 2 * rank * (rows + width)


def product(weight: torch.Tensor, budget: int) -> tuple[torch.Tensor, int]:
    """Product quantization (Jégou et al., 2011): k-means of 256 vectors for each part of the rows."""
    rows, width = weight.shape
    parts = max((n for n in range(1, width + 1) if width % n == 0 and rows * n + 512 * width <= budget), default=1)
    made = torch.empty_like(weight)
    generator = torch.Generator().manual_seed(0)
    for at in range(0, width, width // parts):
        some = weight[:, at : at + width // parts]
        centres = some[torch.randperm(rows, generator=generator)[:256]].clone()
        for _ in range(15):
            nearest = torch.cdist(some, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, some)
            sizes = torch.bincount(nearest, minlength=len(centres))[:, None]
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        made[:, at : at + width // parts] = centres.half().float()[torch.cdist(some, centres).argmin(1)]
    return made, rows * parts + 512 * width


def hashed(weight: torch.Tensor, counts: np.ndarray) -> Callable[[torch.Tensor, int], tuple[torch.Tensor, int]]:
    """Quotient and remainder of the id (Shi et al., 2019): the product of two rows of float16, one of each table,
    fitted to ``weight`` by alternating least squares, weighted by frequency."""
    rows, width = weight.shape
    shares = torch.from_numpy(unigram(counts).weights).float()

    def made(_: torch.Tensor, budget: int) -> tuple[torch.Tensor, int]:
        most = budget // (2 * width)
        remainders = max((n for n in range(1, most) if n - (-rows // n) <= most), default=0)
        if not remainders:
            return torch.zeros_like(weight), 0
        quotients = -(-rows // remainders)
        spare = quotients * remainders - rows
        grid = pad(weight, (0, 0, 0, spare)).view(quotients, remainders, width)
        counted = pad(shares, (0, spare)).view(quotients, remainders, 1)
        first, second = torch.ones(quotients, 1, width), torch.zeros(1, remainders, width)
        for _round in range(ROUNDS):
            second = (counted * grid * first).sum(0, True) / (counted * first.square()).sum(0, True).clamp_min(1e-12)
            first = (counted * grid * second).sum(1, True) / (counted * second.square()).sum(1, True).clamp_min(1e-12)
        fitted = first.half().float() * second.half().float()
        return fitted.view(-1, width)[:rows], 2 * width * (quotients + remainders)

    return made


def group_reduce(weight: torch.Tensor, counts: np.ndarray) -> Callable[[torch.Tensor, int], tuple[torch.Tensor, int]]:
    """Bands and ranks in float16, weighted by frequency."""
    found = Measured([weight], [metric(weight.shape[1], None)], unigram(counts), (16,), 5)

    def made(_: torch.Tensor, budget: int) -> tuple[torch.Tensor, int]:
        fitted = found.allocate(budget)
        if fitted is None:
            return torch.zeros_like(weight), 0
        return stored_table(fitted[0]).expanded(), fitted[0].layout.bytes

    return made


def judge(network: Any, data: Encoded, task: Task) -> np.ndarray:
    """What a model is judged by for each example: the loss of each window, or whether the label is right."""
    if task == "text-generation":
        return losses_of(network, data)[0]
    parts = [data.take(slice(at, at + 64)) for at in range(0, len(data), 64)]
    return np.concatenate([(outputs(network, part).argmax(1).numpy() == part.labels) for part in parts]).astype(float)


def shown(values: np.ndarray, dense: np.ndarray, tokens: int, task: Task) -> tuple[str, float]:
    """Quality and its change against the dense table, with a paired bootstrap over the examples; and the change."""
    drawn = np.random.default_rng(0).integers(0, len(values), (1000, len(values)))
    if task == "text-generation":
        changes = 100 * (np.exp((values - dense)[drawn].mean(1) / tokens) - 1)
        change, quality = 100 * (np.exp((values - dense).mean() / tokens) - 1), f"{np.exp(values.mean() / tokens):.1f}"
        unit = "%"
    else:
        changes = 100 * (values - dense)[drawn].mean(1)
        change, quality, unit = 100 * (values - dense).mean(), f"{values.mean():.3f}", " points"
    low, high = np.quantile(changes, [0.025, 0.975])
    return f"{quality} | {change:+.2f}{unit} [{low:+.2f}, {high:+.2f}]", float(change)


def lookups(folder: Path, weight: torch.Tensor, length: int) -> list[str]:
    """Rows of the table of times: a lookup of 32 texts, medians in turns, one thread."""
    made: Any = table.tables(load(folder))[0]
    ids = torch.randint(len(weight), (32, length), generator=torch.Generator().manual_seed(0))
    thin = [(rows := made.rows(n))[:, : max(1, rows.shape[1] // 4)].contiguous() for n in range(len(made.layout.bands))]

    def quarter() -> list[torch.Tensor]:
        """What a level of a quarter of the rank costs at least: the gathers and products of every band."""
        found = []
        for number, rows in enumerate(thin):
            project = made.projection(number)
            vectors = embedding(ids % len(rows), rows)
            found.append(vectors if project is None else vectors @ project[: rows.shape[1]])
        return found

    ways: dict[str, Callable[[], Any]] = {
        "dense table": lambda: embedding(ids, weight),
        "bands, as the step's model looks up": lambda: made.lookup(ids),
        "bands, from factors in every call": lambda: made._from_factors(ids),
        "a quarter of the rank for every token": quarter,
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(LOOKUPS):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                spent[name].append(time.perf_counter() - started)
    first = statistics.median(spent["dense table"])
    return [
        f"| {name} | {1e6 * statistics.median(times):.0f} us | {statistics.median(times) / first:.2f} |"
        for name, times in spent.items()
    ]


def trained_with(given: argparse.Namespace) -> dict[str, Any]:
    """The fields of every training."""
    rate = given.rate or (1e-4 if given.model else 3e-3)
    return {
        "batch_size": given.batch,
        "learning_rate": rate,
        "validation": 0.01,
        "weight_decay": given.weight_decay,
    }


def from_scratch(given: argparse.Namespace, data: DataSpec, place: Callable[[str], Any]) -> None:
    """Train a decoder with a dense table, with an adaptive input, and with an adaptive softmax too, each for as long,
    and print what they foretell of the evaluation data."""
    fields = trained_with(given)
    config = decoder(given)
    start = dataclasses.replace(place("scratch"), model=ModelSpec(config=config))
    if not (start.out / "config.json").exists():
        import_model(spec=BaselineSpec(uses="model", id="baseline", model=ModelSpec(config=config)), ctx=start)
    starts = {"dense": start.out}
    for name in ("full", "adaptive"):
        ctx = place(f"scratch-{name}")
        plan = {"uses": "adaptive_input", "id": "a", "ratio": given.ratios[0], "method": "adaptive", "softmax": name}
        adaptive_input(as_artifact(start.out), spec=AdaptiveInputSpec.model_validate(plan), ctx=ctx)
        starts[f"adaptive input, {name} softmax"] = ctx.out

    def train(name: str, source: Path, steps: int, why: str) -> tuple[float, Path]:
        ctx = place(f"scratch-{why}-{name}".replace(" ", "-").replace(",", ""))
        shutil.rmtree(ctx.checkpoints, ignore_errors=True)  # else it would go on from an earlier run
        spec = FinetuneSpec(uses="finetune", id="t", max_steps=steps, eval_steps=max(steps // 4, 1), **fields)
        began = time.perf_counter()
        finetune(as_artifact(source), spec=spec, ctx=ctx)
        return time.perf_counter() - began, ctx.out

    encode(data, "train", "text-generation", start.out, given.work / "store")
    paces: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(2):  # in turns; what does not depend on the number of steps cancels out
        for name, source in starts.items():
            short, long = (train(name, source, steps, "pace")[0] for steps in (PACE, 3 * PACE))
            paces[name].append(max((long - short) / (2 * PACE), 1e-3))
    windows = encode(data, "eval", "text-generation", start.out, given.work / "store")
    whole = np.flatnonzero(windows.lengths() == windows.length)
    windows = windows.take(whole[np.linspace(0, len(whole) - 1, min(given.examples, len(whole))).astype(int)])
    core = open_tokenizer(start.out).core
    texts = [core.decode(row.tolist()) for row in np.asarray(windows.input_ids)]
    words, read = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    print(
        f"\n{given.vocabulary} tokens; {len(windows)} windows; every model trained for about {given.from_scratch} s\n"
    )
    print("| model | parameters | steps | s | steps/s | perplexity per token | per word | bits per byte |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name, source in starts.items():
        steps = max(int(given.from_scratch / min(paces[name])), 4)
        spent, out = train(name, source, steps, "out")
        network: Any = load(out)
        lost = float(losses_of(network, windows)[0].sum())
        token = np.exp(lost / (len(windows) * (windows.length - 1)))
        print(
            f"| {name} | {sum(one.numel() for one in network.parameters()) / 1e6:.2f} M | {steps} | {spent:.0f} | "
            f"{1 / min(paces[name]):.2f} | {token:.1f} | {np.exp(lost / words):.0f} | {lost / np.log(2) / read:.3f} |",
            flush=True,
        )


def draw(curves: dict[str, list[tuple[int, float]]], what: str, file: Path) -> None:
    """Change of quality against bytes, a line for every method."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, lw=1.2, label=name)
    axes.set(xscale="log", yscale="symlog", xlabel="the table", ylabel=what, ylim=(min(0, axes.dataLim.y0) - 0.5, None))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda bytes_, _: size(bytes_))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", help="a classifier's folder; default: a decoder from random weights")
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps of the training")
    parser.add_argument("--heal", type=int, default=300, help="optimiser steps of the healing")
    parser.add_argument("--examples", type=int, default=200, help="windows that judge; sentences: all")
    parser.add_argument("--ratios", type=float, nargs="+", default=[8, 16, 24, 32])
    parser.add_argument(
        "--from-scratch", type=float, help="seconds of training, dense and adaptive from random weights"
    )
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the decoder")
    parser.add_argument("--width", type=int, default=128, help="of the decoder, a multiple of 64")
    parser.add_argument("--blocks", type=int, default=2, help="of the decoder")
    parser.add_argument("--batch", type=int, default=16, help="examples of an optimiser step")
    parser.add_argument("--rate", type=float, help="learning rate; default: 3e-3, and 1e-4 for a classifier")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where models are trained")
    given = parser.parse_args()
    task: Task = "text-classification" if given.model else "text-generation"
    model = ModelSpec(source=given.model) if given.model else ModelSpec(config=decoder(given))
    data = DataSpec(train=str(given.train), eval=str(given.eval), max_length=LENGTH)

    def place(name: str) -> Any:
        ctx = context(given.work / name, task, data, model, device=given.device, threads=torch.get_num_threads())
        return dataclasses.replace(ctx, store=given.work / "store")

    if given.from_scratch:
        from_scratch(given, data, place)
        return
    trained = given.work / "trained" / "out"
    fields = trained_with(given)
    if not (trained / "config.json").exists():
        start = place("baseline")
        if not (start.out / "config.json").exists():
            import_model(spec=BaselineSpec(uses="model", id="baseline", model=model), ctx=start)
        spec = FinetuneSpec(
            uses="finetune", id="t", **fields, max_steps=given.steps, eval_steps=max(given.steps // 6, 1)
        )
        print(finetune(as_artifact(start.out), spec=spec, ctx=place("trained")).summary)
    windows = encode(data, "eval", task, trained, given.work / "store")
    if task == "text-generation":
        whole = np.flatnonzero(windows.lengths() == windows.length)
        windows = windows.take(whole[np.linspace(0, len(whole) - 1, min(given.examples, len(whole))).astype(int)])
    network: Any = load(trained)
    weight = network.get_input_embeddings().weight.detach().clone()
    counts = count(encode(data, "train", task, trained, given.work / "store"), len(weight))
    tokens, whole_bytes = windows.length - 1, 4 * weight.numel()
    base = judge(network, windows, task)
    print(f"\n{len(windows)} examples; float32 {whole_bytes / 1000:.0f} kB, {shown(base, base, tokens, task)[0]}\n")
    print("| method | bytes | times smaller | quality | change [95 %] |\n| --- | --- | --- | --- | --- |", flush=True)
    curves: dict[str, list[tuple[int, float]]] = {}

    def row(name: str, bytes_: int, values: np.ndarray) -> None:
        text, change = shown(values, base, tokens, task)
        curves.setdefault(name.partition(" int")[0], []).append((bytes_, change))
        print(f"| {name} | {bytes_ / 1000:.1f} kB | {whole_bytes / max(bytes_, 1):.1f} | {text} |", flush=True)

    def replaced(name: str, made: torch.Tensor, bytes_: int) -> None:
        with torch.no_grad():
            network.get_input_embeddings().weight.copy_(made)
        row(name, bytes_, judge(network, windows, task))

    for bits in (8, 4, 2):
        replaced(
            f"uniform int{bits}", rounding.rounded(weight, bits), rounding.bytes_of(len(weight), weight.shape[1], bits)
        )
    peers = {"plain SVD": svd, "GroupReduce": group_reduce(weight, counts), "product quantization": product}
    peers["quotient-remainder hashing"] = hashed(weight, counts)
    training = {**fields, "max_steps": given.heal, "eval_steps": max(given.heal // 4, 1)}
    for ratio in given.ratios:
        budget = int(whole_bytes / ratio)
        for name, peer in peers.items():
            made, bytes_ = peer(weight, budget)
            if 0 < bytes_ <= budget:
                replaced(name, made, bytes_)
        ours: dict[str, dict[str, Any] | None] = {"bands": None}
        if given.heal:
            ours |= {"bands, healed": training, "bands, healed with the model": {**training, "trains": "model"}}
        for name, heal in ours.items():
            ctx = place(f"{ratio:g}x {name}".replace(" ", "-"))
            shutil.rmtree(ctx.checkpoints, ignore_errors=True)  # else it would go on from an earlier run
            spec = AdaptiveInputSpec.model_validate({"uses": "adaptive_input", "id": "a", "ratio": ratio, "heal": heal})
            result = adaptive_input(as_artifact(trained), spec=spec, ctx=ctx)
            row(name, result.properties["adaptive_input"]["bytes"], judge(load(ctx.out), windows, task))
    print("\n| lookup of 32 texts | time | against dense |\n| --- | --- | --- |")
    print("\n".join(lookups(given.work / f"{given.ratios[-1]:g}x-bands" / "out", weight, windows.length)))
    draw(
        curves, "change of perplexity, %" if task == "text-generation" else "points", given.work / "adaptive_input.png"
    )


if __name__ == "__main__":
    main()
