"""The trainer: one optimisation step after another. It touches no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from edgeprune.config import Constraint, TrainerConfig
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cache import KeptPasses
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.engine.gradient import CudaGraphs, Gradient, StepInputs, differentiate
from edgeprune.errors import CheckpointError, ConfigError, TrainingError
from edgeprune.methods import hard_concrete
from edgeprune.methods.masks import CircuitMasks, combined_gates
from edgeprune.methods.objective import (
    SparsityConstraint,
    learning_rate_factor,
    scheduled_target,
)
from edgeprune.metrics import Output
from edgeprune.prompts import Batch, Pair, collate, training_pairs
from edgeprune.scale.sharding import is_sharded
from edgeprune.scale.world import World
from edgeprune.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class StepMetrics:
    """One optimisation step, measured on its own batch and its own sample of the gates.

    Attributes:
        step: steps done, this one included.
        loss: what was minimised.
        kl: nats per predicted token; None where outputs are not logits.
        unexplained: share of the outputs' variance that is unexplained; None where they are logits.
        sparsity, target: 1 - mean edge gate, and what it is driven to; no target where edges have
            a price.
        node_sparsity, node_target: the same for nodes; None without node gates.
        lambda_1, lambda_2: of the edges' Lagrangian, with which the loss was made; None
            without.
        learning_rate: of log alpha.
    """

    step: int
    loss: float
    kl: float | None
    unexplained: float | None
    sparsity: float
    target: float | None
    node_sparsity: float | None
    node_target: float | None
    lambda_1: float | None
    lambda_2: float | None
    learning_rate: float


class Trainer:
    """Learns a circuit's masks.

    Args:
        model: the frozen model.
        pairs: training prompts.
        config: how.
        target_sparsity: of the edges, after the warm-up; None where edges have a price.
        seed: of the start, the noise and the order of the data.
        ablation: what closed edges carry.
        processes: those that share the run, each with a trainer of its own; all take the step that
            one process would take.

    Raises:
        ConfigError: a batch has fewer pairs than there are processes, or is to be run in parts
            where the model's outputs are values; or CUDA graphs are asked for elsewhere than on a
            GPU.
    """

    def __init__(
        self,
        model: CircuitModel,
        pairs: Sequence[Pair],
        config: TrainerConfig,
        *,
        target_sparsity: float | None,
        seed: int,
        ablation: Ablation,
        processes: World | None = None,
    ) -> None:
        self.model = model
        self.pairs = pairs
        self.config = config
        self.target_sparsity = target_sparsity
        self.seed = seed
        self.ablation = ablation
        self.processes = processes or World()
        self.processes.check_batch(min(config.batch_size, len(pairs)))
        if model.output is not Output.logits and (
            config.micro_batch_size or self.processes.count > 1
        ):
            raise ConfigError(
                f"the outputs of {model.name} are values, and their variance is taken over a whole "
                "batch; leave out trainer.micro_batch_size, and start one process"
            )
        if config.cuda_graph and model.device.type != "cuda":
            raise ConfigError(
                f"trainer.cuda_graph=true is for a GPU, but the model is on {model.device.type}; "
                "leave it out"
            )
        self._sharded = is_sharded(model.architecture.blocks[0].layer)
        self.step = 0
        self.masks = CircuitMasks(
            model.graph,
            node_gates=config.node_gates,
            init_mean=config.init_mean,
            init_std=config.init_std,
            seed=seed,
        ).to(model.device)
        self._is_exact = config.constraint is Constraint.exact
        constraints = {}
        if not self._is_exact and config.edge_price is None:
            constraints["edge"] = SparsityConstraint()
        if not self._is_exact and config.node_gates:
            constraints["node"] = SparsityConstraint()
        self.constraints = nn.ModuleDict(constraints).to(model.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.masks.parameters())},
                {"params": list(self.constraints.parameters()), "maximize": True},
            ],
            lr=config.learning_rate,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self._hold()

    def train_step(self) -> StepMetrics:
        """Do one optimisation step.

        Raises:
            TrainingError: the loss or a gradient is not finite; nothing was changed.
            ProcessError: another process died or hung; nothing was changed.
        """
        config = self.config
        pairs = training_pairs(self.pairs, config.batch_size, self.seed, self.step)
        gates = self.masks.sample(self.step)
        mixed = combined_gates(gates, self.masks.edge_writers)
        differentiate = partial(self._differentiate, pairs, mixed.detach())
        if self._sharded:  # its layers are gathered from other processes
            distance, grad_gates = self.processes.collective(differentiate)
        else:
            distance, grad_gates = differentiate()
        self.processes.sum([distance, grad_gates])
        sparsity = {k: hard_concrete.sparsity(g) for k, g in vars(gates).items() if g is not None}
        targets = self._targets()
        loss = distance
        if config.edge_price is not None:
            is_open = hard_concrete.probability_open(self.masks.edge_log_alpha)
            loss = loss + config.edge_price * is_open.sum()
        for kind, constraint in self.constraints.items():
            loss = loss + constraint(sparsity[kind], targets[kind])
        multipliers = dict(self.constraints.named_parameters())
        values = {"loss": loss, "distance": distance, **sparsity, **multipliers}
        values["gradient"] = grad_gates.sum()
        values = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient"])):
            raise TrainingError(
                f"the loss is {values['loss']} at step {self.step + 1} (distance "
                f"{values['distance']}), and the sum of its gradients by the gates "
                f"{values['gradient']}, on the batch that begins with {pairs[0].text!r}; the "
                "state before this step is kept. Lower trainer.learning_rate, or use "
                "model.dtype=float32"
            )
        learning_rate = self._set_learning_rates()
        self.optimizer.zero_grad(set_to_none=True)
        if self._is_exact:
            for kind in sparsity:
                getattr(gates, kind).retain_grad()
        mixed.backward(grad_gates, retain_graph=loss.requires_grad)
        if loss.requires_grad:
            loss.backward()
        if self._is_exact:
            self.masks.project_gradients(gates, **targets)
        self.optimizer.step()
        self.step += 1
        self._hold()
        of_logits = self.model.output is Output.logits
        return StepMetrics(
            step=self.step,
            loss=values["loss"],
            kl=max(values["distance"], 0.0) if of_logits else None,  # rounding may be below
            unexplained=None if of_logits else values["distance"],
            sparsity=values["edge"],
            target=targets["edge"],
            node_sparsity=values.get("node"),
            node_target=targets["node"],
            lambda_1=values.get("edge.lambda_1"),
            lambda_2=values.get("edge.lambda_2"),
            learning_rate=learning_rate,
        )

    def _differentiate(self, pairs: Sequence[Pair], gates: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of a batch's distance and of its gradient by the gates, [edge].

        The part is run in slices of `micro_batch_size`, all with the same gates.
        """
        config = self.config
        gates.requires_grad_()
        total = torch.zeros((), device=gates.device)
        grad_gates = torch.zeros_like(gates)
        mine = self.processes.part(pairs)
        size = config.micro_batch_size or len(mine)
        for start in range(0, len(mine), size):
            batch = collate(mine[start : start + size]).to(gates.device)
            reference, corrupted = self._run_pair(batch)
            inputs = StepInputs(batch, reference, self.ablation.values(batch, corrupted), gates)
            share = len(batch.pairs) / len(pairs)
            distance, gradient = self._differentiate_slice(inputs, share=share)
            total += distance
            grad_gates += gradient
        return total, grad_gates

    @cached_property
    def _differentiate_slice(self) -> Callable[..., Gradient]:
        """See `differentiate`."""
        recompute = self.config.recompute
        if self.config.cuda_graph:
            return CudaGraphs(self.model, recompute=recompute).differentiate
        return partial(differentiate, self.model, recompute=recompute)

    @cached_property
    def _run_pair(self) -> Callable[[Batch], tuple[Tensor, Activations | None]]:
        """See `CircuitModel.run_pair`; a small training set is run once, before the first step."""
        size = self.config.micro_batch_size
        size = size or math.ceil(self.config.batch_size / self.processes.count)
        return KeptPasses.where_they_fit(
            self.model, self.pairs, size, corrupted=self.ablation.needs_corrupted
        )

    def _targets(self) -> dict[str, float | None]:
        """The next step's target sparsity of edges and nodes; None where there is none."""
        config = self.config

        def scheduled(start: float, target: float) -> float:
            return scheduled_target(self.step, start, target, config.sparsity_warmup, config.warmup)

        edge = node = None
        if config.edge_price is None:
            edge = scheduled(config.start_sparsity, self.target_sparsity)
        if config.node_gates:
            node = scheduled(config.start_node_sparsity, config.target_node_sparsity)
        return {"edge": edge, "node": node}

    def _hold(self) -> None:
        """Bring the gates to the next step's targets."""
        if self._is_exact:
            self.masks.shift(self.step, **self._targets())

    def _set_learning_rates(self) -> float:
        config = self.config
        factor = learning_rate_factor(self.step, config)
        of_masks, of_multipliers = self.optimizer.param_groups
        of_masks["lr"] = config.learning_rate * factor
        of_multipliers["lr"] = config.multiplier_learning_rate * factor
        return of_masks["lr"]

    # ---------------------------------------------------------------------------------- the state

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        """In the optimiser's order."""
        return dict(self.masks.named_parameters()) | dict(self.constraints.named_parameters())

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on."""
        optimizer: dict[str, Tensor] = dict(self.constraints.state_dict())
        for name, parameter in self._named_parameters().items():
            for key, value in self.optimizer.state[parameter].items():
                optimizer[f"{name}/{key}"] = value
        return Checkpoint(self.step, dict(self.masks.state_dict()), optimizer)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, to the same bits as without the interruption.

        Raises:
            CheckpointError: it belongs to another graph or another kind of run.
        """
        try:
            self.masks.load_state_dict(checkpoint.masks)
            state = checkpoint.optimizer
            self.constraints.load_state_dict({k: v for k, v in state.items() if "/" not in k})
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} is not of this model: {error}"
            ) from None
        for name, parameter in self._named_parameters().items():
            prefix = f"{name}/"
            found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if found:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in found.items()
                }
        self.step = checkpoint.step
