"""Tests of a circuit that a sceptic would ask for, each with what would count against it.

Sufficiency, partial necessity, equivalence, independence and minimality are those of Shi et al.
2024 (arXiv:2410.13032), completeness is that of Wang et al. 2022 (arXiv:2211.00593). Each function
returns a `Finding`; its docstring says how it differs from the paper. Tests are at level .05.
Intervals are 95 % bootstrap intervals over prompts, for the given circuits.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import KINDS, Ablation
from edgeprune.evaluation.bench import SAME, Bench
from edgeprune.evaluation.curve import log_sizes
from edgeprune.evaluation.random_circuits import RandomPaths
from edgeprune.evaluation.statistics import (
    benjamini_hochberg,
    binomial_tail,
    bootstrap_interval,
    gaussian_kernel,
    hsic_test,
    mean_interval,
    rank_p_values,
    sign_test,
)
from edgeprune.evaluation.table import Table
from edgeprune.files import json_values
from edgeprune.metrics import ExampleMetrics
from edgeprune.scores import EdgeScores

LEVEL = 0.05
"""Level of all tests."""
NUM_SIZES, SMALLEST_SHARE = 15, 0.001
"""Number of sizes of the curve, and the smallest one as a share of the edges, as in MIB."""
MAX_AS_GOOD = 0.1
"""Largest probability with which a random circuit may do as well (1 - q* of Shi et al.)."""
MARGIN = 0.1
"""How far from one half the share of prompts may be for equivalence (epsilon of Shi et al.)."""
MAX_EDGES = 200
"""Number of edges whose removal is measured; of a larger circuit, edges drawn at random."""
NUM_NODE_SETS = 20
"""Number of random sets of nodes."""
GREEDY_STEPS, GREEDY_TRIES = 5, 10
"""Number of nodes of the greedy set, and of nodes tried for each (10 in Wang et al.)."""
MAX_INCOMPLETE = 0.2
"""How much of the full model's score a circuit may differ by when both lose the same nodes. A
convention of ours."""
MAX_HSIC = 500
"""Number of prompts of the independence test, which needs memory quadratic in it."""


@dataclass(frozen=True)
class Finding:
    """The result of a test.

    Attributes:
        name: of the test.
        measured, compared: the number measured and what it is compared with, as text.
        holds: whether the circuit passes; None if the test has no pass mark or does not apply.
        words: one or two sentences, with what would count against the circuit.
        interval: of what was measured.
        p: p value.
        details: more numbers, as JSON values.
    """

    name: str
    measured: str
    compared: str
    holds: bool | None
    words: str
    interval: tuple[float, float] | None = None
    p: float | None = None
    details: Any = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""
        return json_values(asdict(self))


# ------------------------------------------------------------------------------- circuits of sizes


def curve(bench: Bench, scores: EdgeScores) -> Finding:
    """Circuits of 15 sizes, with the area under each curve over the logarithm of the size.

    The area is a mean over the logarithm, in the unit of the metric. On a linear axis (CPR and CMD
    of MIB, Mueller et al. 2025, arXiv:2504.13151) 95 % of it lies above 5 % of the edges, where
    every method does well. Quantiles are over prompts.
    """
    total = bench.graph.num_edges
    sizes = log_sizes(max(1, round(SMALLEST_SHARE * total)), total, NUM_SIZES)
    found = bench.measure(scores.circuit(num_edges=size) for size in sizes)
    distances = torch.stack([bench.distance(each) for each in found])  # [size, example]
    points = []
    for size, each in zip(sizes, found, strict=True):
        point = {"num_edges": size, **_quantiles(bench.distance(each))}
        point["mean_interval"] = mean_interval(bench.distance(each))
        point["exact_match"] = each.exact_match.mean().item()
        point["exact_match_interval"] = mean_interval(each.exact_match)
        point["recovered"] = bench.recovered(each)
        point["recovered_interval"] = bench.recovered_interval(each)
        points.append(point)
    weights = _log_weights(sizes)
    distance = (weights[:, None] * distances).sum(0)  # [example]
    matches = (weights[:, None] * torch.stack([each.exact_match for each in found])).sum(0)
    recovered = sum(w * point["recovered"] for w, point in zip(weights, points, strict=True))
    low, high = mean_interval(distance)
    empty, name = bench.distance(bench.empty).mean().item(), bench.distance_name
    areas = {"distance": distance.mean().item(), "distance_interval": (low, high),
             "exact_match": matches.mean().item(), "recovered": float(recovered)}  # fmt: skip
    return Finding(
        "curve", f"{name} {_number(areas['distance'])}, averaged over sizes",
        f"empty circuit {_number(empty)}", None,
        f"Over circuits from {sizes[0]:,} to {total:,} edges, averaged on a logarithmic axis, the "
        f"{name} is {_number(areas['distance'])}, exact match {areas['exact_match']:.2f} and the "
        f"recovered {bench.score_name} {areas['recovered']:.2f}.",
        (low, high), details={"areas": areas, "points": points, "empty": empty},
    )  # fmt: skip


def _log_weights(sizes: Sequence[int]) -> Tensor:
    """[size], weights of the trapezoidal rule over the logarithm of the size; they sum to 1."""
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    if len(sizes) == 1:
        return torch.ones(1, dtype=torch.float64)
    steps = logs.diff()
    weights = torch.zeros(len(sizes), dtype=torch.float64)
    weights[:-1] += steps / 2
    weights[1:] += steps / 2
    return weights / steps.sum()


def _quantiles(values: Tensor) -> dict[str, float]:
    return {
        "mean": values.mean().item(), "median": values.quantile(0.5).item(),
        "quantile_90": values.quantile(0.9).item(), "worst": values.max().item(),
    }  # fmt: skip


def faithfulness(bench: Bench, circuit: Circuit, own: ExampleMetrics) -> Finding:
    """The circuit's distance from the full model: mean and quantiles over prompts."""
    found = _quantiles(bench.distance(own))
    empty, name = bench.distance(bench.empty).mean().item(), bench.distance_name
    low, high = mean_interval(bench.distance(own))
    match, recovered = own.exact_match.mean().item(), bench.recovered(own)
    return Finding(
        "faithfulness", f"{name} {_number(found['mean'])}",
        f"median {_number(found['median'])}, 90 % {_number(found['quantile_90'])}, "
        f"worst {_number(found['worst'])}; empty circuit {_number(empty)}",
        None,
        f"The circuit has {len(circuit):,} of {bench.graph.num_edges:,} edges. On {len(bench):,} "
        f"prompts its {name} from the full model is {_number(found['mean'])} "
        f"({_number(low)} to {_number(high)}; {_number(found['quantile_90'])} on one prompt in "
        f"ten, {_number(found['worst'])} on the worst), where the empty circuit's is "
        f"{_number(empty)}; it gives the full model's answer on {match:.0%} of the prompts and "
        f"recovers {percent(recovered)} of the {bench.score_name}.",
        (low, high),
        details={**found, "empty": empty, "exact_match": match, "recovered": recovered,
                 "exact_match_interval": mean_interval(own.exact_match),
                 "recovered_interval": bench.recovered_interval(own)},
    )  # fmt: skip


