"""CircuitModel: a frozen language model which can be run as a circuit.

Hugging Face loads the model and runs it whole; the pass through separate outboxes is ours. What an
architecture has to tell for that is in `gpt2.py` (and its siblings); what is common is here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgeprune.engine.heads import centre
from edgeprune.engine.outbox import Outboxes, Workspace, mix, split_by_site
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import Output
from edgeprune.prompts import Batch, Pair, iterate_batches
from edgeprune.scale.sharding import begin_layer, end_layer, receive, shard_layers

MAX_AHEAD = 8
"""Layers of a look-ahead, at most: more save little, and take memory where blocks run again."""

SUMMED = 2**22
"""Numbers of a weight that are added up at a time."""


class Block(Protocol):
    """One transformer block, run on a separate input for each reader.

    Attributes:
        layer: the loaded module of the whole block.
        d_head: width of a head.
        attention_norm, mlp_norm: the norms of what is read.
        attention_output: the projection of the heads' values.
        mlp: what is between its norm and the stream.
        mlp_output: the loaded module whose output the stream gets from the MLP.
        fused: whether Triton norms and projects what heads read; may be set.
    """

    layer: nn.Module
    d_head: int
    attention_norm: nn.Module
    attention_output: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    mlp_output: nn.Module
    fused: bool

    def attend(self, x: Tensor, inputs: Any) -> Tensor:
        """[reader, batch, pos, d_model] -> the heads' scaled values [batch, pos, head * d_head].

        Where the norm is a LayerNorm, x has no mean over d_model. The backward pass may put the
        gradient of x in its place.
        """
        ...

    def scale(self, values: Tensor) -> Tensor:
        """The heads' values times what makes their outboxes linear in them, if need be."""
        ...

    def head_delta(self, values: Tensor, closed: Tensor | None, *, centred: bool) -> Tensor:
        """Heads' values, less those of closed edges (None: zero outboxes) -> [head, ..., d_model].

        `centred`: without their mean over d_model.
        """
        ...


