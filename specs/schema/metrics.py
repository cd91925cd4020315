"""The metrics that evaluation reports: name, unit, direction. Gates and ``select`` may name these and no others."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from specs.schema.base import TASKS, Task

Unit = Literal["share", "seconds", "bytes", "count", "rate", "number"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """A number with a name, a unit and a direction.

    ``unit`` is ``share`` (0 to 1), ``seconds``, ``bytes``, ``count``, ``rate`` (per second) or ``number``.
    ``of`` says what carries it: every artifact, a torch model, what was derived from one and runs otherwise (a packed
    model or an export), or an NPU build.
    """

    name: str
    unit: Unit
    better: Better
    description: str
    tasks: tuple[Task, ...] = TASKS
    of: Literal["any", "model", "derived", "npu"] = "any"
    quality: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest limit, in the metric's unit; an error rate itself may exceed 1."""
        return _RANGES.get(self.name, (0.0, 1.0 if self.unit == "share" else inf))


_RANGES = {"perplexity": (1.0, inf), "mcc": (-1.0, 1.0), "bleu": (0.0, 100.0), "chrf": (0.0, 100.0)}

_GENERATION: tuple[Task, ...] = ("text-generation",)
_CLASSIFICATION: tuple[Task, ...] = ("text-classification",)
_TRANSLATION: tuple[Task, ...] = ("translation",)
_SPEECH: tuple[Task, ...] = ("speech-recognition",)
WRITES: tuple[Task, ...] = ("text-generation", "translation", "speech-recognition")
"""The tasks whose models write text."""

_QUALITY: tuple[tuple[str, Unit, Better, str, tuple[Task, ...]], ...] = (
    ("perplexity", "number", "lower", "exp of the mean negative log-likelihood of a token", _GENERATION),
    ("bits_per_byte", "number", "lower", "negative log2-likelihood per byte of the text", _GENERATION),
    ("accuracy", "share", "higher", "share of the examples classified correctly", _CLASSIFICATION),
    ("f1", "share", "higher", "F1, macro-averaged over the classes", _CLASSIFICATION),
    ("mcc", "number", "higher", "Matthews correlation coefficient of all classes, -1 to 1", _CLASSIFICATION),
    (
        "calibration_error",
        "share",
        "lower",
        "expected calibration error: how far the confidence of the predictions is from their accuracy, 15 bins",
        _CLASSIFICATION,
    ),
    ("bleu", "number", "higher", "BLEU of the corpus by sacrebleu (13a, cased), 0 to 100", _TRANSLATION),
    ("chrf", "number", "higher", "chrF++ of the corpus by sacrebleu, 0 to 100", _TRANSLATION),
    ("length_ratio", "number", "higher", "tokens of the translations over tokens of the references", _TRANSLATION),
    ("wer", "share", "lower", "word error rate by jiwer, of the normalised text", _SPEECH),
    ("cer", "share", "lower", "character error rate by jiwer, of the normalised text", _SPEECH),
)

_ALL = (
    *(Metric(name, unit, better, text, tasks, quality=True) for name, unit, better, text, tasks in _QUALITY),
    Metric("time_to_first_token", "seconds", "lower", "median time from the input to the first token", WRITES),
    Metric("tokens_per_second", "rate", "higher", "tokens written a second, greedy, one input at a time", WRITES),
    Metric("real_time_factor", "number", "lower", "seconds of work for a second of audio", _SPEECH),
    Metric("latency_p50", "seconds", "lower", "median latency of one batch"),
    Metric("latency_p90", "seconds", "lower", "90th percentile of the latency of one batch"),
    Metric("latency_p99", "seconds", "lower", "99th percentile of the latency of one batch"),
    Metric("throughput", "rate", "higher", "examples a second at the stated batch and length"),
    Metric("peak_memory", "bytes", "lower", "peak resident memory of the process that loads and runs the artifact"),
    Metric("size", "bytes", "lower", "bytes on disk of the files that are deployed"),
    Metric("parameters", "count", "lower", "number of weights"),
    Metric("nonzero_parameters", "count", "lower", "number of weights that are not zero"),
    Metric(
        "parity_error",
        "share",
        "lower",
        "relative error of an export's or a packed model's outputs against the torch model it was made from",
        of="derived",
    ),
    Metric(
        "parity_agreement",
        "share",
        "higher",
        "share of the top predictions that equal those of the torch model",
        of="derived",
    ),
    Metric("npu_operator_share", "share", "higher", "share of the operators that run on the NPU", of="npu"),
    Metric("npu_cycles", "count", "lower", "cycles of one inference on the NPU, as vela estimates them", of="npu"),
    Metric("npu_latency", "seconds", "lower", "time of one inference on the NPU, as vela estimates it", of="npu"),
    Metric("npu_sram", "bytes", "lower", "SRAM that the NPU build uses", of="npu"),
    Metric("npu_flash", "bytes", "lower", "off-chip flash or DRAM that the NPU build uses", of="npu"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

HEADLINE: dict[Task, str] = {
    "text-generation": "perplexity",
    "text-classification": "accuracy",
    "translation": "bleu",
    "speech-recognition": "wer",
}
"""The quality metric of each task that tables, plots and the final screen show first."""
