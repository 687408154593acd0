"""One process of a run on random prompts, for test_distributed.py: writes its state to a file.

Arguments: JSON objects with `output`, and optionally `resume` (a folder of checkpoints), `until`
(the last step), `keep` (whether passes are kept), `model`, `shard` and `method`; the rest are
settings of the trainer.
"""

import json
import sys
from pathlib import Path

import test_llama
import torch
from conftest import random_gpt2, random_pairs
from safetensors.torch import save_file
from test_trainer import METHODS

from edgeprune.config import TrainerConfig
from edgeprune.engine import cache
from edgeprune.engine.ablation import Ablation
from edgeprune.models.load import wrap_model
from edgeprune.scale.world import World
from edgeprune.training.checkpoint import load_latest, save_checkpoint
from edgeprune.training.trainer import Trainer

STEPS = 20
SLOWLY = {
    "lagrangian": {"learning_rate": 0.1, "lr_warmup_steps": 0, "sparsity_warmup_steps": 10},
    "every_size": {"learning_rate": 0.1},
}
SLOWLY["nodes"] = SLOWLY["lagrangian"]


def untied_gpt2():
    """Its weights are not tied, although its configuration ties those of its meta model."""
    hf_model = random_gpt2()
    if hf_model.device.type != "meta":
        hf_model.lm_head.weight = torch.nn.Parameter(1.5 * hf_model.lm_head.weight.detach())
    return wrap_model(hf_model)


MODELS = {
    "gpt2": lambda: wrap_model(random_gpt2()),
    "untied": untied_gpt2,
    "qwen3": lambda: wrap_model(test_llama.random_llama(test_llama.FAMILIES["qwen3"])),
    "split": lambda: wrap_model(
        test_llama.random_llama(test_llama.FAMILIES["qwen3"]), split_kv_readers=True
    ),
}


def run(world: World, job: dict) -> None:
    job = dict(job)
    output, resume, until = (job.pop(key, None) for key in ("output", "resume", "until"))
    cache.MAX_KEPT = 2**30 if job.pop("keep", True) else 0
    make = MODELS[job.pop("model", "gpt2")]
    if shard := job.pop("shard", None):
        with torch.device("meta"):
            meta_model = make()
        model = world.shard(make, meta_model, offload=shard == "offload")
    else:
        model = make()
    pairs = random_pairs(13) + random_pairs(10, length=5, seed=1, predicted=2)
    name = job.pop("method", "lagrangian")
    make_method, settings = METHODS[name]
    settings = {**settings, **SLOWLY[name]}
    method = make_method(model.graph, seed=3, device=model.device, steps=STEPS, **settings)
    ablation = Ablation(model, "interchange", pairs)
    config = TrainerConfig(steps=STEPS, **job)
    trainer = Trainer(model, pairs, method, config, 3, ablation, world)
    if resume is not None:
        trainer.restore(load_latest(Path(resume)))
    value = 0.0
    while trainer.step < (until or STEPS):
        value = trainer.train_step().value
    if shard:  # no layer stays gathered
        for parameter in model.architecture.blocks[0].layer.parameters():
            assert parameter.to_local().numel() < parameter.numel()
    checkpoint = trainer.checkpoint()
    if world.is_rank_zero:
        save_checkpoint(Path(output), checkpoint)
    state = {**checkpoint.state, "value": torch.tensor(value)}
    save_file(state, f"{output}-{world.rank}.safetensors")
    world.any(False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with World.join("cpu", timeout=1) as joined:
        for argument in sys.argv[1:]:
            run(joined, json.loads(argument))
