"""What each attention head attends to: scores with their chance levels, and kinds of heads.

A kind is a rule that gives each query its target keys. A head's score is the attention that it
pays to the targets, averaged over the queries that have any and then over prompts. The kinds are
those of Olsson et al. 2022 (arXiv:2209.11895) and, the last two, of Wang et al. 2023
(arXiv:2211.00593):

    previous token    the token before
    duplicate token   earlier occurrences of the token
    induction         the tokens after earlier occurrences of the token
    first token       the first token, which counts for no other kind
    S-inhibition      from the last token to the second subject
    name mover        from the last token to the indirect object

Chance is the mean score if each query's attention is shuffled over the positions it can see: the
fraction of these that are targets. A head is of a kind if its score is both above what shuffled
attention reaches in all but `FALSE_ALARMS` of models, in any of their heads (normal approximation),
and so large that the targets get `MIN_EXCESS` of what chance leaves.

`copying` is the fraction of random tokens whose own logit is raised most, among the logits of the
prompt's tokens, when the head attends to them. `entropy` is the entropy of the attention, in nats;
its chance level is the entropy of uniform attention.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edgeprune.circuit import Circuit
from edgeprune.drawing.graphviz import COMMON_KINDS
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.errors import ConfigError
from edgeprune.evaluation.compare import kinds_of_heads
from edgeprune.evaluation.table import Table
from edgeprune.metrics import Output
from edgeprune.prompts import Pair

HEAD_KINDS = ("previous token", "duplicate token", "induction", "first token", "S-inhibition",
         "name mover", "copying")  # fmt: skip
"""Scores by which heads are of a kind, in the order in which they are shown."""
MARKED = {"S-inhibition": ("end", "S2"), "name mover": ("end", "IO")}
"""Kinds that need marked words: (query, key), by name; see `prompts.tasks.MARKS`."""
FALSE_ALARMS = 0.001
"""Probability that shuffled attention makes any head of a model one of a given kind."""
MIN_EXCESS = 0.3
"""Minimum of (score - chance) / (1 - chance) for a head to be of a kind."""
RANDOM = "random tokens"
"""Name of the prompts of repeated random tokens."""
NUM_LISTED = 6
"""Number of heads listed per score."""


@dataclass(frozen=True)
class Score:
    """One score of every head; tensors are [layer, head].

    Attributes:
        name: one of `HEAD_KINDS`, or "entropy".
        prompts: on which it was measured: `RANDOM` or the name of the task.
        value: a fraction, or nats.
        chance: the score of shuffled attention.
        threshold: above it a head is of this kind; None for entropy.
    """

    name: str
    prompts: str
    value: Tensor
    chance: float
    threshold: Tensor | None

    def heads(self) -> dict[str, float]:
        """The heads above the threshold, and their scores, the highest first."""
        if self.threshold is None:
            return {}
        above = (self.value > self.threshold).nonzero().tolist()
        found = {f"a{i}.h{j}": self.value[i, j].item() for i, j in above}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def by_head(self) -> dict[str, float]:
        """The score of each head, the highest first."""
        num_heads = self.value.shape[1]
        values, order = self.value.flatten().sort(descending=True, stable=True)
        names = (f"a{index // num_heads}.h{index % num_heads}" for index in order.tolist())
        return dict(zip(names, values.tolist(), strict=True))

    def ranked(self) -> list[str]:
        """All heads, the highest score first."""
        return [*self.by_head()]


@dataclass(frozen=True)
class HeadScores:
    """All scores of a model's heads."""

    scores: tuple[Score, ...]

    @property
    def labels(self) -> dict[str, list[str]]:
        """The kinds of every head that has any: the clearest first, `COMMON_KINDS` last.

        A kind that is measured on several prompts is decided on the first of them.
        """
        excess: dict[str, dict[str, float]] = {}
        for score in reversed(self.scores):  # the first is written last
            if score.threshold is not None:
                for kinds in excess.values():
                    kinds.pop(score.name, None)
                for head, value in score.heads().items():
                    excess.setdefault(head, {})[score.name] = value - score.chance
        kinds_of = {
            head: sorted(kinds, key=lambda kind: (kind in COMMON_KINDS, -kinds[kind]))
            for head, kinds in excess.items() if kinds
        }  # fmt: skip
        return dict(sorted(kinds_of.items(), key=lambda item: _place(item[0])))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> HeadScores:
        """The inverse of `to_dict`."""

        def tensor(values: Any) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.float64)

        return cls(tuple(
            Score(s["name"], s["prompts"], tensor(s["value"]), s["chance"], tensor(s["threshold"]))
            for s in fields["scores"]
        ))  # fmt: skip

    def score(self, name: str) -> Score:
        """The first score of a name; raises ConfigError for an unknown one."""
        found = [score for score in self.scores if score.name == name.replace("_", " ")]
        if not found:
            known = dict.fromkeys(score.name.replace(" ", "_") for score in self.scores)
            raise ConfigError(f"there is no score {name!r} of heads; choose {', '.join(known)}")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; scores are [layer][head]."""
        return {
            "labels": self.labels,
            "false_alarms": FALSE_ALARMS,
            "min_excess": MIN_EXCESS,
            "scores": [
                {
                    "name": s.name, "prompts": s.prompts, "chance": s.chance,
                    "value": s.value.tolist(),
                    "threshold": None if s.threshold is None else s.threshold.tolist(),
                }
                for s in self.scores
            ],
        }  # fmt: skip

    def rows(self) -> list[list[Any]]:
        """A table with a head's score per row, and a first row with the columns' names."""
        rows: list[list[Any]] = [
            ["head", "layer", "index", "prompts", "score", "value", "chance", "threshold"]
        ]
        for s in self.scores:
            for layer, values in enumerate(s.value.tolist()):
                for head, value in enumerate(values):
                    limit = "" if s.threshold is None else s.threshold[layer, head].item()
                    where = [f"a{layer}.h{head}", layer, head, s.prompts]
                    rows.append([*where, s.name, value, s.chance, limit])
        return rows


def score_heads(
    model: CircuitModel, pairs: Sequence[Pair] = (), *, task: str = "task",
    marks: Mapping[Pair, Mapping[str, int]] | None = None, num_random: int = 50,
    length: int = 50, batch_size: int = 16, seed: int = 0,
) -> HeadScores:  # fmt: skip
    """Score every head on repeated random tokens, and on the clean prompts of pairs.

    Args:
        task: name of the pairs' task.
        marks: positions of tokens by name, such as "IO", of prompts that mark their words.
        num_random: number of prompts of random tokens.
        length: number of random tokens, which are then repeated; fewer where the model takes fewer.
        batch_size: prompts per forward pass.

    Raises DataError if a prompt does not fit the model.
    """
    prompts = repeated_tokens(model, num_random, length, seed)
    found = _measure(model, RANDOM, [(ids, {}) for ids in prompts], batch_size, copying=True)
    if len(pairs):
        model.check_prompts(pairs)
        # What comes after the first predicting position is fed back to the model.
        ends = [len(pair.clean_ids) - len(pair.target_ids) for pair in pairs]
        known = marks or {}
        marked = [
            (pair.clean_ids, {**known.get(pair, {}), "end": end})
            for pair, end in zip(pairs, ends, strict=True)
        ]
        found += _measure(model, task, marked, batch_size)
    return HeadScores(tuple(found))


def repeated_tokens(
    model: CircuitModel, count: int, length: int, seed: int
) -> list[tuple[int, ...]]:
    """Prompts of distinct random tokens that are repeated once, after a BOS token if there is one.

    Fewer than `length` tokens are drawn if the vocabulary or the model's prompts do not allow more.
    """
    tokenizer, size = model.tokenizer, model.architecture.body.config.vocab_size
    special = set(getattr(tokenizer, "all_special_ids", ()))
    size = size if tokenizer is None else min(size, len(tokenizer))
    vocabulary = [token for token in range(size) if token not in special]
    begin = getattr(tokenizer, "bos_token_id", None)
    start = () if begin is None else (begin,)
    length = min(length, len(vocabulary), (model.max_length - len(start)) // 2)
    rng = random.Random(seed)
    drawn = [tuple(rng.sample(vocabulary, length)) for _ in range(count)]
    return [start + tokens + tokens for tokens in drawn]


Marked = tuple[tuple[int, ...], Mapping[str, int]]
"""Token ids of a prompt, and the positions of its marked tokens."""


@torch.no_grad()
def _measure(
    model: CircuitModel, name: str, prompts: Sequence[Marked], batch_size: int, *,
    copying: bool = False,
) -> list[Score]:  # fmt: skip
    """All scores on some prompts, whose name is `name`.

    Args:
        copying: whether to score copying as well; the prompts are then `repeated_tokens`.
    """
    by_length = sorted(prompts, key=lambda prompt: len(prompt[0]))
    if not model.architecture.may_pad:
        batch_size = 1
    totals = _Totals(model)
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        totals.add(batch, copying and model.output is Output.logits)
    return totals.scores(name)


class _Totals:
    """Sums over prompts from which the scores are computed; tensors are on the CPU."""

    def __init__(self, model: CircuitModel) -> None:
        self.model = model
        self.shape = (model.graph.num_layers, model.graph.num_heads)
        self.sums: dict[str, Tensor] = {}  # [score or variance, layer, head]
        self.chances: dict[str, float] = {}
        self.counts: dict[str, int] = {}  # number of prompts

    def add(self, batch: Sequence[Marked], copying: bool) -> None:
        """Run the full model on a batch of prompts and add its attention."""
        arch, device = self.model.architecture, self.model.device
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in batch], batch_first=True)
        lengths = torch.tensor([len(tokens) for tokens, _ in batch])
        visible = _visible(ids, lengths, causal=arch.may_pad)  # [batch, query, key]
        targets = _targets(ids, [at for _, at in batch])
        rules = [_Rule(name, mask, visible) for name, mask in targets.items()]
        rules = [rule for rule in rules if rule.num_queries.any()]
        for rule in rules:
            self._count(rule.name, rule.chance)
            rule.to(device)
        num_visible = visible.sum(-1)  # [batch, query]
        is_query = (num_visible > 1).float()
        is_query /= is_query.sum(-1, keepdim=True)
        self._count("entropy", (num_visible.clamp(min=1).log() * is_query).sum(-1))
        is_query = is_query.nan_to_num()  # prompts of one token have none
        is_query, ids = is_query[:, None].to(device), ids.to(device)
        once = slice(ids.shape[1] % 2, ids.shape[1] // 2 + ids.shape[1] % 2)  # before they repeat
        if copying:
            self._count("copying", torch.full((len(ids),), 1 / (ids.shape[1] // 2)))

        def probe(layer: int, part: str, x: Tensor) -> Tensor:
            if part == "v" and copying:
                copied = _copied(self.model, layer, x[:, :, once], ids[:, once])
                self._add("copying", layer, *copied)
            elif part == "pattern":  # [batch, head, query, key]
                exact = x.float()
                for rule in rules:
                    self._add(rule.name, layer, *rule.apply(exact))
                entropy = (torch.special.entr(exact).sum(-1) * is_query).sum(-1)  # [batch, head]
                self._add("entropy", layer, entropy, torch.zeros_like(entropy))
            return x

        with arch.probe_attention(probe):
            arch.body(inputs_embeds=arch.body.get_input_embeddings()(ids), use_cache=False)

    def _count(self, name: str, chances: Tensor) -> None:
        """Count the prompts that have a chance level, [batch], NaN for those without targets."""
        known = chances[~chances.isnan()]
        self.counts[name] = self.counts.get(name, 0) + len(known)
        self.chances[name] = self.chances.get(name, 0.0) + known.sum().item()

    def _add(self, name: str, layer: int, score: Tensor, variance: Tensor) -> None:
        """Add a layer's scores and their variances under shuffling, [batch, head] each."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(2, *self.shape, dtype=torch.float64)
        self.sums[name][:, layer] += torch.stack([score.sum(0), variance.sum(0)]).cpu().double()

    def scores(self, prompts: str) -> list[Score]:
        """The means over the prompts."""
        z = NormalDist().inv_cdf(1 - FALSE_ALARMS / (self.shape[0] * self.shape[1]))
        found = []
        for name in (*HEAD_KINDS, "entropy"):
            if name in self.sums:
                count = self.counts[name]
                value, chance = self.sums[name][0] / count, self.chances[name] / count
                deviation = self.sums[name][1].sqrt() / count  # of the mean over prompts
                threshold = chance + (z * deviation).clamp(min=MIN_EXCESS * (1 - chance))
                found.append(
                    Score(name, prompts, value, chance, None if name == "entropy" else threshold)
                )
        return found