# ------------------------------------------------------------------------------- random circuits


def sufficiency(
    bench: Bench, circuit: Circuit, own: ExampleMetrics, num_random: int = 100, seed: int = 0
) -> Finding:
    """Compare the circuit with random circuits made of paths, of equally many edges.

    The hypothesis is that a random circuit is at least as faithful with probability .1 or more
    (q* = .9 of Shi et al.), tested with the exact binomial distribution.
    """
    paths = RandomPaths(bench.graph)
    circuits = [paths.circuit(len(circuit), seed + number) for number in range(num_random)]
    distances = [bench.distance(each).mean().item() for each in bench.measure(circuits)]
    mine, name = bench.distance(own).mean().item(), bench.distance_name
    as_good = sum(distance <= mine + SAME for distance in distances)
    p = 1 - binomial_tail(as_good + 1, num_random, MAX_AS_GOOD)
    best, mean = min(distances), sum(distances) / num_random
    return Finding(
        "sufficiency", f"{name} {_number(mine)}",
        f"random circuits {_number(mean)}, the best {_number(best)}", p <= LEVEL,
        f"Of {num_random} random circuits of as many connected edges, {_count(as_good)} at least "
        f"as faithful (their mean {name} is {_number(mean)}, the lowest {_number(best)}); "
        f"{_most_as_good(num_random) + 1} would count against it.",
        mean_interval(bench.distance(own)), p,
        {"random": distances, "sizes": [len(each) for each in circuits], "as_good": as_good},
    )  # fmt: skip


