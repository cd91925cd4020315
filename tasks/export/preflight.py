"""What can be known about an export before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec
from specs.schema.steps.export import ExportTfliteSpec
from tasks.context import StepError
from tasks.export.npu import choose

if TYPE_CHECKING:
    from tasks.models.applications import Family

UNFAITHFUL: Mapping[str, str] = {
    "deberta-v2": "the converter's file does not compute what torch does",
    "opt": "it takes no ready-made attention mask",
    "bloom": "it takes no ready-made attention mask",
    "wavlm": "its attention takes no mask from outside, so that padding would change what it hears",
    "data2vec-audio": "its positions are several convolutions, so that padding would change what it hears",
    "wav2vec2-conformer": "its convolutions see padding, which would change what it hears",
    "sew": "it shortens its frames behind the convolutions",
    "sew-d": "it shortens its frames behind the convolutions",
}
"""Architectures whose converted file was seen to differ from torch by more than the step allows, or not to convert."""

UNCACHED = ("bloom", "falcon_mamba", "mamba", "mamba2", "opt", "rwkv", "xlnet")
"""Decoders that keep no keys and values of every layer, or not in transformers' cache."""

VARIANTS = {
    "export_tflite (int8)": ExportTfliteSpec(uses="export_tflite", id="int8", precision="int8"),
    "export_tflite (npu)": ExportTfliteSpec(uses="export_tflite", id="npu", precision="int8", npu="ethos-u85-256"),
}

_LARGE_OUTPUT = 64_000_000


def refuses(spec: ExportTfliteSpec | None, family: Family, task: Task) -> str | None:
    """Why a model of ``family`` cannot be exported for ``task``; None where it can."""
    if spec is None:
        return None
    writes_from_an_encoder = family == "encoder-decoder" and task != "text-classification"
    if spec.npu is not None and writes_from_an_encoder:
        return (
            f"npu: {spec.npu} compiles one graph, and a model that reads and then writes token by token is two; leave "
            "npu out, or use a model for CTC where it is speech"
        )
    if spec.precision == "int8" and writes_from_an_encoder:
        return (
            "precision int8 gives the encoder's output another scale than the decoder takes it with; write precision: "
            "int8-dynamic"
        )
    for field, tasks, families in _FIELDS:
        if getattr(spec, field) is not None and not (task in tasks and family in families):
            return f"{field} is for {' and '.join(tasks)} with a model that is {' or '.join(families)}; leave it out"
    return None


_FIELDS: tuple[tuple[str, tuple[Task, ...], tuple[Family, ...]], ...] = (
    ("generation", ("text-generation",), ("decoder",)),
    ("duration", ("speech-recognition",), ("ctc",)),
    ("length", ("text-generation", "text-classification", "translation"), ("decoder", "encoder", "encoder-decoder")),
    ("cache", ("text-generation", "translation", "speech-recognition"), ("decoder", "encoder-decoder")),
)
"""Fields that not every model has a use for, with the tasks and families that do."""


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that the model can tell apart by position, from its configuration; None where it sets no limit."""
    if "relative_attention_num_buckets" in config:
        return None
    limit = next((config[name] for name in ("max_position_embeddings", "n_positions") if config.get(name)), None)
    if limit is None:
        return None
    counts_from_padding = config.get("model_type") in ("roberta", "xlm-roberta", "camembert")
    return limit - (config.get("pad_token_id", 1) or 0) - 1 if counts_from_padding else limit


def target_length(cache: int | None, task: Task, data: DataSpec) -> int:
    """Tokens that an encoder-decoder's file can write, where the spec of the export says ``cache``."""
    return cache or (data.max_target_length if task == "translation" else None) or data.max_length


def check_length(config: Mapping[str, Any], length: int, field: str = "length") -> None:
    """Refuse a length that the model has no positions for.

    Raises:
        StepError: the length and the limit.
    """
    limit = positions_of(config)
    if limit is not None and length > limit:
        raise StepError(f"{field} is {length} and the model has {limit} positions; write {field}: {limit} or less")


