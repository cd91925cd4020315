"""Healing: what it takes back, also of what the data hardly shows."""

from __future__ import annotations

import pytest
import torch

from specs.schema.steps.finetune import FinetuneSpec
from tasks.adaptive_input.adaptive_input import adaptive_input
from tasks.adaptive_input.noise import disturbed, ordinary
from tasks.compress.teach import LABELLED
from tasks.data.tokens import open_tokenizer
from tasks.finetune.finetune import finetune
from tests.support import as_artifact, context
from tests.tasks.banded import load, loss_of, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_data, llama):
    """A llama that knows its text."""
    ctx = context(tmp_path_factory.mktemp("trained"), "text-generation", text_data)
    spec = FinetuneSpec(uses="finetune", id="t", max_steps=120, batch_size=16, learning_rate=1e-2, validation=0)
    finetune(as_artifact(llama), spec=spec, ctx=ctx)
    return ctx.out


def test_healing_takes_back_most_of_what_was_lost(trained, text_data, tmp_path):
    losses = {}
    for name, heal in (
        ("hurt", None),
        ("healed", {"max_steps": 60, "batch_size": 16, "learning_rate": 5e-3, "trains": "model"}),
    ):
        ctx = context(tmp_path / name, "text-generation", text_data)
        result = adaptive_input(as_artifact(trained), spec=spec_of(ratio="15x", bits=(1,), heal=heal), ctx=ctx)
        losses[name] = loss_of(ctx.out, ctx)
        about = result.properties["adaptive_input"]
        assert about["bytes"] <= about["budget"]
        surprise = [band["surprise"] for band in about["tables"][0]["bands"] if band["surprise"]]
        assert surprise
        losses["dense"] = loss_of(trained, ctx)
    assert losses["hurt"] > losses["dense"] + 0.05
    assert losses["healed"] - losses["dense"] < 0.5 * (losses["hurt"] - losses["dense"])


def test_a_healing_that_does_not_help_is_told(trained, text_data, tmp_path):
    ctx = context(tmp_path, "text-generation", text_data)
    heal = {"max_steps": 2, "batch_size": 4, "learning_rate": 9.0, "validation": 0.2}
    result = adaptive_input(as_artifact(trained), spec=spec_of(ratio="5x", heal=heal), ctx=ctx)
    assert any("no validation was better" in warning for warning in result.warnings)


def test_special_tokens_are_neither_drawn_nor_replaced(bert):
    tokens, opened = ordinary(bert, 300), open_tokenizer(bert)
    named = [opened.core.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")]
    special = [number for number in named if number is not None]
    assert len(special) >= 3
    assert not torch.isin(torch.tensor(special), tokens).any()
    assert tokens.tolist() == sorted({*range(min(300, opened.core.get_vocab_size()))} - set(special))
    ids = torch.tensor([special * 20] * 8)
    assert torch.equal(disturbed({"input_ids": ids}, ["input_ids"], tokens, 0.5)["input_ids"], ids)


def test_a_disturbed_example_has_so_many_drawn_tokens_and_no_label():
    torch.manual_seed(0)
    tokens, ids = torch.arange(10, 5000), torch.full((400, 100), 50)
    labels = torch.where(torch.arange(100) < 60, 70, -100).repeat(400, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found = disturbed(batch, ["input_ids", "labels"], tokens, 0.1)
    changed = found["input_ids"] != ids
    assert 0.08 < changed.float().mean() < 0.12
    assert torch.equal(found[LABELLED], ~(changed.any(1) | (found["labels"] != labels).any(1)))
    assert 0.4 < found[LABELLED].float().mean() < 0.6
    assert torch.equal(found["labels"] == -100, labels == -100)
    assert found["attention_mask"] is batch["attention_mask"]
    drawn = found["input_ids"][changed]
    assert int(drawn.min()) < 60
    assert int(drawn.max()) > 4950
    assert torch.equal(ids, torch.full((400, 100), 50))


def test_tokens_that_the_data_never_has_keep_what_they_do(trained, text_data, tmp_path):
    """How far the outputs for texts of unseen tokens are from those before the step, without noise and with it."""
    tokens = ordinary(trained, 320)
    ids = tokens[torch.randint(len(tokens), (16, 24), generator=torch.Generator().manual_seed(0))]
    dense, apart = load(trained)(input_ids=ids).logits.log_softmax(-1).detach(), {}
    for noise in (0.0, 0.1):
        ctx = context(tmp_path / str(noise), "text-generation", text_data)
        heal = {"max_steps": 60, "batch_size": 16, "learning_rate": 5e-3, "noise": noise}
        adaptive_input(as_artifact(trained), spec=spec_of(ratio="12x", heal=heal), ctx=ctx)
        with torch.inference_mode():
            logs = load(ctx.out)(input_ids=ids).logits.log_softmax(-1)
        apart[noise] = float((dense.exp() * (dense - logs)).sum(-1).mean())
    assert apart[0.1] < 0.8 * apart[0.0], apart
