"""Students cut out of their teacher: ordinary smaller models whose weights are the teacher's."""

import numpy as np
import pytest
import torch
import transformers

from specs.schema.steps.distill import StudentSpec
from tasks.compress.student import build, importance, picked, plan
from tasks.compress.width import ffn_name
from tasks.context import StepError
from tasks.models import load, save
from tasks.models.anatomy import anatomy
from tests.tasks import tiny

MODELS = {
    "llama": lambda **fields: tiny.network("llama", **fields),
    "gpt2": lambda **fields: tiny.network("gpt2", **fields),
    "bert": lambda **fields: tiny.network("bert", **fields),
    **{
        name: lambda name=name, **fields: tiny.writer(name, **fields)
        for name in ("marian", "t5", "whisper", "wav2vec2")
    },
}
DATA = {
    "bert": lambda: tiny.sentences(8),
    "marian": lambda: tiny.pairs(8),
    "t5": lambda: tiny.pairs(8),
    "whisper": lambda: tiny.recordings("whisper", 8),
    "wav2vec2": lambda: tiny.recordings("wav2vec2", 8),
}
SHAPES = (
    {"layers": 1},
    {"hidden": 16},
    {"layers": 1, "hidden": 16, "ffn": 24, "heads": 2},
    {"heads": 2},
    {"ffn": 24},
)


def _data(kind):
    return DATA.get(kind, lambda: tiny.language(8))()


def _logits(model, kind):
    from tasks.compress.calibrate import forward, inputs

    with torch.no_grad():
        return forward(model, inputs(_data(kind), np.arange(4)))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()))
