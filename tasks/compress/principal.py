"""A narrower stream between the blocks by its principal directions, where single numbers of it would lose more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.compress.calibrate import observe
from tasks.compress.cut import Axis
from tasks.context import StepError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from tasks.data.encoded import Encoded
    from tasks.models.anatomy import Anatomy

UNTIED: Mapping[str, Any] = {"tie_word_embeddings": False}
"""What the configuration says where the head can share the table of the tokens no longer."""


@dataclass(frozen=True)
class Directions:
    """Where the stream varies, and how much.

    Args:
        basis: orthonormal, [D, D]; columns by falling variance. Where the norms subtract the mean the last is the
            direction of all numbers alike, which they take away.
        energy: by the name of each norm, the mean square along each direction of what it divided by its size, [D].
    """

    basis: Tensor
    energy: Mapping[str, Tensor]

    def kept(self, width: int) -> float:
        """The share of the energy, over all norms, that ``width`` directions keep."""
        total = sum(self.energy.values())
        return float(total[:width].sum() / total.sum())  # type: ignore[index, union-attr]


def check(network: nn.Module, anatomy: Anatomy) -> None:
    """Refuse a model whose stream cannot be turned.

    A rotation goes through a norm only if the norm's own weights can move into the layers that read it. So every block
    must normalise what it reads and add what it gives, and nothing else may touch the stream.

    Raises:
        StepError: a block normalises what it gives, audio comes in behind a non-linear function, it is an
            encoder-decoder, or the norms are of two kinds.
    """
    kind, remedy = anatomy.model_type, "leave hidden_by out"
    if anatomy.front:
        raise StepError(f"hidden_by: pca: {kind} gives frames to its blocks behind a non-linear function; {remedy}")
    for stack in anatomy.stacks:
        if not stack.norm_first or len(stack.norms) != 1:
            raise StepError(
                f"hidden_by: pca: {kind} adds to what it has normalised, so that the weights of its norms cannot move "
                f"into the layers behind them; {remedy}"
            )
    if len(anatomy.stacks) > 1:
        raise StepError(f"hidden_by: pca: transformers always ties the head of {kind} to the table of tokens; {remedy}")
    if len({_centres(network, name) for name in readers(anatomy)}) > 1:
        raise StepError(f"hidden_by: pca: this {kind} model has norms of two kinds; {remedy}")


def readers(anatomy: Anatomy) -> dict[str, tuple[str, ...]]:
    """Every norm of the stream, to the linear layers that read what it gives."""
    found: dict[str, tuple[str, ...]] = {}
    for stack in anatomy.stacks:
        for block in stack.blocks:
            for part in block.attentions:
                found[part.norms[0]] = part.layers[:-1]
            found[block.ffn.norms[0]] = tuple(name for name in (block.ffn.gate, block.ffn.up) if name is not None)
        found[stack.norms[-1]] = anatomy.head
    return found


def directions(
    network: nn.Module,
    anatomy: Anatomy,
    data: Encoded,
    *,
    device: str = "cpu",
    progress: Callable[[float, float, str], None] | None = None,
) -> Directions:
    """The principal directions of what the norms of the stream see, all of them together (SliceGPT, 2401.15024).

    Departure: the paper turns every block by a rotation of its own and multiplies the stream by a matrix between two
    blocks, which no ordinary configuration can say. Here one rotation serves the whole model. As there, a vector counts
    as a norm sees it: divided by its size, and without its mean where the norm takes that away.

    Args:
        network: a model in eval mode, on ``device``.
        anatomy: of it.
        data: the examples, each run by itself.
    """
    import torch

    norms = list(readers(anatomy))
    width = anatomy.stacks[0].width
    centred = _centres(network, norms[0])
    sums = {name: torch.zeros(width, width, dtype=torch.float64) for name in norms}
    counts = dict.fromkeys(norms, 0)

    def see(name: str, vectors: Tensor) -> None:
        found = vectors.double().cpu()
        found = found - found.mean(1, keepdim=True) if centred else found
        found = found / found.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        sums[name] += found.T @ found
        counts[name] += len(found)

    observe(network, norms, data, see, device=device, progress=progress)
    moments = {name: sums[name] / counts[name] for name in norms}
    together = torch.stack(list(moments.values())).sum(0)
    if centred:  # all numbers alike never occur, and come last
        together = together - torch.full_like(together, float(together.trace()) / width)
    basis = torch.linalg.eigh(together).eigenvectors.flip(1)
    return Directions(basis, {name: ((moment @ basis) * basis).sum(0) for name, moment in moments.items()})


def project(
    network: nn.Module, anatomy: Anatomy, state: Mapping[str, Tensor], axis: Axis, found: Directions, width: int
) -> dict[str, Tensor]:
    """The tensors of ``state`` with a stream of ``width`` numbers: what is written onto it and read from it by the
    principal directions, the weights of the norms in the layers that read them.

    With the whole width it is the same function. A norm divides by the size of ``width`` numbers where there were more:
    its weight makes up for that, and for the energy that the other directions had on average. Where the norms subtract
    the mean, one of the ``width`` numbers' directions is that of all alike, which is never used; the constants that
    the norms added go there, and through it to every reader.

    Args:
        network: the whole model; read, not changed.
        anatomy: of it.
        state: its tensors, in which other parts may be cut already.
        axis: the hidden numbers, with all their places.
        found: the directions.
        width: how many numbers stay.
    """
    import torch

    reads = readers(anatomy)
    centred = _centres(network, next(iter(reads)))
    onto = found.basis[:, :width]
    if centred:
        onto = found.basis[:, : width - 1] @ _beside_ones(width).T
    changed = dict(state)
    places = {(place.tensor, place.dim) for place in axis.places}
    alike = torch.full((width,), width**-0.5, dtype=torch.float64)
    for norm, layers in reads.items():
        module: Any = network.get_submodule(norm)
        weight, bias = module.weight.detach().double().cpu(), getattr(module, "bias", None)
        for name in layers:
            place = next(place for place in places if place[0] == f"{name}.weight" and _reads(network, name, place[1]))
            matrix = state[place[0]].double().movedim(place[1], -1)
            turned = (matrix * weight) @ onto
            if centred and bias is not None:
                turned = turned + (matrix @ bias.detach().double().cpu())[..., None] * alike
            changed[place[0]] = _like(turned.movedim(-1, place[1]), state[place[0]])
            places.remove(place)
        energy = found.energy[norm]
        share = energy[: width - int(centred)].sum() / energy.sum()
        size = (len(weight) / width * share).sqrt()
        changed[f"{norm}.weight"] = _like(size.expand(width), state[f"{norm}.weight"])
        places.remove((f"{norm}.weight", 0))
        if bias is not None:
            changed[f"{norm}.bias"] = _like(alike, state[f"{norm}.bias"])
            places.remove((f"{norm}.bias", 0))
    for name, dim in places:
        turned = changed[name].double().movedim(dim, -1) @ onto
        changed[name] = _like(turned.movedim(-1, dim), state[name])
    return changed


def _beside_ones(width: int) -> Tensor:
    """An orthonormal basis [width, width - 1] of the vectors whose numbers sum to 0 (Helmert's)."""
    import torch

    upper = torch.ones(width, width - 1, dtype=torch.float64).triu()
    rows = torch.arange(1, width, dtype=torch.float64)
    upper[torch.arange(1, width), torch.arange(width - 1)] = -rows
    return upper / (rows * (rows + 1)).sqrt()


def _reads(network: nn.Module, name: str, dim: int) -> bool:
    """Whether the dimension of a layer's weight is that of its inputs."""
    from torch import nn

    return dim == (1 if isinstance(network.get_submodule(name), nn.Linear) else 0)


def _centres(network: nn.Module, norm: str) -> bool:
    """Whether a norm subtracts the mean."""
    from torch import nn

    return isinstance(network.get_submodule(norm), nn.LayerNorm)


def _like(found: Tensor, old: Tensor) -> Tensor:
    return found.to(old.dtype).contiguous()
