"""What every export keeps of a model's configuration, and the comparison of its file with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.context import StepError

_KEPT = (  # what the runtime, the features and the measurement ask for
    "model_type",
    "architectures",
    "id2label",
    "label2id",
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "conv_kernel",
    "conv_stride",
    "num_mel_bins",
    "max_source_positions",
)


def kept_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model's configuration that its exported file is read with."""
    return {name: config[name] for name in _KEPT if config.get(name) is not None}


def relative_error(given: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference of any logits, relative to the largest of them."""
    errors = [
        np.abs(mine - wanted).max() / max(float(np.abs(wanted).max()), 1e-6)
        for mine, wanted in zip(given, expected, strict=True)
    ]
    return float(np.max(errors))  # a NaN stays one


def check_faithful(given: Sequence[np.ndarray], expected: Sequence[np.ndarray], most: float, model_type: str) -> None:
    """Compare what a float file gives with what torch gave.

    Raises:
        StepError: they differ by more than ``most``, for example because the model ignores a ready-made mask.
    """
    error = relative_error(given, expected)
    if not error <= most:
        raise StepError(
            f"the converted file does not compute what this {model_type} computes: its logits differ by {error:.1%}; "
            "the model type cannot be exported"
        )
