"""A smaller vocabulary: the tokens that the training data never uses go, from the tokenizer and from the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.prune import PruneSpec
from tasks.compress import cut, structured
from tasks.compress.pieces import needed, smaller
from tasks.context import Artifact, StepContext, StepError, StepResult

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from tasks.data.encoded import Encoded

TOKENIZERS = ("tokenizer.json", "target_tokenizer.json")

_NUMBERED = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "force_words_ids")
"""Fields that hold ids, beside those that end in ``_token_id``."""

_SIZES = ("vocab_size", "decoder_vocab_size")

_BIAS = "final_logits_bias"

_CHECKED = 4
_EXACT = 1e-4


def refuses(task: Task) -> str | None:
    """Why tokens cannot go for a task; None where they can."""
    if task == "speech-recognition":
        return (
            "method: vocabulary is for models that read text: one for CTC has characters alone, and Whisper's settings "
            "name tokens by number in many places; use method: width or depth"
        )
    return None


def prune_vocabulary(model: Artifact, spec: PruneSpec, ctx: StepContext) -> StepResult:
    """Take the tokens that the training data never uses out of tokenizer, embeddings and output.

    What keeps every text encodable stays: special and added tokens, bytes, single characters, and the pieces from which
    kept ones are merged. Tokens keep their order. Before the step succeeds the training data is encoded anew and must
    be the old tokens under their new numbers, and on some of it the model must give the logits of the whole one.

    Raises:
        StepError: every token is used, the tokenizer or the model cannot be cut, or a proof fails.
    """
    from tasks.data import encode
    from tasks.models import load, save
    from tasks.models.check import grown, weights_in
    from tasks.models.load import check_plain

    reason = refuses(ctx.task)
    if reason is not None:
        raise StepError(reason)
    network: Any = load(model.path)
    check_plain(network)
    data = encode(ctx.data, "train", ctx.task, model.path, ctx.store)
    if not len(data):
        raise StepError("the training data has no example to see tokens in; check data.train and its filters")
    files = {name: _read(model.path / name) for name in TOKENIZERS if (model.path / name).is_file()}
    if not files:
        raise StepError(f"{model.path} has no tokenizer.json; import the model through a spec, which writes one")
    size = network.config.vocab_size
    kept = plan(files, _used(data), _ids_of(network), size)
    if len(kept) == size:
        raise StepError(f"the training data uses, or the tokenizer needs, all {size} tokens; leave this step out")
    numbers = {old: new for new, old in enumerate(kept)}
    smaller_model = _cut(network, kept, numbers)
    for name, content in files.items():
        text = json.dumps(smaller(content, numbers), ensure_ascii=False, indent=2)
        (ctx.out / name).write_text(text, encoding="utf-8")
    dropped = _write_rest(model.path, ctx.out, numbers)
    save(smaller_model, ctx.out)
    _prove_encoding(data, encode(ctx.data, "train", ctx.task, ctx.out, ctx.store), numbers)
    _prove_loaded(model.path, ctx.out, data, numbers)
    _prove_logits(network, smaller_model, data, kept, numbers, ctx)
    properties: dict[str, Any] = {}
    summary, warnings = f"kept {len(kept)} of {size} tokens", ()
    if spec.recover is not None:
        trained, properties, warnings = structured.recover(smaller_model, replace(model, path=ctx.out), spec, ctx)
        save(smaller_model, ctx.out)
        summary += f"; {trained}"
    sizes = weights_in(model.path), weights_in(ctx.out)
    return StepResult(
        kind="model",
        touched=(*files, *_tables(network)),
        left=dict.fromkeys(dropped, "not written: tokenizer.json says the same"),
        summary=f"{summary}; parameters {sizes[0].parameters} -> {sizes[1].parameters}",
        properties=properties
        | {
            "tokens": len(kept),
            "tokens_before": size,
            "parameters": sizes[1].parameters,
            "parameters_before": sizes[0].parameters,
            "weight_bytes": sizes[1].bytes,
            "weight_bytes_before": sizes[0].bytes,
        },
        warnings=(*warnings, *grown(*sizes)),
    )


def plan(files: Mapping[str, Mapping[str, Any]], used: Iterable[int], named: Iterable[int], size: int) -> list[int]:
    """The ids that stay, ascending.

    Args:
        files: the tokenizers by their file.
        used: ids in the data.
        named: ids that the configuration names.
        size: of the vocabulary.

    Raises:
        StepError: the tokenizer cannot be cut, or has more tokens than the model.
    """
    kept = {*used, *named}
    for _ in files:  # what one tokenizer needs may be made of pieces in the other
        for content in files.values():
            kept |= needed(content, kept)
    if max(kept) >= size:
        raise StepError(f"the tokenizer has the token {max(kept)}, and the model rows for {size}; they do not fit")
    return sorted(kept)


def _used(data: Encoded) -> set[int]:
    import numpy as np

    found: set[int] = {data.pad}
    for ids, mask in ((data.input_ids, data.attention_mask), (data.target_ids, data.target_mask)):
        if ids is not None:
            found |= set(np.unique(np.asarray(ids)[np.asarray(mask).astype(bool)]).tolist())
    return found


def _ids_of(network: Any) -> set[int]:
    """The ids that the configurations of model and generation name."""
    found: set[int] = set()
    for settings in _settings(network):
        for value in _id_fields(settings).values():
            found |= set(_flat(value))
    return found


def _settings(network: Any) -> list[Any]:
    return [
        settings for settings in (network.config, getattr(network, "generation_config", None)) if settings is not None
    ]


def _id_fields(settings: Any) -> dict[str, Any]:
    fields = settings.to_dict()
    return {
        name: value
        for name, value in fields.items()
        if value is not None and (name.endswith(("_token_id", "_token_ids")) or name in _NUMBERED)
    }


def _flat(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in _flat(part)]
    return [value] if isinstance(value, int) and value >= 0 else []


def _renumbered(value: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_renumbered(part, numbers) for part in value]
    return numbers.get(value, value) if isinstance(value, int) else value


def _tables(network: Any) -> list[str]:
    """The tensors with a row for every token."""
    from tasks.models.anatomy import anatomy

    tokens = [f"{name}.weight" for name, what in anatomy(network).embeddings.items() if what == "tokens"]
    head = network.get_output_embeddings()
    names = {module: name for name, module in network.named_modules()}
    if head is not None:
        tokens += [
            f"{names[head]}.weight",
            *([f"{names[head]}.bias"] if getattr(head, "bias", None) is not None else []),
        ]
    state = network.state_dict()
    return [*dict.fromkeys(tokens), *([_BIAS] if _BIAS in state else [])]


def _cut(network: Any, kept: list[int], numbers: Mapping[int, int]) -> nn.Module:
    places = tuple(cut.Place(name, 1 if name == _BIAS else 0) for name in _tables(network))
    size = network.config.vocab_size
    axis = cut.Axis("vocabulary", "hidden", size, places, ())
    state = network.state_dict()
    odd = [name for place in places if state[name := place.tensor].shape[place.dim] != size]
    if odd:
        raise StepError(
            f"{odd[0]} has not one row for each of the {size} tokens; this model's vocabulary cannot be cut"
        )
    fields = {name: len(kept) for name in _SIZES if getattr(network.config, name, None) == size}
    config = cut.configured(network.config, fields)
    config = cut.configured(
        config, {name: _renumbered(value, numbers) for name, value in _id_fields(network.config).items()}
    )
    built: Any = cut.rebuild(network, config, cut.cut(cut.state_of(network), [axis], {"vocabulary": kept}))
    settings = getattr(built, "generation_config", None)
    if settings is not None:
        for name, value in _id_fields(settings).items():
            setattr(settings, name, _renumbered(value, numbers))
    return built


def _write_rest(source: Path, out: Path, numbers: Mapping[int, int]) -> list[str]:
    """Write what else belongs to a tokenizer; the names of the files that would say the old vocabulary."""
    from tasks.models.load import INPUT_FILES

    old = []
    for name in INPUT_FILES:
        file = source / name
        if name in TOKENIZERS or not file.is_file():
            continue
        if name == "tokenizer_config.json":
            content = _read(file)
            added = content.get("added_tokens_decoder")
            if isinstance(added, dict):
                content["added_tokens_decoder"] = {str(numbers[int(number)]): token for number, token in added.items()}
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (out / name).write_text(text, encoding="utf-8")
        elif name not in _VOCABULARIES:
            shutil.copyfile(file, out / name)
        else:
            old.append(name)
    return old


_VOCABULARIES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "source.spm",
    "spiece.model",
    "target.spm",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
"""Files that say the vocabulary beside tokenizer.json."""


def _prove_encoding(old: Encoded, new: Encoded, numbers: Mapping[int, int]) -> None:
    """Hold the data as the new tokenizer encodes it against the old tokens.

    Raises:
        StepError: a token differs.
    """
    import numpy as np

    table = np.full(max(numbers) + 1, -1, np.int64)
    table[list(numbers)] = list(numbers.values())
    for name in ("input_ids", "target_ids"):
        before, after = getattr(old, name), getattr(new, name)
        if before is None:
            continue
        mask = np.asarray(getattr(old, "attention_mask" if name == "input_ids" else "target_mask")).astype(bool)
        same = before.shape == after.shape and np.array_equal(table[np.asarray(before)[mask]], np.asarray(after)[mask])
        if not same or len(old) != len(new):
            raise StepError(
                "the smaller tokenizer encodes the training data in another way than the whole one, so that the model "
                "would read other tokens than it learned; leave this step out for this tokenizer"
            )


def _prove_loaded(source: Path, out: Path, data: Encoded, numbers: Mapping[int, int]) -> None:
    """Hold what transformers itself makes of both folders against each other, on some texts of the data.

    Raises:
        StepError: they differ: the tokenizer's class reads more than tokenizer.json.
    """
    import numpy as np

    from tasks.models import load_tokenizer

    before, after = load_tokenizer(source), load_tokenizer(out)
    for ids in np.asarray(data.input_ids)[:_CHECKED].tolist():
        text = before.decode(ids, skip_special_tokens=True)
        wanted = before(text).input_ids  # type: ignore[operator]
        known = all(number in numbers for number in wanted)  # a window may begin within a word
        if known and after(text).input_ids != [numbers[number] for number in wanted]:  # type: ignore[operator]
            raise StepError(
                f"{type(after).__name__} of transformers encodes otherwise with the smaller vocabulary; leave this "
                "step out for this tokenizer"
            )


def _prove_logits(
    old: nn.Module, new: nn.Module, data: Encoded, kept: list[int], numbers: Mapping[int, int], ctx: StepContext
) -> None:
    """Hold the logits of some examples against those of the whole model for the same tokens.

    Raises:
        StepError: they differ.
    """
    from tasks.compress.calibrate import outputs

    few = data.take(slice(0, _CHECKED))
    expected = outputs(old, few)
    if ctx.task != "text-classification":
        expected = expected[..., kept]
    found = outputs(new, _renumbered_data(few, numbers))
    if not float((expected - found).abs().max()) <= _EXACT * float(expected.abs().max()):
        raise StepError("the model uses the numbers of tokens in a way that is not known here; leave this step out")


def _renumbered_data(data: Encoded, numbers: Mapping[int, int]) -> Encoded:
    import numpy as np

    def changed(ids: Any) -> np.ndarray | None:
        return None if ids is None else np.vectorize(lambda old: numbers.get(old, 0))(np.asarray(ids)).astype(np.int32)

    return replace(
        data, input_ids=changed(data.input_ids), target_ids=changed(data.target_ids), pad=numbers.get(data.pad, 0)
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StepError(f"{file} is not JSON: {error}; fetch the model again") from error
    if not isinstance(content, dict):
        raise StepError(f"{file} is no JSON object; fetch the model again")
    return content
