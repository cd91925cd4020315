"""The losses of distillation against loops written for reading, and against numbers worked out by hand."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specs.schema.pipeline import DataSpec
from tasks.compress import heard
from tasks.compress.divergence import (
    divergence,
    hidden_error,
    largest,
    log_shares,
    matched,
    relation_error,
    relation_heads,
)
from tasks.compress.reading import hard_losses, reader
from tasks.compress.teach import (
    LABELLED,
    LOGS,
    PROJECTIONS,
    Comparison,
    Teaching,
    add_projections,
    plan_inside,
    remove_projections,
)
from tasks.context import StepError
from tasks.finetune.batches import Batches
from tasks.finetune.objective import task_loss
from tasks.models import family_of
from tests.tasks import tiny

CASES = {
    "llama": ("text-generation", tiny.network, lambda: tiny.language(6, 8)),
    "gpt2": ("text-generation", tiny.network, lambda: tiny.language(6, 8)),
    "bert": ("text-classification", tiny.network, lambda: tiny.sentences(6, 8)),
    "marian": ("translation", tiny.writer, lambda: tiny.pairs(6)),
    "t5": ("translation", tiny.writer, lambda: tiny.pairs(6)),
    "whisper": ("speech-recognition", tiny.writer, lambda: tiny.recordings("whisper", 6)),
    "wav2vec2": ("speech-recognition", tiny.writer, lambda: tiny.recordings("wav2vec2", 6)),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def _case(name, rows=None, **how):
    task, make, data = CASES[name]
    student, teacher = make(name, seed=0), make(name, seed=1)
    encoded = data()
    batch = Batches(encoded, 0.0, 6, 0, "cpu").tensors(np.arange(6) if rows is None else np.array(rows))
    return student, teacher, batch, Comparison(task, family_of(student.config), **how)


def _shares(logits, temperature):
    exponents = [math.exp(float(value) / temperature) for value in logits]
    return [value / sum(exponents) for value in exponents]


def naive_kl(teacher, student):
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True) if p > 0)


def test_by_hand():
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    p, q = (log_shares(logits, 1.0) for logits in (teacher, student))
    assert float(divergence(p, q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(divergence(p, q, "reverse")) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    mixed = [0.1 * 0.75 + 0.9 * 0.5, 0.1 * 0.25 + 0.9 * 0.5]
    assert float(divergence(p, q, "skewed", 0.1)) == pytest.approx(naive_kl([0.75, 0.25], mixed))
    soft = log_shares(teacher, 2.0).exp()[0]
    assert soft.tolist() == pytest.approx([math.sqrt(3) / (1 + math.sqrt(3)), 1 / (1 + math.sqrt(3))])


def test_several_labels_are_compared_one_by_one():
    teacher, student = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    found = divergence(log_shares(teacher, 1.0, several=True), log_shares(student, 1.0, several=True))
    assert float(found) == pytest.approx((0 + naive_kl([0.75, 0.25], [0.5, 0.5])) / 2)


def test_probabilities_of_nothing_do_no_harm():
    teacher = torch.tensor([[0.0, -torch.inf, -300.0]])
    student = torch.tensor([[1.0, 2.0, -400.0]], requires_grad=True)
    for kind in ("forward", "skewed", "reverse"):
        found = divergence(log_shares(teacher, 1.0), log_shares(student, 1.0), kind)
        found.sum().backward()
        assert torch.isfinite(found).all(), kind
        assert torch.isfinite(student.grad).all(), kind


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from(["forward", "reverse", "skewed"]))
def test_the_buckets_of_the_largest(seed, count, kind):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (3 * torch.randn(5, 12, generator=generator) for _ in range(2))
    classes = teacher.topk(count, -1).indices
    p, q = (log_shares(logits, 1.7, classes) for logits in (teacher, student))
    assert torch.allclose(p.exp().sum(-1), torch.ones(5), atol=1e-5)  # no mass is lost
    rest = torch.log_softmax(teacher / 1.7, -1).scatter(-1, classes, -torch.inf).exp().sum(-1)
    if count < 12:
        assert torch.allclose(p[:, -1].exp(), rest, atol=1e-6)
    whole = divergence(log_shares(teacher, 1.7), log_shares(student, 1.7), kind)
    part = divergence(p, q, kind)
    assert (part <= whole + 1e-5).all()
    assert (part >= -1e-5).all()
    if count >= 11:  # all classes, or all but one, are all
        assert torch.allclose(part, whole, atol=1e-5)


def test_all_classes_need_no_bucket():
    logits = torch.randn(3, 4)
    assert largest(logits, 4) is None
    assert largest(logits, 3).shape == (3, 3)
    assert log_shares(logits, 1.0, logits.topk(4).indices).shape == (3, 4)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("divergent", ["forward", "reverse", "skewed"])
def test_it_is_zero_where_the_student_is_the_teacher_and_has_no_gradient(kind, divergent):
    student, _, batch, how = _case(kind, alpha=0.0, kind=divergent)
    total, weight = Teaching(how, copy.deepcopy(student))(student, batch)
    total.backward()
    assert abs(float(total.detach() / weight)) < 1e-5
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-4


@pytest.mark.parametrize("kind", CASES)
def test_gradients_reach_the_student_alone(kind):
    student, teacher, batch, how = _case(kind)
    inside = plan_inside(student, teacher, 1.0, 1.0)
    total, _ = Teaching(how, teacher, inside)(student, batch)
    total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in student.parameters())


@pytest.mark.parametrize("kind", CASES)
def test_with_alpha_1_it_is_the_loss_of_the_task(kind):
    student, teacher, batch, how = _case(kind, alpha=1.0)
    with torch.no_grad():
        total, weight = Teaching(how, teacher)(student, batch)
        expected, count = task_loss(how.task, how.family)(student, batch)
    assert float(total / weight) == pytest.approx(float(expected / count), rel=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_the_whole_loss_is_that_of_a_loop_over_single_examples(kind):
    """One example after the other, so that there is no padding; a token, a class or a frame after the other."""
    student, teacher, batch, how = _case(kind, alpha=0.3, temperature=3.0)
    data = CASES[kind][2]()
    soft = hard = 0.0
    count = 0
    read = reader(how.task, how.family)
    with torch.no_grad():
        for row in range(6):
            alone = Batches(data, 0.0, 1, 0, "cpu").tensors(np.array([row]))
            ours, theirs = read(student, alone), read(teacher, alone)
            units = [
                naive_kl(_shares(p, 3.0), _shares(q, 3.0)) for p, q in zip(theirs.logits, ours.logits, strict=True)
            ]
            total, weight = task_loss(how.task, how.family)(student, alone)
            hard += float(total)
            soft += sum(units) / (len(units) if how.family == "ctc" else 1)
            count += int(weight)
        total, weight = Teaching(how, teacher)(student, batch)
    assert int(weight) == count
    assert float(total) == pytest.approx(0.3 * hard + 0.7 * 9 * soft, rel=2e-3)


def test_every_example_counts_by_its_class():
    weights = torch.tensor([0.25, 4.0])
    student, teacher, batch, how = _case("bert", alpha=0.5, class_weights=weights)
    with torch.no_grad():
        total, weight = Teaching(how, teacher)(student, batch)
        parts = []
        for row in range(6):
            alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            plain = dataclasses.replace(how, class_weights=None)
            parts.append(float(Teaching(plain, teacher)(student, alone)[0]) * float(weights[batch["labels"][row]]))
    assert float(weight) == pytest.approx(float(weights[batch["labels"]].sum()))
    assert float(total) == pytest.approx(sum(parts), rel=1e-4)


def test_several_labels_with_weights_are_those_of_the_task():
    student, teacher, batch, how = _case("bert", alpha=1.0, several=True, class_weights=torch.tensor([2.0, 3.0]))
    batch["labels"] = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [1, 0], [1, 1]])
    with torch.no_grad():
        total, weight = Teaching(how, teacher)(student, batch)
        expected, count = task_loss("text-classification", class_weights=how.class_weights)(student, batch)
    assert (float(total), int(weight)) == (pytest.approx(float(expected), rel=1e-5), int(count))


def test_without_a_label_the_teacher_alone_counts():
    student, teacher, batch, how = _case("bert", alpha=0.9)
    nothing = {**batch, LABELLED: torch.tensor([False] * 6)}
    only = dataclasses.replace(how, alpha=0.0)
    with torch.no_grad():
        assert torch.allclose(Teaching(how, teacher)(student, nothing)[0], Teaching(only, teacher)(student, batch)[0])
        half = {**batch, LABELLED: torch.tensor([True, False] * 3)}
        found = float(Teaching(how, teacher)(student, half)[0])
        both = [Teaching(one, teacher) for one in (how, only)]
        rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(6)]
        expected = sum(float(both[row % 2](student, alone)[0]) for row, alone in enumerate(rows))
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_gradient_keeps_its_size_as_the_temperature_rises():
    """T² · KL tends to half the squared distance of the centred logits over their number, whatever T (Hinton)."""
    teacher = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    student = torch.zeros(4, 6, requires_grad=True)
    sizes = []
    for temperature in (50.0, 100.0):
        found = temperature**2 * divergence(log_shares(teacher, temperature), log_shares(student, temperature)).sum()
        sizes.append(torch.autograd.grad(found, student)[0])
    limit = (student - (teacher - teacher.mean(-1, keepdim=True))).detach() / 6
    assert torch.allclose(sizes[0], limit, atol=0.02)
    assert torch.allclose(sizes[0], sizes[1], atol=0.02)


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "wav2vec2"])
def test_padding_changes_nothing(kind):
    """Examples of unlike lengths together weigh as much as alone, inside and outside."""
    student, teacher, batch, how = _case(kind)
    inside = plan_inside(student, teacher, 0.7, 0.3)
    teaching = Teaching(how, teacher, inside)
    data = CASES[kind][2]()
    with torch.no_grad():
        total, weight = teaching(student, batch)
        parts = [teaching(student, Batches(data, 0.0, 1, 0, "cpu").tensors(np.array([row]))) for row in range(6)]
    assert float(total) == pytest.approx(sum(float(part) for part, _ in parts), rel=2e-3)
    assert float(weight) == pytest.approx(sum(float(part) for _, part in parts))


def test_frames_of_padding_do_not_count():
    student, teacher, batch, how = _case("wav2vec2", alpha=0.0)
    read = reader(how.task, how.family)
    with torch.no_grad():
        reading = read(student, batch)
        frames = student._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
        assert torch.bincount(reading.owner).tolist() == frames.tolist()
        assert reading.share.sum() == pytest.approx(6)
        changed = {**batch, "input_values": batch["input_values"].clone()}
        total, _ = Teaching(how, teacher)(student, batch)
        changed["input_values"][batch["attention_mask"] == 0] = 0.0
        assert float(Teaching(how, teacher)(student, changed)[0]) == pytest.approx(float(total), rel=1e-5)


def naive_relations(vectors, heads, allowed):
    size = vectors.shape[-1] // heads
    found = torch.zeros(heads, len(vectors), len(vectors))
    for head in range(heads):
        part = vectors[:, head * size : (head + 1) * size]
        for at in range(len(vectors)):
            scores = [float(part[at] @ part[other]) / math.sqrt(size) for other in range(len(vectors))]
            exponents = [math.exp(score) if allowed[at][other] else 0.0 for other, score in enumerate(scores)]
            found[head, at] = torch.tensor(exponents) / sum(exponents)
    return found


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_relations_are_those_of_a_loop_for_any_number_of_heads_and_any_widths(heads, causal):
    generator = torch.Generator().manual_seed(heads)
    student, teacher = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    found = relation_error(student, teacher, heads, mask, causal)
    for row, length in enumerate((5, 3)):
        allowed = [[other <= at or not causal for other in range(length)] for at in range(length)]
        ours, theirs = (naive_relations(side[row, :length], heads, allowed) for side in (student, teacher))
        total = sum(
            naive_kl(theirs[head, at].tolist(), [value or 1.0 for value in ours[head, at].tolist()])
            for head in range(heads)
            for at in range(length)
        )
        assert float(found[row]) == pytest.approx(total / heads / length, rel=1e-4)
    student.requires_grad_(True)
    relation_error(student, teacher, heads, mask, causal).sum().backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad[1, 3:] == 0).all()


def test_hidden_states_by_hand():
    student = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])
    teacher = torch.zeros(1, 2, 2)
    assert hidden_error(student, teacher, torch.tensor([[True, False]])).tolist() == [0.5]
    assert hidden_error(student, teacher, torch.tensor([[False, False]])).tolist() == [0.0]


def test_blocks_and_heads_that_go_together():
    assert matched(2, 6) == [2, 5]
    assert matched(3, 12) == [3, 7, 11]
    assert matched(4, 6) == [1, 2, 4, 5]
    assert matched(2, 2) == [0, 1]
    assert matched(3, 2) == [0, 1, 1]
    assert relation_heads((384, 128), 12) == 8
    assert relation_heads((384, 384), 12) == 12


@pytest.mark.parametrize(("kind", "narrow"), [("llama", {"num_key_value_heads": 4}), ("gpt2", {}), ("bert", {})])
def test_what_is_watched_are_the_projections(kind, narrow):
    """Grouped, fused and plain attention: what is compared is what the attention's own layers give."""
    student, teacher, batch, how = _case(kind)
    if narrow:
        student = CASES[kind][1](kind, seed=0, **narrow)
    plan = plan_inside(student, teacher, None, 1.0)
    with torch.no_grad():
        total, _ = Teaching(dataclasses.replace(how, alpha=0.0), teacher, plan)(student, batch)
        plain, _ = Teaching(dataclasses.replace(how, alpha=0.0), teacher)(student, batch)
    expected, seen = 0.0, {}
    for name, model in (("student", student), ("teacher", teacher)):
        blocks = model.model.layers if kind == "llama" else model.transformer.h if kind == "gpt2" else None
        blocks = model.bert.encoder.layer if blocks is None else blocks
        keep = seen[name] = {}
        attention = blocks[-1]
        layers = (
            [attention.attn.c_attn]
            if kind == "gpt2"
            else [attention.attention.self.query, attention.attention.self.key, attention.attention.self.value]
            if kind == "bert"
            else [attention.self_attn.q_proj, attention.self_attn.k_proj, attention.self_attn.v_proj]
        )
        for number, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, __, out, n=number, keep=keep: keep.__setitem__(n, out.detach()))
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        if kind == "gpt2":
            keep.update(enumerate(keep[0].split(32, -1)))
    mask = batch["attention_mask"].bool()
    units = batch["attention_mask"].sum(1) - 1 if kind != "bert" else torch.ones(6)
    heads = plan.relations[0].heads
    for part in range(3):
        error = relation_error(seen["student"][part], seen["teacher"][part], heads, mask, kind != "bert")
        expected += float((error * units).sum()) / 3
    assert float(total - plain) == pytest.approx(expected, rel=1e-3)


