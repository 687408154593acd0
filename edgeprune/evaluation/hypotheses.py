"""Tests of hypotheses about a circuit, each with what would count against the circuit.

Sufficiency, partial necessity, equivalence, independence and minimality are those of Shi et al.
2024 (arXiv:2410.13032), completeness is that of Wang et al. 2022 (arXiv:2211.00593). Each function
returns a `Finding`; its docstring says where the test differs from the paper's. Tests are at level
.05. Intervals are 95 % bootstrap intervals over prompts, for the given circuits.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.evaluation.bench import SAME, Bench
from edgeprune.evaluation.cuts import without_nodes
from edgeprune.evaluation.finding import Finding, brief
from edgeprune.evaluation.random_circuits import RandomPaths
from edgeprune.evaluation.statistics import (
    LEVEL,
    benjamini_hochberg,
    binomial_tail,
    bootstrap_interval,
    gaussian_kernel,
    hsic_test,
    mean_interval,
    rank_p_values,
    sign_test,
)
from edgeprune.metrics import SAME_NUMBER, ExampleMetrics
from edgeprune.scores import EdgeScores

MAX_AS_GOOD = 0.1
"""Largest probability with which a random circuit may do as well (1 - q* of Shi et al.)."""
NUM_STRONGEST = 20
"""Number of the circuit's strongest edges that are cut out of the full model one at a time."""
MARGIN = 0.1
"""How far from one half the share of prompts may be for equivalence (epsilon of Shi et al.)."""
MAX_EDGES = 200
"""Maximum number of edges whose removal is measured; of a larger circuit, they are drawn."""
NUM_NODE_SETS = 20
"""Number of random sets of nodes."""
GREEDY_STEPS, GREEDY_TRIES = 5, 10
"""Number of nodes of the greedy set, and of nodes tried for each (10 in Wang et al.)."""
MAX_INCOMPLETE = 0.2
"""By how much circuit and full model may differ when both lose the same nodes, as a share of the
full model's score. The limit is a convention of ours."""
MAX_HSIC = 500
"""Maximum number of prompts of the independence test, whose memory grows with its square."""


# ------------------------------------------------------------------------------- random circuits


def sufficiency(
    bench: Bench, circuit: Circuit, own: ExampleMetrics, num_random: int = 100, seed: int = 0
) -> Finding:
    """Compare the circuit with random circuits of as many edges, which are made of paths.

    The hypothesis is that a random circuit is at least as faithful with probability .1 or more
    (q* = .9 of Shi et al.). It is tested with the exact binomial distribution.
    """
    paths = RandomPaths(bench.graph)
    circuits = [paths.circuit(len(circuit), seed + index) for index in range(num_random)]
    distances = [bench.distance(each).mean().item() for each in bench.measure(circuits)]
    mine, name = bench.distance(own).mean().item(), bench.distance_name
    as_good = sum(distance <= mine + SAME for distance in distances)
    p = _p_value(as_good, num_random)
    best, mean = min(distances), sum(distances) / num_random
    return Finding(
        "sufficiency", f"{name} {brief(mine)}",
        f"random circuits {brief(mean)}, the best {brief(best)}",
        _rejected(p, num_random),
        f"Of {num_random} random circuits of as many connected edges, {_count(as_good)} at least "
        f"as faithful (their mean {name} is {brief(mean)}, the lowest {brief(best)}); "
        f"{_against(num_random)}.",
        mean_interval(bench.distance(own)), p,
        {"random": distances, "sizes": [len(each) for each in circuits], "as_good": as_good},
    )  # fmt: skip


