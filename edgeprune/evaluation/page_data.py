"""What the page of circuits shows, as JSON: edges by score, answers by size, cuts, attention.

Numbers are rounded and long lists are cut, because the page is one file that can be mailed.
`drawing/page/model.js` reads what is written here.
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.evaluation.bench import Bench
from edgeprune.evaluation.curve import SMALLEST_SHARE, Curve, log_sizes
from edgeprune.evaluation.cuts import Cut, cuts_of, num_flips, without
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import METRICS, ExampleMetrics, Output, distance_by_example
from edgeprune.prompts import Batch, Pair, draw_pairs, iterate_batches, token_text
from edgeprune.scores import EdgeScores
from edgeprune.training.snapshots import Snapshots

FORMAT = 2
"""Version of the data; measurements in pages of another version are not used again."""
MAX_EDGES = 5_000
"""Default number of edges in a page: the strongest."""
UNCHOSEN_SIZE = 100
"""Size that is shown first where no circuit was chosen."""
NUM_PROMPTS = 10
"""Default number of prompts, half of them typical and half the least faithful."""
MAX_RANKED = 100
"""Maximum number of prompts among which these are found."""
NUM_CUT_PROMPTS = 16
"""Maximum number of prompts on which the effects of cuts are measured."""
CUT_BUDGET = {"cpu": 2.5e12, "cuda": 1e15}
"""Operations that all cuts together may take, by device; about a minute on one core."""
MAX_ATTENTION = 1_200_000
"""Maximum size of the attention patterns in a page, in bytes before base64."""
MAX_RISES = 500
"""Maximum number of edges for which a page shows when they rose."""
MAX_SIZES = 16
"""Maximum number of sizes at which answers are measured."""
TOP = 5
"""Number of most likely tokens shown."""
MAX_PREDICTED = 8
"""Maximum number of predicted tokens shown per prompt."""
MAX_TEXT = 400
"""Maximum number of characters kept of a token."""

Listener = Callable[[int, int], object]
"""Called with the number of passes done, and of all."""


def graph_data(graph: CircuitGraph) -> dict[str, Any]:
    """Names of the nodes, in order, and the sizes of the graph."""
    return {
        "layers": graph.num_layers,
        "heads": graph.num_heads,
        "kv_heads": graph.num_kv_heads,
        "writers": graph.writers,
        "readers": graph.readers,
        "num_edges": graph.num_edges,
    }


def scores_data(
    scores: EdgeScores, circuit: Circuit | None = None, chosen_by: str | None = None,
    max_edges: int = MAX_EDGES,
) -> dict[str, Any]:  # fmt: skip
    """The strongest edges with their scores, and the chosen circuit, if one was chosen.

    Edges are pairs of indices of writer and reader. The chosen circuit is given by its size if it
    has the strongest edges (`chosen.edges` is None), or else edge by edge.
    """
    ranking = scores.ranking().tolist()
    carried = ranking[:max_edges]
    chosen = {"size": min(UNCHOSEN_SIZE, len(carried)), "by": None, "edges": None}
    if circuit is not None:
        edges = {*map(circuit.graph.edge_index, circuit.edge_set)}
        is_best = edges == {*ranking[: len(circuit)]}
        by_edge = None if is_best else _pairs(scores.graph, sorted(edges))
        chosen = {"size": len(circuit), "by": chosen_by, "edges": by_edge}
    return {
        "edges": _pairs(scores.graph, carried),
        "scores": [_rounded(value) for value in scores.values[carried].nan_to_num().tolist()],
        "by_magnitude": scores.by_magnitude,
        "chosen": chosen,
    }


def rise_data(scores: EdgeScores, snapshots: Snapshots) -> dict[str, Any] | None:
    """The ranks of the strongest edges at the snapshots of a run, edge by edge, the best first."""
    if len(snapshots.steps) < 2:
        return None
    ranks = snapshots.ranks(scores.ranking()[:MAX_RISES].tolist()).T.tolist()
    return {"steps": snapshots.steps.tolist(), "ranks": ranks}


def explained_data(explanation: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of an explain.json."""
    shown = ("rise", "num_flips", "num_tokens", "kinds", "changes", "prompts")

    def part(record: Mapping[str, Any]) -> dict[str, Any]:
        effects = {
            effect: {key: record[effect][key] for key in shown}
            for effect in ("in_circuit", "in_full")
        }
        return {**effects, "pushed": record.get("pushed")}

    return {
        "prompts": explanation["num_prompts"], "split": explanation["split"],
        "distance": explanation["distance"],
        "num_pairs": explanation.get("pushes", {}).get("num_pairs"),
        **{kind: {name: part(record) for name, record in explanation[kind].items()}
           for kind in ("nodes", "edges")},
    }  # fmt: skip


