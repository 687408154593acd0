"""CircuitModel: a frozen language model that can be run as a circuit.

A training step, from the prompts to the gradient of the gates:

1. `CircuitModel.run_pair` runs the full model on clean and corrupted prompts in one batch, without
   gradients. The clean half gives the reference logits; hooks on the corrupted half record its
   activations, the values that ablated edges carry.
2. `CircuitModel.run_circuit` runs the clean prompts with a gate on every edge, layer by layer
   (`_CircuitPass`). Each writer appends its delta (clean minus ablation value), [batch, pos,
   d_model], to the outboxes; each reader gets an input of its own (`Outboxes.read` in outbox.py):

       input[reader] = ablated residual stream + sum over writers of gate * delta[writer]

   A block turns its readers' inputs into the deltas of its heads and its MLP (architecture.py).
   From the outputs of the last layer's heads on, only predicted tokens are computed
   (`_CircuitPass.finish`), [predicted, d_model], which ordinary autograd differentiates.
3. `differentiate` in gradient.py takes the distance from the reference and runs autograd. Backward,
   each block overwrites its readers' inputs with their gradients; each mix then adds
   gates.T @ grad_inputs to the writers' gradients, and writes grad_inputs @ delta.T, the gradient
   of its gates, into one flat [edge] tensor (`_Mix.backward` in outbox.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgeprune.engine.architecture import Architecture, Block, fingerprint
from edgeprune.engine.heads import centre
from edgeprune.engine.intervene import Change, Intervention
from edgeprune.engine.outbox import Outboxes, Workspace, mix, split_by_site
from edgeprune.errors import DataError
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import Output
from edgeprune.prompts import Batch, Pair, token_text

MAX_LOOKAHEAD = 8
"""Maximum layers whose readers are mixed together (`Outboxes.read`); with more, recomputing blocks
would take much memory and save little time."""


@dataclass(frozen=True)
class Activations:
    """What the full model computes on a batch of prompts: values for ablated edges.

    Attributes:
        embeddings: [embedding, batch, pos, d_model].
        head_values: per layer, [batch, pos, head * d_head]: the input of the output projection,
            after `Block.scale`.
        mlp_outputs: per layer, [batch, pos, d_model].
        residuals: per site, [batch, pos, d_model]: the residual stream, without its mean over
            d_model if all norms are LayerNorms.
    """

    embeddings: Tensor
    head_values: Sequence[Tensor] | Tensor
    mlp_outputs: Sequence[Tensor] | Tensor
    residuals: Sequence[Tensor] | Tensor

    def stacked(self) -> Activations:
        """Stack each sequence into one tensor, so that `map` makes four calls."""
        layers = map(torch.stack, (self.head_values, self.mlp_outputs, self.residuals))
        return Activations(self.embeddings, *layers)

    def map(self, function: Callable[..., Tensor], *others: Activations) -> Activations:
        """Apply a function to every tensor (and to the corresponding tensors of the others)."""
        fields = zip(*(vars(x).values() for x in (self, *others)), strict=True)
        return Activations(*(
            function(*items) if isinstance(items[0], Tensor) else tuple(map(function, *items))
            for items in fields
        ))  # fmt: skip


class CircuitModel:
    """A frozen model with a gate on every edge.

    Args:
        architecture, graph, tokenizer: the loaded model; the tokenizer may be None.
        name: shown in messages.
        settings: JSON values that determine, with the weights, what the model computes.

    Attributes:
        output: what the model's outputs are.
        max_length: maximum number of tokens of a prompt.
        d_model: width of the residual stream.
        begin_layer: called by our passes before a layer, with its module and a tensor whose
            gradient is known once the whole layer has been differentiated.
        end_layer: called after a layer, with its module and a tensor whose gradient is known
            before any of the layer is differentiated.
        workspace: the memory of the outboxes, reused from step to step.
        digest: the fingerprint, once it is known.
    """

    def __init__(
        self,
        architecture: Architecture,
        graph: CircuitGraph,
        tokenizer: Any,
        name: str,
        settings: dict[str, Any],
    ) -> None:
        self.architecture, self.graph, self.tokenizer = architecture, graph, tokenizer
        self.name, self.settings = name, settings
        self.output, config = architecture.output, architecture.body.config
        self.max_length, self.d_model = config.max_position_embeddings, config.hidden_size
        self.workspace = Workspace()
        self.begin_layer: Callable[[nn.Module, Tensor], None] = lambda layer, x: None
        self.end_layer: Callable[[nn.Module, Tensor], None] = lambda layer, x: None
        self.digest: str | None = None
        # A LayerNorm subtracts the mean of its input, so the outboxes are kept without it.
        norms = [n for b in architecture.blocks for n in (b.attention_norm, b.mlp_norm)]
        norms.append(architecture.final_norm)
        self.is_centred = all(isinstance(norm, nn.LayerNorm) for norm in norms)

    def __repr__(self) -> str:
        graph = self.graph
        return (
            f"CircuitModel({self.name}: {graph.num_layers} layers, {graph.num_heads} heads each, "
            f"{graph.num_edges:,} edges)"
        )

    def text_of(self, predicted: Sequence[float]) -> str:
        """How predicted tokens, or the numbers of a model that outputs these, are displayed.

        Tokens are separated by |, because each is predicted after the right ones before it, so that
        together they need not be a text that the model would write.
        """
        if self.output is Output.number:
            return " ".join(f"{number:.4g}" for number in predicted)
        if self.tokenizer is None:
            return " ".join(map(str, predicted))
        if self.output is not Output.logits:
            return self.tokenizer.decode(list(predicted))
        return "|".join(token_text(self.tokenizer, int(token)) for token in predicted)

    @property
    def device(self) -> torch.device:
        return next(self.architecture.body.parameters()).device

    def check_prompts(self, pairs: Sequence[Pair]) -> None:
        """Raises DataError if there are no prompts or one does not fit the model, and TypeError if
        one is not a Pair."""
        if not len(pairs):
            raise DataError("got no prompts; give at least one pair, from load_dataset")
        for pair in pairs:
            if not isinstance(pair, Pair):
                raise TypeError(
                    f"got a {type(pair).__name__} as a prompt, expected a Pair, from load_dataset "
                    "or encode_pair"
                )
        longest = max(len(pair.clean_ids) for pair in pairs)
        if longest > self.max_length:
            raise DataError(
                f"a prompt has {longest} tokens, but {self.name} takes at most {self.max_length}; "
                f"drop longer prompts with load_dataset(..., max_length={self.max_length})"
            )
        highest = max(max(pair.token_ids(self.output is Output.logits)) for pair in pairs)
        num_embeddings = self.architecture.body.config.vocab_size
        if highest >= num_embeddings:
            name = f" ({self.tokenizer.decode([highest])!r})" if self.tokenizer else ""
            raise DataError(
                f"token {highest}{name} is beyond the {num_embeddings:,} embeddings of "
                f"{self.name}; its tokenizer has tokens that the model lacks: leave them out"
            )

    def check_padding(self, batch: Batch) -> None:
        """Raises ValueError if the batch is padded and the model attends to padding."""
        lengths = sorted({len(pair.clean_ids) for pair in batch.pairs})
        if not self.architecture.may_pad and len(lengths) > 1:
            raise ValueError(
                f"{self.name} attends to padding, but the batch has prompts of {lengths[0]} to "
                f"{lengths[-1]} tokens; use prompts of equal length, or batch_size=1"
            )

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the settings and the tokenizer."""
        if self.digest is None:
            self.digest = fingerprint(self.architecture, self.tokenizer, self.settings)
        return self.digest

    def release(self) -> None:
        """Free the memory that is kept from one step to the next."""
        self.workspace = Workspace()

    def centre(self, x: Tensor) -> Tensor:
        """Subtract the mean over the last axis if all norms are LayerNorms."""
        return centre(x) if self.is_centred else x

    def intervene(
        self, changes: Mapping[str, Change] | None = None
    ) -> AbstractContextManager[Intervention]:
        """Change activations of the full model by name, and read them; names: `intervene.py`.

            with model.intervene({"a5.h1": 0, "m3": "Another prompt", "a7.h2.pattern": f}) as run:
                logits, activations = run("A prompt", ["a1.h0", "a5.resid"])

        The changes also apply to whatever else runs the loaded model within the block.

        Raises ConfigError for an unknown name.
        """
        changes = changes or {}
        return Intervention(self.architecture, self.graph, self.tokenizer, changes).hooked()

    @torch.no_grad()
    def run_full(self, ids: Tensor, keep: slice) -> tuple[Tensor, Activations]:
        """Run the full model on [batch, pos].

        Returns the hidden states after the final norm, [batch, pos, d_model], and the activations
        of the examples in `keep`.
        """
        arch = self.architecture
        embeddings = arch.embed(ids[keep])
        # Summed in float32: in 16 bits, the stock model's own stream is rounded at every addition.
        stream = embeddings.sum(0, dtype=torch.float32)  # [batch, pos, d_model]
        head_values, mlp_outputs, residuals = [], [], []

        def record_residual() -> None:
            residuals.append(self.centre(stream).to(embeddings.dtype, copy=True))

        def record_heads(block: Block, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            head_values.append(block.scale(inputs[0][keep]).clone())

        def add_heads(module: nn.Module, inputs: Any, output: Tensor) -> None:
            stream.add_(output[keep])
            record_residual()

        def add_mlp(module: nn.Module, inputs: Any, output: Tensor) -> None:
            mlp_outputs.append(output[keep].clone())
            add_heads(module, inputs, output)

        record_residual()
        with ExitStack() as hooks:  # removes them
            for block in arch.blocks:
                heads = block.attention_output
                hooks.enter_context(heads.register_forward_pre_hook(partial(record_heads, block)))
                hooks.enter_context(block.heads_output.register_forward_hook(add_heads))
                hooks.enter_context(block.mlp_output.register_forward_hook(add_mlp))
            inputs_embeds = arch.body.get_input_embeddings()(ids)
            states = arch.body(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        return states, Activations(embeddings, head_values, mlp_outputs, residuals)

    def run_pair(
        self, batch: Batch, *, corrupted: bool = True
    ) -> tuple[Tensor, Activations | None]:
        """Run clean and, if asked, corrupted prompts through the full model, in one batch.

        Returns the reference, [predicted, vocabulary]: logits on the clean prompts; and the
        activations on the corrupted prompts, or None.
        """
        self.check_padding(batch)
        ids = batch.clean_ids  # [batch, pos]
        if corrupted:
            ids = torch.cat([ids, batch.corrupted_ids])  # [2 * batch, pos]
        states, activations = self.run_full(ids, slice(len(batch.clean_ids), None))
        reference = self.architecture.logits(states[batch.rows, batch.cols])
        return reference, activations if corrupted else None

    def run_circuit(
        self,
        batch: Batch,
        gates: Tensor,
        ablation_values: Activations | None,
        *,
        recompute: bool = False,
        start: int = 0,
        embeddings: Tensor | None = None,
        written: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the clean prompts of a batch with a gate on every edge.

        Args:
            gates: [edge] in [0, 1], in the graph's order; 1 = clean.
            ablation_values: what an edge with gate 0 carries; None: zeros.
            recompute: whether the backward pass recomputes the blocks. Then only the outboxes,
                their gradients and the blocks of one look-ahead take memory.
            start: the layer to start from, without gradients. The last `run_circuit` must have had
                the same arguments, except for gates into this layer and later ones.
            embeddings: take the place of the clean prompts', [embedding, batch, pos, d_model].
            written: receives the deltas of all writers, in order, one tensor per embedding layer,
                layer's heads and MLP: [writer, batch, pos, d_model], and of the last layer
                [writer, predicted, d_model]. Not with `recompute`.

        Returns:
            Logits, [predicted, vocabulary], differentiable with respect to the gates, `embeddings`
            and what was `written`. Call backward before the next `run_circuit`.

        Raises ValueError if the model attends to the batch's padding or gates have another shape.
        """
        self.check_padding(batch)
        if gates.shape != (self.graph.num_edges,):
            raise ValueError(f"gates are {list(gates.shape)}, expected [{self.graph.num_edges}]")
        keep_inputs = torch.is_grad_enabled() and not recompute
        circuit_pass = _CircuitPass(
            self, batch, gates, ablation_values, keep_inputs, embeddings, written
        )
        if start:
            circuit_pass.boxes.skip_to(2 * start)
        for layers in lookaheads(self.graph):
            layers = range(max(start, layers.start), layers.stop)
            if not layers:
                continue
            if recompute:
                values = checkpoint(
                    circuit_pass.run_layers, layers, use_reentrant=False, preserve_rng_state=False,
                    context_fn=circuit_pass.boxes.contexts,
                )  # fmt: skip
            else:
                values = circuit_pass.run_layers(layers)
        return circuit_pass.finish(values)

    @torch.no_grad()
    def run_circuits(
        self, batch: Batch, circuits: Iterable[Tensor], ablation_values: Activations | None
    ) -> Iterator[Tensor]:
        """Run one circuit after another as `run_circuit` does, without gradients.

        A circuit starts at the first layer in which its gates differ from those of the one before,
        so it is fastest to sort the circuits by their gates.

        Args:
            circuits: the gates of each, [edge] in [0, 1].

        Yields the logits of each circuit, [predicted, vocabulary].
        """
        before, generation = None, None
        for gates in circuits:
            is_undisturbed = before is not None and generation == self.workspace.generation
            start = self._first_change(before, gates) if is_undisturbed else 0
            outputs = self.run_circuit(batch, gates, ablation_values, start=start)
            before, generation = gates, self.workspace.generation
            yield outputs

    def _first_change(self, before: Tensor, gates: Tensor) -> int:
        """The first layer with other gates; the last layer if none has."""
        changed = (before != gates).nonzero()
        edge = int(changed[0]) if len(changed) else self.graph.num_edges
        site = bisect_right(self.graph.sites, edge, key=lambda site: site.offset) - 1
        return self.graph.sites[site].layer


class _CircuitPass:
    """The state of one `CircuitModel.run_circuit`.

    Layer l reads at the sites 2 l (heads) and 2 l + 1 (MLP), the final norm at the last site. From
    the outputs of the last layer's heads on, only the predicted tokens matter, so the last two
    sites are left to `finish`.
    """

    def __init__(
        self,
        model: CircuitModel,
        batch: Batch,
        gates: Tensor,
        ablation_values: Activations | None,
        keep_inputs: bool,
        embeddings: Tensor | None,
        written: list[Tensor] | None,
    ) -> None:
        arch, graph = model.architecture, model.graph
        self.model, self.batch, self.ablation_values = model, batch, ablation_values
        self.written = written
        sites = [(len(site.readers), site.num_writers) for site in graph.sites]
        sites, self.last_sites = sites[:-2], sites[-2:]
        self.num_sites = len(sites)
        num_last = sum(readers * writers for readers, writers in self.last_sites)
        gates, self.last_gates = gates.split([graph.num_edges - num_last, num_last])

        if embeddings is None:
            embeddings = arch.embed(batch.clean_ids)  # [embedding, batch, pos, d_model]
        like = embeddings[0]  # [batch, pos, d_model]
        self.boxes = Outboxes(
            model.workspace, graph.num_writers, gates, sites, like, keep_inputs=keep_inputs
        )
        delta = embeddings if ablation_values is None else embeddings - ablation_values.embeddings
        delta = model.centre(delta)
        num_written = len(graph.embedding_writers)
        # The clean values of the other embeddings reach every reader.
        self.always_on = delta[num_written:].sum(0) if num_written < len(delta) else None
        if num_written:
            self.boxes.write(self.note(delta[:num_written]))
        zeros = [None] * graph.num_layers
        self.ablated_heads = zeros if ablation_values is None else ablation_values.head_values
        self.ablated_mlps = zeros if ablation_values is None else ablation_values.mlp_outputs
        self.attention_inputs = arch.attention_inputs(like)

    def note(self, delta: Tensor) -> Tensor:
        """Add a delta to those written, if the caller asked for them."""
        if self.written is not None:
            self.written.append(delta)
        return delta

    def base(self, site: int) -> Tensor | None:
        """The input of a site's readers if all gates are 0: [batch, pos, d_model]; None: zeros."""
        if self.ablation_values is None:
            return self.always_on
        residual = self.ablation_values.residuals[site]
        return residual if self.always_on is None else residual + self.always_on

    def run_layers(self, layers: range) -> Tensor:
        """Run the layers of one look-ahead, except for what is left to `finish`.

        Returns the last layer's head values, [batch, pos, head * d_head].
        """
        model, boxes = self.model, self.boxes
        for index, layer in enumerate(layers):
            block, site = model.architecture.blocks[layer], 2 * layer
            # Mix for all readers of the look-ahead at once; then add what is written during it, by
            # halves: in a look-ahead of 8 layers, reads serve 8, 1, 2, 1, 4, 1, 2, 1 of them.
            num_layers_ahead = index & -index or len(layers)
            stop = min(2 * (layer + num_layers_ahead), 2 * layers.stop, self.num_sites)
            x = boxes.read(self.base(site), stop)  # [q, k and v reader, batch, pos, d_model]
            model.begin_layer(block.layer, x)
            values = block.attend(x, self.attention_inputs)  # [batch, pos, head * d_head]
            if layer < model.graph.num_layers - 1:
                ablated = self.ablated_heads[layer]
                boxes.write(self.note(block.head_delta(values, ablated, centred=model.is_centred)))
                x = boxes.read(self.base(site + 1)).squeeze(0)  # [batch, pos, d_model]
                delta = model.centre(_mlp_delta(block, x, self.ablated_mlps[layer]))
                model.end_layer(block.layer, delta)
                boxes.write(self.note(delta))
        return values

    def finish(self, values: Tensor) -> Tensor:
        """Run the rest at the predicted tokens: [batch, pos, head * d_head] -> logits."""
        arch, boxes = self.model.architecture, self.boxes
        block, at = arch.blocks[-1], (self.batch.rows, self.batch.cols)

        def predicted(x: Tensor | None) -> Tensor | None:
            """[batch, pos, ...] -> [predicted, ...]"""
            return None if x is None else x[at]

        ablated = predicted(self.ablated_heads[-1])
        heads_delta = self.note(
            block.head_delta(values[at], ablated, centred=self.model.is_centred)
        )
        delta = torch.cat([boxes.at(*at), heads_delta])  # [writer, predicted, d_model]
        mlp_gates, final_gates = split_by_site(self.last_gates, self.last_sites)
        x = mix(mlp_gates, delta, predicted(self.base(-2)))[0]  # [predicted, d_model]
        mlp_delta = _mlp_delta(block, x, predicted(self.ablated_mlps[-1]))
        self.model.end_layer(block.layer, mlp_delta)
        delta = torch.cat([delta, self.note(mlp_delta)])  # [all writers, predicted, d_model]
        x = mix(final_gates, delta, predicted(self.base(-1)))[0]  # [predicted, d_model]
        return arch.logits(arch.final_norm(x))


def _mlp_delta(block: Block, x: Tensor, ablated: Tensor | None) -> Tensor:
    """Run the MLP and subtract its ablation value (None: zeros): [..., d_model] -> [1, ...]."""
    output = block.mlp(block.mlp_norm(x))
    return (output if ablated is None else output - ablated)[None]


def lookaheads(graph: CircuitGraph) -> list[range]:
    """The layers of each look-ahead (see `Outboxes.read`), such that the least memory is moved.

    Counts arrays of [token, d_model]. Forward and backward, a look-ahead moves four times what was
    written before it (deltas or their gradients). Adding what is written during it moves four times
    the inputs of its readers (or their gradients): those of its layer with index i as often as the
    binary form of i has ones.
    """
    layers, num_readers = range(graph.num_layers), len(graph.sites[0].readers) + 1

    def split(length: int) -> list[range]:
        return [layers[start : start + length] for start in layers[::length]]

    def num_arrays(length: int) -> int:
        return sum(
            graph.sites[2 * part.start].num_writers
            + num_readers * sum(index.bit_count() for index in range(len(part)))
            for part in split(length)
        )

    return split(min(range(2, MAX_LOOKAHEAD + 1), key=num_arrays))
