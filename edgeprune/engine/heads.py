"""Attention by single heads: what all architectures share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def attention_mask(
    make: Callable[..., Any], config: Any, embeddings: Tensor, window: int | None = None
) -> Any:
    """A causal mask, as the library makes it, or None where its attention needs none.

    The library leaves masks out too, but in some versions not while a CUDA graph is recorded, which
    would then hold another kernel than the one it stands for.

    Args:
        make: the library's function.
        config: the model's.
        embeddings: [batch, pos, d_model], without padding on the left.
        window: tokens that a token sees, itself included; None: all before it.
    """
    sees_all = window is None or embeddings.shape[1] < window
    if sees_all and config._attn_implementation == "sdpa":
        return None
    return make(config, embeddings, attention_mask=None, past_key_values=None)


def is_foldable(norm: nn.Module) -> bool:
    """Whether a norm is a LayerNorm or a plain RMSNorm, whose scale can be part of the weights."""
    return isinstance(norm, nn.LayerNorm) or hasattr(norm, "variance_epsilon")


def project_to_heads(
    x: Tensor,
    norm: nn.Module,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    *,
    fused: bool = False,
) -> Tensor:
    """Queries, keys or values of heads with an input of their own each.

    A norm's scale and shift are folded into the projection: what is left is one number an input,
    by which what has been projected is multiplied. No normed copy of the inputs is made, and where
    the norm is folded, the backward pass puts their gradient in their place.

    Args:
        x: [head, batch, pos, d_model], less its mean over d_model if the norm is a LayerNorm.
        norm: of the inputs. It is called as it is where it is not foldable, and in float16, which
            what is not normed would overflow.
        weights: [head, d_head, d_model] each, of all heads when put together.
        bias: [head, d_head] or None.
        fused: whether a norm that is foldable is left to Triton, with its projection.

    Returns:
        [head, batch, pos, d_head].
    """
    num_heads, batch, pos, _ = x.shape
    is_layer_norm = isinstance(norm, nn.LayerNorm)
    if is_foldable(norm) and x.dtype != torch.float16:
        if is_layer_norm and norm.bias is not None:
            shift = torch.cat([weight @ norm.bias for weight in weights])  # [head, d_head]
            bias = shift if bias is None else bias + shift
        eps = norm.eps if is_layer_norm else norm.variance_epsilon
        projected = _ScaledProjection.apply(x.flatten(1, 2), eps, fused, norm.weight, *weights)
    else:
        projected = torch.bmm(norm(x).flatten(1, 2), torch.cat(tuple(weights)).transpose(1, 2))
    if bias is not None:
        projected = projected + bias[:, None]
    return projected.view(num_heads, batch, pos, -1)


class _ScaledProjection(torch.autograd.Function):
    """y = x / sqrt(mean square + eps) * scale @ weight.T, for x of [head, token, d_model].

    The mean is over d_model. Scale and weights get no gradients. The backward pass folds them
    again, for what is folded takes as much memory as the model's own weights.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, fused: bool, scale: Tensor, *weights: Tensor
    ) -> Tensor:
        weight = _fold(scale, weights)
        if fused:
            from edgeprune.engine import kernels  # needs Triton

            factor = None  # the kernels make their own
            y, negated = kernels.project(x, weight, eps)
        else:
            exact = x.float() if x.device.type == "cpu" else x  # of 16 bits, a CPU's norm is slow
            norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True, dtype=torch.float32)
            # [head, token, 1]: -(sum of squares + eps ...)
            negated = -x.shape[-1] * eps - norm.square_()
            factor = (negated / -x.shape[-1]).rsqrt_()
            y = (torch.bmm(x, weight.transpose(1, 2)) * factor).to(x.dtype)
        ctx.fused = fused
        ctx.save_for_backward(x, negated, factor, y, scale, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, negated, factor, y, scale, *weights = ctx.saved_tensors
        weight = _fold(scale, weights)
        if ctx.fused:
            from edgeprune.engine import kernels

            kernels.put_gradient(x, weight, y, negated, grad)
        else:
            # The factor changes by -factor^3 x / d_model, and factor^2 / d_model is -1 / negated.
            change = (grad * y).sum(-1, keepdim=True, dtype=torch.float32).div_(negated)
            x.mul_(change.to(x.dtype))
            x.baddbmm_((grad * factor).to(x.dtype), weight)
        return x, *[None] * (3 + len(weights))


def _fold(scale: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """A norm's scale as part of the weights of all heads."""
    num_heads = [len(weight) for weight in weights]
    folded = weights[0].new_empty(sum(num_heads), *weights[0].shape[1:])
    for weight, part in zip(weights, folded.split(num_heads), strict=True):
        torch.mul(scale, weight, out=part)
    return folded


def centre(x: Tensor) -> Tensor:
    """Less its mean over the last axis."""
    return x - x.mean(-1, keepdim=True)


def project_from_heads(
    values: Tensor,
    closed: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    centred: bool,
) -> Tensor:
    """Outboxes of the heads, less what closed edges carry.

    The bias of the output projection is divided equally over the heads; it cancels in a difference.

    Args:
        values, closed: [..., head * d_head]; the latter None for zero outboxes.
        weight: [head, d_head, d_model].
        bias: [d_model] or None.
        centred: whether the outboxes are to have no mean over d_model.

    Returns:
        [head, ..., d_model].
    """
    num_heads, _, d_model = weight.shape
    if centred:  # what writes them is smaller than what is written
        weight = centre(weight)
    difference = values if closed is None else values - closed
    by_head = rearrange(difference, "... (head d_head) -> head (...) d_head", head=num_heads)
    if closed is None and bias is not None:
        share = centre(bias) if centred else bias
        share = (share / num_heads).expand(num_heads, 1, d_model)
        outboxes = torch.baddbmm(share, by_head, weight)
    else:
        outboxes = torch.bmm(by_head, weight)
    return outboxes.view(num_heads, *values.shape[:-1], d_model)
