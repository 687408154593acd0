"""All that a sceptic would ask about one circuit, as a list of findings."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import ABLATIONS, Ablation
from edgeprune.evaluation.bench import Bench
from edgeprune.evaluation.curve import log_sizes
from edgeprune.evaluation.finding import Finding, brief, interval_text, percent
from edgeprune.evaluation.hypotheses import (
    GREEDY_STEPS,
    GREEDY_TRIES,
    MAX_EDGES,
    NUM_NODE_SETS,
    NUM_STRONGEST,
    completeness,
    equivalence,
    independence,
    minimality,
    necessity,
    sufficiency,
)
from edgeprune.evaluation.statistics import mean_interval
from edgeprune.evaluation.table import Table
from edgeprune.metrics import ExampleMetrics
from edgeprune.prompts import Pair
from edgeprune.scores import EdgeScores

NUM_SIZES, SMALLEST_SHARE = 15, 0.001
"""Number of sizes of the curve, and the smallest one as a share of the edges, as in MIB."""

# ------------------------------------------------------------------------------- faithfulness


def curve(bench: Bench, scores: EdgeScores) -> Finding:
    """Measure circuits of up to 15 sizes, and the mean of each metric over log(size).

    The mean is the area under the metric's curve, divided by the width of the logarithmic axis, so
    it has the metric's unit. On a linear axis (CPR and CMD of MIB, Mueller et al. 2025,
    arXiv:2504.13151) 95 % of the area lies above 5 % of the edges, where every method does well.
    Quantiles are over prompts.
    """
    total, sizes = bench.graph.num_edges, curve_sizes(bench.graph.num_edges)
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
    distance = _mean_over_log_sizes(distances, sizes)  # [example]
    matches, recovered = (
        _mean_over_log_sizes(torch.tensor([point[key] for point in points]), sizes).item()
        for key in ("exact_match", "recovered")
    )
    interval = mean_interval(distance)
    empty, name = bench.distance(bench.empty).mean().item(), bench.distance_name
    areas = {"distance": distance.mean().item(), "distance_interval": interval,
             "exact_match": matches, "recovered": recovered}  # fmt: skip
    return Finding(
        "curve", f"{name} {brief(areas['distance'])}, averaged over sizes",
        f"empty circuit {brief(empty)}", None,
        f"Over circuits from {sizes[0]:,} to {total:,} edges, averaged on a logarithmic axis, the "
        f"{name} is {brief(areas['distance'])}, exact match {areas['exact_match']:.2f} and the "
        f"recovered {bench.score_name} {areas['recovered']:.2f}.",
        interval, details={"areas": areas, "points": points, "empty": empty},
    )  # fmt: skip


def curve_sizes(total: int) -> list[int]:
    """The sizes that the curve measures, in ascending order, for a graph with `total` edges."""
    return log_sizes(max(1, round(SMALLEST_SHARE * total)), total, NUM_SIZES)


def _mean_over_log_sizes(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """[size, ...] -> [...], the mean over the logarithm of the size, by the trapezoidal rule."""
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    return torch.trapezoid(values.double(), logs, dim=0) / (logs[-1] - logs[0])


def _quantiles(values: Tensor) -> dict[str, float]:
    return {
        "mean": values.mean().item(), "median": values.quantile(0.5).item(),
        "quantile_90": values.quantile(0.9).item(), "worst": values.max().item(),
    }  # fmt: skip


def faithfulness(bench: Bench, circuit: Circuit, own: ExampleMetrics) -> Finding:
    """The circuit's distance from the full model: mean and quantiles over prompts."""
    found = _quantiles(bench.distance(own))
    empty, name = bench.distance(bench.empty).mean().item(), bench.distance_name
    interval = low, high = mean_interval(bench.distance(own))
    match, recovered = own.exact_match.mean().item(), bench.recovered(own)
    return Finding(
        "faithfulness", f"{name} {brief(found['mean'])}",
        f"median {brief(found['median'])}, 90 % {brief(found['quantile_90'])}, "
        f"worst {brief(found['worst'])}; empty circuit {brief(empty)}",
        None,
        f"The circuit has {len(circuit):,} of {bench.graph.num_edges:,} edges. On {len(bench):,} "
        f"prompts its {name} from the full model is {brief(found['mean'])} "
        f"({brief(low)} to {brief(high)}; {brief(found['quantile_90'])} on one prompt in "
        f"ten, {brief(found['worst'])} on the worst), where the empty circuit's is "
        f"{brief(empty)}; it gives the full model's answer on {match:.0%} of the prompts and "
        f"recovers {percent(recovered)} of the {bench.score_name}.",
        interval,
        details={**found, "empty": empty, "exact_match": match, "recovered": recovered,
                 "exact_match_interval": mean_interval(own.exact_match),
                 "recovered_interval": bench.recovered_interval(own)},
    )  # fmt: skip


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


