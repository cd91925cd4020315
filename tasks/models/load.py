"""Loading and saving of models: Hugging Face's folder layout, safetensors only, no code from the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.base import TASKS
from tasks.context import StepError
from tasks.models.applications import auto_for, task_of
from tasks.models.features import FILE as FEATURES
from tasks.models.layout import check_finite
from tasks.models.transforms import Extras, read_extras, replay, trainable, write_extras

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "target.spm",
    "target_tokenizer.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

INPUT_FILES = (*TOKENIZER_FILES, FEATURES)
"""What turns texts and audio into the model's input; every step keeps it."""

_REPLAYED = "lathe_transforms"
"""Where a loaded model keeps what was replayed on it, so that what trains it writes it again."""

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def load(path: Path, device: str = "cpu") -> nn.Module:
    """The model in the folder ``path``, in eval mode on ``device``.

    Weights stored as fp16 or bf16 compute in float32. Transforms that ``lathe.json`` records are replayed.

    Raises:
        StepError: the folder has no safetensors weights, asks for code of its own, or does not fit its configuration,
            or a weight is not finite.
    """
    import torch

    quiet()
    config = load_config(path)
    auto = auto_class(config, path)
    extras = read_extras(path)
    if extras.transforms:
        return _whole(_load_transformed(path, config, auto, extras), device)
    check_weights(path)
    model, info = auto.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise StepError(
            f"{path}: {len(missing)} weights that config.json asks for are not in the file, first {missing[0]}; "
            "the folder is incomplete or belongs to another model"
        )
    return _whole(_settled(model), device)


