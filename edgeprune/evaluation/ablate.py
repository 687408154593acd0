"""Does a set of nodes matter? The full model without them, next to controls.

The set's nodes are ablated together, and every later part of the model sees their ablated outputs.
A control is a set with as many heads in each layer (`layer_matched`): the heads outside of the set
with the lowest scores, or random heads. Random heads are drawn from all heads of the layer, so that
the share of random sets that do as much harm is the p value of a permutation test. The MLPs of the
set are ablated in every control as well.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.node_ablation import AblatedModel, NodeMeans
from edgeprune.errors import ConfigError
from edgeprune.evaluation.statistics import (
    LEVEL,
    Difference,
    McNemar,
    mcnemar,
    paired_bootstrap,
    rank_p_values,
)
from edgeprune.evaluation.table import Table
from edgeprune.files import json_values
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import ExampleMetrics, Output, measure
from edgeprune.prompts import Batch, Pair, collate

LABELS = {"kl": "KL", "error": "error", "accuracy": "accuracy", "answers": "answers"}
"""Measures by name; `answers` is the share of generated texts that contain a right answer."""


@dataclass(frozen=True)
class Outcome:
    """How the model does on each prompt without some nodes; tensors are [prompt]."""

    nodes: tuple[str, ...]
    measures: dict[str, Tensor]  # by the names in `LABELS`, the distance from the full model first
    texts: tuple[str, ...]  # what it generated after each prompt

    def mean(self, name: str) -> float:
        return self.measures[name].mean().item()


@dataclass(frozen=True)
class Comparison:
    """One measure of the ablated model minus that of another model, on the same prompts."""

    measure: str
    other: str  # "full model", "low-scoring" or "random"
    difference: Difference
    test: McNemar | None  # of measures that are right or wrong, except against random sets
    p_random: float | None  # p value among the random sets; None against other models


@dataclass(frozen=True)
class NodeAblation:
    """The effect of ablating a set of nodes, and those of its controls."""

    kind: str
    full: Outcome
    ablated: Outcome
    low_scoring: Outcome | None
    random: tuple[Outcome, ...]
    prompts: tuple[str, ...]  # in the order of the measures

    def comparisons(self) -> list[Comparison]:
        """The ablated model against the full model and each control, by every measure."""
        found = []
        for name, own in self.ablated.measures.items():
            is_right = name not in ("kl", "error")
            for other, outcome in (("full model", self.full), ("low-scoring", self.low_scoring)):
                if outcome is not None:
                    theirs = outcome.measures[name]
                    test = mcnemar(own, theirs) if is_right else None
                    difference = paired_bootstrap(own, theirs)
                    found.append(Comparison(name, other, difference, test, None))
            if self.random:
                every = torch.stack([outcome.measures[name] for outcome in self.random])
                sign = -1 if is_right else 1  # harm
                harm, others = sign * own.mean(), sign * every.mean(1)
                p = rank_p_values(harm[None], others).item()
                difference = paired_bootstrap(own, every.mean(0))
                found.append(Comparison(name, "random", difference, None, p))
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""

        def record(outcome: Outcome) -> dict[str, Any]:
            means = {name: outcome.mean(name) for name in outcome.measures}
            return {"nodes": outcome.nodes, **means}

        examples = {
            "prompt": self.prompts,
            **{f"full_{name}": x.tolist() for name, x in self.full.measures.items()},
            **{name: x.tolist() for name, x in self.ablated.measures.items()},
            "full_text": self.full.texts, "text": self.ablated.texts,
        }  # fmt: skip
        return json_values({
            "ablation": self.kind,
            "num_prompts": len(self.prompts),
            "full": record(self.full),
            "ablated": record(self.ablated),
            "low_scoring": self.low_scoring and record(self.low_scoring),
            "random": list(map(record, self.random)),
            "comparisons": [
                {"measure": c.measure, "other": c.other, "difference": c.difference._asdict(),
                 "mcnemar": c.test and c.test._asdict(), "p_random": c.p_random}
                for c in self.comparisons()
            ],
            "examples": examples,
        })  # fmt: skip


def ablate(
    model: CircuitModel, nodes: Sequence[str], pairs: Sequence[Pair], *, kind: str = "zero",
    scores: Mapping[str, float] | None = None, num_random: int = 20, generate: int = 0,
    answers: Mapping[str, Sequence[str]] | None = None, reference_set: Sequence[Pair] = (),
    per_position: bool = True, batch_size: int = 16, seed: int = 0,
    listener: Callable[[int], object] = lambda done: None,
) -> NodeAblation:  # fmt: skip
    """Measure a model without some nodes, and without control sets.

    Args:
        nodes: names of heads and MLPs, such as "a5.h1" and "m3".
        kind: `zero`, `mean` or `interchange`.
        scores: of heads; makes a control of heads with the lowest.
        num_random: number of random control sets.
        generate: number of tokens to generate after each prompt; 0 for none.
        answers: right answers by the clean prompt's text; the tokens to predict if it has none.
        reference_set: over whose clean prompts `mean` takes means; the pairs if empty.
        per_position: whether means are taken per position; see `NodeMeans`.
        batch_size: prompts of equal length per forward pass.
        listener: called after each batch with the number of prompts done.

    Raises ConfigError for unknown nodes, or text from a model without a tokenizer.
    """
    model.check_prompts(pairs)
    known = {node for node in model.graph.writers if node[0] in "am"}
    unknown = [node for node in nodes if node not in known]
    if unknown or not nodes:
        raise ConfigError(
            f"got nodes {', '.join(unknown) or 'none'}, expected heads and MLPs of "
            f"{model.name}, such as a0.h0 and m0"
        )
    if generate and model.output is not Output.logits:
        raise ConfigError(f"{model.name} generates no text; leave out generate={generate}")
    sets = [(), tuple(nodes)]
    if scores is not None:
        ranked = sorted(scores, key=scores.__getitem__)
        # Outside of the set first; where a layer has too few others, heads of the set fill up.
        ranked.sort(key=lambda head: head in nodes)
        sets.append(layer_matched(model.graph, nodes, ranked))
    rng = random.Random(seed)
    heads = [node for node in model.graph.writers if node.startswith("a")]
    for _ in range(num_random):
        sets.append(layer_matched(model.graph, nodes, rng.sample(heads, len(heads))))
    means = None
    if kind == "mean":
        every = list(dict.fromkeys(node for each in sets for node in each))
        means = NodeMeans(model, every, per_position=per_position)
        for batch in equal_lengths(reference_set or pairs, batch_size):
            means.add(batch.clean_ids.to(model.device))
    batches = equal_lengths(pairs, batch_size)
    full, ablated, *controls = _measure(
        model, sets, batches, kind, means, generate, answers or {}, listener
    )
    texts = tuple(pair.text for batch in batches for pair in batch.pairs)
    low_scoring = controls.pop(0) if scores is not None else None
    return NodeAblation(kind, full, ablated, low_scoring, tuple(controls), texts)


def layer_matched(
    graph: CircuitGraph, nodes: Sequence[str], order: Sequence[str]
) -> tuple[str, ...]:
    """The set's MLPs, and of each layer the first heads of an order, as many as the set has."""
    needed: dict[str, int] = defaultdict(int)
    for node in nodes:
        needed[node.partition(".")[0]] += node.startswith("a")
    chosen = {node for node in nodes if node.startswith("m")}
    for head in order:
        layer = head.partition(".")[0]
        if needed[layer] > 0:
            needed[layer] -= 1
            chosen.add(head)
    return tuple(node for node in graph.writers if node in chosen)


