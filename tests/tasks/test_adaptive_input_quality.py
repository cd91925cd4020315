"""What the step ``adaptive_input`` says of its own quality: robust errors, advice that fits, plots, and sizes."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specs.schema.steps.quantize import QuantizeSpec
from tasks.adaptive_input import quality
from tasks.adaptive_input.adaptive_input import adaptive_input
from tasks.adaptive_input.bands import Measured
from tasks.adaptive_input.curves import metric
from tasks.adaptive_input.in_exports import FORMS, Exported, grown
from tasks.adaptive_input.information import unigram
from tasks.adaptive_input.layout import Band, Layout
from tasks.adaptive_input.quality import errors
from tasks.adaptive_input.table import tables
from tasks.compress.quantize import quantize
from tasks.evaluate.format import size
from tests.support import as_artifact, context, tiny_model
from tests.tasks.banded import load, run, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_error_is_of_what_tells_a_token_apart():
    torch.manual_seed(0)
    apart, noise = torch.randn(2, 200, 16)
    torch.testing.assert_close(errors(apart, torch.zeros(200, 16)).median().item(), 1.0, atol=0.02, rtol=0)
    # What all have in common is kept by a mean: it must not speak for what is lost beside it.
    torch.testing.assert_close(errors(apart + 9, torch.full((200, 16), 9.0)).median().item(), 1.0, atol=0.03, rtol=0)
    half = errors(apart + 9, apart + 9 + 0.5 * noise).median()
    assert 0.2 < half < 0.3
    # Nor may a few long vectors, by their own energy or by their part of the mean.
    long = apart.clone()
    long[:3] *= 1000
    kept = torch.zeros_like(long)
    kept[:3] = long[:3]
    found = errors(long, kept)
    assert found[:3].max() < 1e-6
    torch.testing.assert_close(found[3:].median().item(), 1.0, atol=0.1, rtol=0)


def test_vectors_that_say_nothing_lose_nothing():
    alike = torch.randn(1, 16).expand(20, 16)
    assert errors(alike, alike.half().float()).max() < 1e-3
    zeros = torch.zeros(20, 16)
    assert errors(zeros, zeros + 1).tolist() == [0.0] * 20


def _changed(source, folder, change):
    """A copy of the GPT-2 at ``source`` whose table of tokens ``change`` has changed in place."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    (name,) = [name for name in state if name.endswith("wte.weight")]
    state[name] = state[name].clone()
    change(state[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_one_long_vector_does_not_hide_what_the_others_of_its_band_lost(gpt2, text_data, tmp_path):
    def lengthen(table):
        table[300] *= 30 * table.norm(dim=1).mean() / table[300].norm()

    model = _changed(gpt2, tmp_path / "model", lengthen)
    ctx = context(tmp_path, "text-generation", text_data.model_copy(update={"train_limit": 24}))
    result = adaptive_input(as_artifact(model), spec=spec_of(ratio="14x", bits=(1, 4), bands=5), ctx=ctx)
    (made,), dense = tables(load(ctx.out)), load(model).get_input_embeddings().weight
    number = int(made.band_of[300])
    others = (made.band_of == number) & (torch.arange(320) != 300)
    lost = ((made.expanded() - dense)[others].square().sum() / dense[others].square().sum()).item()
    band = result.properties["adaptive_input"]["tables"][0]["bands"][number]
    assert lost > 0.5
    assert band["error"] == pytest.approx(lost, abs=0.1)
    assert f"median error {band['error']:.0%}" in result.summary
    (said,) = [text for text in result.warnings if f"{band['lost']} of {band['band']['count']} tokens" in text]
    assert said.endswith("; a smaller ratio or heal keeps more")


@pytest.fixture(scope="module")
def unbitten(request, tmp_path_factory):
    """A table whose factors stay in float32: the context and the result."""
    return run(request, tmp_path_factory.mktemp("a"), "gpt2", ratio="3.4x", method="adaptive", bits=None)


def test_the_advice_is_one_that_can_be_followed(request, tmp_path, monkeypatch, unbitten):
    monkeypatch.setattr("tasks.adaptive_input.adaptive_input.lookup_ratio", lambda *given: 1.31)
    _, healed = run(request, tmp_path, "gpt2", budget="2 KiB", bits=(1,), heal={"max_steps": 1, "batch_size": 2})
    advised = {"a smaller ratio keeps more, and a finetune behind": unbitten[1], "; a larger budget keeps more": healed}
    for advice, result in advised.items():
        said = [text for text in result.warnings if "vectors apart" in text]
        assert said
        assert all(advice in text and "heal" not in text for text in said)
    assert any("a lookup takes 1.31 times as long" in text for text in healed.warnings)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("untied"), "llama", "text-generation", tie_word_embeddings=False)


def test_every_table_is_drawn_with_its_own_bytes(untied, text_data, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.adaptive_input.adaptive_input.lookup_ratio", lambda *given: 1.2)
    ctx = context(tmp_path, "text-generation", text_data.model_copy(update={"train_limit": 24}))
    result = adaptive_input(as_artifact(untied), spec=spec_of(ratio="6x"), ctx=ctx)
    about = result.properties["adaptive_input"]
    assert not [text for text in result.warnings if "a lookup takes" in text]
    drawn = (ctx.out / "adaptive_input.svg").read_text()
    assert len(about["tables"]) == 2
    for one in about["tables"]:
        assert one["table"] in drawn
        assert f"this table, {size(one['bytes'])}" in drawn


@pytest.mark.parametrize(
    ("sizes", "costs"),
    [
        ([2000 * 1.3**step for step in range(15)], [0.4**step for step in range(15)]),
        ([11000, 12500, 14000, 17000], [0.5, 0.3, 0.1, 0.0]),
        ([2000, 9000], [0.0, 0.0]),
        ([2**22], [0.1]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_sizes_under_the_plot_can_be_read(sizes, costs):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    quality._draw_error(axes, (sizes, costs), int(sizes[len(sizes) // 2]))
    figure.canvas.draw()
    labels = [label.get_window_extent() for label in axes.get_xticklabels(which="both") if label.get_text()]
    assert len(labels) >= min(len(sizes), 2)
    assert all(one.x1 + 3 < other.x0 for one, other in itertools.pairwise(labels))


def test_an_export_that_grows_is_warned_of_with_a_remedy_that_works():
    bands = tuple(Band(count, ((bits, 64),), projected=False) for count, bits in ((16, 8), (335, 8), (161, 6)))
    whole = Exported(Layout(512, 64, bands), looked_up=True, scored=True)
    # Rows of 64 numbers with a scale each, two copies of three means, and where each row is, twice.
    assert whole.held(FORMS[3]) == 512 * (64 + 4) + 6 * 4 * 64 + 12 * 512
    (said,) = grown([whole], spec_of(ratio="3.9x", bits=None), 3.9)
    assert all(form.name in said for form in FORMS)
    advised = re.search(r"write bits: \[8\] and ratio: ([0-9.]+)x or more", said)
    assert advised
    table = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    measured = Measured([table], [metric(64, None)], unigram(np.arange(512)[::-1]), (8,), 3)
    (fitted,) = measured.allocate(int(4 * 512 * 64 / float(advised[1]))) or ()
    followed = Exported(fitted.layout, looked_up=True, scored=True)
    assert grown([followed], spec_of(ratio=float(advised[1]), bits=(8,)), float(advised[1])) == []


def test_quantize_names_the_table_that_it_leaves(unbitten, tmp_path):
    ctx, _ = unbitten
    for precision in ("int8-dynamic", "fp16"):
        after = dataclasses.replace(context(tmp_path / precision, "text-generation", ctx.data), store=ctx.store)
        spec = QuantizeSpec.model_validate({"uses": "quantize", "id": "q", "precision": precision})
        result = quantize(as_artifact(ctx.out), spec=spec, ctx=after)
        assert result.left.keys() >= {"transformer.wte", "lm_head"}
        assert "factors stay in float32 (method: adaptive)" in result.left["transformer.wte"]
        assert "transformer.wte: its tokens are in bands" in result.summary
        assert not [name for name in result.touched if ".table." in name]
        kept, made = load_file(ctx.out / "model.safetensors"), load_file(after.out / "model.safetensors")
        assert all(made[name].dtype == kept[name].dtype for name in kept if ".table." in name)
