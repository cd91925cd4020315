"""Numbers for people."""

from __future__ import annotations

import math

from specs.schema.metrics import METRICS


def figure(metric: str, value: float | None) -> str:
    """A metric's value as its field writes it: ``bleu`` 27.3, ``wer`` 4.2%, ``accuracy`` 0.872, ``size`` 12.5 MB."""
    if value is not None and math.isfinite(value):
        if metric in _PER_CENT:
            return human(100 * value, "%")
        if metric in _PLACES:
            return f"{value:.{_PLACES[metric]}f}"
        if metric == "real_time_factor":
            return significant(value, 2)
    return human(value, METRICS[metric].unit if metric in METRICS else "number")


_PER_CENT = ("wer", "cer")
_PLACES = {"bleu": 1, "chrf": 1, "mcc": 3, "length_ratio": 3}


def human(value: float | None, unit: str) -> str:
    """A figure with its unit in a few characters: ``12.5 MB``, ``6.81 ms``, ``0.872``, ``1.5 points``, ``4.1x``."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "bytes":
        return size(value)
    if unit == "seconds":
        return duration(value)
    if unit == "count":
        return count(value)
    if unit == "share":
        return f"{value:.3f}"
    if unit == "points":
        return f"{value:.2f} points"
    if unit == "%":
        return f"{value:.1f}%"
    if unit == "x":
        return factor(value)
    return significant(value, 4 if unit == "number" else 3)


def significant(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, without an exponent where that stays short."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")  # 0.9999 is 1.00, one place less
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{places}f}"


def size(value: float) -> str:
    """Bytes in decimal units, as file managers and vendors give them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale * 0.9995:
            return f"{significant(value / scale)} {unit}"
    return f"{value:.0f} B"


def duration(value: float) -> str:
    """Seconds as µs, ms, s, min or h."""
    if abs(value) >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    if abs(value) >= 60:
        return f"{int(value // 60)} min {int(value % 60)} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= scale * 0.9995:
            return f"{significant(value / scale)} {unit}"
    return f"{significant(value / 1e-6)} µs"


def count(value: float) -> str:
    """A number of things: ``22.7 M``."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= scale * 0.9995:
            return f"{significant(value / (1e3 if unit == 'k' else scale))} {unit}"
    return f"{value:.0f}"


def factor(value: float) -> str:
    """A ratio: ``4.1x``."""
    return f"{significant(value, 2 if abs(value) < 100 else 3)}x"
