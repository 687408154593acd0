"""Which tokens of the prompt an answer is due to, through the full model and through a circuit.

The token embeddings move in a straight line from the corrupted prompt's to the clean prompt's,
while closed edges keep their ablation values. On the way the answer's score F changes by the
effect, F(clean) - F(corrupted), and

    attribution of a token = integral of dF/d(its embedding) . d(its embedding)

(integrated gradients, Sundararajan et al. 2017, arXiv:1703.01365). Attributions add up to the
effect. A token that is the same in both prompts has none, and neither have positions.

    conductance of a node at a token = integral of dF/d(its output there) . d(its output there)

is how much of the effect passes through what the node writes at that token (Dhamdhere et al. 2018,
arXiv:1805.12233). An embedding's conductance is its attribution. Nodes of different layers lie on
the same paths, so the conductances of all nodes do not add up to the effect; those of a set of
nodes do if every path goes through exactly one of them.

Both integrals are sums over equal steps. Gradients are taken in the middle of a step, and the
change of an output is the one from the step's beginning to its end. The effect is measured as well,
so the error of the sum is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.config import TOKEN_TARGETS
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError, DataError
from edgeprune.files import json_values
from edgeprune.metrics import Output, answer_scores
from edgeprune.prompts import Batch, Pair, collate

log = logging.getLogger("edgeprune")

TOLERANCE = 0.01
"""Largest error of the sum, as a fraction of the effect, for which no smaller steps are tried."""
STEPS = (8, 16, 32, 64)
"""Numbers of steps, which are tried in turn until the error is small enough."""


@dataclass(frozen=True)
class Attribution:
    """The attribution of one answer through one model.

    Attributes:
        target: one of `TOKEN_TARGETS`.
        tokens: attribution of each token, [pos].
        nodes: conductance of each writer at each token, [writer, pos].
        clean, corrupted: every score of the answer at the ends of the line, by name; NaN for a
            contrast without distractors.
        steps: number of steps.
    """

    target: str
    tokens: Tensor
    nodes: Tensor
    clean: Mapping[str, float]
    corrupted: Mapping[str, float]
    steps: int

    @property
    def effect(self) -> float:
        """The change of the target from the corrupted prompt to the clean one."""
        return self.clean[self.target] - self.corrupted[self.target]

    @property
    def error(self) -> float:
        """The difference between the tokens' sum and the effect, as a fraction of the effect."""
        difference = abs(self.tokens.sum().item() - self.effect)
        return 0.0 if not difference else difference / max(abs(self.effect), 1e-12)


@dataclass(frozen=True)
class Answer:
    """An answer that was attributed: a token predicted after a prompt.

    Attributes:
        prompt: index of the prompt among those given.
        pair: the prompt, with this one token to predict.
        tokens, corrupted: texts of the clean and of the corrupted prompt's tokens.
        text, distractor: texts of the right and of the wrong answers, separated by slashes.
        step: index of the token among those that are predicted after the prompt.
        labels: short names of tokens by position: the task's marks, or the order of the tokens
            that differ from the corrupted prompt.
        through: the attributions, by "full model" and, if one was given, "circuit".
    """

    prompt: int
    pair: Pair
    tokens: tuple[str, ...]
    corrupted: tuple[str, ...]
    text: str
    distractor: str
    step: int
    labels: Mapping[int, str]
    through: Mapping[str, Attribution]

    def differs(self, position: int) -> bool:
        """Whether the token differs from the corrupted prompt's."""
        return self.pair.clean_ids[position] != self.pair.corrupted_ids[position]