def necessity(
    bench: Bench, circuit: Circuit, num_random: int = 100, seed: int = 0,
    scores: EdgeScores | None = None,
) -> Finding:  # fmt: skip
    """Compare the damage to the full model of cutting the circuit and of cutting random paths.

    Partial necessity of Shi et al.: the random paths avoid the circuit's edges and have as many, or
    fewer if there are not enough. The hypothesis is that cutting them does at least as much damage
    with probability .1 or more. It does not apply if every path goes through the circuit.

    A single edge, such as the one from the embedding into the first MLP, may do all of the damage.
    So the strongest edges by `scores` are also cut one at a time, and the worst is named.
    """
    paths = RandomPaths(bench.graph, excluded=circuit.edge_set)
    circuits = [paths.circuit(len(circuit), seed + index) for index in range(num_random)]
    if circuit.edge_set and not any(circuits):
        reason = "every path from the input to the output goes through the circuit's edges"
        return Finding.inapplicable("partial necessity", reason)
    ranked = [] if scores is None else (bench.graph.edges[e] for e in scores.ranking().tolist())
    strongest = [*islice((edge for edge in ranked if edge in circuit.edge_set), NUM_STRONGEST)]
    single = [Circuit.from_edges(bench.graph, [edge]) for edge in strongest]
    cut = (circuit, *circuits, *single)
    without, *others = bench.measure(bench.whole - each for each in cut)
    damage, name = bench.distance(without), bench.distance_name
    distances = [bench.distance(each).mean().item() for each in others]
    distances, of_single = distances[:num_random], distances[num_random:]
    mine, mean, worst = damage.mean().item(), sum(distances) / num_random, max(distances)
    as_bad = sum(distance >= mine - SAME for distance in distances)
    p = _p_value(as_bad, num_random)
    sizes = [len(each) for each in circuits]
    few = "" if min(sizes) == len(circuit) else f" (only {min(sizes):,} or more could be drawn)"
    alone = ""
    if strongest:
        most, edge = max(zip(of_single, strongest, strict=True))
        alone = (
            f" Of its {len(strongest)} strongest edges {' → '.join(edge)} does most damage alone: "
            f"without it the {name} is {brief(most)}."
        )
    return Finding(
        "partial necessity", f"{name} {brief(mine)} without it",
        f"without random edges {brief(mean)}, at most {brief(worst)}",
        _rejected(p, num_random),
        f"Without the circuit's edges the full model's {name} is {brief(mine)}; without as many "
        f"random connected edges{few} it is {brief(mean)}, and at least as large in {as_bad} of "
        f"{num_random} cases ({_against(num_random)}).{alone}",
        mean_interval(damage), p,
        {"random": distances, "sizes": sizes, "as_bad": as_bad,
         "edges": [[*edge, x] for edge, x in zip(strongest, of_single, strict=True)],
         "exact_match": without.exact_match.mean().item(),
         "recovered": bench.recovered(without)},
    )  # fmt: skip


def _count(number: int) -> str:
    return {0: "none is", 1: "one is"}.get(number, f"{number} are")


def _p_value(as_good: int, trials: int) -> float:
    """P value of the hypothesis that random circuits are as good with probability `MAX_AS_GOOD` or
    more: that of at most as many successes."""
    return 1 - binomial_tail(as_good + 1, trials, MAX_AS_GOOD)


def _rejected(p: float, trials: int) -> bool | None:
    """Whether the hypothesis is rejected; None if no p value of so few circuits could reject it."""
    return p <= LEVEL if _most_as_good(trials) >= 0 else None


def _against(trials: int) -> str:
    """From how many random circuits that are as good the circuit fails, in words."""
    most = _most_as_good(trials)
    return f"{most + 1} would count against it" if most >= 0 else "too few for a verdict"


def _most_as_good(trials: int) -> int:
    """The most random circuits that may be as good if the hypothesis is rejected; -1: none may."""
    return max((k for k in range(trials) if _p_value(k, trials) <= LEVEL), default=-1)


# ------------------------------------------------------------------------------- single hypotheses


def equivalence(bench: Bench, own: ExampleMetrics) -> Finding:
    """Test whether the circuit does better than the full model on about half of the prompts.

    The hypothesis, which is in the circuit's favour, is that the share is within .1 of one half
    (epsilon = .1 of Shi et al.). The scores of the two are compared prompt by prompt; the test
    leaves out ties, and the share counts each as half.
    """
    difference = bench.score(own) - bench.score(bench.full)
    better, worse = (int((sign * difference > SAME).sum()) for sign in (1, -1))
    trials = better + worse
    share = (better + (len(bench) - trials) / 2) / len(bench)
    p = sign_test(better, trials, MARGIN)
    halves = torch.where(difference.abs() <= SAME, 0.5, (difference > 0).double())
    most = bisect_left(
        range(trials + 1), True, lo=(trials + 1) // 2,
        key=lambda wins: sign_test(wins, trials, MARGIN) <= LEVEL,
    ) - 1  # fmt: skip
    against = (
        f"fewer than {trials - most} or more than {most} of the {trials} would count against it"
        if most < trials else "too few differ to count against it"
    )  # fmt: skip
    return Finding(
        "equivalence", f"better than the full model on {share:.0%}", "half of the prompts",
        p > LEVEL,
        f"By its {bench.score_name} the circuit does better than the full model on {better} "
        f"prompts and worse on {worse}; {against}.",
        mean_interval(halves), p,
        {"better": better, "worse": worse, "share": share,
         "mean_difference": difference.mean().item()},
    )  # fmt: skip


