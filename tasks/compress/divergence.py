"""How far a student is from its teacher: plain functions of logits, hidden states and projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["forward", "reverse", "skewed"]


def largest(logits: Tensor, count: int) -> Tensor | None:
    """The classes of the largest logits [U, C], int64 [U, count]; None where there are no more than that."""
    return None if logits.shape[-1] <= count else logits.topk(count, -1).indices


def log_shares(logits: Tensor, temperature: float, classes: Tensor | None = None, *, several: bool = False) -> Tensor:
    """Log-probabilities in float32 of what is compared.

    With ``classes`` these are the classes named and, behind them, all the others together as one: the mass that a
    teacher's top-k leaves out is neither dropped nor renormalised away. A divergence over these k + 1 is never above
    the one over all classes, and equal where k is all of them. With ``several`` every class is a yes or no by itself.

    Args:
        logits: [U, C].
        temperature: the logits are divided by it.
        classes: int64 [U, k], each once in a row; None for all.
        several: whether an example may have several classes.

    Returns:
        [U, C]; or [U, k + 1], and [U, C] where k is C; or [U, C, 2].
    """
    import torch
    from torch.nn.functional import logsigmoid

    scaled = logits.float() / temperature
    if several:
        return torch.stack([logsigmoid(scaled), logsigmoid(-scaled)], -1)
    logs = torch.log_softmax(scaled, -1)
    if classes is None:
        return logs
    kept = logs.gather(-1, classes)
    if classes.shape[-1] == logits.shape[-1]:
        return kept
    return torch.cat([kept, logs.scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)], -1)


def divergence(teacher: Tensor, student: Tensor, kind: Divergence = "forward", skew: float = 0.1) -> Tensor:
    """The divergence of each unit, [U]; of several labels the mean over them.

    ``forward`` is KL(teacher ‖ student), Hinton et al. (1503.02531); ``reverse`` KL(student ‖ teacher), MiniLLM
    (2306.08543); ``skewed`` KL(teacher ‖ skew · teacher + (1 − skew) · student), DistiLLM (2402.03898), whose gradient
    stays bounded where the student gives next to nothing to what the teacher says.

    Args:
        teacher: log-probabilities [U, B] or [U, C, B].
        student: the same of the student; gradients go through it alone.
        kind: which.
        skew: the teacher's share of the mixture, above 0 and below 1.
    """
    import math

    import torch

    if kind == "reverse":
        found = _kl(student, teacher.clamp(min=-1e4))
    elif kind == "skewed":
        found = _kl(teacher, torch.logaddexp(teacher + math.log(skew), student + math.log1p(-skew)))
    else:
        found = _kl(teacher, student)
    return found.flatten(1).mean(1) if found.ndim > 1 else found


def _kl(of: Tensor, against: Tensor) -> Tensor:
    """KL over the last dimension; what has no probability counts nothing."""
    import torch

    share = of.exp()
    return torch.where(share > 0, share * (of - against), 0.0).sum(-1)


def hidden_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The mean squared error of each example's vectors, [B] (TinyBERT, 1909.10351, equation 8).

    Args:
        student: [B, T, D], projected to the teacher's width.
        teacher: [B, T, D].
        mask: bool [B, T], False where there is padding.
    """
    errors = (student.float() - teacher.float()).pow(2).mean(-1)
    return _mean(errors, mask)


def relation_error(student: Tensor, teacher: Tensor, heads: int, mask: Tensor, causal: bool = False) -> Tensor:
    """KL of the teacher's relations and the student's, the mean over heads and positions of each example, [B].

    The vectors of all attention heads stand side by side and are cut anew into relation heads; a relation is the
    softmax of their scaled products with each other (MiniLMv2, 2012.15828, section 3). So teacher and student may have
    any number of attention heads and any widths. Departure: with ``causal`` a position is held only against itself and
    those before, which is all that a decoder attends to.

    Args:
        student: queries, keys or values, [B, T, D].
        teacher: the same of the teacher, [B, T, E].
        heads: relation heads; divides D and E.
        mask: bool [B, T], False where there is padding, which is neither held against others nor they against it.
        causal: whether later positions are left out.
    """
    import torch

    allowed = mask[:, None, None, :]
    if causal:
        length = mask.shape[1]
        allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    logs = [_relations(vectors, heads, allowed) for vectors in (teacher, student)]
    found = torch.where(allowed, logs[0].exp() * (logs[0] - logs[1]), 0.0).sum(-1).mean(1)  # [B, T]
    return _mean(found, mask)


def _relations(vectors: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """Log-softmax of the scaled products, [B, heads, T, T]."""
    import torch

    batch, length, width = vectors.shape
    parts = vectors.float().reshape(batch, length, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / (width // heads) ** 0.5
    # A finite floor: where a row has nothing that is allowed, its gradient must not be NaN.
    return torch.log_softmax(scores.masked_fill(~allowed, -1e9), -1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of [B, T] over what ``mask`` keeps, [B]; 0 where it keeps nothing."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def matched(student: int, teacher: int) -> list[int]:
    """The teacher's block, from 0, for every block of the student: the one at the same share of the depth, the last
    for the last (TinyBERT's uniform mapping)."""
    return [-(-(index + 1) * teacher // student) - 1 for index in range(student)]


def relation_heads(widths: Sequence[int], at_most: int) -> int:
    """The largest number of relation heads up to ``at_most`` that divides all ``widths``."""
    return next(heads for heads in range(at_most, 0, -1) if all(width % heads == 0 for width in widths))