class _Rule:
    """The targets of one kind, and the attention that they get by chance.

    Attributes:
        targets, visible: [batch, query, key], the targets, and the keys that a query can attend to.
        num_queries: [batch], number of queries that have a target.
        chance: [batch], the score of shuffled attention; NaN for prompts without such a query.
    """

    def __init__(self, name: str, targets: Tensor, visible: Tensor) -> None:
        self.name, self.targets, self.visible = name, targets & visible, visible
        num_targets, self.num_visible = self.targets.sum(-1), visible.sum(-1)  # [batch, query]
        self.is_query = (num_targets > 0) & (self.num_visible > 1)
        self.num_queries = self.is_query.sum(-1)  # [batch]
        self.share = num_targets / self.num_visible.clamp(min=1)  # [batch, query]
        self.chance = (self.share * self.is_query).sum(-1) / self.num_queries
        # The variance of a sum over `num_targets` of n values, drawn without replacement, is
        # num_targets * (1 - num_targets / n) times that of the values.
        self.factor = num_targets * (1 - self.share)

    def to(self, device: torch.device) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def apply(self, pattern: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of a layer's heads and their variances under shuffling, [batch, head] each.

        The variance is that of shuffling all queries of a prompt in the same way, which is the
        largest possible. The pattern is [batch, head, query, key].
        """
        num_queries = self.num_queries.clamp(min=1)[:, None]
        paid = torch.einsum("bhqk,bqk->bhq", pattern, self.targets.float())
        score = (paid * self.is_query[:, None]).sum(-1) / num_queries
        n = self.num_visible[:, None].float()  # [batch, 1, query]
        squares = torch.einsum("bhqk,bqk->bhq", pattern.square(), self.visible.float())
        variance = (squares - 1 / n).clamp(min=0) / (n - 1).clamp(min=1) * self.factor[:, None]
        deviation = (variance.sqrt() * self.is_query[:, None]).sum(-1) / num_queries
        return score, deviation.square()


def _visible(ids: Tensor, lengths: Tensor, *, causal: bool) -> Tensor:
    """[batch, query, key], whether both are tokens and the query can attend to the key."""
    is_token = torch.arange(ids.shape[1]) < lengths[:, None]  # [batch, pos]
    both = is_token[:, :, None] & is_token[:, None]
    return both.tril() if causal else both


def _targets(ids: Tensor, marks: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
    """The targets of each kind, [batch, query, key]."""
    length = ids.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)
    same = (ids[:, :, None] == ids[:, None]) & (key < query)  # earlier occurrences
    after = torch.zeros_like(same)
    after[..., 1:] = same[..., :-1]
    targets = {
        "previous token": (key == query - 1).expand_as(same) & (key > 0),
        "duplicate token": same & (key > 0),
        "induction": after & (key < query),
        "first token": (key == 0).expand_as(same) & (query > 0),
    }
    for name, (source, target) in MARKED.items():
        mask = torch.zeros_like(same)
        for row, at in enumerate(marks):
            if source in at and target in at:
                mask[row, at[source], at[target]] = True
        targets[name] = mask
    return targets


def _copied(model: CircuitModel, layer: int, v: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The fraction of tokens of which a head that attends to them raises the logit most.

    Args:
        v: [batch, kv_head, pos, d_head], the values of the tokens.
        ids: [batch, pos].

    Returns:
        The fraction and its variance by chance, [batch, head] each.
    """
    arch = model.architecture
    block = arch.blocks[layer]
    weight = block.output_weight(v.dtype)  # [head, d_head, d_model]
    v = v.repeat_interleave(len(weight) // v.shape[1], 1)
    outputs = arch.final_norm(v @ weight)  # [batch, head, pos, d_model]
    logits = outputs @ arch.unembed.weight[ids].transpose(1, 2)[:, None]  # [.., pos, token]
    logits = logits - logits.mean(-2, keepdim=True)  # what a token gets whatever the head reads
    hits = logits.argmax(-1) == torch.arange(ids.shape[1], device=ids.device)
    chance = 1 / ids.shape[1]
    share = hits.float().mean(-1)
    return share, torch.full_like(share, chance * (1 - chance))


# ----------------------------------------------------------------------------------------- tables


def heads_table(scores: HeadScores, title: str) -> Table:
    """Per score: its chance level, how many heads are above their thresholds, and the highest."""
    rows = []
    for score in scores.scores:
        best = [
            f"{_short(head)} ({value:.2f})"
            for head, value in islice(score.by_head().items(), NUM_LISTED)
        ]
        limit = "–" if score.threshold is None else f"{score.threshold.median().item():.2f}"
        count = "–" if score.threshold is None else str(len(score.heads()))
        rows.append([
            score.name, score.prompts, f"{score.chance:.2f}", limit, count, ", ".join(best)
        ])  # fmt: skip
    columns = ["", "", "chance", "median\nthreshold", "heads\nabove", ""]
    return Table(columns, rows, title)


def circuit_tables(labels: Mapping[str, Sequence[str]], circuit: Circuit) -> list[Table]:
    """How many heads of each kind a circuit has, and how many of its edges join the kinds.

    Only edges on a path from the input to the output count. A head of several kinds counts for each
    of them, its edges for the first only. Tables without rows are left out.
    """
    circuit = circuit.without_dangling()
    kind_of = {head: kinds[0] for head, kinds in labels.items()}
    counts = kinds_of_heads(labels, {"circuit": circuit})
    rows = [[kind, str(n["model"]), str(n["circuits"]["circuit"])] for kind, n in counts.items()]
    between: Counter[tuple[str, str]] = Counter()
    for writer, reader in circuit.edges:
        port = reader.rpartition(".")[2]
        fed = {kind_of[node] for node in circuit.nodes_fed_by(reader) if node in kind_of}
        into = [f"{kind}, {port}" for kind in sorted(fed)]
        into += ["output"] if reader == "resid_post" else []
        if writer in kind_of:
            between.update((kind_of[writer], target) for target in into)
    edges = [[*pair, str(count)] for pair, count in between.most_common()]
    tables = [
        Table(["", "heads in\nthe model", "in the\ncircuit"], rows, "kinds of heads"),
        Table(["", "into", "edges"], edges, "edges between heads of these kinds"),
    ]
    return [table for table in tables if table.rows]


def _short(head: str) -> str:
    """a5.h1 -> 5.1"""
    return head.removeprefix("a").replace(".h", ".")


def _place(head: str) -> tuple[int, int]:
    layer, index = _short(head).split(".")
    return int(layer), int(index)