def equal_lengths(pairs: Sequence[Pair], batch_size: int) -> list[Batch]:
    """Batches of prompts that have equally many tokens, and equally many to predict.

    They need no padding, so that text can be generated after them.
    """
    groups: dict[tuple[int, int], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[len(pair.clean_ids), len(pair.target_ids)].append(pair)
    return [
        collate(group[start : start + batch_size])
        for _, group in sorted(groups.items()) for start in range(0, len(group), batch_size)
    ]  # fmt: skip


@torch.no_grad()
def _measure(
    model: CircuitModel, sets: Sequence[Sequence[str]], batches: Sequence[Batch], kind: str,
    means: NodeMeans | None, generate: int, answers: Mapping[str, Sequence[str]],
    listener: Callable[[int], object],
) -> list[Outcome]:  # fmt: skip
    """The outcome of ablating each set; the first is the full model."""
    models = [AblatedModel(model, nodes, kind, means) for nodes in sets]
    examples: list[list[ExampleMetrics]] = [[] for _ in sets]
    texts: list[list[str]] = [[] for _ in sets]
    prompts: list[Pair] = []
    for batch in batches:
        batch = batch.to(model.device)
        reference: Tensor | None = None
        for index, ablated in enumerate(models):
            with ablated.ready():
                logits, generated = _run(ablated, batch, generate)
            reference = logits if reference is None else reference
            examples[index].append(measure(batch, reference, logits, model.output))
            texts[index] += generated
        prompts += batch.pairs
        listener(len(prompts))
    outcomes = []
    for nodes, parts, generated in zip(sets, examples, texts, strict=True):
        whole = ExampleMetrics.concatenate(parts)
        is_logits = model.output is Output.logits
        measures = {"kl": whole.kl.clamp(min=0)} if is_logits else {"error": whole.error}
        measures["accuracy"] = whole.correct
        if generate:
            right = (
                answers.get(pair.text) or [model.tokenizer.decode(list(pair.target_ids))]
                for pair in prompts
            )
            contains = [
                any(answer.strip() in text for answer in options)
                for text, options in zip(generated, right, strict=True)
            ]
            measures["answers"] = torch.tensor(contains, dtype=torch.float64)
        outcomes.append(Outcome(tuple(nodes), measures, tuple(generated)))
    return outcomes


def _run(ablated: AblatedModel, batch: Batch, generate: int) -> tuple[Tensor, list[str]]:
    """Logits at the predicted tokens, [predicted, vocabulary], and the texts generated."""
    model, clean, corrupted = ablated.model, batch.clean_ids, batch.corrupted_ids
    num_fed_back = len(batch.pairs[0].target_ids) - 1
    caches: dict[str, Any] | None = {} if generate and not num_fed_back else None
    states = ablated.states(clean, corrupted, caches)
    logits = model.architecture.logits(states[batch.rows, batch.cols])
    if not generate:
        return logits, []
    if caches is None:  # the prompts alone
        caches, stop = {}, clean.shape[1] - num_fed_back
        states = ablated.states(clean[:, :stop], corrupted[:, :stop], caches)
    tokens = ablated.generate(states[:, -1], caches, generate)
    end = model.tokenizer.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in tokens.tolist()]
    return logits, [model.tokenizer.decode(row) for row in rows]