def independence(bench: Bench, circuit: Circuit) -> Finding:
    """Test whether the edges outside of the circuit carry information about the answer.

    The full model without the circuit's edges is compared with the empty circuit: the difference of
    their outputs must be independent of the answer, by HSIC with permutations. Shi et al. test the
    scores of this model against those of the full one. These may depend on each other through what
    clean and corrupted prompts share, so we subtract the empty circuit's outputs and test against
    the answer itself.
    """
    without, empty = bench.outputs([bench.whole - circuit, bench.whole - bench.whole])
    rows = random.Random(0).sample(range(len(bench)), min(MAX_HSIC, len(bench)))
    rows.sort()  # those of the bench lie in the order of their lengths
    added = (without - empty)[rows]  # [example, feature]
    added = torch.where(added.abs() <= SAME, 0.0, added)
    answers = bench.answers()[rows]
    same = (answers[:, None] - answers).abs() <= SAME_NUMBER  # [example, example, token]
    same = same.double().mean(-1)
    apart = same[~torch.eye(len(same), dtype=torch.bool)]
    if len(apart.unique()) < 2:  # permutations would change nothing
        reason = "all prompts have the same answer, or no two have"
        return Finding.inapplicable("independence", reason)
    criterion, p = hsic_test(gaussian_kernel(added), same)
    changed = added.abs().amax(-1).mean().item()
    return Finding(
        "independence", f"dependence {criterion:.3f}", "no dependence (0)", p > LEVEL,
        f"What the circuit leaves out changes outputs by up to {brief(changed)} on an average "
        f"prompt; the normalised dependence of this change on the answer is {criterion:.3f}, which "
        f"{'could be chance' if p > LEVEL else 'is more than chance'} (p = {p:.3f}; at most .05 "
        "would count against it).",
        None, p, {"hsic": criterion, "mean_change": changed, "num_prompts": len(added)},
    )  # fmt: skip


def minimality(
    bench: Bench, circuit: Circuit, own: ExampleMetrics, num_random: int = 100, seed: int = 0
) -> Finding:
    """Test whether each edge of the circuit does more than an edge that is added at random.

    An edge's effect is what its removal adds to the mean distance. It is compared with the effects
    of random edges in the same circuit: a random path is added, and one of its new edges is removed
    again (Shi et al., figure 4). An edge is needed if its effect is larger, at a false discovery
    rate of .05 (Benjamini and Hochberg). The circuit passes if all edges that were tested are
    needed; Shi et al. put the burden of proof on the other side. With 100 random edges, none can be
    shown to be needed unless a fifth of the circuit's edges are.
    """
    rng, paths = random.Random(seed), RandomPaths(bench.graph)
    edges = circuit.edges
    if len(edges) > MAX_EDGES:
        edges = rng.sample(edges, MAX_EDGES)
    single = {edge: Circuit(bench.graph, frozenset([edge])) for edge in edges}
    inflated: list[Circuit] = []
    for _ in range(50 * num_random):
        new = {*(paths.path(rng) or ())} - circuit.edge_set
        if len(inflated) == 2 * num_random:
            break
        if new:
            larger = circuit | Circuit(bench.graph, frozenset(new))
            removed = Circuit(bench.graph, frozenset([rng.choice(sorted(new))]))
            inflated += [larger, larger - removed]
    if not edges or not inflated:
        return Finding.inapplicable("minimality", "the circuit has no edges, or all of the graph's")
    found = bench.measure([*(circuit - edge for edge in single.values()), *inflated])
    means = torch.stack([bench.distance(each).mean() for each in found])
    effects = _rounded(means[: len(edges)] - bench.distance(own).mean())
    larger, removed = means[len(edges) :].view(-1, 2).T
    reference = _rounded(removed - larger)
    p_values = rank_p_values(effects, reference)
    needed = benjamini_hochberg(p_values)
    count, name = sum(needed), bench.distance_name
    limit = reference.quantile(0.95).item()
    rows = zip(edges, effects.tolist(), p_values.tolist(), needed, strict=True)
    drawn = "" if len(edges) == len(circuit) else f", drawn from {len(circuit):,}"
    return Finding(
        "minimality", f"{count:,} of {len(edges):,} edges needed",
        f"95 % of random edges add at most {brief(limit)}",
        all(needed) if len(reference) >= 1 / LEVEL - 1 else None,
        f"The removal of {count:,} of {len(edges):,} edges{drawn} raises the {name} by more than "
        f"that of random edges (95 % of {len(reference)} raise it by at most {brief(limit)}); "
        f"every edge of which this is not true counts against it.",
        None, None,
        {"share_needed": count / len(edges), "effects": [[*edge, *row] for edge, *row in rows],
         "random_effects": reference.tolist()},
    )  # fmt: skip


def _rounded(effects: Tensor) -> Tensor:
    """Effects with rounding errors set to 0, so that edges that do nothing are tied."""
    return torch.where(effects.abs() <= SAME / 100, 0.0, effects)


# ------------------------------------------------------------------------------- sets of nodes


