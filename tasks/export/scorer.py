"""Models that give logits for a whole text in one call: classifiers, and decoders as scorers of every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from tasks.export.attention import additive
from tasks.export.names import IDS, LOGITS, MASK

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_causal(model: Any, task: Task) -> bool:
    """Whether tokens attend to earlier ones alone: in a decoder, and so in a classifier that reads the last token."""
    return task == "text-generation" or pools_last(model, task)


def pools_last(model: Any, task: Task) -> bool:
    """Whether a classifier reads the last token that is no padding."""
    from torch import nn

    return task == "text-classification" and isinstance(getattr(model, "score", None), nn.Linear)


def scorer(model: Any, task: Task, length: int, lookup: bool) -> nn.Module:
    """The model with int32 ids and mask [batch, length] as inputs and logits as the only output.

    It hands the model a ready additive mask [batch, 1, rows, length].

    Args:
        model: a transformers model.
        task: text-classification or text-generation.
        length: tokens of the input.
        lookup: whether the mask is looked up; see ``additive``.
    """
    import torch
    from torch import nn

    last = pools_last(model, task)
    causal = is_causal(model, task)
    offset = position_offset(model)

    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(lookup)
            self.last = nn.Embedding.from_pretrained(torch.tensor([[0.0], [1.0]]))
            self.earlier = nn.Buffer(torch.ones(length, length, dtype=torch.int32).tril()[None, None])
            self.positions = None if offset is None else nn.Buffer(torch.arange(offset, offset + length)[None])

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            allowed = attention_mask.view(input_ids.shape[0], 1, 1, length)
            if causal:
                allowed = allowed * self.earlier
            arguments: dict[str, Any] = {IDS: input_ids, MASK: self.bias(allowed)}
            if causal:
                arguments["use_cache"] = False
            if self.positions is not None:
                arguments["position_ids"] = self.positions
            if not last:
                return {LOGITS: self.model(**arguments).logits}
            logits = self.model.score(self.model.base_model(**arguments).last_hidden_state)
            following = torch.cat([attention_mask[:, 1:], torch.zeros_like(attention_mask[:, :1])], dim=1)
            is_last = self.last(attention_mask - following)
            return {LOGITS: (logits * is_last).sum(dim=1)}

    return Scorer()


def position_offset(model: Any) -> int | None:
    """The first position of models (RoBERTa and its kin) that else count the ids that are no padding, in the graph."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return None if padding is None else padding + 1