def test_the_projection_learns_and_goes():
    teacher = tiny.network("bert", seed=1)
    student = tiny.network("bert", hidden_size=16, num_hidden_layers=1)
    before = set(student.state_dict())
    inside = plan_inside(student, teacher, 1.0, None)
    add_projections(student, teacher, inside, torch.Generator().manual_seed(0))
    assert [pair.teacher for pair in inside.pairs] == ["bert.encoder.layer.1"]
    batch = Batches(tiny.sentences(6, 8), 0.0, 6, 0, "cpu").tensors(np.arange(6))
    Teaching(Comparison("text-classification", "encoder"), teacher, inside)(student, batch)[0].backward()
    projection: nn.Linear = getattr(student, PROJECTIONS)["encoder_0"]
    assert projection.weight.shape == (32, 16)
    assert projection.weight.grad.abs().sum() > 0
    remove_projections(student)
    assert set(student.state_dict()) == before
    same = plan_inside(teacher, teacher, 1.0, None)
    add_projections(teacher, teacher, same, torch.Generator())
    assert not hasattr(teacher, PROJECTIONS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, r"relations.heads 5 does not divide the widths 32, 16.*for example 4"),
        ({"layer": 3}, "relations.layer 3 is beyond the 2 blocks of the teacher's decoder; write at most 2"),
    ],
)
def test_relations_that_cannot_be(fields, message):
    student = tiny.network("llama")
    with pytest.raises(StepError, match=message):
        plan_inside(student, student, None, 1.0, **fields)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("count", [4, 10_000])
