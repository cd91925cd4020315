"""Distillation on a teacher that has learned something: it helps, and what it is cut from matters."""

import numpy as np
import pytest
import torch

from specs.schema.steps.distill import StudentSpec
from specs.schema.steps.finetune import TrainingSpec
from tasks.compress.reading import reader
from tasks.compress.student import apply, build, importance, plan
from tasks.compress.teach import Comparison, Teaching
from tasks.finetune.batches import Batches
from tasks.finetune.loop import train
from tasks.finetune.objective import task_loss
from tests.tasks import tiny

SHAPE = StudentSpec(layers=1, hidden=16, ffn=32)
RATE = {"learning_rate": 5e-3, "batch_size": 32, "validation": 0.0, "save_every": 1000.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def _loss(model, data) -> float:
    batches = Batches(data, 0.0, 64, 0, "cpu")
    with torch.no_grad():
        total, weight = task_loss("text-generation")(model, batches.tensors(np.arange(len(data))))
    return float(total / weight)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A language model that has learned a language of few rules from much text, little text, and text to judge by."""
    teacher = tiny.network("llama")
    ctx = tiny.context(tmp_path_factory.mktemp("teacher"))
    train(teacher, tiny.language(1024), TrainingSpec(max_steps=160, **RATE), ctx)
    return teacher, tiny.language(48, seed=1), tiny.language(128, seed=2)


def test_a_teacher_helps_where_there_is_little_data(tmp_path, taught):
    """The same student, data and steps: with the teacher's word the loss on other text is clearly lower."""
    teacher, data, judge = taught
    found = {}
    start = build(teacher, SHAPE, data)
    for name, alpha in (("alone", 1.0), ("taught", 0.0)):
        student = build(teacher, SHAPE, data)
        loss = Teaching(Comparison("text-generation", "decoder", alpha=alpha, temperature=1.0), teacher)
        train(student, data, TrainingSpec(max_steps=60, **RATE), tiny.context(tmp_path / name), loss=loss)
        found[name] = _loss(student, judge)
    assert _loss(teacher, judge) < found["taught"] < found["alone"] - 0.1, found
    assert found["taught"] < _loss(start, judge) - 0.5


def test_what_matters_is_the_better_part_of_the_teacher(taught):
    """Of the same sizes the student of the channels with large activations is nearer to the teacher than the first
    channels."""
    teacher, data, judge = taught
    spec = StudentSpec(hidden=24, heads=4)
    kept = {name: apply(teacher, plan(teacher, spec, scores)) for name, scores in _scores(teacher, data).items()}
    found = {name: _loss(student, judge) for name, student in kept.items()}
    assert _loss(teacher, judge) <= found["activations"] < found["first"], found


def _scores(teacher, data):
    return {"activations": importance(teacher, data), "first": {}}


def test_on_policy_learns_what_the_student_itself_writes(tmp_path, taught):
    """What the student writes is likelier to the teacher than before, although no text of the data was learned."""
    from tasks.compress.written import own_batches

    teacher, data, _ = taught
    student = build(teacher, SHAPE, data)
    own = own_batches("text-generation", 1.0)

    def judged() -> float:
        torch.manual_seed(0)
        batch = own(student, Batches(data, 0.0, 48, 0, "cpu").tensors(np.arange(48)))
        with torch.no_grad():
            reading = reader("text-generation", "decoder")(teacher, batch)
        assert reading.labels is not None
        return float(torch.nn.functional.cross_entropy(reading.logits, reading.labels))

    before = judged()
    how = Comparison("text-generation", "decoder", alpha=0.0, temperature=1.0, kind="reverse")
    loss = Teaching(how, teacher, write=own, write_share=1.0)
    train(student, data, TrainingSpec(max_steps=40, **RATE), tiny.context(tmp_path), loss=loss)
    assert judged() < before - 0.3


def test_inner_losses_bring_the_insides_together(tmp_path, taught):
    from tasks.compress.teach import PROJECTIONS, add_projections, plan_inside

    teacher, data, _ = taught
    student = build(teacher, SHAPE, data)
    inside = plan_inside(student, teacher, 1.0, 1.0)
    add_projections(student, teacher, inside, torch.Generator().manual_seed(0))
    batch = Batches(data, 0.0, 48, 0, "cpu").tensors(np.arange(48))
    how = Comparison("text-generation", "decoder", alpha=0.0)

    def apart() -> float:
        with torch.no_grad():
            parts = [Teaching(how, teacher, one)(student, batch)[0] for one in (inside, type(inside)())]
        return float(parts[0] - parts[1])

    before = apart()
    assert hasattr(student, PROJECTIONS)
    train(
        student, data, TrainingSpec(max_steps=40, **RATE), tiny.context(tmp_path), loss=Teaching(how, teacher, inside)
    )
    assert apart() < 0.8 * before