# ------------------------------------------------------------------------------------------ words


def ablation_tables(result: NodeAblation, title: str) -> list[Table]:
    """The measures of every model, and what the ablated one differs by."""
    models = {"full model": result.full, "ablated": result.ablated}
    if result.low_scoring is not None:
        models["low-scoring"] = result.low_scoring
    names = list(result.full.measures)
    rows = [
        [model, str(len(outcome.nodes)), *(f"{outcome.mean(name):.3f}" for name in names)]
        for model, outcome in models.items()
    ]
    for label, choose in (("lowest", min), ("mean", fmean), ("highest", max)):
        if result.random:
            values = [choose([each.mean(name) for each in result.random]) for name in names]
            row = [f"random, {label} of {len(result.random)}", str(len(result.ablated.nodes))]
            rows.append(row + [f"{value:.3f}" for value in values])
    shown = Table(["", "nodes\nablated", *(LABELS[name] for name in names)], rows, title)
    rows = [
        [LABELS[c.measure], c.other, f"{c.difference.mean:+.3f}",
         f"{c.difference.low:+.3f} to {c.difference.high:+.3f}", _p_value(c)]
        for c in result.comparisons()
    ]  # fmt: skip
    columns = ["", "minus", "difference", "95 % interval", "p"]
    title = (
        "the ablated model minus others\n(p: McNemar's test, with the prompts right only here / "
        "only there; random: the share of sets that do as much harm)"
    )
    return [shown, Table(columns, rows, title)]


