"""Attention by single heads: masks and projections that all architectures share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def attention_mask(
    make: Callable[..., Any], config: Any, embeddings: Tensor, window: int | None = None
) -> Any:
    """Make a causal mask with a function of the library, or None where SDPA needs none.

    The library leaves out such masks as well, but in some versions not while a CUDA graph is
    recorded. The embeddings are [batch, pos, d_model]; `window` is in tokens.
    """
    sees_all = window is None or embeddings.shape[1] < window
    if sees_all and config._attn_implementation == "sdpa":
        return None
    return make(config, embeddings, attention_mask=None, past_key_values=None)


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as the library calls it, whose parts can be read and changed on the way.

    If the module has a `probe`, `probe(part, x)` takes the place of every part: "q", "k" and "v",
    as they are multiplied (so after any rotation), and "pattern", [batch, head, query, key].

    Args:
        q: [batch, head, pos, d_head]; `k` and `v` may have fewer heads, which then are shared.
        mask: added to the scores; None for none.
        softcap: the scores' magnitude is kept below this.

    Returns:
        The values, [batch, pos, head, d_head], and the pattern.
    """
    probe = getattr(module, "probe", None) or (lambda part, x: x)
    q, k, v = (probe(part, x) for part, x in zip("qkv", (q, k, v), strict=True))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    pattern = probe("pattern", scores.softmax(-1, dtype=torch.float32).to(q.dtype))
    return (pattern @ v).transpose(1, 2).contiguous(), pattern


def is_foldable(norm: nn.Module) -> bool:
    """Whether a norm is a LayerNorm or plain RMSNorm, whose scale can be folded into weights."""
    return isinstance(norm, nn.LayerNorm) or hasattr(norm, "variance_epsilon")


def project_to_heads(
    x: Tensor, norm: nn.Module, weights: Sequence[Tensor], bias: Tensor | None, fused: bool = False
) -> Tensor:
    """Norm and project a separate input per reader; returns [reader, batch, pos, d_head].

    The norm's scale and shift are folded into the projection, and its factor per input multiplies
    the result. So no normed copy is made; the backward pass overwrites x with its gradient.

    Args:
        x: [reader, batch, pos, d_model], with zero mean over d_model if the norm is a LayerNorm.
        norm: called as usual if it cannot be folded, and in float16, where the unnormed inputs
            would overflow.
        weights: [head, d_head, d_model] each, one after another for all heads. A head has one
            reader; if there are more readers than heads, this holds for the first weight, and the
            other weights' heads have equally many consecutive readers each.
        bias: [head, d_head] or None.
        fused: whether to use the Triton kernels if the norm can be folded.
    """
    num_single = len(weights[0])
    is_layer_norm = isinstance(norm, nn.LayerNorm)
    if is_foldable(norm) and x.dtype != torch.float16:
        if is_layer_norm and norm.bias is not None:
            shift = torch.cat([weight @ norm.bias for weight in weights])  # [head, d_head]
            bias = shift if bias is None else bias + shift
        eps = norm.eps if is_layer_norm else norm.variance_epsilon
        projected = _ScaledProjection.apply(x.flatten(1, 2), eps, fused, norm.weight, *weights)
    else:
        weight = torch.cat(tuple(weights)).transpose(1, 2)  # [head, d_model, d_head]
        projected = _multiply(norm(x).flatten(1, 2), weight, num_single)
    if bias is not None:
        if len(x) > len(bias):
            single, shared = bias[:num_single], bias[num_single:]
            num_sharing = (len(x) - num_single) // len(shared)
            bias = torch.cat([single, shared.repeat_interleave(num_sharing, 0)])  # [reader, d_head]
        projected = projected + bias[:, None]  # [reader, batch * pos, d_head]
    return projected.unflatten(1, x.shape[1:3])


