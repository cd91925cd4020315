"""A student and a teacher of different vocabularies: what is the same is compared, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specs.schema.pipeline import DataSpec
from specs.schema.steps.distill import DistillSpec
from specs.schema.steps.prune import PruneSpec
from tasks.compress import heard, kept
from tasks.compress.distill import distill
from tasks.compress.prune import prune
from tasks.compress.teach import Comparison, Teaching
from tasks.compress.vocabularies import align
from tasks.context import StepError
from tasks.data import encode
from tasks.finetune.batches import Batches
from tasks.models import family_of, load
from tests.support import TASKS_OF, as_artifact, context, tiny_data, tiny_model

FAST = {"max_steps": 2, "batch_size": 8, "validation": 0.2, "eval_steps": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def spec(**fields: Any) -> DistillSpec:
    return DistillSpec(**{"uses": "distill", "id": "s", "teacher": "t", **FAST, **fields})


def task_of(kind: str) -> Any:
    return TASKS_OF.get(kind, "text-generation")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, DataSpec]]:
    """By kind a teacher, the same model with the tokens of the data alone, and the data."""
    root = tmp_path_factory.mktemp("pruned")
    found = {}
    for kind in ("llama", "marian"):
        data = tiny_data(root / kind / "data", task_of(kind), train=16, eval=2)
        teacher = tiny_model(root / kind / "teacher", kind, task_of(kind))  # type: ignore[arg-type]
        ctx = context(root / kind, task_of(kind), data)
        prune(as_artifact(teacher), spec=PruneSpec(uses="prune", id="p", method="vocabulary"), ctx=ctx)
        found[kind] = (teacher, ctx.out, data)
    return found


@pytest.mark.parametrize("kind", ["llama", "marian"])
def test_a_model_that_lost_unused_tokens_says_what_its_teacher_says_of_the_others(tmp_path, pruned, kind):
    """No token has its number, and of those that both have the shares are the same: the divergence is 0."""
    teacher, student, data = pruned[kind]
    ctx = context(tmp_path, task_of(kind), data)
    both = [load(folder) for folder in (teacher, student)]
    rows = encode(data, "train", ctx.task, student, ctx.store)
    aligned = align(student, teacher, rows, spec(), ctx)
    assert aligned.data is None
    assert aligned.writes is not None
    sizes = [model.config.vocab_size for model in both]
    assert len(aligned.writes) == sizes[1] < sizes[0]
    how = Comparison(
        ctx.task,
        family_of(both[0].config),
        alpha=0.0,
        top_k=8,
        order=torch.as_tensor(aligned.writes),
        reads=None if aligned.reads is None else torch.as_tensor(aligned.reads),
    )
    batch = Batches(rows, 0.0, 4, 0, "cpu").tensors(np.arange(4))
    with torch.no_grad():
        live, units = Teaching(how, both[0])(both[1], batch)
        said = heard.listen(both[0], {}, rows, how, 4, ctx)
        stored, _ = Teaching(how, None)(both[1], {**batch, **heard.beside(said, np.arange(4), "cpu")})
        other, _ = Teaching(how, both[0])(load(student).requires_grad_(False).train(False), batch)
    assert units > 0
    assert abs(float(live)) < 1e-4 * float(units)
    assert abs(float(stored)) < 1e-4 * float(units)
    assert torch.equal(live, other)
    with torch.no_grad():  # and it is not 0 for everything
        weights = both[1].get_output_embeddings().weight
        weights.copy_(weights.flip(0))
        assert float(Teaching(how, both[0])(both[1], batch)[0]) > 1e-3 * float(units)


@pytest.mark.parametrize("kind", ["llama", "marian"])
def test_the_step_teaches_it(tmp_path, pruned, kind):
    teacher, student, data = pruned[kind]
    ctx = context(tmp_path, task_of(kind), data)
    fields = {"on_policy": {"share": 0.5}, "hidden": {}} if kind == "llama" else {}
    result = distill(as_artifact(student), as_artifact(teacher), spec=spec(**fields), ctx=ctx)
    size = load(student).config.vocab_size
    assert f"{size} of the teacher's tokens are compared" in result.summary
    assert load(ctx.out).config.vocab_size == size


def test_of_a_text_each_reads_its_own_tokens(tmp_path):
    """A label is a label whatever the tokens: the teacher's word is that on its own reading of the text."""
    data = tiny_data(tmp_path / "data", "text-classification", train=16, eval=2)
    teacher = tiny_model(tmp_path / "teacher", "bert", "text-classification")
    student = tiny_model(tmp_path / "student", "bert", "text-classification", vocab_size=300)
    ctx = context(tmp_path / "run", "text-classification", data)
    rows = encode(data, "train", ctx.task, student, ctx.store)
    aligned = align(student, teacher, rows, spec(), ctx)
    assert aligned.data is not None
    assert not np.array_equal(aligned.data.lengths(), rows.lengths())
    result = distill(as_artifact(student), as_artifact(teacher), spec=spec(), ctx=ctx)
    assert "each reads by its own tokenizer" in result.summary
    how = Comparison(ctx.task, "encoder", top_k=64)
    said = heard.listen(load(teacher), kept.identity(teacher), aligned.data, how, 8, ctx)
    own = encode(data, "train", ctx.task, teacher, ctx.store)
    batch = Batches(own, 0.0, 4, 0, "cpu").tensors(np.arange(4))
    with torch.no_grad():
        logits = load(teacher)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = heard.beside(said, np.arange(4), "cpu")["teacher_logs"]
    assert torch.allclose(found, torch.log_softmax(logits / 2, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden": {}}, "hidden and relations compare token with token"),
        ({"augment": {"copies": 1}}, "augment gives the teacher the student's tokens"),
        ({"cache": False}, "leave cache out"),
    ],
)
def test_what_needs_the_same_tokens_is_refused(tmp_path, bert, review_data, fields, reason):
    strange = tiny_model(tmp_path / "strange", "bert", "text-classification", vocab_size=300)
    ctx = context(tmp_path, "text-classification", review_data)
    with pytest.raises(StepError, match=rf"vocabulary \(300 tokens\) is not the teacher's \(320.*{reason}"):
        distill(as_artifact(strange), as_artifact(bert), spec=spec(**fields), ctx=ctx)
    assert list(ctx.out.iterdir()) == []


def test_texts_that_are_cut_otherwise_cannot_be_compared(tmp_path, pruned):
    teacher, student, data = pruned["llama"]
    ctx = context(tmp_path, "text-generation", data)
    other = tiny_model(tmp_path / "other", "llama", "text-generation", vocab_size=300)
    for model, reason in (
        ((other, teacher), "cut the training data into different tokens|the teacher has not"),
        ((teacher, student), r"of its tokens the teacher has not \("),
    ):
        with pytest.raises(StepError, match=reason):
            distill(*map(as_artifact, model), spec=spec(), ctx=ctx)
    with pytest.raises(StepError, match="the teacher would write tokens that the student has not"):
        distill(as_artifact(student), as_artifact(teacher), spec=spec(data="teacher-generated"), ctx=ctx)
    (tmp_path / "more.txt").write_text("some text")
    with pytest.raises(StepError, match="leave unlabelled out"):
        distill(as_artifact(student), as_artifact(teacher), spec=spec(unlabelled=str(tmp_path / "more.txt")), ctx=ctx)