def test_the_student_is_an_ordinary_smaller_model(tmp_path, kind, shape):
    teacher = MODELS[kind]()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = build(teacher, StudentSpec(**shape), _data(kind))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    assert sizes[0] < sizes[1] or (sizes[0] == sizes[1] and list(shape) == ["heads"])  # fewer heads may be larger ones
    for stack in anatomy(student).stacks:
        assert len(stack.blocks) == shape.get("layers", 2)
        assert stack.width == shape.get("hidden", 32)
        for block in stack.blocks:
            assert block.ffn.width == shape.get("ffn", 64 * stack.width // 32 if kind != "gpt2" else 4 * stack.width)
    save(student, tmp_path)
    assert not (tmp_path / "lathe.json").exists()
    plain = type(teacher).from_pretrained(tmp_path).eval()
    expected = _logits(student, kind)
    assert torch.allclose(_logits(plain, kind), expected, atol=1e-5)
    assert torch.allclose(_logits(load(tmp_path), kind), expected, atol=1e-5)
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("kind", MODELS)
def test_all_that_there_is_gives_the_teacher_itself(kind):
    teacher = MODELS[kind]()
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "ffn": anatomy(teacher).stacks[0].blocks[0].ffn.width}
    student = build(teacher, StudentSpec(**sizes), _data(kind))
    assert torch.allclose(_logits(student, kind), _logits(teacher, kind), atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_channels_that_do_nothing_are_what_is_cut(kind):
    """Heads and feed-forward channels whose outputs are multiplied by 0 leave without a trace."""
    teacher = MODELS[kind]()
    linear = dict(teacher.named_modules())
    with torch.no_grad():
        for block in anatomy(teacher).blocks:
            for part in (*(a.output for a in block.attentions), block.ffn.down):
                weight = linear[part].weight if kind == "gpt2" else linear[part].weight.T
                weight[: len(weight) // 2] = 0  # of two groups of queries the first, with GQA
                if part == block.ffn.down:
                    continue
    expected = _logits(teacher, kind)
    spec = StudentSpec(heads=2, ffn=anatomy(teacher).stacks[0].blocks[0].ffn.width // 2)
    scores = importance(teacher, _data(kind))
    for block in anatomy(teacher).blocks:
        for part in (*(a.output for a in block.attentions), ffn_name(block)):
            scores[part][: len(scores[part]) // 2] = 0
    from tasks.compress.student import apply

    if kind in ("llama", "t5"):  # the others give fewer heads another size
        student = apply(teacher, plan(teacher, spec, scores))
        assert torch.allclose(_logits(student, kind), expected, atol=1e-5)
    else:
        spec = StudentSpec(ffn=spec.ffn)
        student = apply(teacher, plan(teacher, spec, scores))
        assert torch.allclose(_logits(student, kind), expected, atol=1e-5)


def test_blocks_are_spread_evenly():
    assert picked(1, 6) == (0,)
    assert picked(2, 6) == (0, 5)
    assert picked(3, 12) == (0, 6, 11)
    assert picked(4, 4) == (0, 1, 2, 3)
    teacher = tiny.network("bert", num_hidden_layers=5)
    student = build(teacher, StudentSpec(layers=3))
    for new, old in enumerate((0, 2, 4)):
        ours, theirs = student.bert.encoder.layer[new], teacher.bert.encoder.layer[old]
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_decoder_alone_becomes_shallow():
    student = build(tiny.writer("whisper"), StudentSpec(decoder_layers=1))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 1)


def test_it_generates_after_the_cut():
    student = build(tiny.network("llama"), StudentSpec(layers=1, hidden=16), tiny.language(8))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        cached = student.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=True)
        plain = student.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(("hidden", "heads", "kv"), [(24, 2, 1), (12, 2, 1), (8, 2, 1)])
def test_heads_that_share_keys_and_values_fit_any_width(hidden, heads, kv):
    config = build(tiny.network("llama"), StudentSpec(hidden=hidden)).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, kv, 8)


def test_what_matters_is_kept_and_not_what_comes_first():
    teacher = tiny.network("bert")
    with torch.no_grad():
        teacher.bert.encoder.layer[0].intermediate.dense.bias[40:] += 10
    chosen = plan(teacher, StudentSpec(ffn=24), importance(teacher, tiny.sentences(8)))
    first = ffn_name(next(anatomy(teacher).blocks))
    assert chosen.kept[first] == list(range(40, 64))
    assert plan(teacher, StudentSpec(ffn=24), {}).kept[first] == list(range(24))


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("bert", {"layers": 3}, "student.layers 3 is more than the teacher's 2; write at most 2"),
        ("bert", {"hidden": 64}, "student.hidden 64 is more than the teacher's 32"),
        ("bert", {"heads": 8}, "student.heads 8 is more than the teacher's 4"),
        ("bert", {"ffn": 65}, "student.ffn 65 is more than the teacher's 64"),
        ("bert", {"heads": 3}, r"student.heads: 3 heads do not divide the width 32; write one of 1, 2, 4"),
        ("bert", {"hidden": 30}, "student.hidden: the teacher's 4 heads of 8 do not .*; .* or as heads one of 1, 2, 3"),
        ("bert", {"decoder_layers": 1}, "student.decoder_layers: a bert model has no decoder; write layers"),
        ("llama", {"heads": 3}, "student.heads: 3 heads cannot share .* 2 heads of keys and values; .* multiple of 2$"),
        ("whisper", {"decoder_layers": 3}, "student.decoder_layers 3 is more than"),
        ("wav2vec2", {"hidden": 18, "heads": 2}, "no multiple of the 4 groups of the model's convolution"),
    ],
)
def test_sizes_that_cannot_be(kind, shape, message):
    with pytest.raises(StepError, match=message):
        build(MODELS[kind](), StudentSpec(**shape), _data(kind))


def test_grouped_channels_of_a_convolution_stay_with_their_group():
    teacher = tiny.writer("wav2vec2")
    student = build(teacher, StudentSpec(hidden=16), tiny.recordings("wav2vec2", 8))
    scores = importance(teacher, tiny.recordings("wav2vec2", 8))
    kept = torch.tensor(plan(teacher, StudentSpec(hidden=16), scores).kept["hidden"])
    assert torch.bincount(kept // 8).tolist() == [4, 4, 4, 4]
    ours, theirs = (model.wav2vec2.encoder.pos_conv_embed.conv for model in (student, teacher))
    for out in range(16):
        group = out // 4
        inputs = kept[4 * group : 4 * group + 4] % 8
        assert torch.allclose(ours.weight[out], theirs.weight[kept[out]][inputs], atol=1e-5)


def test_every_configuration_says_what_it_is():
    assert isinstance(
        build(tiny.network("gpt2"), StudentSpec(ffn=24), tiny.language(8)).config, transformers.GPT2Config
    )
