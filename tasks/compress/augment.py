"""Texts with words replaced by near ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tasks.data.encoded import Encoded

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

_MARKS = ("##", "Ġ", "▁")
"""How vocabularies mark a piece that goes on within a word, or that begins one."""

_BLOCK = 512


def augmented(
    data: Encoded, neighbours: np.ndarray, copies: int, share: float, rng: np.random.Generator
) -> tuple[Encoded, np.ndarray]:
    """Copies of classification examples in which each token is replaced with the probability ``share`` by one of its
    neighbours, all alike likely.

    After TinyBERT's data augmentation (1909.10351, algorithm 1). Departure: the candidates there come from a masked
    language model, or from GloVe for words of several pieces; a classifier has no such head, so here they are the
    nearest tokens by the teacher's own embedding, of the same kind (see ``neighbours_of``).

    Args:
        data: the examples.
        neighbours: int32 [V, K], a token that has none stands there itself.
        copies: of every example.
        share: of the tokens.
        rng: decides.

    Returns:
        The copies, those of the first example first, and the example that each is made from, int64 [N · copies].
    """
    origin = np.repeat(np.arange(len(data)), copies)
    ids, mask = np.asarray(data.input_ids)[origin], np.asarray(data.attention_mask)[origin]
    replaced = (rng.random(ids.shape) < share) & (mask > 0)
    drawn = neighbours[ids, rng.integers(0, neighbours.shape[1], ids.shape)]
    made = data.take(origin)
    return replace(made, input_ids=np.where(replaced, drawn, ids).astype(np.int32)), origin


def neighbours_of(table: Tensor, tokenizer: Tokenizer, count: int) -> np.ndarray:
    """The ``count`` nearest tokens of each token by the cosine of their embeddings, itself left out, int32 [V, K].

    A piece that begins a word is near to such pieces alone, one that goes on within a word to those, and what is no
    word (punctuation, numbers) to its like. Special tokens, and tokens without any of their kind, have themselves.

    Args:
        table: the embeddings, [V, D].
        tokenizer: says what the tokens are.
        count: of neighbours.
    """
    import torch

    vectors = torch.nn.functional.normalize(table.detach().float().cpu(), dim=-1)
    kinds = torch.from_numpy(_kinds(tokenizer, len(vectors)))
    found = torch.arange(len(vectors))[:, None].repeat(1, count)
    for kind in kinds.unique().tolist():
        members = torch.nonzero(kinds == kind).flatten()
        if kind < 0 or len(members) < 2:
            continue
        near = min(count, len(members) - 1)
        for at in range(0, len(members), _BLOCK):
            block = members[at : at + _BLOCK]
            scores = vectors[block] @ vectors[members].T
            scores[torch.arange(len(block)), torch.arange(at, at + len(block))] = -torch.inf
            nearest = members[scores.topk(near, -1).indices]
            found[block] = nearest[:, torch.arange(count) % near]
    return found.numpy().astype(np.int32)


def _kinds(tokenizer: Tokenizer, size: int) -> np.ndarray:
    """What each token is: -1 special or none, else its mark and whether it has a letter."""
    kinds = np.full(size, -1, np.int64)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary: Iterable[tuple[str, int]] = tokenizer.get_vocab().items()
    for token, number in vocabulary:
        if number < size and number not in special and not (token.startswith("[") and token.endswith("]")):
            mark = next((at for at, mark in enumerate(_MARKS, 1) if token.startswith(mark) and token != mark), 0)
            kinds[number] = 2 * mark + any(letter.isalpha() for letter in token.removeprefix("Ġ"))
    return kinds