def circuit_data(circuit: Circuit) -> dict[str, Any]:
    """A circuit without scores: all its edges, which the page cannot rank."""
    edges = _pairs(circuit.graph, sorted(map(circuit.graph.edge_index, circuit.edge_set)))
    chosen = {"size": len(circuit), "by": None, "edges": None}
    return {"edges": edges, "scores": None, "by_magnitude": False, "chosen": chosen}


def _pairs(graph: CircuitGraph, edges: Sequence[int]) -> list[list[int]]:
    """[indices of the writers, indices of the readers] of edges that are given by number."""
    numbers = torch.tensor(edges, dtype=torch.long)
    starts = torch.tensor([into.start for into in graph.edges_into.values()])
    readers = torch.searchsorted(starts, numbers, right=True) - 1
    return [(numbers - starts[readers]).tolist(), readers.tolist()]


def curve_data(curve: Curve, rules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics by size; `rules` are conditions, each a `text`, `by` and the `size` it chooses."""
    shown = {
        name: metric for name, metric in METRICS.items()
        if metric.better and not any(math.isnan(point[name]) for point in curve.points.values())
    }  # fmt: skip
    return {
        "prompts": curve.prompts,
        "num_examples": curve.num_examples,
        "sizes": list(curve.points),
        "metrics": [
            {
                "name": name,
                "label": metric.label,
                "description": metric.description,
                "better": metric.better,
                "values": [_rounded(point[name]) for point in curve.points.values()],
            }
            for name, metric in shown.items()
        ],
        "rules": rules,
    }


@torch.no_grad()
def measured_data(
    model: CircuitModel,
    scores: EdgeScores,
    circuit: Circuit,
    pairs: Sequence[Pair],
    *,
    ablation: Ablation,
    curve: Curve | None = None,
    batch_size: int = 64,
    max_edges: int = MAX_EDGES,
    num_prompts: int = NUM_PROMPTS,
    num_cuts: int | None = None,
    listener: Listener = lambda done, total: None,
) -> dict[str, Any]:
    """Measure what the page shows of prompts and of cuts.

    Args:
        circuit: the chosen one, whose prompts, nodes and edges are looked at.
        pairs: prompts, which should not be those the scores were learned on.
        curve: answers are measured at its sizes.
        num_cuts: maximum number of nodes and edges that are cut one at a time, nodes first;
            None: as many as `CUT_BUDGET` allows.

    Raises ValueError as `evaluate` does.
    """
    Circuit.check(circuit, model.graph)
    if ablation.means is not None and ablation.per_position:  # leave out longer prompts
        known = ablation.means.residuals[0].shape[-2]
        pairs = [pair for pair in pairs if len(pair.clean_ids) <= known]
    model.check_prompts(pairs)
    ranking = scores.ranking().to(model.device)
    cut_pairs = draw_pairs(pairs, NUM_CUT_PROMPTS)
    cuts = cuts_of(circuit, ranking.tolist())[: _max_cuts(model, cut_pairs, num_cuts)]
    sizes = _sizes(model.graph, curve, len(circuit), max_edges)
    if not model.architecture.may_pad:
        batch_size = 1
    # To select prompts the empty circuit and the chosen one; answers of the empty circuit and at
    # each size; attention; and for the cuts the empty circuit, the chosen one and one per cut.
    total, done = 2 + (1 + len(sizes)) + 1 + (2 + len(cuts)), 0.0

    def step(number: float = 1) -> None:
        nonlocal done
        done += number
        listener(round(done), total)

    some = draw_pairs([*dict.fromkeys(pairs)], MAX_RANKED)
    selected = _select(Bench(model, some, ablation, batch_size, step), circuit, num_prompts)
    prompts = [_prompt(model, pair, kind) for pair, kind in selected]
    shown = [pair for pair, _ in selected]
    batches = list(iterate_batches(shown, batch_size))
    answers = _answers(model, ranking, sizes, batches, ablation, step)
    for pair, prompt in zip(shown, prompts, strict=True):
        prompt["answers"] = answers[pair]
    heads, patterns = _attention(model, ranking, shown)
    step()
    for prompt, pattern in zip(prompts, patterns, strict=False):
        prompt["attention"] = pattern
    return {
        "distance": "KL" if model.output is Output.logits else "error",
        "output": model.output.name,
        "sizes": sizes,
        "prompts": prompts,
        "attention_heads": heads,
        "cuts": _measure_cuts(Bench(model, cut_pairs, ablation, batch_size, step), circuit, cuts),
    }


# --------------------------------------------------------------------------------------- prompts


def _select(bench: Bench, circuit: Circuit, num_prompts: int) -> list[tuple[Pair, str]]:
    """Prompts near the median distance of the circuit, and those with the largest."""
    (own,) = bench.measure([circuit])
    pairs, distances = bench.pairs, bench.distance(own).tolist()
    order = sorted(range(len(pairs)), key=distances.__getitem__)
    num_worst = min(num_prompts, len(pairs)) // 2
    worst, others = order[len(order) - num_worst :][::-1], order[: len(order) - num_worst]
    num_typical = min(num_prompts - num_worst, len(others))
    start = min(max(len(order) // 2 - num_typical // 2, 0), len(others) - num_typical)
    typical = others[start : start + num_typical]
    return [(pairs[i], "typical") for i in typical] + [(pairs[i], "worst") for i in worst]


def _reference(model: CircuitModel, batch: Batch, ablation: Ablation) -> tuple[Tensor, Any, Batch]:
    """The full model's outputs, the ablation values, and the batch on the model's device."""
    batch = batch.to(model.device)
    reference, corrupted = model.run_pair(batch, corrupted=ablation.needs_corrupted)
    return reference, ablation.values(batch, corrupted), batch


def _prompt(model: CircuitModel, pair: Pair, kind: str) -> dict[str, Any]:
    """Tokens of a pair; `predicted` are the positions from which tokens are predicted."""
    clean, corrupted = (_token_texts(model, ids) for ids in (pair.clean_ids, pair.corrupted_ids))
    first = len(clean) - len(pair.target_ids)
    predicted = list(range(first, len(clean)))[:MAX_PREDICTED]
    return {"kind": kind, "clean": clean, "corrupted": corrupted, "predicted": predicted}


def _token_texts(model: CircuitModel, ids: Sequence[int]) -> list[str]:
    """The text of each input token, for display."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return [str(token) for token in ids]
    if model.output is not Output.logits:
        return [tokenizer.decode_inputs([token])[:MAX_TEXT] for token in ids]
    return [token_text(tokenizer, token)[:MAX_TEXT] for token in ids]


def _sizes(graph: CircuitGraph, curve: Curve | None, chosen: int, max_edges: int) -> list[int]:
    """The sizes at which answers are measured: the curve's, or some of them, and the chosen one."""
    largest = min(max_edges, graph.num_edges)
    if curve is None:
        sizes = log_sizes(max(1, round(SMALLEST_SHARE * graph.num_edges)), largest, 8)
    else:
        sizes = [size for size in sorted(curve.points) if 0 < size <= largest]
    if len(sizes) > MAX_SIZES:
        last = len(sizes) - 1
        sizes = [sizes[round(i * last / (MAX_SIZES - 1))] for i in range(MAX_SIZES)]
    return sorted({*sizes, *([chosen] if 0 < chosen <= largest else [])})


def _answers(
    model: CircuitModel, ranking: Tensor, sizes: Sequence[int], batches: Sequence[Batch],
    ablation: Ablation, step: Callable[[], None],
) -> dict[Pair, dict[str, Any]]:  # fmt: skip
    """Per pair, the answers of the full model, the empty circuit and the circuit of each size."""
    found: dict[Pair, dict[str, Any]] = {}
    references = [_reference(model, batch, ablation) for batch in batches]
    for reference, _, batch in references:
        for pair, top in zip(batch.pairs, _top(model, batch, reference, reference), strict=True):
            found[pair] = {"full": top, "circuits": []}
    for size in (0, *sizes):
        gates = torch.zeros(model.graph.num_edges, device=model.device)
        gates[ranking[:size]] = 1
        for reference, values, batch in references:
            outputs = model.run_circuit(batch, gates, values)
            distances = distance_by_example(batch, reference, outputs, model.output).tolist()
            tops = _top(model, batch, outputs, reference)
            for pair, distance, top in zip(batch.pairs, distances, tops, strict=True):
                answer = {"distance": _rounded(max(distance, 0.0)), "top": top}
                if size:
                    found[pair]["circuits"].append(answer)
                else:
                    found[pair]["empty"] = answer
        step()
    return found


def _top(
    model: CircuitModel, batch: Batch, outputs: Tensor, reference: Tensor
) -> list[list[list[list[Any]]]]:
    """Per pair and predicted token, the best answers: [text, probability (or value)] each.

    The full model's answer, the best of `reference`, follows them if it is not among them.
    """
    if model.output is Output.number:
        rows = [[[model.text_of([number]), _rounded(number)]] for number in outputs[:, 0].tolist()]
    else:
        is_logits = model.output is Output.logits
        shares = outputs.float().softmax(-1) if is_logits else outputs.float()
        ids = shares.topk(min(TOP, outputs.shape[-1])).indices
        ids = torch.cat([ids, reference.argmax(-1, keepdim=True)], -1)
        values = shares.gather(-1, ids)
        rows = []
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True):
            best = dict(zip(row_ids, row_values, strict=True))  # each token once
            rows.append([[model.text_of([i])[:MAX_TEXT], _rounded(v, 3)] for i, v in best.items()])
    remaining = iter(rows)
    return [[next(remaining) for _ in pair.target_ids][:MAX_PREDICTED] for pair in batch.pairs]


