"""Stability: how similar are circuits that are learned again?"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.errors import DataError
from edgeprune.evaluation.bench import Bench
from edgeprune.evaluation.compare import consensus, overlap, times_kept
from edgeprune.evaluation.finding import Finding, brief
from edgeprune.evaluation.sceptic import curve_sizes
from edgeprune.evaluation.statistics import cluster_interval, mean_interval
from edgeprune.evaluation.table import Table
from edgeprune.prompts import Pair
from edgeprune.scores import EdgeScores

STANDARD = 0.8
"""Mean Jaccard index of pairs of circuits that counts as stable."""


def stability(bench: Bench, circuit: Circuit, repeated: Sequence[EdgeScores], what: str) -> Finding:
    """Compare circuits cut from scores that were learned several times.

    Measures the Jaccard index (intersection over union) of each pair's edges, at many sizes, next
    to what is expected of as many edges drawn at random; how many of the circuits have each edge;
    and how good the consensus is, which has the edges of more than half of the circuits.

    Args:
        repeated: scores, at least two.
        what: what differed between them, such as "bootstrap samples".
    """
    sizes = sorted({*curve_sizes(bench.graph.num_edges)[:-1], len(circuit)})
    rows = []
    for size in sizes:
        pairs = combinations([scores.circuit(num_edges=size) for scores in repeated], 2)
        overlaps = [overlap(a, b) for a, b in pairs]
        ious = [each["edge_iou"] for each in overlaps]
        rows.append({"num_edges": size, "jaccard": fmean(ious), "lowest": min(ious),
                     "highest": max(ious),
                     "by_chance": overlaps[0]["edge_iou_by_chance"]})  # fmt: skip
    circuits = [scores.circuit(num_edges=len(circuit)) for scores in repeated]
    agreed, kept = consensus(circuits), times_kept(circuits)
    of_consensus, own, *others = bench.measure([agreed, circuit, *circuits])
    distances = [bench.distance(each).mean().item() for each in others]
    found = {name: bench.distance(each) for name, each in
             (("consensus", of_consensus), ("circuit", own))}  # fmt: skip
    here = next(row for row in rows if row["num_edges"] == len(circuit))
    counts = Counter(kept.values())
    frequencies = {number: counts[number] for number in range(len(circuits), 0, -1)}
    details: dict[str, Any] = {
        "repeats": len(repeated), "sizes": rows, "frequencies": frequencies,
        "edges": [[*edge, number] for edge, number in kept.items()],
        "consensus": {"edges": agreed.edges, "distance": found["consensus"].mean().item(),
                      "distance_interval": mean_interval(found["consensus"]),
                      "exact_match": of_consensus.exact_match.mean().item()},
        "distances": distances, "distance": found["circuit"].mean().item(),
    }  # fmt: skip
    name = bench.distance_name
    return Finding(
        "stability",
        f"Jaccard index {here['jaccard']:.2f} ({here['lowest']:.2f} to {here['highest']:.2f})",
        f"chance {here['by_chance']:.3f}", here["jaccard"] >= STANDARD,
        f"Of {len(repeated)} circuits of {len(circuit):,} edges learned from other {what}, two "
        f"share {here['jaccard']:.0%} of the edges that either has (by chance "
        f"{here['by_chance']:.1%}; less than {STANDARD:.0%} counts against them); "
        f"{counts[len(circuits)]:,} of {len(kept):,} edges are in all of them. Their {name} is "
        f"{brief(fmean(distances))} on average, that of their consensus ({len(agreed):,} edges) "
        f"{brief(found['consensus'].mean().item())}.",
        details=details,
    )  # fmt: skip


def other_templates(
    bench: Bench, circuits: Sequence[Circuit], learned: Sequence[Set[str]],
    templates: Mapping[Pair, str],
) -> Finding:  # fmt: skip
    """Compare circuits on prompts of templates that they were learned from and of other templates.

    For each prompt, the mean distance of the circuits that have not seen its template is compared
    with that of the circuits that have. A 95 % bootstrap interval of the difference that lies above
    0 counts against the circuits. Templates are resampled, because the prompts of one are alike.

    Args:
        learned: for each circuit, the templates that it was learned from. Prompts whose template is
            new to all circuits or to none are left out.
        templates: the template of each prompt.

    Raises DataError if no prompt is left.
    """
    measured = bench.measure(circuits)
    distances = torch.stack([bench.distance(each) for each in measured])  # [circuit, example]
    matches = torch.stack([each.exact_match for each in measured])
    own = [templates[pair] for pair in bench.pairs]
    new = torch.tensor([[name not in known for name in own] for known in learned]).double()
    is_compared = (new.sum(0) > 0) & (new.sum(0) < len(new))  # [example]
    if not is_compared.any():
        raise DataError(
            "no prompt's template is among those that some of the circuits were learned from and "
            "others were not; measure prompts of the training prompts' templates"
        )
    distances, matches, new = (x[:, is_compared] for x in (distances, matches, new))

    def means(values: Tensor) -> list[Tensor]:
        """[example], over the circuits to which it is new, and over the others."""
        return [(weights * values).sum(0) / weights.sum(0) for weights in (new, 1 - new)]

    on_new, on_known = means(distances)
    compared = [name for name, flag in zip(own, is_compared.tolist(), strict=True) if flag]
    low, high = cluster_interval(on_new - on_known, compared)
    name, of_new, of_known = bench.distance_name, on_new.mean().item(), on_known.mean().item()
    match, match_known = (each.mean().item() for each in means(matches))
    return Finding(
        "other templates", f"{name} {brief(of_new)}", f"on their own templates {brief(of_known)}",
        low <= 0,
        f"On prompts of templates that they were not learned from, the {name} of these circuits is "
        f"{brief(of_new)} and exact match {match:.0%}; on those of their own templates "
        f"{brief(of_known)} and {match_known:.0%}. Over {len({*compared})} templates, the "
        f"difference of the {name} is between {brief(low)} and {brief(high)}; above 0 throughout "
        "would count against them.",
        (low, high),
        details={"distance": of_new, "distance_known": of_known, "exact_match": match,
                 "exact_match_known": match_known},
    )  # fmt: skip


def stability_table(finding: Finding) -> Table:
    """The Jaccard index of pairs of circuits by their size."""
    rows = [
        [f"{row['num_edges']:,}", f"{row['jaccard']:.3f}",
         f"{row['lowest']:.3f} – {row['highest']:.3f}", f"{row['by_chance']:.3f}"]
        for row in finding.details["sizes"]
    ]  # fmt: skip
    columns = ["edges", "Jaccard\nindex", "range", "by\nchance"]
    return Table(columns, rows, f"circuits learned {finding.details['repeats']} times")
