"""Specificity: each task's circuit on, and cut out of the model on, every other task's prompts."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from edgeprune.circuit import Circuit
from edgeprune.evaluation.bench import Bench
from edgeprune.evaluation.finding import Finding, percent
from edgeprune.evaluation.statistics import mean_interval
from edgeprune.evaluation.table import Table
from edgeprune.metrics import ExampleMetrics

TITLES = {"on": "exact match of the circuit", "without": "exact match of the model without it"}


class Specificity(NamedTuple):
    """Circuits of several tasks on the prompts of all.

    Attributes:
        cells: for each circuit and each task's prompts, metrics of the circuit (`on`) and of the
            model without it (`without`), as JSON values.
        findings: one for each task's prompts.
    """

    cells: list[dict[str, Any]]
    findings: list[Finding]

    @property
    def circuits(self) -> list[str]:
        return [*dict.fromkeys(cell["circuit"] for cell in self.cells)]

    @property
    def prompts(self) -> list[str]:
        return [*dict.fromkeys(cell["prompts"] for cell in self.cells)]

    def matrices(self) -> dict[str, list[list[float]]]:
        """Exact match of the circuits and of the model without them, [circuit][prompts]."""
        cells = {(cell["circuit"], cell["prompts"]): cell for cell in self.cells}
        return {
            title: [[cells[c, p][key]["exact_match"] for p in self.prompts] for c in self.circuits]
            for key, title in TITLES.items()
        }

    def tables(self) -> list[Table]:
        """A table per matrix."""
        columns = ["", *(f"on {name}" for name in self.prompts)]
        return [
            Table(
                columns,
                [[name, *map("{:.3f}".format, row)]
                 for name, row in zip(self.circuits, values, strict=True)],
                title, values,
            )
            for title, values in self.matrices().items()
        ]  # fmt: skip

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """From what `edgeprune test` wrote; raises KeyError or TypeError if it is damaged."""
        return cls(record["cells"], [Finding(**each) for each in record["findings"]])


def specificity(circuits: Mapping[str, Circuit], benches: Mapping[str, Bench]) -> Specificity:
    """Measure each circuit on, and cut out of the model on, the prompts of every task.

    A circuit that does a task should do it better than the circuits of other tasks, and the model
    should lose more without it than without theirs. Both are compared prompt by prompt through the
    scores; a 95 % bootstrap interval of the mean difference that includes 0 counts against it.
    Circuits differ in size, which is part of the comparison: a larger one does more.

    Args:
        circuits, benches: by the name of their task; all of one model.
    """
    findings, cells = [], []
    for task, bench in benches.items():
        kept = bench.measure(circuits.values())
        cut = bench.measure(bench.whole - circuit for circuit in circuits.values())
        measured = dict(zip(circuits, zip(kept, cut, strict=True), strict=True))
        cells += [
            {"circuit": name, "prompts": task, "num_edges": len(circuits[name]),
             "on": bench.summary(on), "without": bench.summary(without)}
            for name, (on, without) in measured.items()
        ]  # fmt: skip
        findings.append(_judge(task, bench, measured))
    return Specificity(cells, findings)


def _judge(
    task: str, bench: Bench, measured: Mapping[str, tuple[ExampleMetrics, ExampleMetrics]]
) -> Finding:
    """Compare the task's own circuit with the others on the task's prompts."""
    own_on, own_cut = map(bench.score, measured[task])
    better, worse = {}, {}  # intervals: how much more the own circuit keeps, and takes away
    for name, examples in measured.items():
        if name != task:
            on, cut = map(bench.score, examples)
            better[name], worse[name] = mean_interval(own_on - on), mean_interval(cut - own_cut)
    as_good = [name for name, (low, _) in better.items() if low <= 0]
    as_bad = [name for name, (low, _) in worse.items() if low <= 0]
    on = {name: bench.recovered(examples[0]) for name, examples in measured.items()}
    cut = {name: bench.recovered(examples[1]) for name, examples in measured.items()}
    best = max((name for name in on if name != task), key=on.get)
    lowest = min((name for name in cut if name != task), key=cut.get)
    rivals = [f"{', '.join(names)} {what}" for names, what in (
        (as_good, "as good"), (as_bad, "needed as much")) if names]  # fmt: skip
    return Finding(
        f"specificity on {task}", f"recovers {on[task]:.2f}, without it {cut[task]:.2f}",
        f"{best} recovers {on[best]:.2f}, without {lowest} {cut[lowest]:.2f}",
        not as_good and not as_bad,
        f"On the prompts of {task} its own circuit recovers {percent(on[task])} of the "
        f"{bench.score_name} and the model without it {percent(cut[task])}; of the other circuits "
        f"{best} recovers most ({percent(on[best])}), and the model loses most without {lowest} "
        f"({percent(cut[lowest])} left). "
        + (f"Not told apart: {'; '.join(rivals)}." if rivals else
           "The differences are larger than chance."),
        details={"better_by": better, "taken_more": worse, "recovered": on, "without": cut},
    )  # fmt: skip