@dataclass(frozen=True)
class TokenAttributions:
    """Attributions of the answers to some prompts.

    Attributes:
        target: one of `TOKEN_TARGETS`.
        ablation: what closed edges carried.
        nodes: names of the writers.
        answers: in the order of the prompts.
    """

    target: str
    ablation: str
    nodes: tuple[str, ...]
    answers: tuple[Answer, ...]

    def models(self) -> list[str]:
        """What the answers are attributed through."""
        return [*self.answers[0].through]

    def error(self, model: str) -> float:
        """The mean error of the sums, as a fraction of the mean effect."""
        found = [answer.through[model] for answer in self.answers]
        differences = sum(one.error * abs(one.effect) for one in found)
        return differences / max(sum(abs(one.effect) for one in found), 1e-12)

    def by_label(self, model: str) -> dict[str, list[float]]:
        """Per label of tokens that differ from the corrupted prompt, their attributions."""
        found: dict[str, list[float]] = {}
        for answer in self.answers:
            for position, label in answer.labels.items():
                if answer.differs(position):
                    value = answer.through[model].tokens[position].item()
                    found.setdefault(label, []).append(value)
        return found

    def leaders(self, model: str) -> dict[str, float]:
        """Per label, the fraction of the answers in which it has the largest attribution."""
        leads = dict.fromkeys(self.by_label(model), 0.0)
        for answer in self.answers:
            changed = [position for position in answer.labels if answer.differs(position)]
            if changed:
                tokens = answer.through[model].tokens.tolist()
                leads[answer.labels[max(changed, key=tokens.__getitem__)]] += 1
        return {label: count / len(self.answers) for label, count in leads.items()}

    def by_node(self, model: str) -> dict[tuple[str, str], float]:
        """Per node and label, the conductance of all tokens with this label in an answer.

        This is the mean over all answers, the largest magnitude first. Tokens without a label have
        the label "other".
        """
        sums: dict[str, Tensor] = {}
        for answer in self.answers:
            attribution = answer.through[model]
            for position in range(len(answer.tokens)):
                label = answer.labels.get(position, "other")
                column = attribution.nodes[:, position]
                sums[label] = sums.get(label, torch.zeros(len(self.nodes))) + column
        means = {
            (node, label): value / len(self.answers)
            for label, column in sums.items()
            for node, value in zip(self.nodes, column.tolist(), strict=True)
        }
        return dict(sorted(means.items(), key=lambda item: -abs(item[1])))

    def to_dict(self) -> dict[str, Any]:
        """JSON values: per answer, attributions by token, and by node and token."""

        def record(one: Attribution) -> dict[str, Any]:
            return {
                "effect": one.effect, "error": one.error, "steps": one.steps,
                "clean": dict(one.clean), "corrupted": dict(one.corrupted),
                "tokens": one.tokens.tolist(),
                "nodes": [[float(f"{x:.4g}") for x in row] for row in one.nodes.tolist()],
            }  # fmt: skip

        return json_values({
            "target": self.target, "ablation": self.ablation, "nodes": list(self.nodes),
            "error": {model: self.error(model) for model in self.models()},
            "answers": [
                {
                    "prompt": answer.prompt, "step": answer.step,
                    "tokens": answer.tokens, "corrupted": answer.corrupted,
                    "token_ids": answer.pair.clean_ids, "corrupted_ids": answer.pair.corrupted_ids,
                    "answer": answer.text, "answer_ids": answer.pair.answer_ids,
                    "distractor": answer.distractor,
                    "distractor_ids": answer.pair.distractor_ids,
                    "labels": {str(i): x for i, x in answer.labels.items()},
                    "through": {name: record(one) for name, one in answer.through.items()},
                }
                for answer in self.answers
            ],
        })  # fmt: skip

    def _repr_html_(self) -> str:
        """In a notebook: the prompts as shaded text, in a frame."""
        from edgeprune.drawing.page import in_frame
        from edgeprune.drawing.tokens import render_tokens

        return in_frame(render_tokens(self.to_dict(), "Which tokens the answers are due to"))


