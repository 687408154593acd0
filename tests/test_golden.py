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
from edgeprune.methods.masks import CircuitMasks, Gates, Thresholds, combined_gates
from edgeprune.methods.objective import SparsityConstraint
from edgeprune.models import wrap_model
from edgeprune.prompts import Pair, collate

CASES = sorted(path.parent for path in GOLDEN.glob("*/meta.json"))
CASES += [Path(p) for p in os.environ.get("EDGEPRUNE_GOLDEN_CASES", "").split(":") if p]


class Case:
    """A recorded case, and the same model here."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "tensors.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text())
        hf_model = AutoModelForCausalLM.from_pretrained(folder / "model")
        self.model = wrap_model(hf_model, embedding_writers=self.meta["with_embedding_nodes"])
        ids = (self.tensors["input_ids"].tolist(), self.tensors["corrupted_input_ids"].tolist())
        every = tuple(range(len(ids[0][0])))  # as many targets as tokens: all logits
        self.batch = collate([Pair(tuple(a), tuple(b), every) for a, b in zip(*ids, strict=True)])
        self.masks = CircuitMasks(self.model.graph, node_gates=True)
        self.masks.load_state_dict(
            {
                "edge_log_alpha": self.edges("edge_log_alpha"),
                "node_log_alpha": self.tensors["node_log_alpha"],
            }
        )

    def edges(self, prefix: str) -> torch.Tensor:
        """Recorded tensors of all sites as one flat [edge]."""
        parts = []
        for site in self.model.graph.sites:
            names = [f"{site.name}.{kind}" for kind in "qkv"] if len(site.groups) == 3 else [
                site.name
            ]  # fmt: skip
            parts += [self.tensors[f"{prefix}.{n}"].flatten() for n in names if site.num_edges]
        return torch.cat(parts)

    def logits(self, gates: Gates, closed) -> torch.Tensor:
        mixed = combined_gates(gates, self.masks.edge_writers)
        return self.model.run_circuit(self.batch, mixed, closed)

    def recorded(self, name: str) -> torch.Tensor:
        return self.tensors[name].flatten(0, 1)


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request) -> Case:
    return Case(request.param)


def close(got, wanted, relative: float = 0.0) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float32),
        torch.as_tensor(wanted, dtype=torch.float32),
        atol=1e-5,
        rtol=relative,
    )


def test_reference_and_corrupted_activations(case):
    reference, corrupted = case.model.run_pair(case.batch)
    close(reference, case.recorded("teacher_logits"), 1e-4)
    blocks = case.model.architecture.blocks
    recorded = case.tensors["corrupted_outbox"]
    first = 0
    if case.model.graph.embedding_writers:
        first = len(corrupted.embeddings)
        close(corrupted.embeddings, recorded[:first], 1e-4)
    step = case.model.graph.num_heads + 1
    for layer, block in enumerate(blocks):
        start = first + layer * step
        heads = block.head_delta(corrupted.head_values[layer], None, centred=False)
        close(heads, recorded[start : start + step - 1], 1e-4)
        close(corrupted.mlp_outputs[layer], recorded[start + step - 1], 1e-4)


def test_deterministic_gates(case):
    _, corrupted = case.model.run_pair(case.batch)
    gates = case.masks.deterministic()
    recorded = case.meta["eval_soft"]
    close(hard_concrete.sparsity(gates.edge), recorded["model_edge_sparsity"])
    close(hard_concrete.sparsity(gates.node), recorded["model_node_sparsity"])
    with torch.no_grad():
        close(case.logits(gates, corrupted), case.recorded("eval_soft.logits"), 1e-4)
        for kind in ("edge", "node"):
            target = case.meta[f"target_{kind}_sparsity"]
            loss = constraint(case, kind)(hard_concrete.sparsity(getattr(gates, kind)), target)
            close(loss, recorded[f"{kind}_loss"])


def constraint(case: Case, kind: str) -> SparsityConstraint:
    made = SparsityConstraint()
    for number in (1, 2):
        value = case.meta["lambda"][f"sparsity_lambda_{kind}s_{number}"]
        getattr(made, f"multiplier_{number}").data.fill_(value)
    return made


def test_thresholds_and_circuit(case):
    recorded = case.meta["eval_binary"]
    thresholds = case.masks.thresholds()
    close(thresholds.edge, recorded["edge_threshold"])
    if "pos_embeds" not in case.model.graph.writers:  # left out of the published node count
        close(thresholds.node, recorded["node_threshold"])
    circuit = case.masks.circuit_above(
        Thresholds(recorded["edge_threshold"], recorded["node_threshold"])
    )
    assert circuit.edge_set == {tuple(edge) for edge in case.meta["edges"]}
    close(circuit.sparsity, recorded["effective_edge_sparsity"])
    close(
        (case.masks.deterministic().edge <= thresholds.edge).float().mean(),
        recorded["edge_sparsity"],
    )


def test_binary_circuit(case):
    reference, corrupted = case.model.run_pair(case.batch)
    circuit = Circuit.from_edges(case.model.graph, case.meta["edges"])
    gates = Gates(torch.tensor(circuit.mask(), dtype=torch.float32), None)
    with torch.no_grad():
        logits = case.logits(gates, corrupted)
        zero = case.logits(gates, None)
    close(logits, case.recorded("eval_binary.logits"), 1e-4)
    close(zero, case.recorded("eval_binary_zero_ablation.logits"), 1e-4)
    close(last_position_kl(case, reference, logits), case.meta["eval_binary"]["kl_last_position"])


def last_position_kl(case: Case, reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    from edgeprune.metrics import kl_per_token

    last = case.batch.cols == case.batch.cols.max()
    return kl_per_token(reference[last], logits[last]).mean()


def test_training_losses_and_gradients(case):
    reference, corrupted = case.model.run_pair(case.batch)
    gates = Gates(
        hard_concrete.sample(case.masks.edge_log_alpha, case.edges("edge_uniform")),
        hard_concrete.sample(case.masks.node_log_alpha, case.tensors["node_uniform"]),
    )
    logits = case.logits(gates, corrupted)
    kl = last_position_kl(case, reference, logits)
    recorded = case.meta["train"]
    loss = kl
    constraints = {}
    for kind in ("edge", "node"):
        sparsity = hard_concrete.sparsity(getattr(gates, kind))
        close(sparsity, recorded[f"model_{kind}_sparsity"])
        constraints[kind] = constraint(case, kind)
        part = constraints[kind](sparsity, case.meta[f"target_{kind}_sparsity"])
        close(part, recorded[f"{kind}_loss"])
        loss = loss + part
    loss.backward()
    close(logits, case.recorded("train.logits"), 1e-4)
    close(kl, recorded["kl_last_position"])
    close(loss, recorded["loss"])

    close(case.masks.edge_log_alpha.grad, case.edges("train.grad"), 1e-4)
    node_grad, node_wanted = case.masks.node_log_alpha.grad, case.tensors["train.grad.node"]
    # the published Llama code detaches its only embedding writer
    skip = 1 if case.model.graph.embedding_writers == ("embeds",) else 0
    close(node_grad[skip:], node_wanted[skip:], 1e-4)
    for kind, made in constraints.items():
        for number in (1, 2):
            grad = getattr(made, f"multiplier_{number}").grad
            close(grad, recorded["grad_lambda"][f"sparsity_lambda_{kind}s_{number}"], 1e-4)
    case.masks.zero_grad()