def _p_value(comparison: Comparison) -> str:
    """The p value of a comparison, if there is a test of it."""
    if comparison.p_random is not None:
        return _p(comparison.p_random)
    test = comparison.test
    return "–" if test is None else f"{_p(test.p)} ({test.only_a} / {test.only_b})"


def in_words(result: NodeAblation) -> str:
    """What was found, what follows from it and what does not, in a few sentences."""
    by = {(c.measure, c.other): c for c in result.comparisons()}
    distance, *rights = result.ablated.measures
    count = len(result.ablated.nodes)
    effects = [f"gives a {LABELS[distance]} of {result.ablated.mean(distance):.3f}"]
    for name in rights:
        values = [f"{each.mean(name):.3f}" for each in (result.full, result.ablated)]
        p = _equals(by[name, "full model"].test.p)
        effects.append(f"changes {LABELS[name]} from {' to '.join(values)} (McNemar's p {p})")
    whole = " and ".join(filter(None, (", ".join(effects[:-1]), effects[-1])))
    found = f"Ablating the {count} node{'s' * (count != 1)} {whole}."
    changed = [name for name in rights if by[name, "full model"].difference.is_clear]
    decisive = changed[-1] if changed else distance
    controls = [c for (name, other), c in by.items() if name == decisive and other != "full model"]
    for c in controls:
        if c.p_random is None:
            found += (
                f" In {LABELS[decisive]} it differs from ablating low-scoring heads of the same "
                f"layers by {_interval(c.difference)}."
            )
        else:
            as_bad = round(c.p_random * (1 + len(result.random))) - 1
            found += (
                f" Of {len(result.random)} random sets in the same layers, {as_bad} do as much "
                f"harm (p {_equals(c.p_random)})."
            )
    if not controls:
        return f"{found} Without controls, nothing follows about these nodes in particular."
    if all(map(_is_worse, controls)):
        follows = (
            "It follows that these prompts need the nodes more than others of their layers. It "
            "does not follow that they need them for what they are named after: a head may do "
            "several things."
        )
    else:
        follows = (
            "It does not follow that these prompts need these nodes in particular: others of their "
            "layers do about as much harm, as far as so many prompts and sets can tell."
        )
    if not changed and rights:
        follows += (
            " Nor does it follow, where no answer changes, that the model never uses them: others "
            "may stand in for them."
        )
    if result.kind == "zero":
        follows += (
            " Zero ablation also takes away what a node writes on every prompt; ablation=mean or "
            "interchange does not."
        )
    return f"{found} {follows}"


def _is_worse(comparison: Comparison) -> bool:
    """Whether the ablated model is clearly worse than the other, at `LEVEL`."""
    if comparison.p_random is not None:
        return comparison.p_random <= LEVEL
    low, high = comparison.difference.low, comparison.difference.high
    return low > 0 if comparison.measure in ("kl", "error") else high < 0


def _interval(difference: Difference) -> str:
    return f"{difference.mean:+.3f}, 95 % interval {difference.low:+.3f} to {difference.high:+.3f}"


def _p(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}"


def _equals(p: float) -> str:
    return _p(p) if p < 0.001 else f"= {_p(p)}"