# ------------------------------------------------------------------------------------- attention


def _attention(
    model: CircuitModel, ranking: Tensor, pairs: Sequence[Pair]
) -> tuple[list[str], list[dict[str, str]]]:
    """The full model's attention on the clean and the corrupted prompt of each pair.

    Returns the heads, those with the strongest edges if not all fit; and per pair base64 of bytes,
    255 times the weight: head by head the rows of the lower triangle, which causal attention fills.
    No heads for a model that cannot return its attention.
    """
    body = model.architecture.body
    if not hasattr(body, "set_attn_implementation"):
        return [], []
    size = sum(len(pair.clean_ids) * (len(pair.clean_ids) + 1) for pair in pairs)
    heads = _heads_by_strength(model.graph, ranking)[: MAX_ATTENTION // size]
    names, found = [f"{head}.pattern" for head in heads], []
    with model.intervene() as run:
        for pair in pairs if heads else ():
            ids = torch.tensor([pair.clean_ids, pair.corrupted_ids], device=model.device)
            _, read = run.states(ids, names)  # [clean or corrupted, query, key] each
            row, column = torch.tril_indices(ids.shape[1], ids.shape[1])
            chosen = torch.stack([read[name][:, row, column].float().cpu() for name in names], 1)
            data = (255 * chosen).round().to(torch.uint8).contiguous()
            clean, corrupted = (base64.b64encode(x.numpy().tobytes()).decode() for x in data)
            found.append({"clean": clean, "corrupted": corrupted})
    return heads, found


def _heads_by_strength(graph: CircuitGraph, ranking: Tensor) -> list[str]:
    """All heads, those first that the strongest edges connect."""
    order: dict[str, None] = {}
    writers, readers = _pairs(graph, ranking[: 10 * MAX_EDGES].tolist())
    names = graph.writers, graph.readers
    for writer, reader in zip(writers, readers, strict=True):
        for node in (names[0][writer], *graph.nodes_fed_by(names[1][reader])):
            if ".h" in node:
                order.setdefault(node)
    return [*order, *(w for w in graph.writers if ".h" in w and w not in order)]


# ------------------------------------------------------------------------------------------ cuts


def _max_cuts(model: CircuitModel, pairs: Sequence[Pair], asked: int | None) -> int:
    """The number asked for, or else how many cuts can be measured within `CUT_BUDGET`."""
    if asked is not None:
        return asked
    num_tokens = sum(len(pair.clean_ids) for pair in pairs)
    num_weights = sum(parameter.numel() for parameter in model.architecture.body.parameters())
    operations = 2 * num_tokens * (num_weights + model.graph.num_edges * model.d_model)
    return int(CUT_BUDGET["cuda" if model.device.type == "cuda" else "cpu"] / operations)


def _measure_cuts(bench: Bench, circuit: Circuit, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Per cut, [mean distance from the full model, number of prompts whose predictions change]."""

    def distance(examples: ExampleMetrics) -> float | None:
        return _rounded(max(bench.distance(examples).mean().item(), 0.0))

    (before,) = bench.measure([circuit])
    found = {"prompts": len(bench), "distance": distance(before), "nodes": {}, "edges": {}}
    measured = bench.measure(without(circuit, cut.edges) for cut in cuts)
    for cut, after in zip(cuts, measured, strict=True):
        found[f"{cut.kind}s"][cut.name] = [distance(after), num_flips(before, after)]
    return found


# --------------------------------------------------------------------------------------- helpers


def _rounded(value: float, digits: int = 4) -> float | None:
    """A number rounded to significant digits; None for NaN and infinity."""
    number = float(f"{value:.{digits}g}")
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 1e6 else number
