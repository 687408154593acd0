"""Reading and changing activations of the full model by name: `CircuitModel.intervene`.

Names are those of the graph's nodes, and of what lies between them:

    embeds, tok_embeds, pos_embeds   an embedding, [batch, pos, d_model]
    a5.h1, m5                        the output of a head or an MLP, [batch, pos, d_model]
    a5.h1.q, a5.h1.k, a5.h1.v        query, key, value, [batch, pos, d_head], as attention
                                     multiplies them: after any norm and rotation
    a5.h1.pattern                    attention, [batch, query, key]
    a5.resid, m5.resid, resid_post   the residual stream before a layer's attention, before its MLP,
                                     and before the final norm, [batch, pos, d_model]

Where query heads share keys and values, `a5.h1.k` and `a5.h1.v` are those of key/value head 1.
A head's output includes its share of the attention output's bias, as in the circuit pass. Where the
heads' sum is normed (Gemma 2 and 3), a change of one head's output leaves the norm's factor as it
was, so that the outputs still add up.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.engine.architecture import Architecture, Block
from edgeprune.errors import ConfigError, DataError
from edgeprune.graph import CircuitGraph

Prompt = str | Sequence[str] | Sequence[int] | Tensor
"""Text, texts of equally many tokens, or token ids, [pos] or [batch, pos]."""

Change = float | Tensor | Callable[[Tensor], Tensor] | Prompt
"""A number or a tensor that takes an activation's place, a function of it, or another prompt, whose
activation takes its place. Integer tensors and lists are token ids."""

Place = tuple[str, int]
"""(kind of activation, layer); a layer's heads share a place."""

_NAME = re.compile(r"a(\d+)\.h(\d+)(?:\.(q|k|v|pattern))?|([am])(\d+)\.resid|m(\d+)")
ATTENTION = ("q", "k", "v", "pattern")


