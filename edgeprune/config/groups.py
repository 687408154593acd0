"""Groups of settings: model, task, ablation, trainer, tracker and launcher."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgeprune.config.settings import (
    CUSTOM,
    DEFAULT_CHOICE,
    DTYPES,
    FREE,
    OBJECTIVES,
    SPLITS,
    WARMUPS,
    Settings,
    is_given,
    setting,
    to_dict,
)
from edgeprune.errors import ConfigError


@dataclass
class ModelConfig(Settings):
    """Which language model, and how it is loaded."""

    prefix = "model."

    name: str = setting("", resumable=True)
    """Shown to people and part of the default run directory."""
    path: str = setting("", digest="model")
    """Hub name; a folder with config.json, tokenizer.json and safetensors; a .gguf file; a Tracr
    folder; or a model shipped with the project: `embedded`, `tracr/NAME`."""
    device: str = setting("auto", **FREE)
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: str = setting("float32", choices=DTYPES)
    """float32, bfloat16 or float16."""
    attention: str = "auto"
    """Attention implementation of the transformers library: sdpa, eager, flash_attention_2, ...;
    auto is sdpa, or eager where the model caps its attention scores. In bfloat16 on a CPU eager is
    5 to 9 % faster, but takes more memory for long prompts."""
    bits: int | None = setting(None, choices=(4, 8))
    """4 or 8: store the weights in that many bits (bitsandbytes; Llama family)."""
    fused: bool = False
    """On a GPU, in bfloat16: normalise and project the heads' inputs in Triton kernels, which moves
    less memory. No effect elsewhere."""
    embedding_writers: str = setting("all", choices=("all", "tokens", "none"))
    """Which embeddings are writers with edges: all; only the tokens'; none. The others always flow.
    With tokens, a GPT-2's position embedding has no edges, as in EAP-IG and MIB."""
    split_kv_readers: bool = False
    """Whether query heads that share keys and values have key and value readers of their own, as in
    EAP-IG and MIB."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fused and self.dtype != "bfloat16":
            raise ConfigError(
                f"model.fused=true needs bfloat16, got model.dtype={self.dtype}; give "
                "model.dtype=bfloat16 or leave it out"
            )

    @property
    def title(self) -> str:
        """Name for people; a user's own model is called by its folder or file."""
        return Path(self.path).name if self.name == CUSTOM and self.path else self.name

    def require_path(self) -> None:
        """Raise ConfigError if no model is named."""
        if not self.path:
            raise ConfigError("model.path is empty; give a hub name or a folder, or model=<name>")
        if self.path == "tracr/":
            raise ConfigError("model=tracr needs the name of a program, such as model.name=reverse")


@dataclass
class TaskConfig(Settings):
    """Where the clean/corrupted prompts come from."""

    prefix = "task."

    name: str = ""
    """One of the tasks that `edgeprune prepare` writes, or any name for your own file."""
    path: str | None = setting(None, digest="data")
    """JSONL file of prompts; null: generate the task's prompts."""
    train: int = setting(200, at_least=0)
    """Number of training prompts to generate."""
    validation: int = setting(200, at_least=0)
    """Number of validation prompts to generate."""
    test: int = setting(1000, at_least=0)
    """Number of test prompts to generate."""
    max_length: int | None = setting(None, at_least=1)
    """Leave out prompts with more tokens than this."""
    seed: int = 0
    """Seed of the generated prompts; separate from the run's seed, so that runs share data."""

    @property
    def title(self) -> str:
        """Name for people; a user's own data is called by its file."""
        return Path(self.path).stem if self.name == CUSTOM and self.path else self.name

    @property
    def sizes(self) -> dict[str, int]:
        """Number of prompts to generate per split."""
        return {split: getattr(self, split) for split in SPLITS}

    def require_path(self) -> None:
        """Raise ConfigError for a custom task without a file."""
        if self.name == CUSTOM and self.path is None:
            raise ConfigError(f"task.path is missing: task={CUSTOM} reads your own file")


