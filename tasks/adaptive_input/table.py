"""A table of tokens in bands, as modules that stand in a model for its embedding and its output layer.

A token of a band has a row of ``rank`` numbers, of which a projection [rank, width] makes its vector; a band may do
without. What the vectors of a band have in common, their mean, is stored once. The embedding and a tied output
layer share one ``Table``: the scores are ``(x projectionᵀ) rowsᵀ + x mean`` band by band, put into the order of the
ids, and no dense copy is needed for them.

On a CPU the lookup reads a table that is expanded once, when it is first used: computing rows from factors in every
call takes many times longer than copying them (``tests/bench/adaptive_input.py``). What is trained and what is exported
goes through the factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tasks.adaptive_input import layout as plan
from tasks.adaptive_input import rounding
from tasks.adaptive_input.layout import Band, Layout
from tasks.adaptive_input.rounding import FLOAT
from tasks.compress.packed import put
from tasks.models.transforms import positive, transform

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "adaptive-input"


def stored(layout: Layout, band_of: Tensor, tensors: Mapping[str, Tensor]) -> Any:
    """A table as it is stored.

    Args:
        layout: its bands.
        band_of: the band of each token, [rows].
        tensors: by the names of ``tensors_of``.
    """
    return classes().Table(layout, plan.pack_index(band_of), tensors)


def tensors_of(
    number: int,
    band: Band,
    rows: Tensor,
    projection: Tensor | None,
    mean: Tensor,
    scale: Tensor | None = None,
    behind: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the file holds of band ``number``: codes and scales, or floats.

    Args:
        number: of the band, from 0.
        band: its bits.
        rows: float [count, rank].
        projection: float [rank, width]; None where there is none.
        mean: float [width]; what is trained from scratch has none.
        scale: of each column of codes, or of each row where there is no projection; None finds the best.
        behind: of each row of a coded projection; None finds the best.
    """
    if band.most == FLOAT:
        found = {f"rows{number}_float": rows.float().contiguous()}
        return found if projection is None else found | {f"projection{number}_float": projection.float().contiguous()}
    found = {f"mean{number}_half": mean.half()}
    if band.most == 16:
        found[f"rows{number}_half"] = rows.half().contiguous()
        return found if projection is None else found | {f"projection{number}_half": projection.half().contiguous()}
    if scale is None:
        scale = rounding.scales_of(rows if projection is None else rows.T, band.bits)
    if projection is None:
        return found | _coded_rows(number, band, rows, scale)
    if behind is None:
        behind = rounding.scales_of(projection, band.projection_bits)
    return found | _coded_columns(number, band, rows, scale, projection, behind)


