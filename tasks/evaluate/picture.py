"""A drawing as files whose bytes follow from what is drawn alone."""

from __future__ import annotations

import io
from typing import Any


def files_of(figure: Any, name: str) -> dict[str, bytes]:
    """A matplotlib figure as ``NAME.svg`` and ``NAME.png``, without dates and versions."""
    svg, png = io.BytesIO(), io.BytesIO()
    nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=nothing)
    software: Any = {"Software": None}
    figure.savefig(png, format="png", dpi=130, metadata=software)
    return {f"{name}.svg": svg.getvalue(), f"{name}.png": png.getvalue()}
