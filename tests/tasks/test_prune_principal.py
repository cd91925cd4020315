"""A stream turned to its principal directions: the same function at full width, and where it needs no more."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specs.schema.steps.prune import PruneSpec
from tasks.compress import principal, width
from tasks.compress.prune import look, prune
from tasks.compress.structured import _WAYS
from tasks.models import load
from tasks.models.anatomy import anatomy
from tests.support import as_artifact, context
from tests.tasks import tiny
from tests.tasks.test_models_anatomy import FIELDS, inputs, make

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def spec(**fields: Any) -> PruneSpec:
    given = {"method": "width", "keep": "50%", "parts": ["heads", "ffn", "hidden"], "hidden_by": "pca", **fields}
    return PruneSpec(uses="prune", id="p", **given)


def trained_norms(model: Any) -> Any:
    """The model with norms as training leaves them, no weight 1 and no bias 0, and vectors so large that what a norm
    adds before it divides does not count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, what in anatomy(model).embeddings.items():
            if what in ("tokens", "positions"):
                model.get_submodule(name).weight.normal_(generator=generator)
        for name in principal.readers(anatomy(model)):
            norm = model.get_submodule(name)
            norm.weight.copy_(1 + 0.5 * torch.rand(norm.weight.shape, generator=generator))
            if getattr(norm, "bias", None) is not None:
                norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    return model


def turned(model: Any, axis: Any, found: principal.Directions, size: int) -> Any:
    """The projected model."""
    from tasks.compress import cut

    parts = anatomy(model)
    state = principal.project(model, parts, cut.state_of(model), axis, found, size)
    head = [f"{name}.weight" for name in parts.head if f"{name}.weight" in parts.ties]
    config = width.config_of(model.config, parts, {parts.stacks[0].fields["width"]: size})
    return cut.rebuild(model, cut.configured(config, principal.UNTIED if head else {}), state, head)


def stream(model: Any, kind: str) -> Any:
    parts = anatomy(model)
    asked = ("heads", "hidden") if kind == "gpt2" else ("hidden",)
    axes = width.axes(model, parts, width.room(model, parts, asked, 8))
    return next(axis for axis in axes if axis.name == width.STREAM)


DATA = tiny.language(8, vocabulary=32)


@pytest.mark.parametrize(("kind", "fields"), KINDS.items())
def test_turned_at_full_width_it_is_the_same_function(kind, fields):
    model = trained_norms(make(kind, **fields))
    found = principal.directions(model, anatomy(model), DATA)
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(32, dtype=torch.float64), atol=1e-9)
    with torch.no_grad():
        before = model(**inputs(kind)).logits
        after = turned(model, stream(model, kind), found, 32)(**inputs(kind)).logits
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


def flat(model: Any, axis: Any, rank: int, centred: bool) -> Any:
    """The model with all that is written onto its stream in ``rank`` directions, which no number of it stands for."""
    reads = {f"{layer}.weight" for layers in principal.readers(anatomy(model)).values() for layer in layers}
    inside = torch.linalg.qr(torch.randn(32, rank, generator=torch.Generator().manual_seed(3)).double())[0]
    if centred:
        inside = torch.linalg.qr(inside - inside.mean(0))[0]
    onto = (inside @ inside.T).float()
    state = model.state_dict()
    norms = tuple(principal.readers(anatomy(model)))
    with torch.no_grad():
        for place in axis.places:
            owned = place.tensor.rpartition(".")[0] in norms or place.tensor in reads - {"lm_head.weight"}
            if not owned and place.tensor != "lm_head.weight":
                tensor = state[place.tensor]
                tensor.copy_((tensor.movedim(place.dim, -1) @ onto).movedim(-1, place.dim))
    return model


