"""Bench: a model, prompts and an ablation, on which many circuits are measured one after another.

All circuits share the full model's passes on the clean and corrupted prompts, which are run once
and kept where they fit into memory (`KeptPasses`).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.engine.cache import KeptPasses
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.evaluation.evaluate import measure_circuits
from edgeprune.evaluation.statistics import bootstrap_interval, mean_interval
from edgeprune.metrics import ExampleMetrics, Output
from edgeprune.prompts import Pair, iterate_batches

AT_A_TIME = 16
"""Number of circuits that are measured on a batch before the next batch."""
SAME = 1e-4
"""Distances and scores that differ by at most this count as equal, because of rounding."""


class Bench:
    """Measures circuits of a model on the same prompts.

    Args:
        ablation: what ablated edges carry, see `evaluate`.
        listener: called with the number of circuits measured since the last call, which may be a
            fraction.

    Attributes:
        pairs: the prompts, in the order of all results.
        full, empty: examples of the full model and of the empty circuit.
        whole: the circuit of all edges.
        has_differences: whether every prompt has a logit difference.

    Raises ValueError as `evaluate` does.
    """

    def __init__(
        self,
        model: CircuitModel,
        pairs: Sequence[Pair],
        ablation: Ablation | str = "interchange",
        batch_size: int = 64,
        listener: Callable[[float], object] | None = None,
    ) -> None:
        model.check_prompts(pairs)
        self.model, self.graph, self.listener = model, model.graph, listener
        self.ablation = Ablation.of(model, ablation, pairs, batch_size)
        self.batches = [batch.to(model.device) for batch in iterate_batches(pairs, batch_size)]
        self.pairs = [pair for batch in self.batches for pair in batch.pairs]
        self.run_pair = KeptPasses.where_they_fit(
            model, self.pairs, batch_size, corrupted=self.ablation.needs_corrupted
        )
        self.whole = Circuit(self.graph, frozenset(self.graph.edges))
        self._known: dict[bytes, ExampleMetrics] = {}
        self.full, self.empty = self._measure([Circuit(self.graph, frozenset())])
        of_both = torch.cat([self.full.logit_difference, self.empty.logit_difference])
        self.has_differences = not bool(of_both.isnan().any())

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def distance_name(self) -> str:
        return "KL" if self.model.output is Output.logits else "error"

    @property
    def score_name(self) -> str:
        if self.model.output is not Output.logits:
            return "share of right outputs"
        return "logit difference" if self.has_differences else "log probability of the answer"

    def measure(self, circuits: Iterable[Circuit]) -> list[ExampleMetrics]:
        """Measure circuits, on the examples in the order of `pairs`.

        A circuit is not run twice. Under interchange ablation dangling edges change no output, so
        circuits that differ in these alone are the same.
        """
        rest, found = iter(circuits), []
        while some := list(islice(rest, AT_A_TIME)):
            keys = [hashlib.sha256(bytes(self._connected(c).mask())).digest() for c in some]
            new = {k: c for k, c in zip(keys, some, strict=True) if k not in self._known}
            if self.listener is not None:
                self.listener(len(some) - len(new))
            measured = self._measure(list(new.values()))[1:] if new else []
            self._known.update(zip(new, measured, strict=True))
            found += [self._known[key] for key in keys]
        return found

    def _connected(self, circuit: Circuit) -> Circuit:
        return circuit.without_dangling() if self.ablation.kind == "interchange" else circuit

    def _measure(self, circuits: Sequence[Circuit]) -> list[ExampleMetrics]:
        done = 0

        def listen(num_prompts: int) -> None:
            nonlocal done
            self.listener(len(circuits) * (num_prompts - done) / len(self))
            done = num_prompts

        return measure_circuits(
            self.model, circuits, self.batches, self.ablation, listen if self.listener else None,
            self.run_pair,
        )  # fmt: skip

    def distance(self, examples: ExampleMetrics) -> Tensor:
        """[example], the distance from the full model: KL in nats, or the error of values."""
        return examples.kl if self.model.output is Output.logits else examples.error

    def score(self, examples: ExampleMetrics) -> Tensor:
        """[example], how well the task is done; higher is better.

        The logit difference or, if some prompts have no distractors, the log probability of the
        answer. For values, 1 if they are the full model's, else 0.
        """
        if self.model.output is not Output.logits:
            return examples.exact_match
        return examples.logit_difference if self.has_differences else examples.log_probability

    def recovered(self, examples: ExampleMetrics) -> float:
        """The mean score on a scale from the empty circuit (0) to the full model (1)."""
        return self._recovered(examples)(torch.arange(len(self))[None]).item()

    def recovered_interval(self, examples: ExampleMetrics) -> tuple[float, float]:
        return bootstrap_interval(self._recovered(examples), len(self))

    def _recovered(self, examples: ExampleMetrics) -> Callable[[Tensor], Tensor]:
        score, full, empty = map(self.score, (examples, self.full, self.empty))

        def statistic(rows: Tensor) -> Tensor:
            of_empty = empty[rows].mean(-1)
            return (score[rows].mean(-1) - of_empty) / (full[rows].mean(-1) - of_empty)

        return statistic

    def summary(self, examples: ExampleMetrics) -> dict[str, Any]:
        """Means and intervals of distance and exact match, and the recovered score; JSON values."""
        distance = self.distance(examples)
        return {
            "exact_match": examples.exact_match.mean().item(),
            "exact_match_interval": mean_interval(examples.exact_match),
            "distance": distance.mean().item(), "distance_interval": mean_interval(distance),
            "recovered": self.recovered(examples),
        }  # fmt: skip

    @torch.no_grad()
    def outputs(self, circuits: Iterable[Circuit]) -> list[Tensor]:
        """What circuits output, [example, feature].

        For logits, at the token where answers and distractors differ, those of all tokens that are
        an answer or a distractor of some prompt. For values, all of them, one token after another.
        """
        tokens = {t for p in self.pairs for t in (p.target_ids[p.contrast], *p.answer_ids,
                                                  *p.distractor_ids)}  # fmt: skip
        candidates = torch.tensor(sorted(tokens), device=self.model.device)
        longest = max(len(pair.target_ids) for pair in self.pairs)
        found = []
        for circuit in circuits:
            gates = torch.tensor(circuit.mask(), dtype=torch.float32, device=self.model.device)
            rows: list[Tensor] = []
            for batch in self.batches:
                _, corrupted = self.run_pair(batch)
                values = self.ablation.values(batch, corrupted)
                outputs = self.model.run_circuit(batch, gates, values).float()
                if self.model.output is Output.logits:
                    rows += outputs[batch.contrasts][:, candidates].cpu()
                    continue
                for part in outputs.split([len(pair.target_ids) for pair in batch.pairs]):
                    padded = part.new_zeros(longest, part.shape[-1])
                    padded[: len(part)] = part
                    rows.append(padded.flatten().cpu())
            found.append(torch.stack(rows))
            if self.listener is not None:
                self.listener(1)
        return found

    def answers(self) -> Tensor:
        """[example, token], the tokens or numbers to predict where `outputs` are taken."""
        if self.model.output is Output.logits:
            return torch.tensor([[float(p.target_ids[p.contrast])] for p in self.pairs])
        rows = [torch.tensor(p.target_values or p.target_ids).float() for p in self.pairs]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
