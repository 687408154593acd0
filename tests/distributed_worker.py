"""One process of a run on random prompts, for test_distributed.py: writes its masks to a file.

Arguments: a JSON object with `steps`, `batch_size`, `output`, and perhaps `resume`, a checkpoint's
run directory; the rest of them are fields of TrainerConfig.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import random_gpt2, random_pairs
from safetensors.torch import save_file

from edgeprune.ablation import Ablation
from edgeprune.config import AblationConfig, TrainerConfig
from edgeprune.modeling import passes, wrap_model
from edgeprune.training.checkpoint import load_latest, save_checkpoint
from edgeprune.training.distributed import Processes
from edgeprune.training.trainer import Trainer

torch.set_num_threads(1)
processes = Processes.join("cpu", timeout=1)
for argument in sys.argv[1:]:
    job = json.loads(argument)
    output, resume, keep, until = (
        job.pop(k, default)
        for k, default in (("output", None), ("resume", None), ("keep", True), ("until", None))
    )
    passes.MOST_KEPT = 2**30 if keep else 0
    model = wrap_model(random_gpt2())
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
    state = trainer.checkpoint()
    if processes.is_first:
        save_checkpoint(Path(output), state)
    tensors = {**state.masks, "kl": torch.tensor(kl), **state.optimizer}
    save_file(tensors, f"{output}-{processes.rank}.safetensors")
    processes.any(False)