@dataclass
class AblationConfig(Settings):
    """What a closed edge carries."""

    prefix = "ablation."

    kind: str = setting("interchange", choices=("interchange", "zero", "mean"))
    """interchange: the value on the corrupted prompt; zero: nothing, not even the head's share of
    the attention output's bias; mean: a mean over the training prompts."""
    per_position: bool = True
    """For mean: one mean per position instead of one over all positions."""


@dataclass
class TrainerConfig(Settings):
    """Settings that all training methods share."""

    prefix = "trainer."
    default_choice: ClassVar[tuple[str, float | None]] = DEFAULT_CHOICE
    """See `PruneConfig.choice`."""

    method: str = setting("", choices=("", "every_size", "lagrangian", "priced"))
    """The method, which `trainer=NAME` chooses together with its settings."""
    steps: int = setting(400, at_least=1)
    """Optimisation steps."""
    batch_size: int = setting(16, at_least=1)
    """Pairs per step."""
    learning_rate: float = setting(0.3, above=0)
    """Largest learning rate, which falls linearly to 0 at the end. With trainer=every_size, fewer
    steps need a larger one (0.8 for 100 steps), because the scores have to move as far."""
    objective: str = setting("kl", choices=OBJECTIVES)
    """What is minimised: kl, the KL divergence from the full model (or where outputs are values,
    the unexplained variance); logit_difference, the squared error of the logit difference between
    answers and distractors; max_logit_difference, minus that logit difference; cross_entropy, of
    the text to predict."""
    micro_batch_size: int | None = setting(None, **FREE, at_least=1)
    """Pairs run at a time, to save memory; null: the whole batch."""
    recompute: bool = setting(False, **FREE)
    """Recompute blocks in the backward pass: slower, but needs less memory."""
    cuda_graph: bool = setting(False, **FREE)
    """On a GPU: record the circuit's forward and backward pass once per batch shape and replay it,
    which saves the time Python takes to launch many small operations. For small models."""
    checkpoint_every: int = setting(100, **FREE, at_least=1)
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self) is not TRAINERS.get(self.method, TrainerConfig):
            raise ConfigError(
                f"trainer.method={self.method} needs other settings; give trainer=NAME"
            )

    def check_start(self) -> None:
        """Raises ConfigError if learning cannot start from the ranking of other scores."""
        if self.method != "every_size":
            raise ConfigError("start= needs trainer=every_size or trainer=short")

    def repeats(self, num_pairs: int) -> bool:
        """Whether training uses any pair more than once, given their number."""
        return self.steps * self.batch_size > num_pairs

    def method_settings(self, asked: float | None) -> dict[str, Any]:
        """Keyword arguments of the method's constructor.

        Args:
            asked: sparsity of the circuit asked for, if any; a target that is not set follows it.
        """
        shared = ("method", "batch_size", "objective", "micro_batch_size", "recompute",
                  "cuda_graph", "checkpoint_every")  # fmt: skip
        return {key: value for key, value in to_dict(self).items() if key not in shared}


@dataclass
class EverySizeConfig(TrainerConfig):
    """Scores that rank the edges for circuits of every size, by training at random sizes."""

    method: str = "every_size"
    temperature: float = setting(0.5, above=0)
    """Temperature at the end: how gradually gates close as scores fall. It starts at four times
    this."""
    smallest: float = setting(0.005, above=0, at_most=0.5)
    """Smallest size that is trained, as a share of the edges; smaller circuits are not ranked."""


