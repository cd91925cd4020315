"""Time of attention against its length, the error beside every time, in one run.

    python -m tests.bench.attention --work FOLDER [--peers FOLDER]
    python -m tests.bench.attention --work FOLDER --model FOLDER --text FILE [--layers 0 3]
    python -m tests.bench.attention --work FOLDER --memory

Heads 8, width 64, one sequence, ``--threads`` threads; medians, exact attention (SDPA) and its replacements in turn.
The data:

- clustered: keys and queries lie about the same centres, as many as there are buckets, which is favourable; the hash is
  fitted on another draw.
- captured: queries, keys and values of a trained model (``--model``, any folder that a step could take: a decoder
  trained at such lengths or with RoPE, or an encoder) on windows of a text. Each attention gets the parameters that the
  step's calibration chooses under ``--captured-bound``, from windows that it is not judged on, or is refused.
- gaussian: nothing is near anything. The audit must find that out and compute exactly.

``lsh`` looks into as few buckets as keep the bound of the table (``--bound``), else into the most tried. With
``--peers``, a folder made by ``pip install --no-deps --target FOLDER reformer-pytorch axial-positional-embedding
product-key-memory local-attention einops hyper-connections colt5-attention``, its LSH attention is timed too; queries
are its keys, so that its error is that against exact attention of the same kind. Prints tables in Markdown and draws
``attention.svg`` into ``--work``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from specs.schema.steps.attention import AttentionSpec
from tasks.attention import breakeven, kernel, swap
from tasks.attention.calibrate import choose
from tasks.attention.chunked import attend_in_chunks, draw_rotations
from tasks.attention.hashing import fit
from tasks.attention.lsh import Call, Hashed, attend
from tasks.attention.swap import Seen
from tasks.memory import peak

HEADS, WIDTH = 8, 64
WINDOWS = 4
PROBES = (1, 2, 4, 8, 16)
NOISE = 0.3


@dataclass(frozen=True)
class Given:
    """Queries, keys and values [1, H, L, D], and keys [H, N, D] on which the hash is fitted."""

    query: Tensor
    key: Tensor
    value: Tensor
    others: Tensor


def clustered(length: int, buckets: int, seed: int = 0) -> Given:
    """See the module; centres are 1.5 standard normals, what lies about them 0.3."""
    centres = 1.5 * torch.randn(HEADS, buckets, WIDTH, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        at = torch.randint(buckets, (HEADS, count, 1), generator=generator).expand(-1, -1, WIDTH)
        return centres.gather(1, at) + NOISE * torch.randn(HEADS, count, WIDTH, generator=generator)

    value = torch.randn(HEADS, length, WIDTH, generator=generator)
    return Given(draw(length)[None], draw(length)[None], value[None], draw(max(8192, 64 * buckets)))


def gaussian(length: int) -> Given:
    """See the module."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(3))
    return Given(query, key, value, torch.randn(HEADS, 8192, WIDTH, generator=generator))