class _ScaledProjection(torch.autograd.Function):
    """y = x * factor @ (scale * weight).T, where factor = 1 / sqrt(mean square of x + eps).

    x is [reader, token, d_model], y is [reader, token, d_head]; the mean is over d_model. The
    backward pass overwrites x with its gradient, unless all inputs are the same memory, and folds
    the frozen weights again to save memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, fused: bool, scale: Tensor, *weights: Tensor
    ) -> Tensor:
        weight = _fold(scale, weights)  # [head, d_head, d_model]
        if fused:
            from edgeprune.engine import kernels  # needs Triton

            factor, (y, negated) = None, kernels.project(x, weight, eps, len(weights[0]))
        else:
            own = x[:1] if _is_shared(x) else x  # [1 or reader, token, d_model]
            exact = own.float() if x.device.type == "cpu" else own  # a CPU's 16-bit norm is slow
            norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True, dtype=torch.float32)
            # -d_model * (mean square + eps)
            negated = -x.shape[-1] * eps - norm.square_()  # [1 or reader, token, 1]
            factor = (negated / -x.shape[-1]).rsqrt_()
            if _is_shared(x) and len(x) == len(weight):  # one wide product
                y = (x[0] @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2]).transpose(0, 1)
            else:
                y = _multiply(x, weight.transpose(1, 2), len(weights[0]))
            y = (y * factor).to(x.dtype)  # [reader, token, d_head]
        ctx.fused = fused
        ctx.save_for_backward(x, negated, factor, y, scale, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, negated, factor, y, scale, *weights = ctx.saved_tensors
        weight = _fold(scale, weights)  # [head, d_head, d_model]
        if ctx.fused:
            from edgeprune.engine import kernels

            x = x.contiguous() if _is_shared(x) else x
            kernels.put_gradient(x, weight, y, negated, grad, len(weights[0]))
        else:
            # d factor / dx = -factor^3 x / d_model, and factor^2 / d_model = -1 / negated, so
            # grad_x = (grad * y).sum() / negated * x + (grad * factor) @ weight.
            change = (grad * y).sum(-1, keepdim=True, dtype=torch.float32).div_(negated)
            x = x * change.to(x.dtype) if _is_shared(x) else x.mul_(change.to(x.dtype))
            grad = (grad * factor).to(x.dtype)
            num_single = len(weights[0])
            inputs, grads = (_by_weight(part, weight, num_single) for part in (x, grad))
            for (part, own), (grad_part, _) in zip(inputs, grads, strict=True):
                part.baddbmm_(grad_part, own)
        return x, *[None] * (3 + len(weights))


def _is_shared(x: Tensor) -> bool:
    """Whether all readers' inputs, [reader, token, d_model], are the same memory."""
    return len(x) > 1 and x.stride(0) == 0


def _multiply(x: Tensor, weight: Tensor, num_single: int) -> Tensor:
    """x @ weight: [reader, token, m] and [head, m, n] -> [reader, token, n]; see `_by_weight`."""
    first, *others = (torch.bmm(part, own) for part, own in _by_weight(x, weight, num_single))
    return torch.cat([first, torch.stack(others, 1).flatten(0, 1)]) if others else first


def _by_weight(x: Tensor, weight: Tensor, num_single: int) -> list[tuple[Tensor, Tensor]]:
    """Pair readers, [reader, ...], with their heads' weights, [head, ...], without copying any.

    A head has one reader; if there are more readers than heads, only the first `num_single` heads
    do, and the others have equally many consecutive ones. Of these, the first reader of every head
    makes one pair with the weights, the second makes the next, and so on.
    """
    if len(x) == len(weight):
        return [(x, weight)]
    single, shared = x.split([num_single, len(x) - num_single])
    members = shared.unflatten(0, (len(weight) - num_single, -1)).unbind(1)
    return [(single, weight[:num_single]), *((part, weight[num_single:]) for part in members)]


def _fold(scale: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Multiply the weights, [head, d_head, d_model] each, by a norm's scale and concatenate."""
    num_heads = [len(weight) for weight in weights]
    folded = weights[0].new_empty(sum(num_heads), *weights[0].shape[1:])
    for weight, part in zip(weights, folded.split(num_heads), strict=True):
        torch.mul(scale, weight, out=part)  # without an intermediate copy
    return folded


def centre(x: Tensor) -> Tensor:
    """Subtract the mean over the last axis."""
    return x - x.mean(-1, keepdim=True)
