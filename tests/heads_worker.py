"""One process of a sharded model that is looked into in every way, for test_distributed.py.

Every process compares the results with those of the whole model.
"""

import test_llama
import torch
from conftest import random_gpt2, random_pairs
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from edgeprune.circuit import Circuit
from edgeprune.engine.ablation import Ablation
from edgeprune.evaluation.ablate import ablate
from edgeprune.evaluation.explain import explain
from edgeprune.evaluation.heads import score_heads
from edgeprune.evaluation.pushes import measure_pushes
from edgeprune.evaluation.tokens import attribute_tokens
from edgeprune.methods import ATTRIBUTIONS
from edgeprune.metrics import mean_kl, negative_logit_difference
from edgeprune.models.load import wrap_model
from edgeprune.scale.sharding import is_sharded
from edgeprune.scale.world import World
from edgeprune.scores import EdgeScores
from edgeprune.training.attributor import Attributor
from edgeprune.training.snapshots import Snapshots
from edgeprune.training.trainer import train

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
CHANGES = {"a1.h1": 0, "m0": IDS.flip(1), "a2.h0.pattern": lambda x: x / 2}
NAMES = ["a1.h0", "a2.h1.pattern", "m1.resid", "a2.h0.v"]
MODELS = {
    "gpt2": lambda: wrap_model(random_gpt2()),
    "gemma3": lambda: wrap_model(test_llama.random_llama(test_llama.FAMILIES["gemma3"])),
}


def results(model) -> list[torch.Tensor]:
    """Logits and activations of an intervention, scores of heads, what ablating some does, and to
    which tokens answers are due."""
    with torch.no_grad(), model.intervene(CHANGES) as run:
        logits, activations = run(IDS, NAMES)
    scores = score_heads(model, num_random=4, length=6).scores
    ablated = ablate(model, ["a0.h1", "m1"], random_pairs(4), kind="interchange", num_random=1)
    measures = [*ablated.ablated.measures.values(), *ablated.random[0].measures.values()]
    tokens = attribute_tokens(model, random_pairs(1)).answers[0].through["full model"]
    return [
        logits, *activations.values(), *(score.value for score in scores), *measures,
        tokens.tokens, tokens.nodes, *explain_circuit(model),
    ]  # fmt: skip


def explain_circuit(model) -> list[torch.Tensor]:
    """What cutting edges does, and the pushes of pairs."""
    pairs = random_pairs(4)
    values = torch.randn(2, model.graph.num_edges, generator=torch.Generator().manual_seed(0))
    circuit = EdgeScores(model.graph, values[0]).circuit(num_edges=60)
    parts = explain(model, circuit, pairs, max_edges=2).parts
    rises = [(each.in_circuit.rise.mean, each.in_full.rise.mean) for each in parts]
    pushes = measure_pushes(
        model, pairs[:2], [5, 50], Snapshots(torch.tensor([0, 5]), values), num_snapshots=1,
        objective=mean_kl, ablation=Ablation(model, "interchange", pairs),
        method={"seed": 0, "device": "cpu", "steps": 5, "learning_rate": 0.1, "temperature": 0.5,
                "smallest": 0.1},
    )  # fmt: skip
    return [torch.tensor(rises), pushes.values]


def edge_scores(model, world: World) -> dict[str, torch.Tensor]:
    """Scores by every attribution, of batches that the processes share; the last has one pair."""
    pairs, scores = random_pairs(2) + random_pairs(2, length=5, seed=1, predicted=2), {}
    few = [reader in ("m1", "resid_post") for _, reader in model.graph.edges]  # cutting is slow
    for method, make in ATTRIBUTIONS.items():
        attribution = make(
            model=model, pairs=pairs, ablation=Ablation(model, "interchange", pairs),
            objective=negative_logit_difference, world=world, method=method, batch_size=3,
            integration_steps=2, threshold=0.1,
            circuit=Circuit.from_mask(model.graph, few),
        )  # fmt: skip
        attributor = Attributor(attribution, "logit_difference")
        train(attributor)
        scores[method] = attributor.values
    return scores


def is_split(layer) -> bool:
    """Whether a process has nothing but its shard of the layer's weights."""
    return all(isinstance(parameter, DTensor) for parameter in layer.parameters())


def gather_alone(layer, gather=FSDPModule.unshard) -> None:
    """Gather a layer's weights; no others may be gathered."""
    assert all(is_split(other) for other in layers if other is not layer)
    gather(layer)


FSDPModule.unshard = gather_alone
torch.set_num_threads(1)
with World.join("cpu", timeout=1) as world:
    for make in MODELS.values():
        with torch.device("meta"):
            meta_model = make()
        sharded = world.shard(make, meta_model, offload=False)
        layers, whole = [block.layer for block in sharded.architecture.blocks], make()
        assert is_sharded(layers[0])
        for got, wanted in zip(results(sharded), results(whole), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        found = edge_scores(sharded, world)
        for method, wanted in edge_scores(whole, World()).items():
            error = (found[method] - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-5, (method, error)
        assert all(map(is_split, layers))
    world.any(False)