def necessity(
    bench: Bench, circuit: Circuit, num_random: int = 100, seed: int = 0
) -> Finding:  # fmt: skip
    """Compare what the full model loses without the circuit and without random connected edges.

    Partial necessity of Shi et al.: the random edges are drawn from outside the circuit, equally
    many as far as there are, and the hypothesis is that losing them does at least as much damage
    with probability .1 or more.
    """
    paths = RandomPaths(bench.graph, excluded=circuit.edge_set)
    circuits = [paths.circuit(len(circuit), seed + number) for number in range(num_random)]
    without, *others = bench.measure(bench.whole - each for each in (circuit, *circuits))
    damage, name = bench.distance(without), bench.distance_name
    distances = [bench.distance(each).mean().item() for each in others]
    mine, mean, worst = damage.mean().item(), sum(distances) / num_random, max(distances)
    as_bad = sum(distance >= mine - SAME for distance in distances)
    p = 1 - binomial_tail(as_bad + 1, num_random, MAX_AS_GOOD)
    sizes = [len(each) for each in circuits]
    few = "" if min(sizes) == len(circuit) else f" (only {min(sizes):,} or more could be drawn)"
    return Finding(
        "partial necessity", f"{name} {_number(mine)} without it",
        f"without random edges {_number(mean)}, at most {_number(worst)}", p <= LEVEL,
        f"Without the circuit's edges the full model's {name} is {_number(mine)}; without as many "
        f"random connected edges{few} it is {_number(mean)}, and at least as large in {as_bad} of "
        f"{num_random} cases ({_most_as_good(num_random) + 1} would count against it).",
        mean_interval(damage), p,
        {"random": distances, "sizes": sizes, "as_bad": as_bad,
         "exact_match": without.exact_match.mean().item(),
         "recovered": bench.recovered(without)},
    )  # fmt: skip


def _count(number: int) -> str:
    return {0: "none is", 1: "one is"}.get(number, f"{number} are")


def _most_as_good(trials: int) -> int:
    """The largest number of random circuits as good with which the hypothesis is rejected."""
    passing = (k for k in range(trials) if 1 - binomial_tail(k + 1, trials, MAX_AS_GOOD) <= LEVEL)
    return max(passing, default=-1)


# ------------------------------------------------------------------------------- single hypotheses


