"""What an export holds of a table in bands: numbers of one precision, and where each token's row is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from tasks.adaptive_input.layout import Layout, least_bytes
from tasks.adaptive_input.rounding import FLOAT
from tasks.evaluate.format import size
from tasks.export.onnx_quantize import LEAST


@dataclass(frozen=True)
class Form:
    """A kind of export.

    Args:
        name: for people.
        number: bytes of a number of a matrix.
        least: elements below which a matrix stays float32.
        scored: bytes for each token of where its row is, if an output layer reads the table and an embedding does or
            does not; what an embedding alone reads are four.
    """

    name: str
    number: int
    least: int
    scored: tuple[int, int]

    def matrix(self, rows: int, columns: int, scales: int) -> int:
        """Bytes of a matrix, with a scale of each of ``scales`` where it is of integers."""
        if self.number == 4 or rows * columns < self.least:
            return 4 * rows * columns
        return self.number * rows * columns + 4 * scales


FORMS = (
    Form("LiteRT float32", 4, 0, (4, 4)),
    Form("LiteRT int8-dynamic", 1, 0, (4, 4)),
    Form("ONNX float32", 4, 0, (8, 12)),
    Form("ONNX int8-dynamic", 1, LEAST, (8, 12)),
)
"""ONNX selects scores by indices of 64 bits beside those of 32 by which an embedding looks up; its int8 leaves small
matrices float."""


@dataclass(frozen=True)
class Exported:
    """A table, and whether an embedding and an output layer read it."""

    layout: Layout
    looked_up: bool
    scored: bool

    def held(self, form: Form) -> int:
        """Bytes of constants: rows, projections and means, of which embedding and output layer have one each, and the
        places of the rows. The operators, a few more for each band, are not counted."""
        width = self.layout.width
        places = form.scored[self.looked_up] if self.scored else 4
        total = places * self.layout.rows
        for band in self.layout.bands:
            total += form.matrix(band.count, band.rank, band.count)
            for reads, outputs in ((self.looked_up, width), (self.scored, band.rank)):
                if reads and band.projected:
                    total += form.matrix(band.rank, width, outputs)
                if reads and band.most != FLOAT:
                    total += 4 * width
        return total

    def dense(self, form: Form) -> int:
        """Bytes of the table without bands."""
        return form.matrix(self.layout.rows, self.layout.width, self.layout.rows)

    def needed(self, form: Form) -> float:
        """How many times fewer numbers than the dense table's the rows may be that an export does not grow: what no
        lower rank takes away stays, and projections of full rank may come."""
        width = self.layout.width
        numbers = form.number * self.layout.rows * width
        kept = form.number * sum(band.count * band.rank for band in self.layout.bands)
        projections = (self.looked_up + self.scored) * form.matrix(width, width, width)
        return numbers / max(self.dense(form) - (self.held(form) - kept) - projections, 1)


def grown(tables: Sequence[Exported], spec: AdaptiveInputSpec, ratio: float) -> list[str]:
    """What to say of exports that hold more of ``tables`` than without the step; nothing where none does.

    Args:
        tables: all that the step has put into bands.
        spec: what was asked for.
        ratio: how many times smaller the file was to be.
    """
    said, needed = [], 0.0
    for form in FORMS:
        held = sum(table.held(form) for table in tables)
        dense = sum(table.dense(form) for table in tables)
        if held > dense:
            said.append(f"{size(held)} and not {size(dense)} in {form.name}")
            needed = max(needed, max(table.needed(form) for table in tables))
    if not said:
        return []
    needed *= 1.05 * (1 if spec.method == "adaptive" else 4)
    return [
        f"an export holds more of the tables than without this step, {', '.join(said)}: there every number has the "
        f"same bits, and only fewer numbers make a file smaller; {_remedy(tables, spec, ratio, needed)}"
    ]


def _remedy(tables: Sequence[Exported], spec: AdaptiveInputSpec, ratio: float, needed: float) -> str:
    instead = "export the model from before this step"
    widths = (FLOAT,) if spec.method == "adaptive" else (8,)
    shapes = [(table.layout.rows, table.layout.width) for table in tables]
    least = sum(least_bytes(rows, width, widths) for rows, width in shapes)
    more = math.ceil(10 * max(needed, ratio)) / 10
    if sum(4 * rows * width for rows, width in shapes) / more < least:
        return instead
    parts = [] if spec.widths == widths else ["bits: [8]"]
    if ratio < needed or not parts:
        parts.append(f"ratio: {more:g}x or more")
    return f"write {' and '.join(parts)}, or {instead}"
