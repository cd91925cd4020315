"""Teachers of every application, and distilling from them."""

from specs.schema.steps.distill import DistillSpec
from tasks.compress.distill import distill
from tests.support import as_artifact, context, tiny_data, tiny_model

CASES = {
    "llama": "text-generation",
    "bert": "text-classification",
    "marian": "translation",
    "whisper": "speech-recognition",
    "wav2vec2": "speech-recognition",
}
KEPT = {"epochs": 2, "top_k": 8, "validation": 0}
FAST = {"max_steps": 3, "batch_size": 8, "validation": 0.2, "learning_rate": 1e-3, "eval_steps": 2}


def teachers(root):
    """Teacher folder and data of each kind, in the folder ``root``."""
    found = {}
    for kind, task in CASES.items():
        data = tiny_data(root / kind / "data", task, train=24, eval=4)
        found[kind] = (tiny_model(root / kind / "teacher", kind, task), data)
    return found


def spec_of(**fields):
    return DistillSpec(**{"uses": "distill", "id": "s", "teacher": "t", **FAST, **fields})


def distilled(folder, made, kind, taught=None, **fields):
    teacher, data = made[kind]
    events = []
    ctx = context(folder, CASES[kind], data, emit=events.append)
    inputs = [as_artifact(path) for path in (taught, teacher) if path is not None]
    return distill(*inputs, spec=spec_of(**fields), ctx=ctx), ctx, events


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()