def test_what_is_kept_is_what_the_teacher_says(tmp_path, kind, count):
    student, teacher, batch, how = _case(kind, rows=[4, 0, 3], top_k=count)
    task, _, make = CASES[kind]
    ctx = tiny.context(tmp_path, task, data=DataSpec(train="builtin:none", eval="builtin:none"))
    said = heard.listen(teacher, {"teacher": kind}, make(), how, 2, ctx)
    found = heard.beside(said, np.array([4, 0, 3]), "cpu")
    with torch.no_grad():
        alive = Teaching(how, teacher)(student, batch)
        kept = Teaching(how, None)(student, {**batch, **found})
        wanted, classes = how.said(reader(how.task, how.family)(teacher, batch), count)
    assert torch.allclose(found[LOGS], wanted, atol=1e-4)
    assert (classes is None) == (count == 10_000 or kind == "bert")
    if classes is None:
        assert float(kept[0]) == pytest.approx(float(alive[0]), rel=1e-4)
    else:
        assert float(kept[0]) < float(alive[0])
    assert float(kept[1]) == float(alive[1])


def test_hard_losses_are_sums_of_each_example():
    student, _, batch, how = _case("llama")
    reading = reader(how.task, how.family)(student, batch)
    losses, known = hard_losses(reading, batch, student)
    total, _ = task_loss("text-generation")(student, batch)
    assert losses.shape == (6,)
    assert known.all()
    assert float(losses.sum()) == pytest.approx(float(total), rel=1e-5)
