"""A model that structured pruning has made smaller is an ordinary one to the exports too."""

from __future__ import annotations

import numpy as np
import torch

from specs.schema.steps.prune import PruneSpec
from tasks.compress.prune import prune
from tasks.export.tflite import export_tflite
from tasks.models import load
from tests.support import as_artifact, context
from tests.tasks import exported


def test_a_narrower_and_shallower_model_gives_in_litert_what_it_gives_in_torch(tmp_path):
    """Heads with their groups and channels go, then a block: the file has what is left and no more."""
    like = exported.context("llama", "examples")
    folder = exported.model("llama")
    for name, fields in {"width": {"parts": ("heads", "ffn")}, "depth": {}}.items():
        ctx = context(tmp_path / name, "text-generation", like.data, store=like.store)
        spec = PruneSpec(uses="prune", id="p", method=name, keep="50%", calibration_examples=4, **fields)
        prune(as_artifact(folder), spec=spec, ctx=ctx)
        folder = ctx.out
    small = load(folder)
    assert (small.config.num_key_value_heads, small.config.num_hidden_layers) == (1, 1)
    ctx = context(tmp_path / "export", "text-generation", like.data, store=like.store, threads=2)
    export_tflite(as_artifact(folder), spec=exported.spec("float32", generation=False), ctx=ctx)
    assert (ctx.out / "model.tflite").stat().st_size < 1.5 * (folder / "model.safetensors").stat().st_size
    ids, mask = exported.examples("llama")
    with torch.inference_mode():
        expected = small(input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()).logits
    real = mask > 0
    given = exported.lite_logits(ctx.out, ids, mask)[real]
    wanted = expected.numpy()[real]
    assert np.abs(given - wanted).max() <= 1e-4 * wanted.std()
