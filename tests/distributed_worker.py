"""One process of a run on random prompts, for test_distributed.py: writes its masks to a file.

Arguments: JSON objects with `output`, and perhaps `resume` (a checkpoint's run directory), `until`
(a step), `keep` (passes), `model` and `shard`; the rest are fields of TrainerConfig.
"""

import json
import sys
from pathlib import Path

import test_llama
import torch
from conftest import random_gpt2, random_pairs
from safetensors.torch import save_file

from edgeprune.config import AblationConfig, TrainerConfig
from edgeprune.engine import cache as passes
from edgeprune.engine.ablation import Ablation
from edgeprune.models import wrap_model
from edgeprune.scale.world import World
from edgeprune.training.checkpoint import load_latest, save_checkpoint
from edgeprune.training.trainer import Trainer


def with_a_head_of_its_own():
    """As a checkpoint may be whose configuration, and so its shape, ties the matrices."""
    hf_model = random_gpt2()
    if hf_model.device.type != "meta":
        hf_model.lm_head.weight = torch.nn.Parameter(1.5 * hf_model.lm_head.weight.detach())
    return wrap_model(hf_model)


MODELS = {
    "gpt2": lambda: wrap_model(random_gpt2()),
    "untied": with_a_head_of_its_own,
    "qwen3": lambda: wrap_model(test_llama.random_llama(test_llama.FAMILIES["qwen3"])),
}

torch.set_num_threads(1)
with World.join("cpu", timeout=1) as processes:
    for argument in sys.argv[1:]:
        job = json.loads(argument)
        output, resume, until = (job.pop(key, None) for key in ("output", "resume", "until"))
        passes.MAX_KEPT = 2**30 if job.pop("keep", True) else 0
        make = MODELS[job.pop("model", "gpt2")]
        if shard := job.pop("shard", None):
            with torch.device("meta"):
                shape = make()
            model = processes.shard(make, shape, offload=shard == "offload")
        else:
            model = make()
        pairs = random_pairs(13) + random_pairs(10, length=5, seed=1, predicted=2)
        config = TrainerConfig(**{"steps": 20, "sparsity_warmup_steps": 10, **job})
        trainer = Trainer(
            model, pairs, config, target_sparsity=0.9, seed=3,
            ablation=Ablation(model, AblationConfig(), pairs), processes=processes,
        )  # fmt: skip
        if resume is not None:
            trainer.restore(load_latest(Path(resume))[0])
        kl = 0.0
        while trainer.step < (until or config.steps):
            kl = trainer.train_step().kl
        if shard:  # nothing stays gathered
            for parameter in model.architecture.blocks[0].layer.parameters():
                assert parameter.to_local().numel() < parameter.numel()
        state = trainer.checkpoint()
        if processes.is_rank_zero:
            save_checkpoint(Path(output), state)
        tensors = {**state.masks, "kl": torch.tensor(kl), **state.optimizer}
        save_file(tensors, f"{output}-{processes.rank}.safetensors")
        processes.any(False)
