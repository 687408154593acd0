"""What `edgeprune explain` shows in a terminal: tables and a summary in words."""

from collections.abc import Sequence

from edgeprune.evaluation.explain import FLIPS, Effect, Explained, Explanation
from edgeprune.evaluation.finding import brief, percent
from edgeprune.evaluation.table import Table

MAX_ROWS = 20
"""Number of rows of the tables in a terminal."""


def explanation_tables(explanation: Explanation, title: str) -> list[Table]:
    """What edges and nodes do, how the edges rose, and what the verification gave."""
    edges, nodes = map(explanation.of_kind, ("edge", "node"))
    tables = [_effects_table(explanation, edges, f"{title}: what each edge does")]
    tables.append(_effects_table(explanation, nodes, "what each node does"))
    tables.append(_flips_table(edges))
    if explanation.pushes is not None:
        tables.append(explanation.pushes.table([(e.title, e.index) for e in edges]))
    if explanation.verification is not None:
        tables.append(explanation.verification.table())
    return [table for table in tables if table.rows]


def _effects_table(explanation: Explanation, parts: Sequence[Explained], title: str) -> Table:
    """A row per part: its rank and effects."""
    name, num_prompts = explanation.distance_name, explanation.num_prompts
    columns = [("", lambda part: part.title)]
    if any(part.rank for part in parts):
        columns.append(("rank", lambda part: f"{part.rank:,}"))
    if any(part.ranks for part in parts):
        columns.append(("since\nstep", _since))
    columns += [
        (f"{name},\ncircuit", lambda part: _signed(part.in_circuit.rise.mean)),
        ("flips", lambda part: percent(part.in_circuit.num_flips / num_prompts)),
        (f"{name},\nfull", lambda part: _signed(part.in_full.rise.mean)),
        ("flips", lambda part: percent(part.in_full.num_flips / num_prompts)),
    ]
    rows = [[text(part) for _, text in columns] for part in parts[:MAX_ROWS]]
    more = "" if len(parts) <= MAX_ROWS else f", the first {MAX_ROWS} of {len(parts):,}"
    return Table([label for label, _ in columns], rows, f"{title}{more}")


def _since(part: Explained) -> str:
    return "–" if part.since is None else f"{part.since:,}"


def _flips_table(edges: Sequence[Explained]) -> Table:
    """What is predicted instead, in the circuit or, if nothing flips there, in the full model."""
    effects = [(e.title, e.in_circuit if e.in_circuit.num_tokens else e.in_full) for e in edges]
    effects = [(title, effect) for title, effect in effects if effect.num_tokens][:MAX_ROWS]
    kinds = [kind for kind in FLIPS if any(kind in effect.kinds for _, effect in effects)]
    rows = [
        [title, *(percent(effect.kinds.get(kind, 0.0)) for kind in kinds), _most_frequent(effect)]
        for title, effect in effects
    ]
    columns = ["", *(FLIPS[kind] for kind in kinds), ""]
    if not any(row[-1] for row in rows):
        rows, columns = [row[:-1] for row in rows], columns[:-1]
    return Table(columns, rows, "what the flipped predictions become, and the most frequent change")


def _most_frequent(effect: Effect) -> str:
    """The most frequent change, if it occurs more than once."""
    change = effect.changes[0]
    return f"{change.text} ({change.count})" if change.count > 1 else ""


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{brief(abs(value))}"


def in_words(explanation: Explanation) -> str:
    """A summary, with the controls."""
    edges, name = explanation.of_kind("edge"), explanation.distance_name
    flipping = sum(edge.in_circuit.num_flips > 0 for edge in edges)
    flipping_full = sum(edge.in_full.num_flips > 0 for edge in edges)
    clear = sum(edge.in_circuit.rise.low > 0 for edge in edges)
    words = [
        f"On {explanation.num_prompts:,} prompts the circuit's {name} is "
        f"{brief(explanation.distance)}. Cut alone, {clear:,} of {len(edges):,} edges raise it "
        f"(95 % interval above 0), {flipping:,} flip a prediction of the circuit, and "
        f"{flipping_full:,} one of the full model."
    ]
    if explanation.controls:
        rises, flipped = zip(*explanation.controls, strict=True)
        words.append(
            f"Of {len(rises)} random edges outside of the circuit, {sum(map(bool, flipped))} flip "
            f"a prediction of the full model, and none raises its {name} by more than "
            f"{brief(max(rises))}."
        )
    rose = sorted(edge.since for edge in edges if edge.since is not None)
    if 2 * len(rose) >= len(edges) and rose:
        middle = rose[(len(edges) - 1) // 2]
        words.append(
            f"Half of the edges were among the {explanation.num_edges:,} strongest for good by "
            f"step {middle:,} of {explanation.steps[-1]:,}."
        )
    if explanation.pushes is not None:
        words.append(
            explanation.pushes.in_words([edge.index for edge in edges], explanation.control_edges)
        )
    if explanation.verification is not None:
        words.append(explanation.verification.in_words())
    return " ".join(words)
