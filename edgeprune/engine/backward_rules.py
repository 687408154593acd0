"""Backward passes in which attribution takes other coefficients than the gradient's.

RelP (Jafari et al. 2025, arXiv:2508.21258) propagates relevance: the gradient is that of linear
functions of the same values,

    norm: y = w x / s, with the scale s held fixed;
    activation: f(x) = x r, with the ratio r = f(x) / x held fixed;
    gate: each of the two factors takes half of the gradient of their product.

Attention keeps its gradient (the authors' AH rule, which would hold the pattern fixed, gives edges
into queries and keys no score; their own examples leave it out).

GIM (Edin et al. 2025, arXiv:2505.17630) corrects for attention that moves elsewhere when one score
changes. The gradient of the softmax p = softmax(x) is taken at the temperature T = 2,

    grad_x = q (grad_p - sum grad_p q), where q = softmax(x / T),

and where factors are multiplied, each takes its share of the gradient: gates and values a half,
queries and keys, whose product is a factor of another, a quarter. The scales of norms are held
fixed here too; activations keep their gradient.

Values stay the same; only what is passed back changes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.engine.circuit_model import CircuitModel

RULES = ("relp", "gim")
"""The sets of rules."""
TEMPERATURE = 2.0
"""Temperature at which GIM takes the softmax's gradient."""
SHARES = {"q": 0.25, "k": 0.25, "v": 0.5}
"""Shares of the gradient in GIM."""

Function = Callable[[Tensor], Tensor]


@contextmanager
def backward_rules(model: CircuitModel, rules: str) -> Iterator[None]:
    """Let passes of the model in the block differentiate by one of RULES.

    The backward pass may be run in the block or after it.
    """
    architecture = model.architecture
    with ExitStack() as stack:

        def replace(owner: Any, name: str, function: Function) -> None:
            stack.enter_context(_replaced(owner, name, function))

        def fix_scale(norm: nn.Module, owner: Any, name: str = "forward") -> None:
            if type(norm).__name__.endswith("Norm"):
                replace(owner, name, _fix_scale(norm))

        fix_scale(architecture.final_norm, architecture.final_norm)
        for block in architecture.blocks:
            # `project_to_heads` folds a norm's weight into its own, but not that of a function
            fix_scale(block.attention_norm, block, "attention_norm")
            replace(block, "scale", _fix_factor(block.scale))
            for module in (block.mlp_norm, *block.attention.modules(), *block.mlp.modules()):
                fix_scale(module, module)
            for module in block.mlp.modules():
                is_activation = not [*module.children(), *module.parameters()]
                if is_activation and rules == "relp":
                    replace(module, "forward", _fix_ratio(module))
                if hasattr(module, "gate_proj"):  # what is projected down is a product
                    down = module.down_proj
                    replace(down, "forward", lambda x, plain=down.forward: plain(_share(x, 0.5)))
        if rules == "gim":
            stack.enter_context(architecture.probe_attention(_adjust_attention))
        yield


@contextmanager
def _replaced(owner: Any, name: str, function: Function) -> Iterator[None]:
    """Set an attribute, of an instance alone."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def _with_gradient_of(linear: Tensor, value: Tensor) -> Tensor:
    """A tensor's gradient with another one's value."""
    return value.detach() + (linear - linear.detach())


def _share(x: Tensor, share: float) -> Tensor:
    """x, which takes a share of its gradient."""
    return _with_gradient_of(share * x, x)


def _fix_scale(norm: nn.Module) -> Function:
    """A LayerNorm or RMSNorm, [..., d] -> [..., d], whose scale has no gradient."""
    plain, is_layer_norm = norm.forward, isinstance(norm, nn.LayerNorm)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if is_layer_norm else x
        weight = norm.weight if is_layer_norm else plain(x.new_ones(x.shape[-1]))  # Gemma's: 1 + w
        scale = (centred.detach().float().square().mean(-1, keepdim=True) + eps).rsqrt()
        return _with_gradient_of(centred * scale.to(x.dtype) * weight, plain(x))

    return forward


def _fix_factor(scale: Function) -> Function:
    """`Block.scale`, whose factor per token has no gradient."""

    def forward(values: Tensor) -> Tensor:
        scaled = scale(values)
        before, after = (x.detach().norm(dim=-1, keepdim=True) for x in (values, scaled))
        return _with_gradient_of(values * torch.where(before == 0, 1, after / before), scaled)

    return forward


def _fix_ratio(activation: nn.Module) -> Function:
    """An activation function, whose ratio of output and input has no gradient."""
    plain = activation.forward

    def forward(x: Tensor) -> Tensor:
        y = plain(x)
        return _with_gradient_of(x * torch.where(x == 0, 0, y / x).detach(), y)

    return forward


def _adjust_attention(layer: int, part: str, x: Tensor) -> Tensor:
    """GIM's rules for the parts of attention, see `heads.attend`."""
    if part in SHARES:
        return _share(x, SHARES[part])
    if x.requires_grad:
        tempered = x.detach() ** (1 / TEMPERATURE)  # softmax(scores / T), once normalised
        tempered = tempered / tempered.sum(-1, keepdim=True)

        def adjust(grad: Tensor) -> Tensor:
            """What the softmax turns into the wanted gradient: it multiplies by x."""
            wanted = tempered * (grad - (grad * tempered).sum(-1, keepdim=True))
            return torch.where(x == 0, 0, wanted / x).detach()

        x.register_hook(adjust)
    return x
