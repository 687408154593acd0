"""Agreement with results recorded from the published implementation."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgeprune.circuit import Circuit
from edgeprune.methods import hard_concrete
from edgeprune.methods.paper import circuit_above, deterministic_gates, penalty
from edgeprune.metrics import kl_per_token
from edgeprune.models.load import wrap_model
from edgeprune.prompts import Pair, collate

KINDS = ("edge", "node")
CASES = sorted(path.parent for path in GOLDEN.glob("*/meta.json"))
CASES += [Path(p) for p in os.environ.get("EDGEPRUNE_GOLDEN_CASES", "").split(":") if p]


class Case:
    """A recorded case with its model."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "tensors.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text())
        hf_model = AutoModelForCausalLM.from_pretrained(folder / "model")
        writers = "all" if self.meta["with_embedding_nodes"] else "none"
        self.model = wrap_model(hf_model, embedding_writers=writers)
        self.graph = self.model.graph
        clean, corrupted = self.tensors["input_ids"], self.tensors["corrupted_input_ids"]
        targets = tuple(range(clean.shape[1]))  # one per token, for the logits at every position
        pairs = zip(clean.tolist(), corrupted.tolist(), strict=True)
        self.batch = collate([Pair(tuple(a), tuple(b), targets) for a, b in pairs])
        self.state = {
            "edge_log_alpha": self.edges("edge_log_alpha"),
            "node_log_alpha": self.tensors["node_log_alpha"],
        }

    def edges(self, prefix: str) -> torch.Tensor:
        """Recorded tensors of all sites as one flat [edge]."""
        names = []
        for site in self.graph.sites:
            if site.num_edges:
                kinds = [".q", ".k", ".v"] if len(site.groups) == 3 else [""]
                names += [f"{prefix}.{site.name}{kind}" for kind in kinds]
        return torch.cat([self.tensors[name].flatten() for name in names])

    def logits(self, gates: dict[str, torch.Tensor], ablation_values) -> torch.Tensor:
        product = gates["edge"] * gates["node"][self.graph.edge_writers()]
        return self.model.run_circuit(self.batch, product, ablation_values)

    def recorded(self, name: str) -> torch.Tensor:
        return self.tensors[name].flatten(0, 1)

    def last_position_kl(self, reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        last = self.batch.cols == self.batch.cols.max()
        return kl_per_token(reference[last], logits[last]).mean()

    def lambdas(self, kind: str, recorded: dict) -> list[torch.Tensor]:
        values = [recorded[f"sparsity_lambda_{kind}s_{number}"] for number in (1, 2)]
        return [torch.tensor(value, requires_grad=True) for value in values]


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request) -> Case:
    return Case(request.param)


def close(got, expected, rtol: float = 0.0) -> None:
    got, expected = (torch.as_tensor(x, dtype=torch.float32) for x in (got, expected))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=rtol)


def test_reference_and_corrupted_activations(case):
    reference, corrupted = case.model.run_pair(case.batch)
    close(reference, case.recorded("teacher_logits"), 1e-4)
    outboxes = list(corrupted.embeddings[: len(case.graph.embedding_writers)])
    for layer, block in enumerate(case.model.architecture.blocks):
        outboxes += block.head_delta(corrupted.head_values[layer], None, centred=False)
        outboxes.append(corrupted.mlp_outputs[layer])
    close(torch.stack(outboxes), case.tensors["corrupted_outbox"], 1e-4)


def test_deterministic_gates(case):
    _, corrupted = case.model.run_pair(case.batch)
    gates = deterministic_gates(case.graph, case.state)
    recorded = case.meta["eval_soft"]
    with torch.no_grad():
        close(case.logits(gates, corrupted), case.recorded("eval_soft.logits"), 1e-4)
        for kind in KINDS:
            sparsity = hard_concrete.sparsity(gates[kind])
            close(sparsity, recorded[f"model_{kind}_sparsity"])
            target = case.meta[f"target_{kind}_sparsity"]
            lambdas = case.lambdas(kind, case.meta["lambda"])
            close(penalty(*lambdas, sparsity, target), recorded[f"{kind}_loss"])


def test_thresholds_and_circuit(case):
    recorded = case.meta["eval_binary"]
    gates = deterministic_gates(case.graph, case.state)
    threshold = hard_concrete.search_threshold(gates["edge"])
    close(threshold, recorded["edge_threshold"])
    close((gates["edge"] <= threshold).float().mean(), recorded["edge_sparsity"])
    if "pos_embeds" not in case.graph.writers:  # left out of the published node count
        close(hard_concrete.search_threshold(gates["node"]), recorded["node_threshold"])
    thresholds = {kind: recorded[f"{kind}_threshold"] for kind in KINDS}
    circuit = circuit_above(case.graph, gates, thresholds)
    assert circuit.edge_set == {tuple(edge) for edge in case.meta["edges"]}
    close(circuit.sparsity, recorded["effective_edge_sparsity"])


def test_binary_circuit(case):
    reference, corrupted = case.model.run_pair(case.batch)
    circuit = Circuit.from_edges(case.graph, case.meta["edges"])
    gates = torch.tensor(circuit.mask(), dtype=torch.float32)
    with torch.no_grad():
        logits = case.model.run_circuit(case.batch, gates, corrupted)
        zero = case.model.run_circuit(case.batch, gates, None)
    close(logits, case.recorded("eval_binary.logits"), 1e-4)
    close(zero, case.recorded("eval_binary_zero_ablation.logits"), 1e-4)
    kl = case.last_position_kl(reference, logits)
    close(kl, case.meta["eval_binary"]["kl_last_position"])


def test_training_losses_and_gradients(case):
    reference, corrupted = case.model.run_pair(case.batch)
    log_alpha = {kind: case.state[f"{kind}_log_alpha"].clone().requires_grad_() for kind in KINDS}
    noise = {"edge": case.edges("edge_uniform"), "node": case.tensors["node_uniform"]}
    gates = {kind: hard_concrete.sample(log_alpha[kind], noise[kind]) for kind in KINDS}
    lambdas = {kind: case.lambdas(kind, case.meta["lambda"]) for kind in KINDS}
    recorded = case.meta["train"]
    logits = case.logits(gates, corrupted)
    loss = kl = case.last_position_kl(reference, logits)
    for kind in KINDS:
        sparsity = hard_concrete.sparsity(gates[kind])
        close(sparsity, recorded[f"model_{kind}_sparsity"])
        part = penalty(*lambdas[kind], sparsity, case.meta[f"target_{kind}_sparsity"])
        close(part, recorded[f"{kind}_loss"])
        loss = loss + part
    loss.backward()
    close(logits, case.recorded("train.logits"), 1e-4)
    close(kl, recorded["kl_last_position"])
    close(loss, recorded["loss"])

    close(log_alpha["edge"].grad, case.edges("train.grad"), 1e-4)
    # The published Llama code detaches its only embedding writer.
    first = 1 if case.graph.embedding_writers == ("embeds",) else 0
    close(log_alpha["node"].grad[first:], case.tensors["train.grad.node"][first:], 1e-4)
    for kind in KINDS:
        expected = case.lambdas(kind, recorded["grad_lambda"])
        for got, value in zip(lambdas[kind], expected, strict=True):
            close(got.grad, value.detach(), 1e-4)