def completeness(
    bench: Bench, circuit: Circuit, own: ExampleMetrics, seed: int = 0,
    labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Finding:  # fmt: skip
    """Test whether circuit and full model lose the same if both lose the same nodes.

    The measure is the incompleteness |F(C without K) - F(M without K)| of Wang et al., with F the
    mean score, as a share of the difference between the full model and the empty circuit. K is the
    empty set, 20 random sets of up to half of the circuit's heads and MLPs, the circuit's heads of
    each kind, and a greedy set. This is built on one half of the prompts, from the nodes that raise
    the incompleteness most, and measured on the other half.

    Args:
        labels: the kinds of heads (classes in Wang et al.) by head, where they are known.
    """
    nodes = [n for n in circuit.nodes if n not in bench.graph.embedding_writers]
    gap = (bench.score(bench.full).mean() - bench.score(bench.empty).mean()).item()
    if not nodes:
        return Finding.inapplicable("completeness", "the circuit has neither heads nor MLPs")
    if gap <= SAME:
        reason = f"the full model's {bench.score_name} is no better than the empty circuit's"
        return Finding.inapplicable("completeness", reason)
    rng = random.Random(seed)
    most = max(1, len(nodes) // 2)
    sets = [rng.sample(nodes, rng.randint(1, most)) for _ in range(NUM_NODE_SETS)]

    def differences(sets: Sequence[Sequence[str]]) -> list[Tensor]:
        """[example] for each set of nodes, F(C without K) - F(M without K) as a share."""
        both = [without_nodes(c, nodes) for nodes in sets for c in (circuit, bench.whole)]
        scores = list(map(bench.score, bench.measure(both)))
        return [(c - m) / gap for c, m in zip(scores[::2], scores[1::2], strict=True)]

    kinds = sorted({kind for node in nodes for kind in labels.get(node, ())})
    of_kind = {kind: [n for n in nodes if kind in labels.get(n, ())] for kind in kinds}
    of_none = (bench.score(own) - bench.score(bench.full)) / gap
    none, *shares = (d.mean().abs().item() for d in (of_none, *differences(sets)))
    of_kinds = (d.mean().abs().item() for d in differences([*of_kind.values()]))
    by_kind = dict(zip(kinds, of_kinds, strict=True))
    half, other = (torch.arange(start, len(bench), 2) for start in (0, 1))
    other = other if len(other) else half
    chosen, of_greedy = _greedy_set(nodes, differences, min(GREEDY_STEPS, most), half, rng)
    greedy, mean = of_greedy[other].mean().abs().item(), sum(shares) / len(shares)
    interval = bootstrap_interval(lambda rows: of_greedy[other][rows].mean(-1).abs(), len(other))
    worst = max(by_kind, key=by_kind.get, default=None)
    return Finding(
        "completeness", f"greedy set {greedy:.2f} of the score",
        f"no nodes {none:.2f}, random sets {mean:.2f} (at most {max(shares):.2f})"
        + (f", {worst} heads {by_kind[worst]:.2f}" if worst else ""),
        max(none, mean, greedy, *by_kind.values()) <= MAX_INCOMPLETE,
        f"If circuit and full model lose the same nodes, their {bench.score_name} differs by "
        f"{mean:.0%} of the full model's (mean of {NUM_NODE_SETS} random sets) and by {greedy:.0%} "
        f"for nodes chosen to tell them apart ({', '.join(chosen)}); without losing any by "
        f"{none:.0%}"
        + (f", without the {len(of_kind[worst])} {worst} heads, the kind that tells them apart "
           f"most, by {by_kind[worst]:.0%}" if worst else "")
        + f". More than {MAX_INCOMPLETE:.0%} counts against it.",
        interval, None,
        {"none": none, "random": shares, "random_sets": sets, "greedy": greedy,
         "greedy_set": chosen, "kinds": by_kind, "kind_sets": of_kind},
    )  # fmt: skip


def _greedy_set(
    nodes: Sequence[str], differences: Callable[[Sequence[Sequence[str]]], list[Tensor]],
    size: int, rows: Tensor, rng: random.Random,
) -> tuple[list[str], Tensor]:  # fmt: skip
    """Build a set node by node, and return it with its difference, [example].

    Each step draws some nodes at random and adds the one with which the magnitude of the mean
    difference on these rows of examples is largest.
    """
    chosen: list[str] = []
    for _ in range(size):
        left = [node for node in nodes if node not in chosen]
        tries = rng.sample(left, min(GREEDY_TRIES, len(left)))
        tried = differences([[*chosen, node] for node in tries])
        best = max(range(len(tries)), key=lambda i: tried[i][rows].mean().abs())
        chosen.append(tries[best])
    return chosen, tried[best]