def _whole(model: nn.Module, device: str) -> nn.Module:
    check_finite(model)
    return model.eval().to(device)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder ``path``.

    Raises:
        StepError: there is none, it has no fast form, or it asks for code of its own.
    """
    from transformers import AutoTokenizer

    quiet()
    if not has_tokenizer(path):
        raise StepError(f"{path} has no tokenizer; name one in model.tokenizer, or leave it to be trained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a folder that it cannot read
        raise StepError(f"{path}: the tokenizer cannot be read: {_first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise StepError(f"{path}: the tokenizer has no fast form; save it as tokenizer.json first")
    return tokenizer


def has_tokenizer(path: Path) -> bool:
    """Whether the folder ``path`` has a file of a tokenizer."""
    return any((path / name).exists() for name in TOKENIZER_FILES)


def save(
    model: nn.Module,
    out: Path,
    tokenizer_from: Path | None = None,
    *,
    transforms: Sequence[Mapping[str, Any]] | None = None,
    compute_dtype: str | None = None,
) -> None:
    """Write ``model`` as a Hugging Face folder.

    The dtypes in the file are those of the model. The tokenizer's files are copied unchanged, so that what was encoded
    for one artifact serves those made from it.

    Args:
        model: a transformers model; with ``transforms`` its modules may be anything with a state dict.
        out: the folder.
        tokenizer_from: a folder with the tokenizer's files; None writes none.
        transforms: what ``load`` replays before it sets the weights; see ``tasks.models.transforms``. Default: those
            with which the model was loaded.
        compute_dtype: recorded where the model is stored in another type than it computes in.
    """
    out.mkdir(parents=True, exist_ok=True)
    recorded: tuple[Mapping[str, Any], ...] = tuple(getattr(model, _REPLAYED, ()) if transforms is None else transforms)
    if recorded:
        aliases = _save_state(model, out)
    else:
        quiet()
        model.save_pretrained(out, max_shard_size="1000GB")  # type: ignore[operator]
        aliases = {}
    write_extras(out, Extras(recorded, aliases, compute_dtype))
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the files of a tokenizer, and of a speech model's features, unchanged."""
    for name in INPUT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def read_config(path: Path) -> dict[str, Any]:
    """``path/config.json`` as a mapping, without transformers.

    Raises:
        StepError: there is none, or it is not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise StepError(f"{path} is not a model: it has no config.json; name the folder that holds it")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StepError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise StepError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise StepError(f"{file} names no model_type; it is not the configuration of a Hugging Face model")
    return config


def load_config(path: Path) -> PretrainedConfig:
    """The configuration in the folder ``path``.

    Raises:
        StepError: the model type is unknown, or exists only as code in the folder.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_config(path)
    if raw["model_type"] not in CONFIG_MAPPING:
        reason = "exists only as code in the folder, which is never run" if "auto_map" in raw else "is unknown"
        raise StepError(
            f"{path}: model type {raw['model_type']!r} {reason}; use a model whose type transformers itself has"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a configuration can be wrong in as many ways as there are model types
        raise StepError(f"{path / 'config.json'}: {_first_line(error)}") from error


def auto_class(config: PretrainedConfig, path: Path) -> Any:
    """transformers' class that loads the model that ``config`` describes.

    Raises:
        StepError: the architecture has no head for a task.
    """
    task = task_of(config.architectures)
    if task is None:
        raise StepError(
            f"{path}: architecture {', '.join(config.architectures or ['(none)'])} has no head for {', '.join(TASKS)}"
        )
    return auto_for(task, config.model_type)


def check_weights(path: Path) -> None:
    """Refuse a folder without safetensors weights, saying the way out.

    Raises:
        StepError: there are only pickles, only an adapter, or no weights at all.
    """
    if (path / "adapter_config.json").exists():
        raise StepError(f"{path} holds an adapter; merge it into its model first (peft: merge_and_unload)")
    if (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise StepError(
            f"{path} has its weights only as a pickle ({pickles[0]}), which can run code and is never loaded. If you "
            'trust it, convert it: python -c "from transformers import AutoConfig as C; import transformers as t; '
            f"p = '{path}'; getattr(t, C.from_pretrained(p).architectures[0]).from_pretrained(p, "
            f'use_safetensors=False).save_pretrained(p)"; or use a hub revision that has {WEIGHTS}'
        )
    raise StepError(f"{path} has no {WEIGHTS}; name the folder that holds the weights")


def quiet() -> None:
    """Keep transformers' progress bars and load reports off the terminal; what matters is raised or returned."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_plain(model: nn.Module) -> None:
    """Raises StepError where the model has a structure that no configuration says, so that it cannot be made anew from
    one in another shape."""
    names = [entry["name"] for entry in getattr(model, _REPLAYED, ())]
    if names:
        raise StepError(
            f"no configuration says what an earlier step made of this model ({', '.join(names)}), so that it cannot be "
            "made anew in another shape; put that step behind this one"
        )


def _load_transformed(path: Path, config: PretrainedConfig, auto: Any, extras: Extras) -> nn.Module:
    from safetensors.torch import load_file
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = auto.from_config(config, trust_remote_code=False)
    replay(model, extras)
    setattr(model, _REPLAYED, extras.transforms)
    file = path / WEIGHTS
    if not file.is_file():
        raise StepError(f"{path} has no {WEIGHTS}; make the artifact again")
    state = load_file(file)
    try:
        state.update({alias: state[owner] for alias, owner in extras.aliases.items()})
        model.load_state_dict(state, strict=True, assign=True)
    except (KeyError, RuntimeError) as error:
        why = _first_line(error) if isinstance(error, KeyError) else str(error).partition("\n")[2].strip()[:300]
        raise StepError(f"{path}: the weights do not fit the recorded transforms: {why}") from error
    if (path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    if not trainable(extras):
        return model.requires_grad_(False)
    return _settled(model.float())


def _settled(model: nn.Module) -> nn.Module:
    """``model`` with what it computes itself, such as Marian's sines, kept from training."""
    computed = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if name in computed:
            parameter.requires_grad_(False)
    return model


def _save_state(model: nn.Module, out: Path) -> dict[str, str]:
    from safetensors.torch import save_file

    state: dict[str, Any] = {}
    owners: dict[tuple[int, tuple[int, ...], Any], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if tensor.numel() and identity in owners:
            aliases[name] = owners[identity]
        else:
            owners[identity] = name
            state[name] = tensor.contiguous()
    save_file(state, out / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(out)  # type: ignore[union-attr, operator]
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.save_pretrained(out)  # type: ignore[union-attr, operator]
    return aliases


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