@pytest.mark.parametrize(("kind", "fields"), KINDS.items())
def test_directions_that_are_never_used_cost_nothing(kind, fields):
    """Channels would: each number of the stream is a mixture of all directions."""
    model = trained_norms(make(kind, **fields))
    axis = stream(model, kind)
    model = flat(model, axis, 16 - (kind == "gpt2"), kind == "gpt2")
    if kind == "gpt2":  # heads go with the hidden size: two of four say nothing
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.c_attn.weight[:, 64 + 16 :] = 0
                block.attn.c_attn.bias[64 + 16 :] = 0
    parts = ["heads", "hidden"] if kind == "gpt2" else ["hidden"]
    with torch.no_grad():
        before = model(**inputs(kind)).logits
    errors = {}
    for how in ("pca", "channels"):
        way = _WAYS["width"](copy.deepcopy(model), spec(parts=parts, hidden_by=how))

        scores = way.scores(DATA, _Here())
        small, kept = way.cut(scores, way.shape(0.5))
        assert small.config.hidden_size == 16
        with torch.no_grad():
            errors[how] = float((small(**inputs(kind)).logits - before).abs().max() / before.abs().max())
        if how == "pca":
            assert kept["hidden"] == list(range(16))
            assert way.said(scores, way.shape(0.5))[0]["variance_kept"] == pytest.approx(1.0, abs=1e-6)
    assert errors["pca"] < 1e-3 < errors["channels"], errors


class _Here:
    device = "cpu"

    def progress(self, *_: Any) -> None: ...


def test_directions_are_those_of_a_plain_decomposition():
    """Of one norm alone: the eigenvectors of the second moments of the vectors that it has divided by their size."""
    model = make("llama", num_hidden_layers=1)
    found = principal.directions(model, anatomy(model), DATA)
    seen: dict[str, list[torch.Tensor]] = {}
    for name in principal.readers(anatomy(model)):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0]))
    for row, length in enumerate(DATA.lengths()):
        with torch.no_grad():
            model(input_ids=torch.tensor(DATA.input_ids[row : row + 1, :length]).long())
    every = {name: torch.cat(rows).double() for name, rows in seen.items()}
    every = {name: rows / rows.square().mean(1, keepdim=True).sqrt() for name, rows in every.items()}
    moments = {name: rows.T @ rows / len(rows) for name, rows in every.items()}
    values = torch.linalg.eigvalsh(sum(moments.values())).flip(0)  # type: ignore[arg-type]
    assert torch.allclose(sum(found.energy.values()), values, atol=1e-9)  # type: ignore[arg-type]
    for name, moment in moments.items():
        direction = found.basis[:, 0]
        assert float(found.energy[name][0]) == pytest.approx(float(direction @ moment @ direction))


def test_the_step_leaves_an_ordinary_model_and_says_that_its_head_is_its_own(tmp_path, gpt2, text_data):
    ctx = context(tmp_path, "text-generation", text_data)
    result = prune(as_artifact(gpt2), spec=spec(calibration_examples=8), ctx=ctx)
    assert re.search(r"n_embd 32 -> 16.*% of the variance between the blocks kept", result.summary)
    assert 0.3 < result.properties["variance_kept"] < 1
    assert "lm_head.weight was tied to transformer.wte.weight and is no more" in result.warnings[0]
    plain = AutoModelForCausalLM.from_pretrained(ctx.out)
    assert plain.lm_head.weight.data_ptr() != plain.transformer.wte.weight.data_ptr()
    ids = torch.randint(4, 300, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, load(ctx.out)(input_ids=ids).logits)
    plain.generate(ids, max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("bert", {}, "bert adds to what it has normalised"),
        ("whisper", {}, "whisper gives frames to its blocks behind a non-linear function"),
        ("mbart", {"scale_embedding": False}, "mbart adds to what it has normalised"),
        ("t5", {}, "transformers always ties the head of t5"),
    ],
)
def test_what_cannot_be_turned_is_known_before(kind, fields, reason):
    problems, _ = look(spec(), FIELDS[kind] | fields | {"model_type": kind}, _task(kind), 32)
    assert len(problems) == 1
    assert reason in problems[0]
    assert problems[0].endswith("leave hidden_by out")


def _task(kind: str) -> Any:
    from tests.tasks.test_models_anatomy import TASKS

    return TASKS.get(kind, "translation")


def test_a_head_that_loses_its_tie_is_told_before():
    for tied in (True, False):
        config = FIELDS["gpt2"] | {"tie_word_embeddings": tied, "model_type": "gpt2"}
        problems, remarks = look(spec(), config, "text-generation", 32)
        assert problems == []
        assert remarks == (
            ["hidden_by: pca: lm_head.weight, which is tied, becomes a table of its own"] if tied else []
        )
