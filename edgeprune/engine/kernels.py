"""Triton kernels that norm and project the heads' inputs in one pass over memory (`fused=true`).

The heads' inputs, [head, token, d_model], are the largest array of a training step. PyTorch's
operations go through it four times: to compute its mean squares, to project it, and in the backward
pass to scale it and to add the product of the gradient. These kernels save three reads and a write.

Only this module needs Triton, which is part of PyTorch's builds for GPUs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 128
"""Number of tokens per program; a program computes all of d_head for one head."""
MODEL = 64
"""Number of elements of d_model that a program loads at a time."""


def project(x: Tensor, weight: Tensor, eps: float, num_single: int) -> tuple[Tensor, Tensor]:
    """y = x / sqrt(mean square + eps) @ weight.T; x is read once.

    Args:
        x: [reader, token, d_model], contiguous along the last axis.
        weight: [head, d_head, d_model], contiguous.
        num_single: number of heads with one reader if there are more readers than heads; the others
            have equally many consecutive ones.

    Returns:
        y, [reader, token, d_head]; and -d_model * (mean square + eps), [reader, token, 1] in
        float32.
    """
    num_readers, num_tokens, d_model = x.shape
    y = x.new_empty(num_readers, num_tokens, weight.shape[1])
    negated = x.new_empty(num_readers, num_tokens, 1, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _project[_grid(x)](
            x, weight, y, negated, num_tokens, *x.stride()[:2], *_sharing(x, weight, num_single),
            eps, d_model, **_tile(weight),
        )  # fmt: skip
    return y, negated


def put_gradient(
    x: Tensor, weight: Tensor, y: Tensor, negated: Tensor, grad: Tensor, num_single: int
) -> None:
    """Overwrite the input of `project` with its gradient, given that of y, [reader, token, d_head].

    y and negated are the results of `project`; x is read once and written once.
    """
    _, num_tokens, d_model = x.shape
    with torch.cuda.device_of(x):
        _put_gradient[_grid(x)](
            x, weight, y, negated, grad.contiguous(), num_tokens, *x.stride()[:2],
            *_sharing(x, weight, num_single), d_model, **_tile(weight),
        )  # fmt: skip


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[1], TOKENS), x.shape[0]


def _sharing(x: Tensor, weight: Tensor, num_single: int) -> tuple[int, int]:
    """The number of heads with one reader, and the number of readers of each other head."""
    if len(x) == len(weight):
        return len(weight), 1
    return num_single, (len(x) - num_single) // (len(weight) - num_single)


def _tile(weight: Tensor) -> dict[str, int]:
    d_head = weight.shape[1]
    padded = max(16, triton.next_power_of_2(d_head))  # tensor cores need at least 16
    return dict(d_head=d_head, PADDED=padded, TOKENS=TOKENS, MODEL=MODEL, num_warps=8)


@triton.jit
def _place(
    num_tokens, num_single, num_sharing,
    d_head: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The part of the arrays that a program computes.

    Returns:
        The reader and its head; the tokens' indices within the reader and among all readers, and
        whether they exist, [TOKENS] each; the indices into d_head, [PADDED]; the offsets into y and
        whether they exist, [TOKENS, PADDED] each.
    """
    reader = tl.program_id(1).to(tl.int64)
    head = tl.where(reader < num_single, reader, num_single + (reader - num_single) // num_sharing)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    own = tl.arange(0, PADDED)
    among_all, is_token = reader * num_tokens + tokens, tokens < num_tokens
    in_y = among_all[:, None] * d_head + own[None, :]
    is_y = is_token[:, None] & (own < d_head)[None, :]
    return reader, head, tokens, among_all, is_token, own, in_y, is_y


@triton.jit
def _project(
    x_at, weight_at, y_at, negated_at, num_tokens, reader_stride, token_stride, num_single,
    num_sharing, eps, d_model,
    d_head: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    reader, head, tokens, among_all, is_token, own, in_y, is_y = _place(
        num_tokens, num_single, num_sharing, d_head, PADDED, TOKENS
    )
    rows = x_at + reader * reader_stride + tokens[:, None] * token_stride
    weights = weight_at + (head * d_head + own[None, :]) * d_model
    product = tl.zeros((TOKENS, PADDED), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, d_model, MODEL):
        inner = start + tl.arange(0, MODEL)
        is_inner = inner < d_model
        x = tl.load(rows + inner[None, :], is_token[:, None] & is_inner[None, :], 0.0)
        is_weight = (own < d_head)[None, :] & is_inner[:, None]
        weight = tl.load(weights + inner[:, None], is_weight, 0.0)
        product = tl.dot(x, weight, product, input_precision="ieee")
        exact = x.to(tl.float32)
        squares += tl.sum(exact * exact, 1)
    negated = -d_model * eps - squares
    y = product * tl.rsqrt(negated / -d_model)[:, None]
    tl.store(y_at + in_y, y.to(y_at.dtype.element_ty), is_y)
    tl.store(negated_at + among_all, negated, is_token)


@triton.jit
def _put_gradient(
    x_at, weight_at, y_at, negated_at, grad_at, num_tokens, reader_stride, token_stride, num_single,
    num_sharing, d_model,
    d_head: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    reader, head, tokens, among_all, is_token, own, in_y, is_y = _place(
        num_tokens, num_single, num_sharing, d_head, PADDED, TOKENS
    )
    y = tl.load(y_at + in_y, is_y, 0.0).to(tl.float32)
    grad = tl.load(grad_at + in_y, is_y, 0.0).to(tl.float32)
    negated = tl.load(negated_at + among_all, is_token, -1.0)
    # See `_ScaledProjection.backward` in heads.py.
    change = tl.sum(grad * y, 1) / negated
    scaled = (grad * tl.rsqrt(negated / -d_model)[:, None]).to(x_at.dtype.element_ty)
    rows = x_at + reader * reader_stride + tokens[:, None] * token_stride
    weights = weight_at + (head * d_head + own[:, None]) * d_model
    for start in range(0, d_model, MODEL):
        inner = start + tl.arange(0, MODEL)
        is_inner = inner[None, :] < d_model
        is_x = is_token[:, None] & is_inner
        x = tl.load(rows + inner[None, :], is_x, 0.0)
        weight = tl.load(weights + inner[None, :], (own < d_head)[:, None] & is_inner, 0.0)
        product = tl.dot(scaled, weight, input_precision="ieee")
        grad_x = x.to(tl.float32) * change[:, None] + product
        tl.store(rows + inner[None, :], grad_x.to(x_at.dtype.element_ty), is_x)