class Intervention:
    """Runs the full model with changed activations; made by `CircuitModel.intervene`."""

    def __init__(
        self, architecture: Architecture, graph: CircuitGraph, tokenizer: Any,
        changes: Mapping[str, Change],
    ) -> None:  # fmt: skip
        self.architecture, self.graph, self.tokenizer = architecture, graph, tokenizer
        self.changes = dict(changes)
        self._wanted: tuple[str, ...] = ()
        self._read: dict[str, Tensor] = {}
        self._touched: dict[Place, dict[str, int]] = {}  # name -> head
        self._touch_only(())
        self._batch_size = 0  # of the current pass
        self._stream = self._values = torch.empty(0)  # of the current layer: its input, the heads'

    def __call__(self, prompt: Prompt, names: Iterable[str] = ()) -> tuple[Tensor, dict]:
        """Run a prompt; returns logits, [batch, pos, vocabulary], and activations by name.

        Unless gradients are disabled, logits are differentiable with respect to the activations
        (and these with respect to those of earlier layers, and to tensors given as changes).

        Raises ConfigError for an unknown name.
        """
        states, activations = self.states(prompt, names)
        return self.architecture.logits(states), activations

    def states(self, prompt: Prompt, names: Iterable[str] = (), **options: Any) -> tuple:
        """As a call, but with the hidden states after the final norm in place of logits.

        `options` are passed to the model's body; with `use_cache` the third result is the cache.
        """
        body, ids = self.architecture.body, self.token_ids(prompt)
        names = tuple(names)
        needs_probe = self._is_attention(names) and not self._is_attention(self.changes)
        self._touch_only(names)
        probed = self._probed() if needs_probe else nullcontext()
        try:
            with probed:
                embeddings = body.get_input_embeddings()(ids)
                output = body(inputs_embeds=embeddings, **{"use_cache": False, **options})
            activations = {name: self._read[name] for name in names}
        finally:
            self._touch_only(())
        if options.get("use_cache"):
            return output.last_hidden_state, activations, output.past_key_values
        return output.last_hidden_state, activations

    def token_ids(self, prompt: Prompt) -> Tensor:
        """A prompt as [batch, pos] on the model's device.

        Raises DataError for texts of unequal numbers of tokens.
        """
        device = next(self.architecture.body.parameters()).device
        if isinstance(prompt, str):
            prompt = [prompt]
        if not isinstance(prompt, Tensor) and all(isinstance(text, str) for text in prompt):
            prompt = self.tokenizer(list(prompt))["input_ids"]
            lengths = sorted({len(ids) for ids in prompt})
            if len(lengths) > 1:
                raise DataError(
                    f"the prompts have {', '.join(map(str, lengths))} tokens; run prompts of "
                    "different lengths one after another"
                )
        return torch.atleast_2d(torch.as_tensor(prompt, device=device))

    # -------------------------------------------------------------------------------------- hooks

    @contextmanager
    def hooked(self) -> Iterator[Intervention]:
        """Keep the changes in place, also for passes of the stock model itself."""
        self._fetch_other_prompts()
        arch = self.architecture
        with ExitStack() as stack:

            def add(module: nn.Module, hook: Callable, *bound: Any, before: bool = False) -> None:
                register = "register_forward_pre_hook" if before else "register_forward_hook"
                stack.enter_context(getattr(module, register)(partial(hook, *bound)))

            for index, module in enumerate(arch.embedding_modules):
                add(module, self._leave_embedding, arch.embeddings[index])
            for layer, block in enumerate(arch.blocks):
                add(block.layer, self._enter_layer, layer, before=True)
                add(block.attention_output, self._enter_output, before=True)
                add(block.heads_output, self._leave_heads, layer, block)
                add(block.mlp_output, self._leave_mlp, layer)
            add(arch.final_norm, self._enter_final_norm, before=True)
            if self._is_attention(self.changes):
                stack.enter_context(self._probed())
            yield self

    def _leave_embedding(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if name == self.architecture.embeddings[0]:
            self._batch_size = len(output)
        if (name, 0) not in self._touched:
            return output
        return self._touch((name, 0), output.expand(self._batch_size, -1, -1))

    def _enter_layer(self, layer: int, module: nn.Module, args: tuple) -> tuple:
        self._stream = self._touch(("a.resid", layer), args[0])
        return (self._stream, *args[1:])

    def _enter_output(self, module: nn.Module, args: tuple) -> None:
        self._values = args[0]

    def _leave_heads(
        self, layer: int, block: Block, module: nn.Module, args: Any, output: Tensor
    ) -> Tensor:
        heads = self._touched.get(("head", layer), {})
        if heads:
            values = block.scale(self._values).unflatten(-1, (self.graph.num_heads, -1))
            weight, bias = block.output_weight(values.dtype), block.attention_output.bias
            for name, head in heads.items():
                old = values[..., head, :] @ weight[head]  # [batch, pos, d_model]
                old = old if bias is None else old + bias / self.graph.num_heads
                output = output + (self._touch_one(name, old) - old)
        if ("m.resid", layer) in self._touched:
            old = self._stream + output
            output = output + (self._touch(("m.resid", layer), old) - old)
        return output

    def _leave_mlp(self, layer: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._touch(("mlp", layer), output)

    def _enter_final_norm(self, module: nn.Module, args: tuple) -> tuple:
        return (self._touch(("resid_post", 0), args[0]), *args[1:])

    def _probed(self) -> Any:
        return self.architecture.probe_attention(self._probe)

    def _probe(self, layer: int, part: str, x: Tensor) -> Tensor:
        """Read and change one part of attention, [batch, head, ...]."""
        if (part, layer) not in self._touched:
            return x
        if part in ("k", "v"):  # query heads may have readers of their own
            x = x.repeat_interleave(self.graph.num_kv_heads // x.shape[1], 1)
        parts = list(x.unbind(1))
        for name, head in self._touched[part, layer].items():
            parts[head] = self._touch_one(name, parts[head])
        return torch.stack(parts, 1)

    # --------------------------------------------------------------------------- values and names

    def _touch(self, place: Place, x: Tensor) -> Tensor:
        """Read and change the activation at a place that has only one."""
        for name in self._touched.get(place, ()):
            x = self._touch_one(name, x)
        return x

    def _touch_one(self, name: str, x: Tensor) -> Tensor:
        if name in self.changes:
            x = self._changed(name, x)
        if name in self._wanted:
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()
            self._read[name] = x
        return x

    def _changed(self, name: str, x: Tensor) -> Tensor:
        change = self.changes[name]
        new = change(x) if callable(change) else change
        new = torch.as_tensor(new, dtype=x.dtype, device=x.device)
        try:
            return new.expand_as(x)
        except RuntimeError:
            raise ConfigError(
                f"the new {name} has shape {list(new.shape)}, expected {list(x.shape)} or a shape "
                "that broadcasts to it"
            ) from None

    def _fetch_other_prompts(self) -> None:
        """Replace the prompts among the changes by their activations."""
        names_of = defaultdict(list)
        for name, change in self.changes.items():
            is_ids = isinstance(change, Tensor) and change.ndim and not change.is_floating_point()
            if is_ids or isinstance(change, (str, list, tuple)):
                names_of[id(change)].append(name)
        for names in names_of.values():
            other = Intervention(self.architecture, self.graph, self.tokenizer, {})
            with torch.no_grad(), other.hooked():
                self.changes |= other.states(self.changes[names[0]], names)[1]

    def _touch_only(self, names: Sequence[str]) -> None:
        """From now on, touch what is changed and read these names."""
        self._wanted, self._read, self._touched = names, {}, defaultdict(dict)
        for name in (*self.changes, *names):
            place, head = self._place(name)
            self._touched[place][name] = head

    def _is_attention(self, names: Iterable[str]) -> bool:
        return any(self._place(name)[0][0] in ATTENTION for name in names)

    def _place(self, name: str) -> tuple[Place, int]:
        """The place of an activation, and its head; raises ConfigError for an unknown name."""
        if name in self.architecture.embeddings:
            return (name, 0), 0
        if name == "resid_post":
            return (name, 0), 0
        graph, found = self.graph, _NAME.fullmatch(name)
        if found is not None:
            attention, head, part, site, site_layer, mlp = found.groups()
            layer, head = int(attention or site_layer or mlp or 0), int(head or 0)
            num_heads = graph.num_kv_heads if part in ("k", "v") else graph.num_heads
            kind = part or ("head" if attention else f"{site}.resid" if site else "mlp")
            if layer < graph.num_layers and head < num_heads:
                return (kind, layer), head
        raise ConfigError(
            f"there is no activation {name!r} in a model of {graph.num_layers} layers of "
            f"{graph.num_heads} heads ({graph.num_kv_heads} for k and v); names are such as a0.h1, "
            "m0, a0.h1.q, a0.h1.pattern, a0.resid, m0.resid, resid_post, "
            f"{', '.join(self.architecture.embeddings)}"
        )
