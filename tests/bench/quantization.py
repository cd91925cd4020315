"""Perplexity and bytes of a small trained decoder in few bits: algorithms, groups, and mixed against uniform bits.

    python -m tests.bench.quantization --data NOVELS_FOLDER --work FOLDER

``NOVELS_FOLDER`` has ``train`` and ``valid`` with plain texts. A decoder of 0.9 M weights is trained on the former
(kept in ``--work`` for the next time), quantized by the step itself, and judged on windows of the latter. The intervals
are of the change of perplexity against the float model: a paired bootstrap over the windows. What is mixed is also held
against the uniform bits of the same bytes, window by window, and against filling the budget with 8 bits in the order of
the layers. Everything is computed in one run; nothing of it is random but the seed's choice. Prints tables in Markdown,
and progress on stderr. ``--quick`` shows that all of it runs, on a model that has learned next to nothing: no evidence.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.quantize import QuantizeSpec
from tasks.compress.few_bits import fixed_bytes, stored_bytes
from tasks.compress.packing import pack_weights
from tasks.compress.quantize import quantize, weight_bytes
from tasks.compress.selection import rows_of, select
from tasks.data import encode
from tasks.data.encoded import Encoded
from tasks.finetune.finetune import finetune
from tasks.models import load, save
from tasks.models.origin import import_model
from tests.bench.common import teller
from tests.support import as_artifact, context

MODEL = ModelSpec(
    config={
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)

UNIFORM: dict[str, dict[str, Any]] = {
    "int8-dynamic": {},
    "int8-dynamic, smoothquant": {"algorithm": "smoothquant"},
    "int8-static": {"precision": "int8-static"},
    "int8-static, smoothquant": {"precision": "int8-static", "algorithm": "smoothquant"},
    "int8": {"precision": "int8"},
    "int4, groups of 32, rtn": {"precision": "int4"},
    "int4, groups of 32, gptq": {"precision": "int4", "algorithm": "gptq"},
    "int4, groups of 32, awq": {"precision": "int4", "algorithm": "awq"},
    "int4, per row, rtn": {"precision": "int4", "group_size": "per-row"},
    "int4, per row, gptq": {"precision": "int4", "group_size": "per-row", "algorithm": "gptq"},
    "int4, per row, gptq, act_order": {
        "precision": "int4",
        "group_size": "per-row",
        "algorithm": "gptq",
        "act_order": True,
    },
    "int4, per row, awq": {"precision": "int4", "group_size": "per-row", "algorithm": "awq"},
}


def losses(folder: Path, data: Encoded) -> tuple[np.ndarray, int]:
    """The summed negative log-likelihood of each window, and the tokens of a window."""
    return losses_of(load(folder), data)


def losses_of(model: Any, data: Encoded) -> tuple[np.ndarray, int]:
    """The same of a loaded model."""
    import torch
    from torch.nn.functional import cross_entropy

    ids = torch.from_numpy(np.asarray(data.input_ids)).long()
    found = []
    with torch.inference_mode():
        for part in ids.split(16):
            logits = model(input_ids=part).logits[:, :-1]
            loss = cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
            found.append(loss.sum(1).double().numpy())
    return np.concatenate(found), ids.shape[1] - 1


def row(name: str, size: int, ours: np.ndarray, theirs: np.ndarray, tokens: int, seconds: float) -> str:
    """A row of the table; the interval is that of the ratio of perplexities."""
    perplexity = np.exp(ours.mean() / tokens)
    return f"| {name} | {size / 1000:.0f} kB | {perplexity:.3f} | {change(ours, theirs, tokens)} | {seconds:.0f} s |"


def change(ours: np.ndarray, theirs: np.ndarray, tokens: int) -> str:
    """By how much a perplexity is above another one, with its interval."""
    count = len(ours)
    drawn = np.random.default_rng(0).integers(0, count, (2000, count))
    ratios = np.exp((ours - theirs)[drawn].mean(1) / tokens) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    return f"{np.exp((ours - theirs).mean() / tokens) - 1:+.2%} [{low:+.2%}, {high:+.2%}]"


def in_order(folder: Path, out: Path, budget: int) -> None:
    """The heuristic beside ``mixed``: 8 bits from the first layer on for as long as they fit, 4 behind them."""
    spec = QuantizeSpec(uses="quantize", id="q", mixed={"budget": budget})  # type: ignore[arg-type]
    network = load(folder)
    selection = select(network)
    sizes = {
        names[0]: [stored_bytes(spec, rows_of(network, selection, names[0]), bits) for bits in (4, 8)]
        for names in selection.units.values()
    }
    left = budget - fixed_bytes(network, selection) - sum(small for small, _ in sizes.values())
    bits = dict.fromkeys(sizes, 4)
    for name, (small, large) in sizes.items():
        if large - small <= left:
            bits[name], left = 8, left - (large - small)
    every = {name: bits[names[0]] for names in selection.units.values() for name in names}
    network, entry = pack_weights(network, selection, every, {4: spec.group(4), 8: spec.group(8)})
    save(network, out, tokenizer_from=folder, transforms=[entry])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250, help="optimiser steps of the training")
    parser.add_argument("--windows", type=int, default=200, help="windows of 64 tokens that judge")
    parser.add_argument("--train-only", action="store_true", help="stop behind the training")
    parser.add_argument("--quick", action="store_true", help="20 steps, 20 windows")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.windows, given.work = 20, 20, given.work / "quick"
    folder = given.data.absolute()
    data = DataSpec(train=str(folder / "train"), eval=str(folder / "valid"), max_length=64)

    def place(name: str) -> Any:
        ctx = context(given.work / name.replace(" ", "_"), "text-generation", data, MODEL)
        return dataclasses.replace(ctx, store=given.work / "store", emit=teller(name))

    trained = given.work / "trained" / "out"
    if not (trained / "config.json").exists():
        start = place("baseline")
        if not (start.out / "config.json").exists():
            import_model(spec=BaselineSpec(uses="model", id="baseline", model=MODEL), ctx=start)
        fields: Mapping[str, Any] = {"max_steps": given.steps, "batch_size": 16, "learning_rate": 3e-3}
        spec = FinetuneSpec(uses="finetune", id="t", validation=0.005, eval_steps=125, **fields)
        print(finetune(as_artifact(start.out), spec=spec, ctx=place("trained")).summary, flush=True)
    if given.train_only:
        return
    windows = encode(data, "eval", "text-generation", trained, given.work / "store")
    whole = np.flatnonzero(windows.lengths() == windows.length)  # evenly over the whole text
    windows = windows.take(whole[np.linspace(0, len(whole) - 1, min(given.windows, len(whole))).astype(int)])
    float_losses, tokens = losses(trained, windows)
    print(f"\n{len(windows)} windows of {tokens + 1} tokens; float32, {weight_bytes(trained) / 1000:.0f} kB, ", end="")
    print(f"perplexity {np.exp(float_losses.mean() / tokens):.3f}\n")
    print("| weights | file | perplexity | against float32 [95 %] | step took |\n| --- | --- | --- | --- | --- |")

    every: dict[str, np.ndarray] = {}

    def judge(name: str, fields: Mapping[str, Any]) -> int:
        ctx, started = place(name), time.monotonic()
        quantize(as_artifact(trained), spec=QuantizeSpec(uses="quantize", id="q", **fields), ctx=ctx)
        size, spent = weight_bytes(ctx.out), time.monotonic() - started
        every[name] = losses(ctx.out, windows)[0]
        print(row(name, size, every[name], float_losses, tokens, spent), flush=True)
        return size

    sizes = {name: judge(name, fields) for name, fields in UNIFORM.items()}
    middle = (sizes["int4, groups of 32, rtn"] + sizes["int8"]) // 2
    budgets = {"int4 g32": sizes["int4, groups of 32, rtn"], "the middle": middle, "int8": sizes["int8"]}
    for what, budget in budgets.items():
        group = "per-row" if what == "int4 g32" else None
        judge(f"mixed, bytes of {what}", {"mixed": {"budget": budget}, "group_size": group})
    fields = {"mixed": {"budget": budgets["int4 g32"]}, "group_size": "per-row", "algorithm": "gptq"}
    judge("mixed, gptq, bytes of int4 g32", fields)
    out = place("in order").out
    in_order(trained, out, middle)
    name = "8 bits in order, then 4, bytes of the middle"
    every[name] = losses(out, windows)[0]
    print(row(name, weight_bytes(out), every[name], float_losses, tokens, 0), flush=True)
    training = {"max_steps": 50, "batch_size": 16, "learning_rate": 3e-4, "validation": 0.01, "eval_steps": 25}
    judge("int4, per row, trained 50 steps", {"precision": "int4", "group_size": "per-row", "train": training})
    judge("mixed, bytes of the middle, trained 50 steps", {"mixed": {"budget": middle}, "train": training})
    print("\n| mixed | beside | perplexity against it [95 %] |\n| --- | --- | --- |")
    pairs = {
        "mixed, bytes of int4 g32": "int4, groups of 32, rtn",
        "mixed, gptq, bytes of int4 g32": "int4, groups of 32, gptq",
        "mixed, bytes of the middle": name,
        "mixed, bytes of int8": "int8",
    }
    for ours, theirs in pairs.items():
        print(f"| {ours} | {theirs} | {change(every[ours], every[theirs], tokens)} |")


if __name__ == "__main__":
    main()
