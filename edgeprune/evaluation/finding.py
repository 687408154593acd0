"""Finding: the result of one test of a circuit, and how findings are shown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from edgeprune.evaluation.table import Table
from edgeprune.files import json_values


@dataclass(frozen=True)
class Finding:
    """The result of a test.

    Attributes:
        name: of the test.
        measured, compared: the number measured and what it is compared with, as text.
        holds: whether the circuit passes; None if the test has no pass mark, does not apply, or
            cannot be decided with so few random circuits.
        words: one or two sentences, with what would count against the circuit.
        interval: 95 % bootstrap interval of what was measured, over prompts (over templates for
            "other templates").
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

    @classmethod
    def inapplicable(cls, name: str, reason: str) -> Self:
        """The finding of a test that does not apply."""
        return cls(name, "–", "–", None, f"The test of {name} does not apply: {reason}.")


def findings_table(findings: Sequence[Finding], title: str) -> Table:
    """A row per test."""
    verdicts = {True: "holds", False: "fails", None: ""}
    rows = [
        [each.name, each.measured, interval_text(each.interval), each.compared,
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
    return f"{share:.0%}".replace("-0%", "0%")


def interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{brief(interval[0])} – {brief(interval[1])}"


def brief(value: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) >= 1e-4 else "0"