def captured(model: Path, text: Path, length: int, layers: Sequence[int] | None) -> dict[str, list[Seen]]:
    """What each attention of a model is given on four windows of ``length`` tokens of a text, which is repeated where
    it is too short; two of them are to fit the hash, two to judge. Keys are as the model rotates them (RoPE)."""
    from tasks.models import load, load_tokenizer

    network: Any = load(model)
    written = text.read_text(encoding="utf-8")[: 8 * WINDOWS * length]
    ids = torch.tensor(load_tokenizer(model)(written)["input_ids"])
    ids = ids.repeat(-(-WINDOWS * length // len(ids)))[: WINDOWS * length]
    modules = swap.dispatching(network)
    kept = {name: module for at, (name, module) in enumerate(modules.items()) if layers is None or at in layers}
    names = {module: name for name, module in kept.items()}
    calls: dict[str, list[Seen]] = {name: [] for name in kept}

    def see(seen: Seen) -> None:
        if seen.module in names:
            calls[names[seen.module]].append(seen)

    with swap.watched(network, see):
        for window in ids.split(length):
            getattr(network, "base_model", network)(window[None])
    return calls


def chosen(calls: Sequence[Seen], bound: float, repeats: int) -> tuple[str, float | None, float]:
    """The cell of a table on one attention, milliseconds and error of what calibration chooses, its gain against SDPA,
    None where the bound is not kept, and the seconds of SDPA."""
    why = next((seen.obstacle for seen in calls if seen.obstacle), None) or swap.obstacle_of(calls[0].module)
    spec = AttentionSpec(uses="attention", id="bench")
    found = None if why else choose(spec, calls, bound, torch.Generator().manual_seed(0))
    seen = calls[-1]
    ways: dict[str, Callable[[], Tensor]] = {"exact": seen.exact}
    if found is not None and found.error <= bound:
        module = torch.nn.Module()
        swap.put(module, {name: value for name, value in found.settings.items() if name != "shapes"}, found.tensors)
        ways["lsh"] = lambda: swap.run(module.attention_swap, seen)
    seconds = {name: statistics.median(times) for name, times in in_turn(ways, repeats).items()}
    if found is None:
        return f"refused: {why}", None, seconds["exact"]
    form = f"{found.settings['probes']} of {found.tensors['table'].shape[1]} buckets"
    if "lsh" not in seconds:
        return f"refused: {found.error:.1%} at best ({form})", None, seconds["exact"]
    return (
        f"{1e3 * seconds['lsh']:.1f} ms, {form}, {found.error:.2%}",
        seconds["exact"] / seconds["lsh"],
        seconds["exact"],
    )


def on_model(given: argparse.Namespace, lines: dict[str, dict[int, float]]) -> None:
    """Print the table of what was captured from a model; the times of what keeps the bound go into ``lines``."""
    print(f"\ncaptured, error at most {given.captured_bound:.0%}\n")
    print("| length | attention | SDPA | lsh | against SDPA |\n| --- | --- | --- | --- | --- |")
    for length in given.lengths:
        try:
            taken = captured(given.model, given.text, length, given.layers)
        except IndexError as error:
            print(f"| {length} | | | the model does not read so many tokens: {error} | |", flush=True)
            return
        for name, calls in taken.items():
            cell, gain, exact = chosen(calls, given.captured_bound, given.repeats)
            faster = "" if gain is None else f"{gain:.2f}x"
            print(f"| {length} | {name} | {1e3 * exact:.1f} ms | {cell} | {faster} |", flush=True)
            if gain is not None:
                lines.setdefault(f"exact, {name}", {})[length] = exact
                lines.setdefault(f"lsh, {name}", {})[length] = exact / gain


def in_turn(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, one call after the other; what has taken 40 s is not called again."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            if sum(seconds[name]) < 40:
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclass(frozen=True)
class Row:
    """One line of a table: milliseconds, times faster than SDPA, and the relative error of the output."""

    length: int
    method: str
    seconds: float
    faster: float
    error: float


def rows(given: Given, causal: bool, buckets: int, bound: float, peers: bool, repeats: int) -> list[Row]:
    """Exact attention and its replacements on the same data."""
    length, scale = given.query.shape[2], given.query.shape[3] ** -0.5
    attention = torch.nn.functional.scaled_dot_product_attention
    gqa = given.query.shape[1] != given.key.shape[1]

    def exact() -> Tensor:
        return attention(given.query, given.key, given.value, is_causal=causal, scale=scale, enable_gqa=gqa).transpose(
            1, 2
        )

    expected = exact()
    hashed = fit("centroid", given.others, buckets, torch.Generator().manual_seed(0))
    call = Call(given.query, given.key, given.value, hashed, window=128 * causal, causal=causal, scale=scale)
    for probes in PROBES:
        call = replace(call, probes=probes)
        if far(attend(call)[0], expected) <= bound:
            break
    ways: dict[str, Callable[[], Tensor]] = {
        "exact (SDPA)": exact,
        f"lsh, {call.probes} of {buckets} buckets": lambda: attend(call)[0],
    }
    references = dict.fromkeys(ways, expected)
    if not causal:
        rotations = draw_rotations(given.key.shape[1], 4, WIDTH, max(2, length // 64), torch.Generator().manual_seed(0))
        rotations = rotations[:, :, : given.key.shape[3] + 1]
        ways["reformer, 4 rounds"] = lambda: attend_in_chunks(
            given.query, given.key, given.value, rotations, 64, None, scale
        )
        references["reformer, 4 rounds"] = expected
    if peers:
        for hashes in (4, 8):
            name = f"reformer-pytorch, {hashes} rounds"
            ways[name] = lambda hashes=hashes: _peer(given, causal, hashes)
            references[name] = _shared(given, causal)
    errors = {name: far(way(), references[name]) for name, way in ways.items()}
    medians = {name: statistics.median(found) for name, found in in_turn(ways, repeats).items()}
    base = medians["exact (SDPA)"]
    return [Row(length, name, found, base / found, errors[name]) for name, found in medians.items()]


def far(found: Tensor, expected: Tensor) -> float:
    """Relative error."""
    return float((found - expected).norm() / expected.norm())


def _peer(given: Given, causal: bool, hashes: int) -> Tensor:
    """reformer-pytorch's attention; one head after the other, for its memory."""
    from reformer_pytorch import LSHAttention  # type: ignore[import-not-found]

    torch.manual_seed(0)
    layer = LSHAttention(bucket_size=64, n_hashes=hashes, causal=causal)
    outs = [layer(query[None], value[None])[0] for query, value in zip(given.query[0], given.value[0], strict=True)]
    return torch.stack([out[0] for out in outs])[None].transpose(1, 2)


def _shared(given: Given, causal: bool) -> Tensor:
    """Exact attention whose keys are the queries, made equally long; a token sees itself only where it is alone."""
    key = torch.nn.functional.normalize(given.query, dim=-1)
    outs = []
    for head in range(HEADS):
        parts = []
        for at in range(0, key.shape[2], 1024):
            scores = given.query[0, head, at : at + 1024] @ key[0, head].T * WIDTH**-0.5
            place = torch.arange(at, at + len(scores))
            if causal:
                scores = scores.masked_fill(torch.arange(key.shape[2])[None] > place[:, None], -torch.inf)
            scores[torch.arange(len(scores)), place] = -5e4
            parts.append(scores.softmax(-1) @ given.value[0, head])
        outs.append(torch.cat(parts))
    return torch.stack(outs)[None].transpose(1, 2)


def audited(length: int, buckets: int) -> str:
    """What a swapped module does with Gaussian data: the line of a table."""
    given = gaussian(length)
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    hashed = fit("centroid", given.others, buckets, torch.Generator().manual_seed(0))
    settings = {"method": "lsh", "probes": 4, "window": 0, "band": 0, "residual": True, "min_length": 0, "limit": 0.04}
    swap.put(module, settings, swap.tensors_of(hashed))
    expected = torch.nn.functional.scaled_dot_product_attention(given.query, given.key, given.value).transpose(1, 2)
    blind = Call(given.query, given.key, given.value, hashed, probes=4, scale=WIDTH**-0.5)
    started = time.perf_counter()
    out = swap.attention(module, given.query, given.key, given.value, None)[0]
    seconds = time.perf_counter() - started
    heads = module.attention_swap.counts["exact: heads that the audit found wrong"]  # type: ignore[union-attr]
    return (
        f"| {length} | {1e3 * seconds:.0f} ms | {heads} of {HEADS} | {far(out, expected):.2%} | "
        f"{far(attend(blind)[0], expected):.0%} |"
    )


WAYS = ("lsh", "flash", "math")
"""Buckets, and torch's two ways to compute exact attention: in blocks, and with all scores kept."""


def training_peak(way: str, length: int) -> None:
    """Print by how many MB a forward and a backward pass of causal attention raise the memory of this process."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    buckets = 64
    given = clustered(length, buckets)
    query, key, value = (tensor.requires_grad_() for tensor in (given.query, given.key, given.value))
    table = given.others[:, :buckets].detach().clone()  # a fit would raise the peak before the clock starts
    hashed = Hashed(table, -table.pow(2).sum(-1) / 2, torch.zeros(HEADS, buckets))
    call = Call(query, key, value, hashed, window=128, causal=True, scale=WIDTH**-0.5)
    kernel.library()  # built and loaded before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew from what is resident
    before = peak()
    with torch.enable_grad():
        if way == "lsh":
            out = attend(call)[0]
        else:
            with sdpa_kernel({"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}[way]):
                out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out.sum().backward()
    print(round((peak() - before) / 2**20))


def memory(lengths: Sequence[int]) -> str:
    """A table of ``training_peak``, each in a process of its own; "-" where the scores alone would take more than half
    of what memory is free."""
    lines = [f"| length | {' | '.join(WAYS)} |", "| --- | --- | --- | --- |"]
    module = (sys.executable, "-m", "tests.bench.attention", "--work", ".")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back, not used anew unseen
    for length in lengths:
        cells = []
        for way in WAYS:
            if way == "math" and 3 * 4 * HEADS * length**2 > psutil.virtual_memory().available / 2:
                cells.append("-")
                continue
            command = [*module, "--peak", way, "--lengths", str(length)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            cells.append(f"{done.stdout.strip()} MB")
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(found: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| length | method | a call | against SDPA | error |", "| --- | --- | --- | --- | --- |"]
    for row in found:
        lines.append(
            f"| {row.length} | {row.method} | {1e3 * row.seconds:.1f} ms | {row.faster:.2f}x | {row.error:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bound", type=float, default=0.01)
    parser.add_argument("--causal-bound", type=float, default=0.02)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--captured-bound", type=float, default=0.05)
    parser.add_argument("--model", type=Path, help="only what is captured from this model on the text --text")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of attentions; default: all")
    parser.add_argument("--memory", action="store_true", help="only the memory of a training step, no times")
    parser.add_argument("--peak", choices=WAYS, help="for a process that ``memory`` starts")
    given = parser.parse_args()
    if (given.model is None) != (given.text is None):
        parser.error("--model and --text go together")
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    if given.peak is not None:
        training_peak(given.peak, given.lengths[0])
        return
    if given.memory:
        print(memory(given.lengths))
        return
    torch.set_grad_enabled(False)
    if given.peers is not None:
        sys.path.insert(0, str(given.peers))
    lines: dict[str, dict[int, float]] = {}
    for causal in () if given.model is not None else (False, True):
        found: list[Row] = []
        for length in given.lengths:
            buckets = max(64, round(64 * (length / 4096) ** 0.5 / 16) * 16)
            bound = given.causal_bound if causal else given.bound
            part = rows(clustered(length, buckets), causal, buckets, bound, given.peers is not None, given.repeats)
            print(table(part), file=sys.stderr, flush=True)
            found += part
        print(f"\nclustered, {'causal' if causal else 'not causal'}\n\n{table(found)}", flush=True)
        for row in found:
            name = f"{row.method.split(',')[0]}{', causal' if causal else ''}"
            lines.setdefault(name, {}).setdefault(row.length, row.seconds)
    if given.model is None:
        print("\ngaussian\n\n| length | a call | heads computed anew | error | error without the audit |")
        print("| --- | --- | --- | --- | --- |")
        for length in given.lengths[:3]:
            print(audited(length, 64), flush=True)
    if given.model is not None:
        on_model(given, lines)
    for name, content in breakeven.draw(lines).items():
        (given.work / name).write_bytes(content)


if __name__ == "__main__":
    main()
