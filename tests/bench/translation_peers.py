"""Speed and BLEU of one translation model in torch, in LiteRT and in CTranslate2, each in a process of its own, one
after the other.

    python -m pip install ctranslate2
    python -m tests.bench.translation_peers --model MODEL_FOLDER --export EXPORT_FOLDER --data test.jsonl

``MODEL_FOLDER`` and ``EXPORT_FOLDER`` are artifacts of a run (`lathe cache ls` names them). Every sentence is
translated alone and greedily, by every engine on one thread and on ``--threads``; the sentences are gone through
``--repeats`` times, and the median of the rounds counts, against that of the faster torch. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ENGINES = ("torch float32", "LiteRT (export)", "CTranslate2 float32", "CTranslate2 int8")

Translate = Callable[[list[int]], list[int]]
"""Ids of a sentence, its end mark included, to ids of its translation."""


def torch_translator(folder: Path, threads: int, limit: int) -> tuple[Translate, int]:
    """transformers' own greedy search."""
    import torch

    from tasks.evaluate.torch_runners import TorchSeq2Seq
    from tasks.models import load

    torch.set_num_threads(threads)
    runner = TorchSeq2Seq(load(folder), "cpu")
    return _by_runner(runner, limit), (folder / "model.safetensors").stat().st_size


def litert_translator(folder: Path, threads: int, limit: int) -> tuple[Translate, int]:
    """The exported file."""
    from tasks.export.runtime import open_export

    return _by_runner(open_export(folder, threads), limit), (folder / "model.tflite").stat().st_size


def ctranslate2_translator(folder: Path, precision: str, threads: int, limit: int, out: Path) -> tuple[Translate, int]:
    """CTranslate2's conversion of the same folder."""
    import ctranslate2
    from ctranslate2.converters import transformers as converters

    class Loader(converters.MarianMTLoader):
        """Marian as transformers trains it: with a padding token that has an embedding, and a decoder that starts
        with it. CTranslate2's own loader expects the original layout, in which it has none."""

        def get_model_spec(self, model: Any) -> Any:
            model.config.normalize_before = model.config.normalize_embedding = False
            return converters.BartLoader.get_model_spec(self, model)

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            config.eos_token, config.unk_token = tokenizer.eos_token, tokenizer.unk_token
            config.decoder_start_token = tokenizer.convert_ids_to_tokens(model.config.decoder_start_token_id)

        def set_decoder(self, spec: Any, decoder: Any) -> None:
            converters.BartLoader.set_decoder(self, spec, decoder)

        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            return converters.BartLoader.get_vocabulary(self, model, tokenizer)

    converters._MODEL_LOADERS["MarianConfig"] = Loader()
    converters.TransformersConverter(str(folder)).convert(str(out), quantization=precision, force=True)
    engine = ctranslate2.Translator(str(out), device="cpu", inter_threads=1, intra_threads=threads)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = vocabulary | {entry["content"]: entry["id"] for entry in added}
    names = {number: token for token, number in ids.items()}

    def translate(sentence: list[int]) -> list[int]:
        tokens = [names[number] for number in sentence]
        found = engine.translate_batch([tokens], beam_size=1, max_decoding_length=limit)
        return [ids[token] for token in found[0].hypotheses[0]]

    return translate, (out / "model.bin").stat().st_size


def _by_runner(runner: Any, limit: int) -> Translate:
    def translate(sentence: list[int]) -> list[int]:
        ids = np.array([sentence], np.int32)
        return runner.write({"input_ids": ids, "attention_mask": np.ones_like(ids)}, limit)[0]

    return translate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="jsonl with source and target")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=60, help="tokens to write at most")
    given = parser.parse_args()

    import sacrebleu
    from tokenizers import Tokenizer

    rows = [json.loads(line) for line in given.data.read_text(encoding="utf-8").splitlines()][: given.sentences]
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    sentences = [encoding.ids for encoding in tokenizer.encode_batch([row["source"] for row in rows])]
    found = []
    for name, threads in [(name, threads) for name in ENGINES for threads in sorted({1, given.threads})]:
        print(f"  {name}, threads: {threads}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # one engine's threads spin a while
            measured = process.submit(
                _measure, name, given.model, given.export, sentences, given.repeats, threads, given.limit
            )
            found.append((name, threads, *measured.result()))
    reference = min(seconds for name, _, seconds, _, _ in found if name.startswith("torch"))
    print("| engine | threads | size | a sentence (median) | against torch | BLEU |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, threads, seconds, size, written in found:
        score = sacrebleu.corpus_bleu([tokenizer.decode(ids) for ids in written], [[r["target"] for r in rows]])
        cells = (name, str(threads), f"{size / 1e6:.2f} MB", f"{1e3 * seconds:.2f} ms", f"{reference / seconds:.1f}x")
        print(f"| {' | '.join(cells)} | {score.score:.1f} |", flush=True)


def _measure(
    name: str, model: Path, export: Path, sentences: list[list[int]], repeats: int, threads: int, limit: int
) -> tuple[float, int, list[list[int]]]:
    """Seconds of a sentence (the median of the rounds), bytes of the file, and what was written."""
    with tempfile.TemporaryDirectory() as scratch:
        if name == "torch float32":
            translate, size = torch_translator(model, threads, limit)
        elif name == "LiteRT (export)":
            translate, size = litert_translator(export, threads, limit)
        else:
            precision = name.rpartition(" ")[2]
            translate, size = ctranslate2_translator(model, precision, threads, limit, Path(scratch))
        rounds: list[float] = []
        written: list[list[int]] = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            written = [translate(sentence) for sentence in sentences]
            rounds.append((time.perf_counter() - began) / len(sentences))
    return statistics.median(rounds[1:]), size, written  # the first round warms up


if __name__ == "__main__":
    main()
