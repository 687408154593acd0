"""Testing circuits as a sceptic would: one circuit thoroughly, or several on each other's tasks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgeprune.api.circuits import labels_of
from edgeprune.api.evaluate import (
    Case,
    case_record,
    load_case,
    scores_of,
)
from edgeprune.api.learn_again import check_learned
from edgeprune.api.repeat import Repeated, repeat
from edgeprune.api.shared import check_output
from edgeprune.circuit import Circuit
from edgeprune.config import TestConfig
from edgeprune.drawing import Line, Panel, draw_frontier, draw_matrices
from edgeprune.errors import ConfigError
from edgeprune.evaluation.bench import Bench
from edgeprune.evaluation.finding import Finding, findings_table, in_words
from edgeprune.evaluation.sceptic import ablation_table, all_findings, num_circuits
from edgeprune.evaluation.specificity import specificity
from edgeprune.evaluation.stability import other_templates, stability, stability_table
from edgeprune.evaluation.table import Table
from edgeprune.files import replace_folder, write_json
from edgeprune.prompts import Pair, draw_pairs
from edgeprune.runs import layout
from edgeprune.runs.source import Source, find, head_labels
from edgeprune.scale.world import World
from edgeprune.training.progress import counting


class Tested(NamedTuple):
    """Tables and words for people, and the files that were written."""

    findings: list[Finding]
    tables: list[Table]
    words: str
    paths: list[Path]


def test(config: TestConfig) -> Tested | None:
    """Test a circuit, or several of one model on each other's prompts.

    Several processes share the repetitions of `repeat=`; rank 0 alone measures, and gets the
    result.
    """
    sources = [find(name) for name in config.circuits]
    if not sources:
        raise ConfigError("got no circuit; expected edgeprune test RUN, or RUN RUN ...")
    if len(sources) > 1 and config.task is not None:
        raise ConfigError("task= takes one circuit; several are measured on their own tasks")
    if config.output:
        check_output(Path(config.output), is_file=False)
    if config.repeat:
        check_learned(sources[0].run, "repeat=", sources[0].path)
    with World.join(sources[0].model(config.model).device, config.launcher.timeout) as world:
        if world.count > 1 and not config.repeat:
            raise ConfigError("several processes share the repetitions of repeat=; start one")
        world.check_same("the settings", str(config))
        if len(sources) > 1:
            return _test_several(sources, config)
        source, repeated = sources[0], None
        case = load_case(source, config, device=world.device)
        pairs = draw_pairs(case.pairs, config.prompts, config.seed)
        if config.repeat:
            repeated = repeat(source.run, case.model, *config.repeats, pairs, world)
    return _measure(source, case, pairs, repeated, config) if world.is_rank_zero else None


def _measure(
    source: Source, case: Case, pairs: Sequence[Pair], repeated: Repeated | None, config: TestConfig
) -> Tested:
    """Measure everything and write what was found."""
    circuit, scores = case.file.circuit, scores_of(source, case.file)
    count = num_circuits(circuit, config.random_circuits, has_scores=scores is not None)
    with counting(count, "testing: circuit") as listen:
        bench = Bench(case.model, pairs, case.make_ablation(), case.batch_size, listen)
        findings = all_findings(
            bench, circuit, scores, num_random=config.random_circuits, reference=case.reference,
            labels=head_labels(source.path.parent), seed=config.seed,
        )  # fmt: skip
        if repeated:
            findings += _stability(bench, circuit, repeated)
    title = f"{case.title}: {len(circuit):,} edges, {len(pairs):,} {config.split} prompts"
    by_name = {each.name: each for each in findings}
    tables = [findings_table(findings, title)]
    tables.append(ablation_table(by_name["ablation choice"], bench.distance_name))
    if repeated:
        tables.append(stability_table(by_name["stability"]))
    words, record = in_words(findings), case_record(source, case, pairs, config)
    record |= {"num_random": config.random_circuits, "words": words}
    record |= {"findings": [each.to_dict() for each in findings]}

    def write(folder: Path) -> list[Path]:
        paths = [folder / layout.TESTS]
        write_json(paths[0], record)
        if "curve" in by_name:
            paths.append(folder / layout.TESTS_PLOT)
            panels = _panels(bench, len(circuit), by_name)
            draw_frontier(panels, paths[-1], title=title, all_edges=bench.graph.num_edges)
        return paths

    paths = []
    if config.output:
        with replace_folder(Path(config.output), ".edgeprune-test") as new:
            paths = [Path(config.output, path.name) for path in write(new)]
    elif case.is_own:
        paths = write(source.path.parent)
    return Tested(findings, tables, words, paths)


def _stability(bench: Bench, circuit: Circuit, repeated: Repeated) -> list[Finding]:
    """How alike the circuits are that were learned again, and how they do on new templates."""
    findings = [stability(bench, circuit, repeated.scores, repeated.what)]
    if repeated.templates is not None:
        circuits = [scores.circuit(num_edges=len(circuit)) for scores in repeated.scores]
        findings.append(other_templates(bench, circuits, repeated.halves, repeated.templates))
    return findings


def _panels(bench: Bench, num_edges: int, findings: dict[str, Finding]) -> list[Panel]:
    """Curves: distance with quantiles, exact match, and the recovered score, with intervals."""
    details = findings["curve"].details
    points = [point for point in details["points"] if point["num_edges"] < bench.graph.num_edges]
    sizes = [point["num_edges"] for point in points]

    def line(name: str, key: str, *, highest: float = math.inf) -> Line:
        """Values and their intervals, if there are any, from 0 to `highest`."""
        triples = [(p[key], *p.get(f"{key}_interval", (p[key], p[key]))) for p in points]
        clipped = [[min(max(x, 0.0), highest) for x in triple] for triple in triples]
        return Line(name, sizes, *map(list, zip(*clipped, strict=True)))

    mine = findings["faithfulness"].details
    others = findings["sufficiency"].details["random"]
    at, mean = [num_edges], sum(others) / len(others)
    distances = [
        line("mean and interval", "mean"), line("median", "median"),
        line("90 % of prompts", "quantile_90"), line("worst prompt", "worst"),
        Line("the circuit", at, [mine["mean"]], [mine["mean"]], [mine["mean"]]),
        Line("random circuits, mean and range", at, [mean], [min(others)], [max(others)]),
    ]  # fmt: skip
    levels = [("empty circuit", details["empty"])]
    panels = [
        Panel(bench.distance_name, distances, levels, log=True),
        Panel("exact match", [line("", "exact_match", highest=1.0)], [], log=False),
        Panel(f"{bench.score_name} recovered", [line("", "recovered", highest=1.0)],
              [("full model", 1.0)], log=False),
    ]  # fmt: skip
    if "stability" in findings:
        rows = findings["stability"].details["sizes"]
        found, low, high, chance = (
            [row[key] for row in rows] for key in ("jaccard", "lowest", "highest", "by_chance")
        )
        sizes = [row["num_edges"] for row in rows]
        lines = [Line("", sizes, found, low, high), Line("", sizes, chance, chance, chance)]
        panels.append(Panel("Jaccard index; orange: by chance", lines, [], log=False))
    return panels


# ------------------------------------------------------------------------------- several circuits


def _test_several(sources: Sequence[Source], config: TestConfig) -> Tested:
    first = sources[0].run.path if sources[0].run else sources[0].path
    output = Path(config.output or first.parent / layout.SPECIFICITY)
    check_output(output, is_file=False)
    labels = labels_of([source.path for source in sources])
    cases: dict[str, Case] = {}
    for label, source in zip(labels, sources, strict=True):
        known = next((case.model for case in cases.values()), None)
        if known is not None and source.digest("model") not in (None, known.fingerprint()):
            raise ConfigError(
                f"{source.path} belongs to another model than {sources[0].path}; specificity "
                "compares circuits of one model"
            )
        cases[label] = load_case(source, config, known)
    circuits: dict[str, Circuit] = {label: case.file.circuit for label, case in cases.items()}
    with counting(2 * len(cases) ** 2, "testing: circuit") as listen:
        benches = {}
        for label, case in cases.items():
            pairs = draw_pairs(case.pairs, config.prompts, config.seed)
            benches[label] = Bench(case.model, pairs, case.make_ablation(), case.batch_size, listen)
        found = specificity(circuits, benches)
    model = next(iter(cases.values())).model.name
    words = in_words(found.findings, "The circuits pass")
    record = {
        "circuits": {
            label: case_record(source, cases[label], benches[label].pairs, config)
            for label, source in zip(labels, sources, strict=True)
        },
        "cells": found.cells,
        "words": words,
        "findings": [each.to_dict() for each in found.findings],
    }
    with replace_folder(output, ".edgeprune-test") as new:
        write_json(new / layout.TESTS, record)
        picture, title = new / layout.TESTS_PLOT, f"circuits in {model}"
        draw_matrices(found.matrices(), found.circuits, picture, title=title)
    tables = [*found.tables(), findings_table(found.findings, "specificity")]
    paths = [output / layout.TESTS, output / layout.TESTS_PLOT]
    return Tested(found.findings, tables, words, paths)
