"""Tokens of the whole vocabulary in place of some of a batch's: what the data hardly has is healed, too.

What a rounded table does to tokens that the training data never has, no example of it can show; they come up all the
same where the model is used. The model before the step says what should follow any token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.compress.teach import LABELLED

if TYPE_CHECKING:
    from torch import Tensor


def ordinary(folder: Path, rows: int) -> Tensor:
    """The tokens that stand for text, int64, of a model with a table of ``rows``: those of its tokenizer that are not
    special."""
    import torch

    from tasks.data.tokens import open_tokenizer

    opened = open_tokenizer(folder)
    known: set[int] = set()
    for core in (opened.core, opened.writes):
        added = core.get_added_tokens_decoder()
        known |= {number for number in core.get_vocab().values() if number not in added or not added[number].special}
    named = {opened.bos, opened.eos, opened.pad, opened.unknown}
    return torch.tensor(sorted(number for number in known - named if number < rows), dtype=torch.int64)


def disturbed(batch: Mapping[str, Tensor], names: Sequence[str], tokens: Tensor, share: float) -> dict[str, Tensor]:
    """The batch with ``share`` of its tokens drawn from ``tokens``, all alike: twice as many in every other example,
    on average, and none in the rest. A disturbed example's own label does not count.

    Args:
        batch: as a model takes it.
        names: of what holds tokens, each int [B, L]; what is special there stays.
        tokens: ids to draw from, int64 and rising.
        share: at most half.
    """
    import torch

    found, examples = dict(batch), len(next(iter(batch.values())))
    chosen = torch.rand(examples) < 0.5
    for name in names:
        ids = batch[name]
        replaced = chosen[:, None] & (torch.rand(ids.shape) < 2 * share) & torch.isin(ids.cpu(), tokens)
        drawn = tokens[torch.randint(len(tokens), ids.shape)]
        found[name] = torch.where(replaced.to(ids.device), drawn.to(ids), ids)
    found[LABELLED] = ~chosen.to(next(iter(batch.values())).device)
    return found