def ablation_choice(benches: dict[str, Bench], circuit: Circuit) -> Finding:
    """Measure the circuit, and all edges between its nodes, under each kind of ablation.

    All measures of faithfulness depend on the values that ablated edges carry, and on whether edges
    or nodes are ablated (Miller et al. 2024, arXiv:2407.08734).
    """
    own, rows = node_circuit(circuit), {}
    for kind, bench in benches.items():
        for what, found in zip(("edges", "nodes"), bench.measure([circuit, own]), strict=True):
            empty = bench.distance(bench.empty).mean().item()
            rows[f"{kind}, {what}"] = {**bench.summary(found), "empty": empty}
    name = next(iter(benches.values())).distance_name
    matches = {key: row["exact_match"] for key, row in rows.items()}
    worst, best = min(matches, key=matches.get), max(matches, key=matches.get)
    of_distance = [row["distance"] for row in rows.values()]
    return Finding(
        "ablation choice", f"{name} {brief(min(of_distance))} to {brief(max(of_distance))}",
        f"exact match {matches[worst]:.2f} ({worst}) to {matches[best]:.2f} ({best})", None,
        f"Under other ablations the {name} is between {brief(min(of_distance))} and "
        f"{brief(max(of_distance))}, and exact match between {matches[worst]:.0%} ({worst}) and "
        f"{matches[best]:.0%} ({best}; the nodes' circuit has {len(own):,} edges).",
        details={"num_edges_of_nodes": len(own), **rows},
    )  # fmt: skip


def ablation_table(finding: Finding, name: str) -> Table:
    """A row per kind of ablation and edges or nodes."""
    rows = [
        [key, brief(row["distance"]), interval_text(row["distance_interval"]),
         f"{row['exact_match']:.3f}", f"{row['recovered']:.3f}", brief(row["empty"])]
        for key, row in finding.details.items() if isinstance(row, dict)
    ]  # fmt: skip
    columns = ["", name, "95 %", "exact\nmatch", "score\nrecovered", "empty\ncircuit"]
    return Table(columns, rows, "what ablated edges carry, and what is ablated")


# ------------------------------------------------------------------------------- all of them


def all_findings(
    bench: Bench, circuit: Circuit, scores: EdgeScores | None = None, *,
    num_random: int = 100, reference: Sequence[Pair] | None = None,
    labels: Mapping[str, Sequence[str]] = MappingProxyType({}), seed: int = 0,
) -> list[Finding]:  # fmt: skip
    """Every test that needs only this circuit.

    Args:
        scores: rank the edges, for the curve and to cut the strongest edges; None: neither.
        num_random: number of random circuits, and of random edges.
        reference: prompts over which mean ablation averages; None: those of the bench.
        labels: kinds of heads, by head, for the test of completeness.
    """
    (own,) = bench.measure([circuit])
    findings = [faithfulness(bench, circuit, own)]
    if scores is not None:
        findings.append(curve(bench, scores))
    findings += [
        sufficiency(bench, circuit, own, num_random, seed),
        necessity(bench, circuit, num_random, seed, scores),
        equivalence(bench, own),
        independence(bench, circuit),
        minimality(bench, circuit, own, num_random, seed),
        completeness(bench, circuit, own, seed, labels),
        ablation_choice(_benches(bench, reference), circuit),
    ]
    return findings


def _benches(bench: Bench, reference: Sequence[Pair] | None) -> dict[str, Bench]:
    """A bench for each kind of ablation under which the prompts can be measured."""
    found = {bench.ablation.kind: bench}
    for kind in ABLATIONS:
        can_be = kind != "interchange" or any(p.clean_ids != p.corrupted_ids for p in bench.pairs)
        if kind not in found and can_be:
            pairs = bench.pairs if reference is None or kind != "mean" else reference
            per_position = max(len(p.clean_ids) for p in pairs) >= max(
                len(p.clean_ids) for p in bench.pairs
            )
            size = max(len(batch.pairs) for batch in bench.batches)
            ablation = Ablation(
                bench.model, kind, pairs, per_position=per_position, batch_size=size
            )
            found[kind] = Bench(bench.model, bench.pairs, ablation, size, bench.listener)
    return {kind: found[kind] for kind in ABLATIONS if kind in found}


def num_circuits(circuit: Circuit, num_random: int, *, has_scores: bool) -> int:
    """About how many circuits `all_findings` measures."""
    nodes = len(circuit.nodes)
    steps = min(GREEDY_STEPS, max(1, nodes // 2))
    return (
        1 + (NUM_SIZES + NUM_STRONGEST) * has_scores + 4 * num_random + 3
        + min(len(circuit), MAX_EDGES)
        + 2 * (NUM_NODE_SETS + steps * min(GREEDY_TRIES, nodes)) + 2 * len(ABLATIONS) + 2
    )  # fmt: skip
