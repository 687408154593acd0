"""Projections of single heads: what all architectures share."""

from __future__ import annotations

import torch
from torch import Tensor


def project_to_heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Queries, keys or values of heads with an input of their own each.

    Args:
        x: [head, batch, pos, d_model], normed.
        weight: [head, d_model, d_head].
        bias: [head * d_head] or None.

    Returns:
        [head, batch, pos, d_head].
    """
    num_heads, batch, pos, d_model = x.shape
    x = x.reshape(num_heads, batch * pos, d_model)
    if bias is None:
        projected = torch.bmm(x, weight)
    else:
        projected = torch.baddbmm(bias.view(num_heads, 1, -1), x, weight)
    return projected.view(num_heads, batch, pos, -1)


def project_from_heads(
    values: Tensor, corrupted: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Outboxes of the heads, less the corrupted ones.

    The bias of the output projection is divided equally over the heads; it cancels in a difference.

    Args:
        values, corrupted: [batch, pos, head * d_head]; None for zero outboxes.
        weight: [head, d_head, d_model].
        bias: [d_model] or None.

    Returns:
        [head, batch, pos, d_model].
    """
    num_heads, d_head, d_model = weight.shape
    batch, pos, _ = values.shape
    difference = values if corrupted is None else values - corrupted
    by_head = difference.view(batch * pos, num_heads, d_head).transpose(0, 1)
    if corrupted is None and bias is not None:
        share = (bias / num_heads).expand(num_heads, 1, d_model)
        outboxes = torch.baddbmm(share, by_head, weight)
    else:
        outboxes = torch.bmm(by_head, weight)
    return outboxes.view(num_heads, batch, pos, d_model)