def equivalence(bench: Bench, own: ExampleMetrics) -> Finding:
    """The share of prompts on which the circuit does the task better than the full model.

    The hypothesis, which is in the circuit's favour, is that the share is within .1 of one half
    (epsilon = .1 of Shi et al.). Both sides are compared on each prompt, by their scores; ties are
    left out.
    """
    difference = bench.score(own) - bench.score(bench.full)
    better, worse = (int((sign * difference > SAME).sum()) for sign in (1, -1))
    trials = better + worse
    share = (better + (len(bench) - trials) / 2) / len(bench)
    p = sign_test(better, trials, MARGIN)
    halves = torch.where(difference.abs() <= SAME, 0.5, (difference > 0).double())
    first = next((k for k in range(trials // 2, trials + 1) if sign_test(k, trials, MARGIN)
                  <= LEVEL), None)  # fmt: skip
    against = (
        f"fewer than {trials - first + 1} or more than {first - 1} of the {trials} would count "
        "against it" if first is not None else "too few differ to count against it"
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
    """Whether what the circuit leaves out carries information about the answer.

    The full model without the circuit's edges is compared with the empty circuit: the difference of
    their outputs must be independent of the answer, by HSIC with permutations. Shi et al. compare
    the scores of this model and of the full one. These may depend on each other through what clean
    and corrupted prompts share, so we subtract the empty circuit's outputs and test against the
    answer itself.
    """
    without, empty = bench.outputs([bench.whole - circuit, bench.whole - bench.whole])
    added = (without - empty)[:MAX_HSIC]  # [example, feature]
    added = torch.where(added.abs() <= SAME, 0.0, added)
    answers = bench.answers()[:MAX_HSIC]
    same = (answers[:, None] - answers).abs() <= 1e-3  # [example, example, token]
    criterion, p = hsic_test(gaussian_kernel(added), same.double().mean(-1))
    changed = added.abs().amax(-1).mean().item()
    return Finding(
        "independence", f"dependence {criterion:.3f}", "no dependence (0)", p > LEVEL,
        f"What the circuit leaves out changes outputs by up to {_number(changed)} on an average "
        f"prompt; the normalised dependence of this change on the answer is {criterion:.3f}, which "
        f"{'could be chance' if p > LEVEL else 'is more than chance'} (p = {p:.3f}; at most .05 "
        "would count against it).",
        None, p, {"hsic": criterion, "mean_change": changed, "num_prompts": len(added)},
    )  # fmt: skip


def minimality(
    bench: Bench, circuit: Circuit, own: ExampleMetrics, num_random: int = 100, seed: int = 0
) -> Finding:
    """Whether each edge does more than an edge added at random.

    An edge's effect is what its removal adds to the mean distance. It is compared with the effects
    of random edges in the same circuit: a random path is added, and one of its new edges removed
    again (Shi et al., figure 4). An edge is needed if its effect is larger, at a false discovery
    rate of .05 (Benjamini and Hochberg). The circuit passes if all edges that were tested are
    needed; Shi et al. put the burden of proof on the other side.
    """
    rng, paths = random.Random(seed), RandomPaths(bench.graph)
    edges = circuit.edges
    if len(edges) > MAX_EDGES:
        edges = rng.sample(edges, MAX_EDGES)
    single = {edge: Circuit(bench.graph, frozenset([edge])) for edge in edges}
    inflated: list[Circuit] = []
    for _ in range(50 * num_random):
        new = {*(paths.path(rng) or ())} - circuit.edge_set
        if new and len(inflated) < 2 * num_random:
            larger = circuit | Circuit(bench.graph, frozenset(new))
            removed = Circuit(bench.graph, frozenset([rng.choice(sorted(new))]))
            inflated += [larger, larger - removed]
    if not edges or not inflated:
        return _inapplicable("minimality", "the circuit has no edges, or all of the graph's")
    found = bench.measure([*(circuit - edge for edge in single.values()), *inflated])
    means = torch.stack([bench.distance(each).mean() for each in found])
    effects = _rounded(means[: len(edges)] - bench.distance(own).mean())
    larger, removed = means[len(edges) :].view(-1, 2).T
    reference = _rounded(removed - larger)
    p_values = rank_p_values(effects, reference)
    needed = benjamini_hochberg(p_values, LEVEL)
    share, name = sum(needed) / len(edges), bench.distance_name
    limit = reference.quantile(0.95).item()
    drawn = "" if len(edges) == len(circuit) else f", drawn from {len(circuit):,}"
    unneeded = len(edges) - sum(needed)
    return Finding(
        "minimality", f"{sum(needed):,} of {len(edges):,} edges needed",
        f"95 % of random edges add at most {_number(limit)}", unneeded == 0,
        f"The removal of {sum(needed):,} of {len(edges):,} edges{drawn} raises the {name} by more "
        f"than that of random edges (95 % of {len(reference)} raise it by at most "
        f"{_number(limit)}); "
        f"every edge of which this is not true counts against it.",
        None, None,
        {"share_needed": share, "effects": [[*edge, effect, p, is_needed] for edge, effect, p,
         is_needed in zip(edges, effects.tolist(), p_values.tolist(), needed, strict=True)],
         "random_effects": reference.tolist()},
    )  # fmt: skip


def _rounded(effects: Tensor) -> Tensor:
    """Effects without rounding errors, so that those of edges that do nothing are equal."""
    return torch.where(effects.abs() <= SAME / 10, 0.0, effects)


def _inapplicable(name: str, reason: str) -> Finding:
    return Finding(name, "–", "–", None, f"The test of {name} does not apply: {reason}.")


# ------------------------------------------------------------------------------- sets of nodes


def completeness(bench: Bench, circuit: Circuit, own: ExampleMetrics, seed: int = 0) -> Finding:
    """Whether circuit and full model lose the same if both lose the same nodes.

    The incompleteness |F(C without K) - F(M without K)| of Wang et al., with F the mean score, as
    a share of the difference between the full model and the empty circuit. K is the empty set, 20
    random sets of up to half of the circuit's heads and MLPs, and a greedy set, which is built from
    nodes that raise it most on one half of the prompts, and measured on the other half.
    """
    nodes = [n for n in circuit.nodes if n not in bench.graph.embedding_writers]
    gap = (bench.score(bench.full).mean() - bench.score(bench.empty).mean()).item()
    if not nodes:
        return _inapplicable("completeness", "the circuit has neither heads nor MLPs")
    if gap <= SAME:
        reason = f"the full model's {bench.score_name} is no better than the empty circuit's"
        return _inapplicable("completeness", reason)
    rng = random.Random(seed)
    most = max(1, len(nodes) // 2)
    sets = [rng.sample(nodes, rng.randint(1, most)) for _ in range(NUM_NODE_SETS)]

    def differences(sets: Sequence[Sequence[str]]) -> list[Tensor]:
        """[example] for each set of nodes, F(C without K) - F(M without K) as a share."""
        both = [_without(c, nodes) for nodes in sets for c in (circuit, bench.whole)]
        scores = list(map(bench.score, bench.measure(both)))
        return [(c - m) / gap for c, m in zip(scores[::2], scores[1::2], strict=True)]

    of_none = (bench.score(own) - bench.score(bench.full)) / gap
    of_random = differences(sets)
    chosen: list[str] = []
    half, other = (torch.arange(start, len(bench), 2) for start in (0, 1))
    other = other if len(other) else half
    for _ in range(min(GREEDY_STEPS, most)):
        left = [node for node in nodes if node not in chosen]
        tries = rng.sample(left, min(GREEDY_TRIES, len(left)))
        tried = differences([[*chosen, node] for node in tries])
        best = max(range(len(tries)), key=lambda i: tried[i][half].mean().abs())
        chosen.append(tries[best])
        of_greedy = tried[best]
    none, greedy = of_none.mean().abs().item(), of_greedy[other].mean().abs().item()
    shares = [each.mean().abs().item() for each in of_random]
    mean = sum(shares) / len(shares)
    largest = max(none, mean, greedy)
    low, high = bootstrap_interval(
        lambda rows: of_greedy[other][rows].mean(-1).abs(), len(other)
    )  # fmt: skip
    holds = largest <= MAX_INCOMPLETE
    return Finding(
        "completeness", f"greedy set {greedy:.2f} of the score",
        f"no nodes {none:.2f}, random sets {mean:.2f} (at most {max(shares):.2f})", holds,
        f"If circuit and full model lose the same nodes, their {bench.score_name} differs by "
        f"{mean:.0%} of the full model's (mean of {NUM_NODE_SETS} random sets) and by {greedy:.0%} "
        f"for nodes chosen to tell them apart ({', '.join(chosen)}); without losing any by "
        f"{none:.0%}. More than {MAX_INCOMPLETE:.0%} counts against it.",
        (low, high), None,
        {"none": none, "random": shares, "random_sets": sets, "greedy": greedy,
         "greedy_set": chosen},
    )  # fmt: skip


def _without(circuit: Circuit, nodes: Sequence[str]) -> Circuit:
    """The circuit without what these nodes write."""
    kept = (edge for edge in circuit.edge_set if edge[0] not in nodes)
    return Circuit(circuit.graph, frozenset(kept))


# ------------------------------------------------------------------------------- other choices


def node_circuit(circuit: Circuit) -> Circuit:
    """All edges between the nodes of a circuit, and into the output."""
    nodes = {*circuit.nodes}
    kept = (
        (writer, reader) for writer, reader in circuit.graph.edges
        if writer in nodes
        and (reader == "resid_post" or nodes & {*circuit.graph.nodes_fed_by(reader)})
    )  # fmt: skip
    return Circuit(circuit.graph, frozenset(kept))


def ablation_choice(
    benches: dict[str, Bench], circuit: Circuit
) -> Finding:  # fmt: skip
    """The circuit, and all edges between its nodes, under each kind of ablation.

    Which values ablated edges carry, and whether edges or nodes are ablated, moves every measure
    of faithfulness (Miller et al. 2024, arXiv:2407.08734).
    """
    own, rows = node_circuit(circuit), {}
    for kind, bench in benches.items():
        for what, found in zip(("edges", "nodes"), bench.measure([circuit, own]), strict=True):
            distance = bench.distance(found)
            rows[f"{kind}, {what}"] = {
                "distance": distance.mean().item(), "distance_interval": mean_interval(distance),
                "exact_match": found.exact_match.mean().item(),
                "recovered": bench.recovered(found),
                "empty": bench.distance(bench.empty).mean().item(),
            }  # fmt: skip
    name = next(iter(benches.values())).distance_name
    matches = {key: row["exact_match"] for key, row in rows.items()}
    worst, best = min(matches, key=matches.get), max(matches, key=matches.get)
    of_distance = [row["distance"] for row in rows.values()]
    return Finding(
        "ablation choice", f"{name} {_number(min(of_distance))} to {_number(max(of_distance))}",
        f"exact match {matches[worst]:.2f} ({worst}) to {matches[best]:.2f} ({best})", None,
        f"Under other ablations the {name} is between {_number(min(of_distance))} and "
        f"{_number(max(of_distance))}, and exact match between {matches[worst]:.0%} ({worst}) and "
        f"{matches[best]:.0%} ({best}; the nodes' circuit has {len(own):,} edges).",
        details={"num_edges_of_nodes": len(own), **rows},
    )  # fmt: skip


def ablation_table(finding: Finding, name: str) -> Table:
    """A row per kind of ablation and edges or nodes."""
    rows = [
        [key, _number(row["distance"]), _interval(row["distance_interval"]),
         f"{row['exact_match']:.3f}", f"{row['recovered']:.3f}", _number(row["empty"])]
        for key, row in finding.details.items() if isinstance(row, dict)
    ]  # fmt: skip
    columns = ["", name, "95 %", "exact\nmatch", "score\nrecovered", "empty\ncircuit"]
    return Table(columns, rows, "what ablated edges carry, and what is ablated")


# ------------------------------------------------------------------------------- all of them


def all_findings(
    bench: Bench, circuit: Circuit, scores: EdgeScores | None = None, *,
    num_random: int = 100, reference: Sequence | None = None, seed: int = 0,
) -> list[Finding]:  # fmt: skip
    """Every test that needs only this circuit.

    Args:
        scores: rank the edges, for the curve; None: no curve.
        num_random: number of random circuits, and of random edges.
        reference: prompts over which mean ablation averages; None: those of the bench.
    """
    (own,) = bench.measure([circuit])
    findings = [faithfulness(bench, circuit, own)]
    if scores is not None:
        findings.append(curve(bench, scores))
    findings += [
        sufficiency(bench, circuit, own, num_random, seed),
        necessity(bench, circuit, num_random, seed),
        equivalence(bench, own),
        independence(bench, circuit),
        minimality(bench, circuit, own, num_random, seed),
        completeness(bench, circuit, own, seed),
        ablation_choice(_benches(bench, reference), circuit),
    ]
    return findings


def _benches(bench: Bench, reference: Sequence | None) -> dict[str, Bench]:
    """A bench for each kind of ablation under which the prompts can be measured."""
    found = {bench.ablation.kind: bench}
    for kind in KINDS:
        can_be = kind != "interchange" or any(p.clean_ids != p.corrupted_ids for p in bench.pairs)
        if kind not in found and can_be:
            pairs = bench.pairs if reference is None or kind != "mean" else reference
            per_position = max(len(p.clean_ids) for p in pairs) >= max(
                len(p.clean_ids) for p in bench.pairs
            )
            ablation = Ablation(bench.model, kind, pairs, per_position=per_position)
            size = max(len(batch.pairs) for batch in bench.batches)
            found[kind] = Bench(bench.model, bench.pairs, ablation, size, bench.listener)
    return {kind: found[kind] for kind in KINDS if kind in found}


def num_circuits(circuit: Circuit, num_random: int, *, has_scores: bool) -> int:
    """About how many circuits `all_findings` measures."""
    nodes = len(circuit.nodes)
    steps = min(GREEDY_STEPS, max(1, nodes // 2))
    return (
        1 + NUM_SIZES * has_scores + 4 * num_random + 3 + min(len(circuit), MAX_EDGES)
        + 2 * (NUM_NODE_SETS + steps * min(GREEDY_TRIES, nodes)) + 2 * len(KINDS) + 2
    )  # fmt: skip


def findings_table(findings: Sequence[Finding], title: str) -> Table:
    """A row per test."""
    verdicts = {True: "holds", False: "fails", None: ""}
    rows = [
        [each.name, each.measured, _interval(each.interval), each.compared,
         "" if each.p is None else f"{each.p:.3f}", verdicts[each.holds]]
        for each in findings
    ]  # fmt: skip
    return Table(["", "", "95 %", "", "p", "verdict"], rows, title)


def in_words(findings: Sequence[Finding], who: str = "The circuit passes") -> str:
    """One paragraph on all tests, with the verdicts first."""
    tested = [each for each in findings if each.holds is not None]
    failed = [each.name for each in tested if not each.holds]
    passed = [each.name for each in tested if each.holds]
    verdict = f"{who} {len(passed)} of {len(tested)} tests"
    verdict += f": {', '.join(passed)}" if passed else ""
    verdict += f". Failed: {', '.join(failed)}." if failed else "."
    return " ".join([verdict, *(each.words for each in findings)])


def percent(share: float) -> str:
    """A fraction in per cent, without a negative zero."""
    return f"{round(100 * share) + 0}%"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{_number(interval[0])} – {_number(interval[1])}"


def _number(value: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) >= 1e-4 else "0"