def attribute_tokens(
    model: CircuitModel, pairs: Sequence[Pair], circuit: Circuit | None = None, *,
    target: str | None = None, steps: int | None = None, ablation: Ablation | str = "interchange",
    marks: Mapping[Pair, Mapping[str, int]] | None = None, batch_size: int = 8,
    listener: Callable[[int, int], object] = lambda done, total: None,
) -> TokenAttributions:  # fmt: skip
    """Attribute answers to the tokens of their prompts, through the full model and a circuit.

    Args:
        pairs: prompts. If several tokens are predicted, each is attributed; with
            `target="contrast"`, only the one at which answer and distractor differ.
        target: one of `TOKEN_TARGETS`; None: the contrast if every pair has a distractor, else the
            logit.
        steps: number of steps of the integrals; None: for each answer, the first of `STEPS` that
            brings the sum of its attributions within `TOLERANCE` of the effect.
        ablation: what closed edges carry. Embeddings start from the corrupted prompts' under every
            kind of ablation.
        marks: positions of tokens by name, such as "IO", of prompts that mark their words.
        batch_size: prompts per forward and backward pass.
        listener: called with the number of answers done through each model, and of all.

    Raises:
        ConfigError: an unknown target, a model that outputs values, no distractor to contrast with.
        DataError: a prompt does not fit the model, none predicts a known token, or all equal their
            corrupted prompts.
    """
    if circuit is not None:
        Circuit.check(circuit, model.graph)
    target = _checked(model, pairs, target)
    ablation = Ablation.of(model, ablation, pairs, batch_size)
    chosen = [
        (prompt, step, one) for prompt, pair in enumerate(pairs)
        for step, one in _single_answers(pair) if target != "contrast" or step == pair.contrast
    ]  # fmt: skip
    if not chosen:
        raise DataError("no prompt has a known token to predict")
    answers = [one for _, _, one in chosen]
    if all(one.clean_ids == one.corrupted_ids for one in answers):
        raise DataError(
            "all corrupted prompts equal their clean prompts, so no token makes a difference; give "
            "other corrupted prompts"
        )
    gates = {"full model": torch.ones(model.graph.num_edges, device=model.device)}
    if circuit is not None:
        gates["circuit"] = torch.tensor(circuit.mask(), device=model.device).float()
    found: dict[str, list[Attribution]] = {}
    for number, (name, one) in enumerate(gates.items()):
        offset = number * len(answers)
        found[name] = _attribute(
            model, answers, one, ablation, target, (steps,) if steps else STEPS, batch_size,
            lambda done, offset=offset: listener(offset + done, len(gates) * len(answers)),
        )  # fmt: skip
    model.release()

    def texts(ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(model.text_of([token]) for token in ids)

    result = TokenAttributions(target, ablation.kind, model.graph.writers, tuple(
        Answer(
            prompt, one, texts(one.clean_ids), texts(one.corrupted_ids),
            "/".join(texts(one.answer_ids)), "/".join(texts(one.distractor_ids)), step,
            _labels(one, (marks or {}).get(pairs[prompt])),
            {name: attributions[i] for name, attributions in found.items()},
        )
        for i, (prompt, step, one) in enumerate(chosen)
    ))  # fmt: skip
    for name in found:
        if result.error(name) > TOLERANCE:
            log.warning(
                f"{name}: the tokens' attributions miss the effect by {result.error(name):.1%} of "
                f"it; give more than {steps or STEPS[-1]} steps, or run the model in float32"
            )
    return result


def _checked(model: CircuitModel, pairs: Sequence[Pair], target: str | None) -> str:
    """The target, or its default; raises as `attribute_tokens`."""
    if model.output is not Output.logits:
        raise ConfigError(f"{model.name} outputs values, but tokens are attributed through logits")
    model.check_prompts(pairs)
    has_distractors = all(pair.distractor_ids for pair in pairs)
    target = target or ("contrast" if has_distractors else "logit")
    if target not in TOKEN_TARGETS:
        raise ConfigError(f"unknown target {target!r}; choose {', '.join(TOKEN_TARGETS)}")
    if target == "contrast" and not has_distractors:
        raise ConfigError(
            "target=contrast needs a distractor for every prompt; give the prompts one, or use "
            "target=logit or probability"
        )
    return target


def _single_answers(pair: Pair) -> list[tuple[int, Pair]]:
    """A pair for each token that a pair predicts and that is known, with the token's index."""
    start, found = len(pair.clean_ids) - len(pair.target_ids) + 1, []
    for step, token in enumerate(pair.target_ids):
        is_contrast = step == pair.contrast
        single = replace(
            pair,
            clean_ids=pair.clean_ids[: start + step],
            corrupted_ids=pair.corrupted_ids[: start + step],
            target_ids=(token,),
            answer_ids=(pair.answer_ids if is_contrast else ()) or (token,),
            distractor_ids=pair.distractor_ids if is_contrast else (),
            contrast=0, also_right=(),
        )  # fmt: skip
        if min(single.answer_ids) >= 0:
            found.append((step, single))
    return found


def _attribute(
    model: CircuitModel, pairs: Sequence[Pair], gates: Tensor, ablation: Ablation, target: str,
    numbers: Sequence[int], batch_size: int, listener: Callable[[int], object],
) -> list[Attribution]:  # fmt: skip
    """Attribute each answer, with more steps as long as its error is above `TOLERANCE` and falls.

    In 16 bits more steps may not help.
    """
    found: dict[int, Attribution] = {}
    left = list(range(len(pairs)))
    for number in numbers:
        improved = []
        for start in range(0, len(left), batch_size):
            part = left[start : start + batch_size]
            batch = collate([pairs[i] for i in part]).to(model.device)
            done = _integrate(model, batch, gates, ablation, target, number)
            for i, one in zip(part, done, strict=True):
                if i not in found or one.error < found[i].error:
                    found[i] = one
                    improved.append(i)
            listener(sum(one.error <= TOLERANCE for one in found.values()))
        left = [i for i in improved if found[i].error > TOLERANCE]
    listener(len(pairs))
    return [found[i] for i in range(len(pairs))]


def _integrate(
    model: CircuitModel, batch: Batch, gates: Tensor, ablation: Ablation, target: str, steps: int
) -> list[Attribution]:
    """Sum over the steps, for each example of a batch."""
    line = _Line(model, batch, gates, ablation)
    corrupted, before = line.run(0.0)
    tokens = nodes = 0.0  # [batch, pos], [writer, batch, pos]
    for step in range(steps):
        grad_embeddings, grad_written = line.differentiate((step + 0.5) / steps, target)
        clean, after = line.run((step + 1) / steps)
        tokens = tokens + (grad_embeddings.float() * line.change).sum((0, -1)) / steps
        nodes = nodes + torch.cat([
            line.at_tokens((grad.float() * (b.float() - a.float())).sum(-1))
            for grad, a, b in zip(grad_written, before, after, strict=True)
        ])  # fmt: skip
        before = after
    ends = zip(_by_example(clean), _by_example(corrupted), batch.lengths.tolist(), strict=True)
    return [
        Attribution(target, tokens[i, :length].cpu(), nodes[:, i, :length].cpu(), *at, steps)
        for i, (*at, length) in enumerate(ends)
    ]


def _by_example(scores: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Values by name, [batch] each, as a dictionary per example."""
    columns = (values.tolist() for values in scores.values())
    return [dict(zip(scores, values, strict=True)) for values in zip(*columns, strict=True)]


class _Line:
    """A circuit on embeddings that lie between the corrupted and the clean prompts'.

    Attributes:
        change: clean minus corrupted embeddings, [embedding, batch, pos, d_model], float32.
    """

    def __init__(
        self, model: CircuitModel, batch: Batch, gates: Tensor, ablation: Ablation
    ) -> None:
        corrupted = None
        if ablation.needs_corrupted:
            _, corrupted = model.run_full(batch.corrupted_ids, slice(None))
        self.model, self.batch, self.gates = model, batch, gates
        self.values = ablation.values(batch, corrupted)
        with torch.no_grad():
            embed = model.architecture.embed
            self.start, self.end = embed(batch.corrupted_ids), embed(batch.clean_ids)
        self.change = self.end.float() - self.start.float()

    def _run(self, fraction: float, with_gradient: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The embeddings at a fraction of the way, the logits, [predicted, vocabulary], and the
        deltas that the nodes write."""
        written: list[Tensor] = []
        embeddings = torch.lerp(self.start, self.end, fraction).requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            outputs = self.model.run_circuit(
                self.batch, self.gates, self.values, embeddings=embeddings, written=written
            )
        return embeddings, outputs, written

    def run(self, fraction: float) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The answers' scores, and the deltas that the nodes write."""
        _, outputs, written = self._run(fraction, with_gradient=False)
        return answer_scores(self.batch, outputs), written

    def differentiate(self, fraction: float, target: str) -> tuple[Tensor, list[Tensor]]:
        """The target's gradients with respect to the embeddings, and to what the nodes write."""
        embeddings, outputs, written = self._run(fraction, with_gradient=True)
        with torch.enable_grad():
            value = answer_scores(self.batch, outputs)[target].sum()
        grad_embeddings, *grad_written = torch.autograd.grad(value, [embeddings, *written])
        return grad_embeddings, grad_written

    def at_tokens(self, values: Tensor) -> Tensor:
        """[node, batch, pos], also from the last layer's [node, predicted]: zeros elsewhere."""
        if values.ndim == 3:
            return values
        whole = values.new_zeros(len(values), *self.batch.clean_ids.shape)
        whole[:, self.batch.rows, self.batch.cols] = values
        return whole


def _labels(pair: Pair, marks: Mapping[str, int] | None) -> dict[int, str]:
    """Short names by position: of marked tokens, of others that differ, and of the last token."""
    both = enumerate(zip(pair.clean_ids, pair.corrupted_ids, strict=True))
    changed = [position for position, (clean, corrupted) in both if clean != corrupted]
    labels = {position: f"changed token {n}" for n, position in enumerate(changed, 1)}
    length = len(pair.clean_ids)
    labels |= {at: name for name, at in (marks or {}).items() if at < length}
    return {length - 1: "end", **labels}
