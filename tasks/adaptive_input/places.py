"""Where a model has a table of tokens: its embeddings, its output layer, and which of them are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.adaptive_input.table import tables
from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor, nn


LONGEST = 2.0**14
"""The longest vector of a token: scales and means are float16, and a scale may be four times as large."""


@dataclass(frozen=True)
class Place:
    """A table of tokens in a model.

    Args:
        name: of the parameter.
        weight: float [V, D].
        embeddings: the modules that look it up, with what their rows are multiplied with.
        heads: those that multiply by it, with whether they have a bias.
    """

    name: str
    weight: Tensor
    embeddings: Mapping[str, float]
    heads: Mapping[str, bool]


def places(network: Any) -> tuple[list[Place], dict[str, str]]:
    """The tables of tokens, the input's first, and the modules that cannot be replaced with the reason.

    Raises:
        StepError: the model has none, has them in bands already, looks them up in a way of its own, has tables of
            several vocabularies, or vectors that float16 cannot hold.
    """
    from torch import nn

    from tasks.models.layout import Embedding, tied_weights

    if tables(network):
        raise StepError("the model's tokens are in bands already; leave one of the two adaptive_input steps out")
    rows = network.config.vocab_size
    ties = tied_weights(network)
    named = dict(network.named_modules(remove_duplicate=False))
    tokens = _token_tables(network, named)
    scores = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    found: dict[str, tuple[Any, dict[str, float], dict[str, bool]]] = {}
    left: dict[str, str] = {}
    for name, module in named.items():
        weight = f"{name}.weight"
        owner = ties.get(weight, weight)
        if isinstance(module, nn.Embedding) and (
            name in tokens or ties.get(weight) in {f"{one}.weight" for one in tokens}
        ):
            factor = Embedding(name, module).factor
            if factor is None:
                raise StepError(f"{name} is a {type(module).__name__}, which does more than look rows up")
            found.setdefault(owner, (module.weight, {}, {}))[1][name] = factor
        elif isinstance(module, nn.Linear) and (module is scores or owner in {f"{one}.weight" for one in tokens}):
            if module.out_features != rows:
                left[name] = f"it has {module.out_features} outputs and the vocabulary {rows} tokens"
                continue
            found.setdefault(owner, (module.weight, {}, {}))[2][name] = module.bias is not None
    if not any(embeddings for _, embeddings, _ in found.values()):
        raise StepError(
            f"this {network.config.model_type} model looks no tokens up, so that there is nothing to make smaller; use "
            "quantize or prune"
        )
    order = sorted(found, key=lambda owner: not found[owner][1])
    _check({owner: found[owner][0].detach() for owner in order})
    return [Place(owner, found[owner][0].detach(), *found[owner][1:]) for owner in order], left


def _check(tables: Mapping[str, Tensor]) -> None:
    """Refuse tables of several vocabularies, and one that float16, which scales and means are, cannot say."""
    (first, one), *_ = tables.items()
    for name, weight in tables.items():
        if len(weight) != len(one):
            raise StepError(
                f"{first} has {len(one)} tokens and {name} {len(weight)}: two vocabularies, of which the training data "
                "does not tell which a token is of; use quantize"
            )
        longest = float(weight.float().norm(dim=1).amax())
        if longest > LONGEST:
            raise StepError(
                f"{name} has a vector of length {longest:.3g}, and bands hold vectors of up to {LONGEST:g}; take a "
                "model from before its training broke"
            )


def _token_tables(network: Any, named: Mapping[str, nn.Module]) -> set[str]:
    """The names of the tables that hold tokens."""
    from tasks.models.anatomy import anatomy
    from tasks.models.patterns import PATTERNS

    if network.config.model_type in PATTERNS:
        return {name for name, what in anatomy(network).embeddings.items() if what == "tokens"}
    table = network.get_input_embeddings()
    return {name for name, module in named.items() if module is table}