def _coded_rows(number: int, band: Band, rows: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The codes of ``rows`` [count, width] of a band without a projection, with the ``scale`` [count] of each."""
    codes = rounding.pack(rounding.to_codes(rows, scale, band.bits), band.most)
    return {_coded("rows", number, rows): _signed(codes), f"rows{number}_scale": scale.half()}


def _coded_columns(
    number: int, band: Band, rows: Tensor, scale: Tensor, projection: Tensor, behind: Tensor
) -> dict[str, Tensor]:
    """The codes of a band with a projection, column by column.

    A direction is stored without its length, which the scale of the column takes over.

    Args:
        number: of the band.
        band: its bits.
        rows: float [count, rank].
        scale: of each column, [rank].
        projection: float [rank, width].
        behind: the scale of each of its rows, [rank].
    """
    bits = band.projection_bits
    directions = rounding.to_codes(projection, behind, bits)
    length = rounding.values(directions, behind, bits).norm(dim=1)
    return {
        _coded("rows", number, rows): _signed(
            rounding.pack_levels(rounding.to_codes(rows.T, scale, band.bits), band.levels)
        ),
        f"rows{number}_scale": (scale.float() * length).half(),
        _coded("projection", number, projection): _signed(rounding.pack_levels(directions, band.projection_levels)),
    }


def _coded(what: str, number: int, values: Tensor) -> str:
    """The name of a tensor of codes, which says how many they are."""
    return f"{what}{number}_codes{values.numel()}"


def _signed(codes: Tensor) -> Tensor:
    """As signed bytes: the converter to LiteRT takes no unsigned tensors, even where no operation reads them."""
    import torch

    return codes.view(torch.int8)


def embedding(table: nn.Module, factor: float, padding_idx: int | None) -> nn.Module:
    """What stands for an embedding: ids [...] to [..., width] times ``factor``, in the type the model computes in."""
    return classes().Embedding(table, factor, padding_idx)


def head(table: nn.Module, bias: Tensor | None) -> nn.Module:
    """What stands for an output layer: [..., width] to scores of every token, [..., rows]."""
    return classes().Head(table, bias)


def tables(model: nn.Module) -> list[Any]:
    """The tables in bands of a model, each once."""
    kinds = classes()
    return list({id(found): found for found in model.modules() if isinstance(found, kinds.Table)}.values())


@transform(NAME, trains=True)
def empty_tables(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Replace embeddings and output layers by ones whose tensors are to be loaded.

    ``tables`` lists ``{"layout": {...}, "embeddings": {name: factor}, "heads": {name: bias}}``, with ``"softmax":
    "adaptive"`` where the heads have one; the modules of one entry share a table. Its tensors have no memory yet.

    Raises:
        ValueError: a layout is of no table, or of another than the modules have; a factor is not a number, or the
            softmax is none that there is.
    """
    import torch

    from tasks.adaptive_input import softmax

    for one in entry["tables"]:
        layout = Layout.read(one["layout"])
        for name in (*one["embeddings"], *one["heads"]):
            dense = tuple(model.get_submodule(name).weight.shape)  # type: ignore[union-attr]
            if dense != (layout.rows, layout.width):
                raise ValueError(f"{name} is {dense[0]} x {dense[1]}, its bands {layout.rows} x {layout.width}")
        empty: dict[str, Tensor] = {}
        with torch.device("meta"):
            for number, band in enumerate(layout.bands):
                projection = torch.zeros(band.rank, layout.width) if band.projected else None
                rows, mean = torch.zeros(band.count, band.rank), torch.zeros(layout.width)
                empty |= tensors_of(number, band, rows, projection, mean)
            table = stored(layout, torch.zeros(layout.rows), empty)
        factors = {name: positive(factor, f"the factor of {name}") for name, factor in one["embeddings"].items()}
        place(model, table, factors, one["heads"], softmax.asked(one.get("softmax"), len(layout.bands)))


def place(
    model: nn.Module, table: Any, embeddings: Mapping[str, float], heads: Mapping[str, bool], adaptive: bool = False
) -> None:
    """Let ``table`` stand for the modules that are named.

    Args:
        model: is changed.
        table: of ``stored``.
        embeddings: name to what its rows are multiplied with.
        heads: name to whether it has a bias, which stays.
        adaptive: whether they give probabilities by an adaptive softmax over the bands, of which there are several.
    """
    from tasks.adaptive_input import softmax

    for name, factor in embeddings.items():
        padding = getattr(model.get_submodule(name), "padding_idx", None)
        put(model, name, embedding(table, factor, padding))
    for name in heads:
        bias = getattr(model.get_submodule(name), "bias", None)
        put(model, name, softmax.head(table) if adaptive else head(table, bias))


def entry(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The transform that ``load`` replays, for tables as ``empty_tables`` takes them."""
    return {"name": NAME, "tables": [dict(part) for part in parts]}


@cache
def classes() -> Any:
    """The modules ``Table``, ``Embedding`` and ``Head``."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Table(nn.Module):
        index: Tensor

        def __init__(self, layout: Layout, index: Tensor, tensors: Mapping[str, Tensor]) -> None:
            super().__init__()
            self.layout = layout
            self.register_buffer("index", index.view(torch.int8))
            for name, tensor in tensors.items():
                if name.endswith("_float"):
                    self.register_parameter(name, nn.Parameter(tensor))
                else:
                    self.register_buffer(name, tensor)
            self.computes = torch.float32
            self._kept: dict[str, Any] = {}

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            # The types are part of the format: ``model.float()`` must not make the file grow. What comes out follows.
            self._kept = {}
            self.computes = fn(torch.empty(0, dtype=self.computes, device=self.index.device)).dtype

            def moved(tensor: Tensor) -> Tensor:
                found = fn(tensor)
                return found if found.dtype == tensor.dtype else tensor.to(found.device)

            return super()._apply(moved, recurse)

        @property
        def learns(self) -> bool:
            """Whether gradients go into it."""
            return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

        @property
        def band_of(self) -> Tensor:
            """The band of each token, uint8 [rows]."""
            return plan.unpack_index(self.index.view(torch.uint8), self.layout.rows)

        @property
        def positions(self) -> Tensor:
            """Where each token's row is when the bands lie one behind the other, int32 [rows]."""
            return self._once("positions", lambda: plan.positions(self.band_of, self.layout))

        def rows(self, number: int) -> Tensor:
            """The rows of a band, float32 [count, rank]."""
            found = self._floats("rows", number)
            return self._once(f"rows{number}", lambda: self._decoded_rows(number)) if found is None else found

        def projection(self, number: int) -> Tensor | None:
            """The projection of a band, float32 [rank, width]; None where it has none."""
            band, name = self.layout.bands[number], f"projection{number}"
            if not band.projected:
                return None
            found = self._floats("projection", number)
            return self._once(name, lambda: self._decoded_projection(number)) if found is None else found

        def mean(self, number: int) -> Tensor | None:
            """What is added to the vectors of a band, float32 [width]; None where nothing is."""
            name = f"mean{number}"
            if self.layout.bands[number].most == FLOAT:
                return None
            return self._once(name, lambda: getattr(self, f"{name}_half").float())

        def expanded(self) -> Tensor:
            """All rows in the order of the ids, [rows, width], in the type that the model computes in."""
            parts = [self._vectors(self.rows(number), number) for number in range(len(self.layout.bands))]
            return torch.cat(parts)[self.positions.long()].to(self.computes)

        def lookup(self, ids: Tensor) -> Tensor:
            """The vectors of ``ids`` [...], [..., width]."""
            if not torch.compiler.is_exporting() and not self.learns:
                return functional.embedding(ids, self._once("expanded", self.expanded))
            found = self._from_factors(ids)
            return found if found.dtype == self.computes else found.to(self.computes)

        def _from_factors(self, ids: Tensor) -> Tensor:
            """A lookup in every band, clamped to its rows, of which the one of the token's own band counts."""
            # LiteRT looks up floats alone; an index_select becomes a gather, which takes whole numbers.
            at = self.positions.index_select(0, ids.reshape(-1)).view(ids.shape)
            found = None
            for number, (band, start) in enumerate(zip(self.layout.bands, self.layout.starts, strict=True)):
                place = at - start
                vectors = self._vectors(functional.embedding(place.clamp(0, band.count - 1), self.rows(number)), number)
                # Bands are walked in order, so that what is at or behind its start is the band's or a later one's.
                found = vectors if found is None else torch.where((place >= 0)[..., None], vectors, found)
            assert found is not None
            return found

        def scores(self, x: Tensor) -> Tensor:
            """``x`` [..., width] times every token's vector, [..., rows]."""
            parts = [self.band_scores(x, number) for number in range(len(self.layout.bands))]
            return torch.cat(parts, -1).index_select(-1, self.positions)

        def band_scores(self, x: Tensor, number: int) -> Tensor:
            """``x`` [..., width] times the vectors of a band, [..., count]."""
            projection, mean = self.projection(number), self.mean(number)
            narrow = x if projection is None else functional.linear(x, projection.to(x.dtype))
            scores = functional.linear(narrow, self.rows(number).to(x.dtype))
            return scores if mean is None else scores + functional.linear(x, mean[None].to(x.dtype))

        def _vectors(self, rows: Tensor, number: int) -> Tensor:
            projection, mean = self.projection(number), self.mean(number)
            vectors = rows if projection is None else rows @ projection
            return vectors if mean is None else vectors + mean

        def _floats(self, what: str, number: int) -> Tensor | None:
            """Rows or a projection that are stored as floats; None where they are codes."""
            name, bits = f"{what}{number}", self.layout.bands[number].most
            if bits == FLOAT:
                return getattr(self, f"{name}_float")
            return self._once(name, lambda: getattr(self, f"{name}_half").float()) if bits == 16 else None

        def _decoded_rows(self, number: int) -> Tensor:
            band, scale = self.layout.bands[number], getattr(self, f"rows{number}_scale")
            packed = getattr(self, f"rows{number}_codes{band.count * band.rank}").view(torch.uint8)
            if not band.projected:
                return rounding.values(rounding.unpack(packed, band.rank, band.most), scale, band.bits)
            codes = rounding.unpack_levels(packed, band.count, band.levels)
            return rounding.values(codes, scale, band.bits).T.contiguous()

        def _decoded_projection(self, number: int) -> Tensor:
            band = self.layout.bands[number]
            packed = getattr(self, f"projection{number}_codes{band.rank * self.layout.width}").view(torch.uint8)
            codes = rounding.unpack_levels(packed, self.layout.width, band.projection_levels)
            directions = rounding.values(codes, torch.ones(band.rank, device=codes.device), band.projection_bits)
            return directions / directions.norm(dim=1, keepdim=True)

        def _once(self, name: str, make: Any) -> Tensor:
            learned = (one for one in self.parameters() if not one.is_inference())
            state = (self.index.device, *(parameter._version for parameter in learned))
            known, found = self._kept.get(name, (None, None))
            if known != state:
                # What inference mode makes could not be used in a training later.
                with torch.inference_mode(False), torch.no_grad():
                    found = make()
                self._kept[name] = state, found
            return found

        def _load_from_state_dict(self, state: Any, prefix: str, *given: Any) -> None:
            types = {name: tensor.dtype for name, tensor in self.named_buffers()}
            super()._load_from_state_dict(state, prefix, *given)
            self._kept = {}
            wrong = given[-1]
            if not wrong and not any(tensor.is_meta for tensor in self.buffers()):  # torch tells what is missing
                wrong += [f"{prefix}{text}" for text in self._faults(types)]

        def _faults(self, types: Mapping[str, Any]) -> Iterator[str]:
            """What is wrong with the tensors that were loaded, which had ``types`` before."""
            for name, tensor in self.named_buffers():
                if tensor.dtype != types[name]:
                    yield f"{name} is {tensor.dtype} and not {types[name]}"
                    return
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    yield f"{name} holds values that are not finite"
            counts = [band.count for band in self.layout.bands]
            if self.band_of.bincount(minlength=len(counts)).tolist() != counts:
                yield "index gives the bands other tokens than they have"

        def extra_repr(self) -> str:
            bands = ", ".join(band.told() for band in self.layout.bands)
            return f"{self.layout.rows}, {self.layout.width}: {bands}"

    class Embedding(nn.Module):
        weight = property(lambda self: self.table.expanded())

        def __init__(self, table: Any, factor: float, padding_idx: int | None) -> None:
            super().__init__()
            self.table = table
            self.factor = factor
            self.padding_idx = padding_idx
            self.num_embeddings, self.embedding_dim = table.layout.rows, table.layout.width

        def forward(self, ids: Tensor) -> Tensor:
            vectors = self.table.lookup(ids)
            if self.padding_idx is not None and torch.is_grad_enabled() and vectors.requires_grad:
                # As torch's own: padding teaches its row nothing.
                padded = (ids == self.padding_idx)[..., None]
                vectors = torch.where(padded, vectors.detach(), vectors)
            return vectors if self.factor == 1 else vectors * self.factor

    class Head(nn.Module):
        weight = property(lambda self: self.table.expanded())

        def __init__(self, table: Any, bias: Any) -> None:
            super().__init__()
            self.table = table
            self.bias = bias
            self.in_features, self.out_features = table.layout.width, table.layout.rows

        def forward(self, x: Tensor) -> Tensor:
            scores = self.table.scores(x)
            return scores if self.bias is None else scores + self.bias

    return SimpleNamespace(Table=Table, Embedding=Embedding, Head=Head)
