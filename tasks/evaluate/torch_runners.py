"""Model and packed artifacts in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.base import Task
from tasks.data.encoded import Encoded
from tasks.evaluate.runners import Inputs, Runner, Writer

_POSITIONS = ("max_target_positions", "max_position_embeddings", "n_positions")
"""What configurations call the number of positions that a decoder, or a model of one part, has."""


def open_folder(path: Path, task: Task, device: str) -> Runner | Writer:
    """The model in the folder ``path``, on ``device``."""
    from tasks.models import family_of, load

    model: Any = load(path, device=device)
    family = family_of(model.config)
    return _OPENERS.get((task, family), TorchRunner)(model, device)


class TorchRunner:
    """A model whose logits score text or classes."""

    batch = None
    length = None
    rescores = False

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device
        if getattr(model.config, "use_cache", False):
            model.config.use_cache = False
        self.positions = positions(model.config)
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self._forward(*self._place(ids, mask)).float().cpu().numpy()

    def nll(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch

        ids_on, mask_on = self._place(ids, mask)
        logits = self._forward(ids_on, mask_on)
        sums = np.empty(len(ids))
        with torch.inference_mode():
            for row in range(len(ids)):  # row by row: the log-softmax of a whole batch would double the memory
                end = int(mask[row].sum())
                losses = torch.nn.functional.cross_entropy(
                    logits[row, : max(end - 1, 0)].float(), ids_on[row, 1 : max(end, 1)], reduction="none"
                )
                sums[row] = losses.double().sum().item()
        return sums

    def generate(self, prompt: np.ndarray, limit: int, eos: int | None) -> list[int]:
        import torch

        ids, mask = self._place(prompt[None], np.ones_like(prompt)[None])
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                min_new_tokens=0 if eos is not None else limit,
                num_beams=1,
                do_sample=False,
                use_cache=True,
                eos_token_id=eos,
                pad_token_id=0,
            )
        return _until(found[0, len(prompt) :].tolist(), eos)

    def caller(self, ids: np.ndarray, mask: np.ndarray) -> Callable[[], object]:
        import torch

        placed = self._place(ids, mask)

        def call() -> None:
            self._forward(*placed)
            if self.device != "cpu":
                torch.cuda.synchronize()

        return call

    def _place(self, ids: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
        import torch

        as_long = (torch.from_numpy(np.array(values, np.int64)) for values in (ids, mask))
        on_ids, on_mask = (values.to(self.device) for values in as_long)
        return on_ids, on_mask

    def _forward(self, ids: Any, mask: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(input_ids=ids, attention_mask=mask).logits


class TorchSeq2Seq:
    """An encoder with a decoder that writes from its output."""

    batch = None
    length = None
    at_once = False

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device
        self.positions = positions(model.config)
        self.target_length = None if self.positions is None else self.positions - 1  # the start token has one too

    def write(self, inputs: Inputs, limit: int) -> list[list[int]]:
        import torch

        config = self.model.config
        with torch.inference_mode():
            found = self.model.generate(
                **place(inputs, self.device), num_beams=1, do_sample=False, max_new_tokens=limit, use_cache=True
            )
        beyond = {config.decoder_start_token_id, config.pad_token_id, config.bos_token_id}
        rows = (row[1:] if row[:1] == [config.decoder_start_token_id] else row for row in found.tolist())
        return [[token for token in _until(row, config.eos_token_id) if token not in beyond] for row in rows]

    def logits(self, inputs: Inputs, decoder_ids: np.ndarray | None) -> np.ndarray:
        import torch

        given = place({**inputs, "decoder_input_ids": np.asarray(decoder_ids, np.int64)}, self.device)
        with torch.inference_mode():
            return self.model(**given, use_cache=False).logits.float().cpu().numpy()

    def decoder_ids(self, rows: Encoded, chosen: np.ndarray) -> np.ndarray | None:
        targets = np.asarray(rows.target_ids)[chosen].astype(np.int64)
        start = np.full((len(targets), 1), self.model.config.decoder_start_token_id)
        return np.concatenate([start, targets[:, :-1]], axis=1)


class TorchCtc:
    """An encoder that names a character, or none, for every frame of audio."""

    batch = None
    length = None
    positions = None
    target_length = None
    at_once = True

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device

    def write(self, inputs: Inputs, limit: int) -> list[list[int]]:
        best = self.logits(inputs, None).argmax(-1)
        frames = np.full(len(best), best.shape[1])
        if "attention_mask" in inputs:
            import torch

            samples = torch.from_numpy(inputs["attention_mask"].sum(-1, dtype=np.int64))
            frames = self.model._get_feat_extract_output_lengths(samples).numpy()
        blank = self.model.config.pad_token_id
        return [collapse(row[:count], blank)[:limit] for row, count in zip(best, frames, strict=True)]

    def logits(self, inputs: Inputs, decoder_ids: np.ndarray | None) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.model(**place(inputs, self.device)).logits.float().cpu().numpy()

    def decoder_ids(self, rows: Encoded, chosen: np.ndarray) -> np.ndarray | None:
        return None


_OPENERS = {
    ("translation", "encoder-decoder"): TorchSeq2Seq,
    ("speech-recognition", "encoder-decoder"): TorchSeq2Seq,
    ("speech-recognition", "ctc"): TorchCtc,
}


def place(inputs: Inputs, device: str) -> dict[str, Any]:
    """Arrays as tensors on a device: whole numbers as int64, others as float32."""
    import torch

    kinds = {name: np.float32 if array.dtype.kind == "f" else np.int64 for name, array in inputs.items()}
    return {name: torch.from_numpy(np.array(array, kinds[name])).to(device) for name, array in inputs.items()}


def collapse(best: np.ndarray, blank: int) -> list[int]:
    """What CTC's labels, one for each frame [F], spell: repeats count once, blanks separate and are left out."""
    kept = np.append(True, best[1:] != best[:-1]) & (best != blank) if len(best) else np.zeros(0, bool)
    return best[kept].tolist()


def positions(config: Any) -> int | None:
    """How many tokens a sequence of the model may have; None where positions are not learned one by one."""
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return None
    found = next((getattr(config, name) for name in _POSITIONS if getattr(config, name, None) is not None), None)
    return found if isinstance(found, int) else None


def _until(ids: list[int], end: int | list[int] | None) -> list[int]:
    ends = set(end) if isinstance(end, list) else {end}
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)