def window_of(config: Mapping[str, Any]) -> int | None:
    """Tokens within which the model attends; None where it attends to all."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    slides = "sliding_attention" in kinds if kinds else config.get("use_sliding_window", True)
    return window if window and slides else None


def check_window(config: Mapping[str, Any], length: int, field: str = "length") -> None:
    """Refuse a length beyond the window in which the model attends: the export's mask knows no window.

    Raises:
        StepError: the length and the window.
    """
    window = window_of(config)
    if window is not None and window < length:
        raise StepError(
            f"the model attends within {window} tokens and {field} is {length}; write {field}: {window} or less"
        )


def check_shape(spec: ExportTfliteSpec, config: Mapping[str, Any], task: Task, data: DataSpec) -> None:
    """Refuse shapes that the model has no positions for.

    Raises:
        StepError: the first of them.
    """
    for check in _shape_checks(spec, config, task, data.max_length, target_length(spec.cache, task, data)):
        check()


def _shape_checks(
    spec: ExportTfliteSpec, config: Mapping[str, Any], task: Task, max_length: int, target: int
) -> list[Callable[[], None]]:
    length = spec.length or max_length
    if task == "speech-recognition":
        limit = config.get("max_target_positions")
        return [] if limit is None else [lambda: check_length({"max_position_embeddings": limit}, target, "cache")]
    checks = [lambda: check_length(config, length), lambda: check_window(config, length)]
    if task == "translation":
        checks.append(lambda: check_length(config, target, "cache"))
    elif task == "text-generation" and spec.generates and spec.cache is not None:
        cache = spec.cache
        checks += [lambda: check_length(config, cache, "cache"), lambda: check_window(config, cache, "cache")]
    return checks


def check_export(
    spec: ExportTfliteSpec, config: Mapping[str, Any], task: Task, max_length: int
) -> tuple[list[str], list[str]]:
    """What stands against an export (``problems``) and what its user should know (``warnings``), before any training.

    Args:
        spec: the export.
        config: the configuration of the model that comes in; steps before the export may make it smaller.
        task: what the model does.
        max_length: tokens of an example of the data, the default length.
    """
    problems: list[str] = []
    warnings: list[str] = []
    kind = config.get("model_type", "")
    if kind in UNFAITHFUL:
        problems.append(
            f"{kind} models cannot be exported: {UNFAITHFUL[kind]}; use another architecture, or quantize without an "
            "export"
        )
    elif task == "text-generation" and spec.generates and kind in UNCACHED:
        problems.append(f"{kind} keeps no keys and values of every layer in a cache; write generation: false")
    length = spec.length or max_length
    hidden = next((config[name] for name in ("hidden_size", "n_embd", "dim", "d_model") if config.get(name)), None)
    rows = config.get("vocab_size") or 0
    checks = _shape_checks(spec, config, task, max_length, spec.cache or max_length)
    if spec.npu is not None:
        target = spec.npu
        checks.append(lambda: choose(target, spec.npu_system_config, spec.npu_memory_mode) and None)
    for check in checks:
        try:
            check()
        except StepError as error:
            problems.append(str(error))
    if spec.precision.startswith("int4") and hidden:
        block = int(spec.precision.removeprefix("int4-block"))
        if hidden % block:
            warnings.append(
                f"{spec.precision}: width {hidden} does not divide by {block}, so most weights are stored as int8; "
                "use a smaller block or precision: int8-dynamic"
            )
    if task == "text-generation" and spec.batch * length * rows > _LARGE_OUTPUT:
        warnings.append(
            f"the output is [{spec.batch}, {length}, {rows}] numbers, {spec.batch * length * rows * 4 / 1e6:.0f} MB a "
            "call; a shorter length is faster"
        )
    if spec.npu is not None and not spec.npu.startswith("ethos-u85"):
        warnings.append(f"{spec.npu} cannot look up tables: the embedding and the mask are left to the CPU")
    return problems, warnings
