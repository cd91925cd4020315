"""The first step of every graph: the model as it came in, brought into one form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import ModelSpec
from tasks.context import StepContext, StepError, StepResult
from tasks.data.encode import data_labels
from tasks.data.labels import agree, model_labels
from tasks.data.readers import records
from tasks.models.applications import task_of
from tasks.models.configuration import build_config, build_model, check_causal, check_length, is_speech
from tasks.models.convert import Tokens, own_tokens
from tasks.models.features import write_features
from tasks.models.generation import fill_tokens, settle, token_fields, use_prompt
from tasks.models.heads import load_for
from tasks.models.layout import check_finite
from tasks.models.load import check_weights, has_tokenizer, load_config, load_tokenizer, quiet, save
from tasks.models.resolve import resolve
from tasks.models.tokenizer import ABOUT, DEFAULT_SIZE, style_of, train_tokenizer
from tasks.registry import step

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_SALT = 0x6D6F64656C
"""Keeps the random weights apart from the other streams of the same seed."""


@step(BaselineSpec, libraries=("torch", "transformers", "tokenizers", "safetensors"))
def import_model(*, spec: BaselineSpec, ctx: StepContext) -> StepResult:
    """Bring the model that the spec names into a Hugging Face folder that does the spec's task.

    Weights keep the type in which they are stored. A model without a head for text-classification, or with one for
    other labels, gets a fresh one; so does a speech encoder without a head for CTC, with a vocabulary of the characters
    of the training data. A model from ``config:`` gets random weights, and a tokenizer trained on the training data
    unless ``model.tokenizer`` names one.

    Raises:
        StepError: the model, its tokenizer or the data is unfit, with the remedy.
    """
    quiet()
    labels = data_labels(ctx.data) if ctx.task == "text-classification" else ()
    if spec.model.source is not None:
        return _from_source(spec.model, labels, ctx)
    return _from_config(spec.model, labels, ctx)


def _from_config(model: ModelSpec, labels: tuple[str, ...], ctx: StepContext) -> StepResult:
    import torch

    fields = model.config or {}
    kind = fields["model_type"]
    warnings: list[str] = []
    draft = build_config(fields, ctx.task)  # mistakes come up before a tokenizer is trained
    if ctx.task == "text-generation":
        check_causal(draft, "model.config")
    if model.tokenizer is not None:
        tokens = _named(model.tokenizer)
        about = f"tokenizer {model.tokenizer}"
    else:
        tokens, about = _trained(kind, fields.get("vocab_size", DEFAULT_SIZE), ctx)
    tokenizer = tokens.tokenizer
    derived = token_fields(tokenizer, ctx.task, kind) | _label_fields(labels)
    config = build_config(fields, ctx.task, vocab_size=len(tokenizer), **derived)
    if config.vocab_size < len(tokenizer):
        raise StepError(
            f"model.config.vocab_size {config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} entries; "
            f"write {len(tokenizer)} or leave it out"
        )
    if config.vocab_size > len(tokenizer):
        warnings.append(
            f"vocab_size {config.vocab_size} leaves {config.vocab_size - len(tokenizer)} embeddings without a token; "
            f"the tokenizer has {len(tokenizer)} entries"
        )
    check_length(config, ctx.data, from_config=True)
    ctx.note("setting random weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.generator(_SALT).initial_seed())
        built = build_model(config, ctx.task)
    _write(built, tokens, ctx)
    return _result(built, ctx.out, labels, f"random weights; {about}", {}, tuple(warnings), revision=None)


def _from_source(model: ModelSpec, labels: tuple[str, ...], ctx: StepContext) -> StepResult:
    ctx.note(f"reading {model.source}")
    found = resolve(model.source or "", model.revision)
    config = load_config(found.folder)
    if ctx.task == "text-generation":
        check_causal(config, model.source or "")
    check_weights(found.folder)
    style = style_of(config.model_type, ctx.task)
    fresh, warnings = "", []
    if model.tokenizer is None and style == "ctc" and not has_tokenizer(found.folder):
        tokens, fresh = _trained(config.model_type, DEFAULT_SIZE, ctx)
    else:
        tokens = _named(model.tokenizer or str(found.folder))
        warnings += _unknown(tokens, ctx) if style == "ctc" else []
        if style == "ctc" and task_of(config.architectures) != ctx.task:
            fresh = f"{len(tokens.tokenizer)} entries of the tokenizer"
    tokenizer = tokens.tokenizer
    names = agree(labels, model_labels(config.to_dict())) if labels else ()
    if names is None or (labels and task_of(config.architectures) != "text-classification"):
        names, fresh = labels, f"{len(labels)} labels"
    if fresh:
        warnings.append(f"the head has random weights, for {fresh}; fine-tune before you judge the quality")
    derived = token_fields(tokenizer, ctx.task, config.model_type)
    if style == "ctc" and fresh:
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    if style == "ctc" and config.pad_token_id != tokenizer.pad_token_id:
        raise StepError(
            f"{model.source}: the model's blank is token {config.pad_token_id}, the tokenizer's padding is "
            f"{tokenizer.pad_token_id}; name the tokenizer that belongs to it in model.tokenizer"
        )
    if config.get_text_config().vocab_size < len(tokenizer):
        raise StepError(
            f"{model.source}: the tokenizer has {len(tokenizer)} entries, the model embeds {config.vocab_size}; "
            "name the tokenizer that belongs to it in model.tokenizer"
        )
    fill_tokens(config, derived)
    for name, value in _label_fields(names).items():
        setattr(config, name, value)
    check_length(config, ctx.data, from_config=False)
    built, left = load_for(found.folder, config, ctx.task, bool(fresh), ctx.generator(_SALT))
    check_finite(built)
    warnings += use_prompt(tokenizer, built)
    _write(built, tokens, ctx, found.folder)
    about = "weights as they came in" + (f"; fresh head for {fresh}" if fresh else "")
    return _result(built, ctx.out, names, about, left, tuple(warnings), revision=found.revision)


def _trained(model_type: str, size: int, ctx: StepContext) -> tuple[Tokens, str]:
    """A tokenizer trained on the training data, and what it is."""
    ctx.note("training a tokenizer")
    style = style_of(model_type, ctx.task)
    entries = train_tokenizer(_texts(ctx), size, style, ctx.out, ctx.data.max_length)
    return Tokens(load_tokenizer(ctx.out)), f"{ABOUT[style]}, {entries} entries from the training data"


def _texts(ctx: StepContext) -> Iterator[str]:
    for record in records(ctx.data, "train", ctx.task):
        yield record.text
        if record.target is not None:
            yield record.target


def _unknown(tokens: Tokens, ctx: StepContext) -> list[str]:
    """A warning where transcripts have characters that the tokenizer has not."""
    tokenizer = tokens.tokenizer
    letters = {letter for text in _texts(ctx) for letter in text if not letter.isspace()}
    unknown = sorted(letter for letter in letters if tokenizer(letter).input_ids == [tokenizer.unk_token_id])
    if not unknown:
        return []
    shown = " ".join(unknown[:20]) + (" …" if len(unknown) > 20 else "")
    return [
        f"the transcripts have {len(unknown)} characters that are not in the vocabulary, where they are all one: "
        f"{shown}; spell them out or leave them out"
    ]


def _named(source: str) -> Tokens:
    tokens = own_tokens(resolve(source, weights=False).folder)
    _pad(tokens.tokenizer, source)
    return tokens


def _pad(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if tokenizer.pad_token is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise StepError(f"{source}: the tokenizer has no padding, end or unknown token; name another tokenizer")
        tokenizer.pad_token = substitute


def _label_fields(names: tuple[str, ...]) -> dict[str, Any]:
    if not names:
        return {}
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _write(model: nn.Module, tokens: Tokens, ctx: StepContext, source: Path | None = None) -> None:
    """Write the model's folder; the type in which it computes is recorded where it is stored in halves."""
    from torch import bfloat16, float16

    config: Any = model.config
    settle(model, tokens)
    tokens.save(ctx.out)
    stored = next(model.parameters()).dtype
    save(model, ctx.out, compute_dtype="float32" if stored in (float16, bfloat16) else None)
    if is_speech(config):
        write_features(config, ctx.out, source)


def _result(
    model: nn.Module,
    out: Path,
    labels: tuple[str, ...],
    about: str,
    left: dict[str, str],
    warnings: tuple[str, ...],
    revision: str | None,
) -> StepResult:
    from tasks.models.check import weights_in

    weights = weights_in(out)
    name = type(model).__name__
    return StepResult(
        "model",
        touched=(name,),
        summary=f"{name}, {weights.parameters:,} parameters in {', '.join(sorted(weights.dtypes))}; {about}",
        left=left,
        properties={
            "architecture": name,
            "parameters": weights.parameters,
            "dtypes": dict(weights.dtypes),
            "labels": list(labels),
            "revision": revision,
        },
        warnings=warnings,
    )
