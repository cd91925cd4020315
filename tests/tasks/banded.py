"""Tables in bands, made by the step of tiny models of every family."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from tasks.adaptive_input.adaptive_input import adaptive_input
from tasks.data import encode
from tasks.finetune.objective import task_loss
from tasks.models import load as load_module
from tests.support import TASKS_OF, as_artifact, context


def load(folder: Path) -> Any:
    return load_module(folder)


def task_of(family):
    return TASKS_OF.get(family, "text-generation")


def data_of(request, family):
    names = {"translation": "pair_data", "speech-recognition": "speech_data", "text-classification": "review_data"}
    return request.getfixturevalue(names.get(task_of(family), "text_data")).model_copy(update={"train_limit": 24})


def spec_of(**fields: Any) -> AdaptiveInputSpec:
    defaults = {"uses": "adaptive_input", "id": "a", "bits": (16, 4, 1), "bands": 3}
    return AdaptiveInputSpec.model_validate(defaults | fields)


def run(request, folder, family, **fields):
    """The context and the result of the step."""
    ctx = context(folder, task_of(family), data_of(request, family))
    model = as_artifact(request.getfixturevalue(family))
    return ctx, adaptive_input(model, spec=spec_of(**fields), ctx=ctx)


def loss_of(folder, ctx):
    """The loss of the model in ``folder`` on the evaluation data."""
    data = encode(ctx.data, "eval", ctx.task, folder, ctx.store)
    batch = {
        "input_ids": torch.from_numpy(np.array(data.input_ids, np.int64)),
        "attention_mask": torch.from_numpy(np.array(data.attention_mask, np.int64)),
    }
    with torch.inference_mode():
        total, weight = task_loss(ctx.task)(load(folder), batch)
    return float(total / weight)