class Architecture(Protocol):
    """A loaded Hugging Face model with its parts named.

    Attributes:
        output: what `logits` gives.
        may_pad: whether padding on the right leaves the positions before it as they are.
    """

    embedding_writers: tuple[str, ...]
    output: Output
    may_pad: bool
    blocks: Sequence[Block]
    body: nn.Module
    final_norm: nn.Module
    unembed: nn.Module

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [embedding writer, batch, pos, d_model]."""
        ...

    def attention_inputs(self, embeddings: Tensor) -> Any:
        """What attention needs beside the states (masks, rotations), for [batch, pos, d_model]."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """Normed final states [..., d_model] -> [..., vocabulary]."""
        ...


@dataclass(frozen=True)
class Activations:
    """What the whole model computes on some prompts: where closed edges take their values from.

    Attributes:
        embeddings: [embedding writer, batch, pos, d_model].
        head_values: a layer each, [batch, pos, head * d_head], scaled, before the projection.
        mlp_outputs: a layer each, [batch, pos, d_model].
        residuals: a site each, [batch, pos, d_model], the stream that is read there, less its mean
            over d_model where all norms are LayerNorms.
    """

    embeddings: Tensor
    head_values: Sequence[Tensor] | Tensor
    mlp_outputs: Sequence[Tensor] | Tensor
    residuals: Sequence[Tensor] | Tensor

    def stacked(self) -> Activations:
        """With one tensor in place of each sequence, so that `map` has four to go through."""
        fields = vars(self).values()
        return Activations(*(x if isinstance(x, Tensor) else torch.stack(x) for x in fields))

    def map(self, function: Callable[..., Tensor], *others: Activations) -> Activations:
        """Apply a function to every tensor (and the others' at its place)."""

        def each(name: str):
            items = [getattr(activations, name) for activations in (self, *others)]
            if isinstance(items[0], Tensor):
                return function(*items)
            return tuple(function(*tensors) for tensors in zip(*items, strict=True))

        return Activations(*(each(name) for name in vars(self)))


class CircuitModel:
    """A frozen model whose edges have gates.

    Args:
        architecture: the loaded model with its parts named.
        graph: its nodes and edges.
        tokenizer: its tokenizer, or None.
        name: for people.
        settings: what beside its weights decides what it computes, as plain values.
    """

    def __init__(
        self,
        architecture: Architecture,
        graph: CircuitGraph,
        tokenizer: Any,
        name: str,
        settings: dict[str, Any],
    ) -> None:
        self.architecture = architecture
        self.graph = graph
        self.tokenizer = tokenizer
        self.name = name
        self.settings = settings
        self.workspace = Workspace()
        # A LayerNorm takes the mean away from whatever it reads, so outboxes are kept without.
        norms = [architecture.final_norm]
        norms += [n for b in architecture.blocks for n in (b.attention_norm, b.mlp_norm)]
        self._centred = all(isinstance(norm, nn.LayerNorm) for norm in norms)
        self._fingerprint: str | None = None

    @staticmethod
    def check(model: Any) -> None:
        """Raises TypeError for anything but a model."""
        if not isinstance(model, CircuitModel):
            raise TypeError(
                f"got a {type(model).__name__}, expected a CircuitModel, from load_model"
            )

    @property
    def device(self) -> torch.device:
        return next(self.architecture.body.parameters()).device

    @property
    def max_length(self) -> int:
        """The most tokens a prompt may have."""
        return self.architecture.body.config.max_position_embeddings

    @property
    def output(self) -> Output:
        """What the model's outputs are."""
        return self.architecture.output

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.architecture.body.config.hidden_size

    def check_prompts(self, pairs: Sequence[Pair]) -> None:
        """Raises ValueError where there are no prompts, or one is too long for the model.

        And TypeError where they are something else.
        """
        if not len(pairs):
            raise ValueError("got no prompts; give at least one pair, from load_dataset")
        if not isinstance(pairs[0], Pair):
            raise TypeError(
                f"prompts are of type {type(pairs[0]).__name__}, expected pairs of token ids, from "
                "load_dataset or encode_pair"
            )
        longest = max(len(pair.clean_ids) for pair in pairs)
        if longest > self.max_length:
            raise ValueError(
                f"a prompt has {longest} tokens, but {self.name} takes at most {self.max_length}; "
                f"leave such prompts out: load_dataset(..., max_length={self.max_length})"
            )

    def _check_padding(self, batch: Batch) -> None:
        lengths = sorted({len(pair.clean_ids) for pair in batch.pairs})
        if not self.architecture.may_pad and len(lengths) > 1:
            raise ValueError(
                f"{self.name} attends to every position, padding too, but the batch has prompts of "
                f"{lengths[0]} to {lengths[-1]} tokens; put only prompts of equal length together, "
                "or take one at a time (batch_size=1)"
            )

    def fingerprint(self) -> str:
        """SHA-256 that tells any change of weights (see `_bit_sums`), settings or tokenizer."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True, default=str).encode())
        if hasattr(self.tokenizer, "backend_tokenizer"):
            tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
            for changed_by_use in ("padding", "truncation"):
                tokenizer.pop(changed_by_use, None)
            digest.update(json.dumps(tokenizer, sort_keys=True).encode())
        arch = self.architecture
        weights = dict(arch.body.named_parameters())
        weights |= {f"unembed.{name}": weight for name, weight in arch.unembed.named_parameters()}
        for name, weight in weights.items():
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            for sums in _bit_sums(weight.detach()):
                digest.update(sums.cpu().numpy().tobytes())
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @property
    def is_tied(self) -> bool:
        """Whether the output projection is the embeddings' matrix."""
        return self.architecture.unembed.weight is self._embeddings.weight

    @property
    def _embeddings(self) -> nn.Module:
        return self.architecture.body.get_input_embeddings()

    def shard(
        self,
        whole: CircuitModel | None,
        mesh: Any,
        device: str,
        *,
        send: Callable[[Tensor], object],
        is_tied: bool,
        offload: bool,
    ) -> None:
        """Split the layers' weights over processes; see `shard_layers`.

        Args:
            whole: in the first process, the same model on the CPU; None in the others. This one has
                no weights yet (it is on the meta device).
            mesh: of all the processes.
            device: where this process runs.
            send: see `receive`.
            is_tied: whether the whole model is; its weights decide, not its configuration.
            offload: whether its share of the weights stays in the CPU's memory.
        """
        arch = self.architecture
        of_whole = None if whole is None else whole.architecture
        shard_layers(
            arch.body,
            [block.layer for block in arch.blocks],
            None if of_whole is None else of_whole.body,
            mesh,
            device,
            send,
            offload=offload,
        )
        if is_tied:
            arch.unembed.weight = self._embeddings.weight
        else:
            own = torch.empty_like(arch.unembed.weight, device="meta")
            arch.unembed.weight = nn.Parameter(own, requires_grad=False)
            unembed = None if of_whole is None else of_whole.unembed
            receive(arch.unembed.to_empty(device=device), unembed, mesh, device, send)
        self._fingerprint = None if whole is None else whole.fingerprint()

    def to(self, dtype: torch.dtype) -> None:
        """Convert weights, and so activations; frequencies of rotation stay as they are."""
        modules = (self.architecture.body, self.architecture.unembed)
        for weight in (p for module in modules for p in module.parameters()):
            weight.data = weight.data.to(dtype)

    def release(self) -> None:
        """Give back the memory that is kept from one step to the next."""
        self.workspace = Workspace()

    # ---------------------------------------------------------------------------- the whole model

    @torch.no_grad()
    def run_full(self, ids: Tensor, keep: slice) -> tuple[Tensor, Activations]:
        """Run the untouched model.

        Args:
            ids: [batch, pos].
            keep: the examples whose activations are wanted.

        Returns:
            The states after the final norm, [batch, pos, d_model], and the activations of `keep`.
        """
        arch = self.architecture
        head_values: list[Tensor] = []
        mlp_outputs: list[Tensor] = []
        residuals: list[Tensor] = []

        def keep_input(store: list[Tensor], change: Callable[[Tensor], Tensor]):
            return lambda module, inputs: store.append(change(inputs[0][keep]).clone())

        with ExitStack() as stack:
            for block in arch.blocks:
                for module, hook in (
                    (block.attention_norm, keep_input(residuals, self._centre)),
                    (block.attention_output, keep_input(head_values, block.scale)),
                    (block.mlp_norm, keep_input(residuals, self._centre)),
                ):
                    stack.enter_context(module.register_forward_pre_hook(hook))
                handle = block.mlp_output.register_forward_hook(
                    lambda module, inputs, output: mlp_outputs.append(output[keep].clone())
                )
                stack.enter_context(handle)
            keep_last = keep_input(residuals, self._centre)
            handle = arch.final_norm.register_forward_pre_hook(keep_last)
            stack.enter_context(handle)
            inputs_embeds = arch.body.get_input_embeddings()(ids)
            states = arch.body(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        return states, Activations(
            arch.embed(ids[keep]), tuple(head_values), tuple(mlp_outputs), tuple(residuals)
        )

    def run_pair(
        self, batch: Batch, *, corrupted: bool = True
    ) -> tuple[Tensor, Activations | None]:
        """Clean and corrupted prompts through the untouched model, in one batch.

        Args:
            batch: the prompts.
            corrupted: whether the corrupted ones are run, too.

        Returns:
            The reference: logits on the clean prompts, [predicted, vocabulary]; and the activations
            on the corrupted prompts, or None.

        Raises:
            ValueError: prompts of unequal length, where the model attends to padding.
        """
        self._check_padding(batch)
        num_examples, ids = len(batch.clean_ids), batch.clean_ids
        if corrupted:
            ids = torch.cat([ids, batch.corrupted_ids])
        states, activations = self.run_full(ids, slice(num_examples, None))
        reference = self.architecture.logits(states[batch.rows, batch.cols])
        return reference, activations if corrupted else None

    # -------------------------------------------------------------------------------- the circuit

    def run_circuit(
        self,
        batch: Batch,
        gates: Tensor,
        closed: Activations | None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Run the model with a gate on every edge.

        Args:
            batch: the prompts; the clean ones are run.
            gates: [edge] in [0, 1], in the graph's order; 1 = clean.
            closed: what closed edges carry: activations on the corrupted prompts, mean
                activations (see `mean_activations`), or None for zeros.
            recompute: whether the backward pass runs blocks again, which needs less memory: the
                outboxes, their gradients and the blocks of one look-ahead.

        Returns:
            Logits, [predicted, vocabulary]. They depend differentiably on the gates; call backward
            before the next `run_circuit`.
        """
        self._check_padding(batch)
        arch, graph = self.architecture, self.graph
        if gates.shape != (graph.num_edges,):
            raise ValueError(f"gates are {list(gates.shape)}, expected [{graph.num_edges}]")
        sites = [(len(site.readers), site.num_writers) for site in graph.sites]
        everywhere, at_predicted = sites[:-2], sites[-2:]
        mixed_last = sum(readers * writers for readers, writers in at_predicted)
        gates, last_gates = gates.split([graph.num_edges - mixed_last, mixed_last])
        embeddings = arch.embed(batch.clean_ids)
        stream = embeddings[0]
        keep_inputs = torch.is_grad_enabled() and not recompute
        boxes = Outboxes(
            self.workspace, graph.num_writers, gates, everywhere, stream, keep_inputs=keep_inputs
        )
        embedding_delta = embeddings if closed is None else embeddings - closed.embeddings
        embedding_delta = self._centre(embedding_delta)
        always_on = None
        if graph.embedding_writers:
            boxes.write(embedding_delta)
        else:
            always_on = embedding_delta.sum(0)
        nothing = [None] * graph.num_layers
        closed_heads = nothing if closed is None else closed.head_values
        closed_mlps = nothing if closed is None else closed.mlp_outputs
        inputs = arch.attention_inputs(stream)

        def base(site: int) -> Tensor | None:
            if closed is None:
                return always_on
            there = closed.residuals[site]
            return there if always_on is None else there + always_on

        def run_lookahead(layers: range) -> Tensor:
            """Run the layers of a look-ahead. Returns the last one's heads' values."""
            for index, layer in enumerate(layers):
                ahead = index & -index or len(layers)  # 8, 1, 2, 1, 4, 1, 2, 1
                stop = min(2 * (layer + ahead), 2 * layers.stop, len(everywhere))
                block, site = arch.blocks[layer], 2 * layer
                x = boxes.read(base(site), stop)
                begin_layer(block.layer, x)
                values = block.attend(x, inputs)
                if layer < graph.num_layers - 1:
                    boxes.write(
                        block.head_delta(values, closed_heads[layer], centred=self._centred)
                    )
                    x = boxes.read(base(site + 1)).squeeze(0)
                    delta = self._centre(_mlp_delta(block, x, closed_mlps[layer]))
                    end_layer(block.layer, delta)
                    boxes.write(delta)
            return values

        for stretch in lookaheads(graph):
            if recompute:
                run_again = boxes.repeatable(partial(run_lookahead, stretch))
                values = checkpoint(run_again, use_reentrant=False, preserve_rng_state=False)
            else:
                values = run_lookahead(stretch)
        # Of the last layer, only the predicted tokens matter from here on.
        block, at = arch.blocks[-1], (batch.rows, batch.cols)

        def predicted(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[at]

        closed_values = predicted(closed_heads[-1])
        heads_delta = block.head_delta(values[at], closed_values, centred=self._centred)
        delta = torch.cat([boxes.at(*at), heads_delta])
        mlp_gates, final_gates = split_by_site(last_gates, at_predicted)
        x = mix(mlp_gates, delta, predicted(base(-2)))[0]
        mlp_delta = _mlp_delta(block, x, predicted(closed_mlps[-1]))
        end_layer(block.layer, mlp_delta)
        delta = torch.cat([delta, mlp_delta])
        x = mix(final_gates, delta, predicted(base(-1)))[0]
        return arch.logits(arch.final_norm(x))

    def _centre(self, x: Tensor) -> Tensor:
        return centre(x) if self._centred else x

    @torch.no_grad()
    def mean_activations(
        self, pairs: Sequence[Pair], batch_size: int, *, per_position: bool
    ) -> MeanActivations:
        """Mean activations on the clean prompts of a reference set, for mean ablation.

        Args:
            pairs: the reference set.
            per_position: one mean a position, or one over all positions.
        """
        totals: Activations | None = None
        counts = None
        width = max(len(pair.clean_ids) for pair in pairs)
        for batch in iterate_batches(pairs, batch_size):
            self._check_padding(batch)
            batch = batch.to(self.device)
            _, activations = self.run_full(batch.clean_ids, slice(None))
            length = batch.clean_ids.shape[1]
            real = torch.arange(length, device=self.device) < batch.lengths[:, None]
            count = torch.zeros(width)
            count[:length] = real.sum(0)

            def total(x: Tensor, real=real, length=length) -> Tensor:
                """Sum over the examples: [..., batch, pos, d] -> [..., 1, width, d], on the CPU.

                Batches are added up there in float64, which Apple's GPUs do not have.
                """
                summed = (x.float() * real[..., None]).sum(-3, keepdim=True).cpu().double()
                return nn.functional.pad(summed, (0, 0, 0, width - length))

            batch_totals = activations.map(total)
            totals = batch_totals if totals is None else totals.map(torch.add, batch_totals)
            counts = count if counts is None else counts + count
        if not per_position:
            totals = totals.map(lambda x: x.sum(-2, keepdim=True))
            counts = counts.sum(0, keepdim=True)
        like = next(self.architecture.body.parameters())
        means = totals.map(
            lambda x: (x / counts.clamp(min=1)[:, None]).to(like.dtype).to(like.device)
        )
        return MeanActivations(means, per_position)


@dataclass(frozen=True)
class MeanActivations:
    """Mean activations with a batch axis of 1, and a position axis of 1 if over all positions."""

    means: Activations
    per_position: bool

    def for_batch(self, batch: Batch) -> Activations:
        """The means, spread over a batch.

        Raises:
            ValueError: the batch has positions which the reference set had not.
        """
        num_examples, length = batch.clean_ids.shape
        known = self.means.residuals[0].shape[-2]
        if self.per_position and length > known:
            raise ValueError(
                f"a prompt has {length} tokens, but the reference set of the per-position mean "
                f"ablation only {known}; use a longer reference set, or per_position=false"
            )

        def spread(x: Tensor) -> Tensor:
            x = x[..., :length, :] if self.per_position else x
            return x.expand(*x.shape[:-3], num_examples, length, x.shape[-1])

        return self.means.map(spread)


def _bit_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the first axis and over the others of a weight's bits, read as whole numbers.

    They are exact, so the same on any device, and no single edit leaves them as they were (of
    weights in 4 or 8 bits the scales are not looked at). Some rows at a time, since adding up takes
    a copy in 64 bits.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    num_rows = weight.shape[0] if weight.dim() else 1
    columns = weight.numel() // max(1, num_rows)
    bits = weight.view(whole[weight.element_size()]).reshape(num_rows, columns)
    parts = bits.split(max(1, SUMMED // max(1, columns)))
    over_rows = sum(part.sum(0, dtype=torch.int64) for part in parts)
    return over_rows, torch.cat([part.sum(1, dtype=torch.int64) for part in parts])


def _mlp_delta(block: Block, x: Tensor, closed: Tensor | None) -> Tensor:
    """MLP's input and closed edges' output (None: zeros), [..., d_model] -> [1, ..., d_model]."""
    output = block.mlp(block.mlp_norm(x))
    return (output if closed is None else output - closed)[None]


def lookaheads(graph: CircuitGraph) -> list[range]:
    """The layers of each look-ahead: a stretch."""
    length = lookahead_length(graph)
    starts = range(0, graph.num_layers, length)
    return [range(start, min(start + length, graph.num_layers)) for start in starts]


def lookahead_length(graph: CircuitGraph) -> int:
    """Layers of a look-ahead, as many as make the fewest arrays of [token, d_model] move.

    Forward and backward, a look-ahead goes four times through the outboxes that are there (or their
    gradients), and what is written after is added in four goes through the inputs of the readers
    (or theirs): of its layer with index i as often as i has binary digits of 1.
    """
    readers = len(graph.sites[0].readers) + 1

    def moved(length: int) -> int:
        total = 0
        for start in range(0, graph.num_layers, length):
            indices = range(min(length, graph.num_layers - start))
            total += graph.sites[2 * start].num_writers
            total += readers * sum(index.bit_count() for index in indices)
        return total

    return min(range(2, MAX_AHEAD + 1), key=moved)