@dataclass
class HardConcreteConfig(TrainerConfig):
    """Settings of methods that sample hard-concrete gates."""

    default_choice = ("threshold", None)

    lr_warmup_steps: int = setting(0, at_least=0)
    """Learning rates rise linearly over these steps, then fall linearly to 0."""
    init_mean: float = setting(1.0)
    """Mean of log alpha at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr_warmup_steps", "sparsity_warmup_steps"):
            given = getattr(self, name, 0)
            if given > self.steps:
                raise ConfigError(
                    f"trainer.{name}={given} must be at most trainer.steps={self.steps}"
                )


@dataclass
class LagrangianConfig(HardConcreteConfig):
    """Hard-concrete gates held at a rising sparsity by learned multipliers (Edge Pruning)."""

    method: str = "lagrangian"
    start_sparsity: float = 0.0
    """Target sparsity at step 0."""
    target_sparsity: float | None = None
    """Target sparsity after the warm-up, which may exceed 1 to push harder; null: the sparsity of
    the circuit asked for."""
    sparsity_warmup_steps: int = setting(0, at_least=0)
    """Steps over which the target rises."""
    warmup: str = setting("linear", choices=WARMUPS)
    """Shape of that rise: linear, or logarithmic in 1 - target, so that the number of open edges
    falls by the same factor each step; then targets are at most 1."""
    weight_decay: float = setting(0.0, at_least=0)
    """Weight decay of AdamW, for log alpha and the multipliers."""
    lambda_learning_rate: float = setting(0.8, above=0)
    """Learning rate of the multipliers lambda_1 and lambda_2, which are maximised."""
    node_gates: bool = False
    """Whether writers have gates too."""
    start_node_sparsity: float = 0.0
    """Target sparsity of the node gates at step 0."""
    target_node_sparsity: float = 0.7
    """Target sparsity of the node gates after the warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("start_sparsity", "target_sparsity", "start_node_sparsity", "target_node_sparsity")
        highest = max(getattr(self, name) or 0.0 for name in names)
        if self.warmup == "logarithmic" and highest > 1:
            raise ConfigError(f"trainer.warmup=logarithmic needs targets up to 1, got {highest}")

    def method_settings(self, asked: float | None) -> dict[str, Any]:
        settings = super().method_settings(asked)
        if self.target_sparsity is None:
            settings["target_sparsity"] = asked
        return settings


@dataclass
class PricedConfig(HardConcreteConfig):
    """Hard-concrete gates with a price per open edge, where the circuit's size is unknown."""

    method: str = "priced"
    adam_epsilon: float = setting(1e-8, above=0)
    """Adam divides gradients by their size plus this, so gradients far below it move little."""
    edge_price: float = setting(0.01, above=0)
    """What each edge that is expected to be open adds to the loss."""


TRAINERS = {
    "every_size": EverySizeConfig,
    "lagrangian": LagrangianConfig,
    "priced": PricedConfig,
}
"""Settings class per training method."""


@dataclass
class TrackerConfig(Settings):
    """Where metrics go in addition to metrics.jsonl."""

    prefix = "tracker."

    kind: str = setting("none", **FREE, choices=("none", "wandb"))
    """none, or wandb (offline without an API key)."""
    project: str = setting("edgeprune", **FREE)
    """wandb project."""


@dataclass
class LauncherConfig(Settings):
    """The processes of a run."""

    prefix = "launcher."

    processes: int | None = setting(1, **FREE, at_least=1)
    """Number of processes that `accelerate launch` starts on this machine; null: one per GPU."""
    shard: bool = setting(False, **FREE)
    """Split the model's layers over the processes (FSDP2), for models too large for one."""
    offload: bool = setting(False, **FREE)
    """With shard: keep weights that are not in use in CPU memory."""
    timeout: int = setting(30, **FREE, at_least=1)
    """Minutes after which a process that waits for another gives up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload and not self.shard:
            raise ConfigError("launcher.offload=true needs launcher.shard=true")

    def check_shard(self, model: ModelConfig, others: Mapping[str, Any] | None = None) -> None:
        """Raise ConfigError if shard is set with what needs the whole model in one process.

        `others` are such settings besides the model's, by name.
        """
        settings = {**(others or {}), "model.fused=": model.fused, "model.bits=": model.bits}
        given = [name for name, value in settings.items() if is_given(value)]
        if self.shard and given:
            raise ConfigError(f"launcher.shard=true does not work with {given[0]}; leave out one")
