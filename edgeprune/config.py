"""Every setting, as dataclasses that validate themselves. Hydra fills them; torch is not imported.

The string below a field is its help text. A field's metadata, set by `setting`, states its range,
whether it may change when a run is resumed, and whether it distinguishes experiments in a report.
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

from edgeprune.errors import ConfigError
from edgeprune.paths import require_utf8

MAX_EVALUATION_BATCH = 64
"""Default number of pairs per forward pass without gradients."""

DTYPES = ("float32", "bfloat16", "float16")
OBJECTIVES = ("kl", "logit_difference", "max_logit_difference", "cross_entropy")
ATTRIBUTIONS = (
    "eap", "eap_ig", "eap_ig_activations", "clean_corrupted", "relp", "gim", "gates", "exact",
    "acdc",
)  # fmt: skip
AT_CLEAN = ("eap", "relp", "gim")
"""The methods of `attribute` whose gradient is taken at the clean prompts alone."""
CUTTING = ("exact", "acdc")
"""The methods of `attribute` that cut edges."""
TOKEN_TARGETS = {
    "logit": "the answer's logit",
    "probability": "the answer's probability",
    "contrast": "the answer's logit minus the distractor's",
}
"""The scores of an answer that `tokens` attributes."""
WARMUPS = ("linear", "logarithmic")
DRAWINGS = ("pdf", "svg", "png", "dot")
"""File formats of drawings."""

CUSTOM = "custom"
"""Name of the task and of the model for a user's own `task.path` or `model.path`."""

LESS_MEMORY = (
    "Run fewer examples at a time (trainer.micro_batch_size, or more processes; for evaluate: "
    "batch_size), recompute blocks in the backward pass (trainer.recompute=true), store the "
    "weights in fewer bits (model.dtype=bfloat16, model.bits=4), or split them over processes "
    "(launcher.shard=true, launcher.offload=true)"
)
"""Advice for errors about memory."""

SIZES = ("sparsity", "num_edges", "max_kl", "min_exact_match")
"""Settings that choose the size of a circuit; at most one is given."""

DEFAULT_CHOICE = ("max_share_lost", 0.05)
"""The default way to choose a circuit: the smallest whose KL is at most this fraction of the empty
circuit's. Unlike a limit on the KL, it means the same for every model and task; unlike a limit on
exact match, few edges can meet it even where the model itself is uncertain."""

SPLITS = ("train", "validation", "test")

FREE = {"resumable": True, "distinguishes": False}
"""Metadata of settings that do not change what is learned, see `setting`."""


def setting(default: Any, **metadata: Any) -> Any:
    """A field of a settings class.

    Args:
        default: its default value; a class or function is called to make one.
        metadata: `resumable=True` if a run may be resumed with another value;
            `distinguishes=False` if runs with different values are the same experiment in a report;
            `digest` ("model" or "data") if that digest of the run identifies the value, wherever it
            lies; `hidden=True` if users do not set it; the bounds `at_least`, `at_most`, `above`;
            and the `choices` of a value.
    """
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """Base of all settings classes: checks every field against its metadata.

    In text that begins with `~/` or `~name/`, this is replaced by the home directory.
    """

    prefix = ""

    def __post_init__(self) -> None:
        """Raise ConfigError, which names the setting, for a value that cannot be used."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, (ModelConfig, TaskConfig)):
                value.require_path()
            elif value is not None:
                listed = [_expand(v) for v in (value if isinstance(value, list) else [value])]
                setattr(self, entry.name, listed if isinstance(value, list) else listed[0])
                bounds = ("choices", "at_least", "at_most", "above")
                choices, least, most, above = map(entry.metadata.get, bounds)
                rules = {
                    f"one of {choices}": not choices or {*listed} <= {*choices},
                    "finite": not isinstance(value, float) or math.isfinite(value),
                    f"at least {least}": least is None or value >= least,
                    f"at most {most}": most is None or value <= most,
                    f"greater than {above}": above is None or value > above,
                }
                broken = [rule for rule, holds in rules.items() if not holds]
                if broken:
                    raise ConfigError(f"{self.prefix}{entry.name}={value} must be {broken[0]}")
        sizes = {name: getattr(self, name, None) for name in SIZES}
        given = [f"{name}={value}" for name, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(
                f"got {' and '.join(given)}; give only one; where an experiment sets the other, "
                f"add {given[0].split('=')[0]}=null"
            )


def _expand(value: Any) -> Any:
    """A value with the home directory in place of a leading `~/`; raises ConfigError for text that
    is not UTF-8."""
    if not isinstance(value, str):
        return value
    require_utf8(value)
    return os.path.expanduser(value) if re.match(r"~\w*/", value) else value


# ---------------------------------------------------------------------------------------- groups


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
    auto is sdpa, or eager where the model caps its attention scores."""
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
    """Largest learning rate; in the end it falls linearly to 0. With trainer=every_size, fewer
    steps need a larger one (0.8 for 100), because scores have the same way to go."""
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
    """How gradually gates close with falling scores, at the end; four times that at the start."""
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
    """Adam divides a gradient by its size plus this; gradients far below it move slowly."""
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


# -------------------------------------------------------------------------------------- commands


@dataclass
class RunConfig(Settings):
    """What makes a run: `prune` and `attribute` differ in how edges are scored."""

    model: ModelConfig = setting(ModelConfig)
    task: TaskConfig = setting(TaskConfig)
    ablation: AblationConfig = setting(AblationConfig)
    launcher: LauncherConfig = setting(LauncherConfig)
    sparsity: float | None = setting(None, at_least=0, at_most=1)
    """Fraction of the edges to remove, exactly."""
    num_edges: int | None = setting(None, at_least=0)
    """Number of edges to keep, exactly."""
    max_kl: float | None = setting(None, above=0)
    """Choose the smallest circuit whose KL on the validation prompts is at most this, in nats; a
    clean-up comes later and may add to it."""
    min_exact_match: float | None = setting(None, above=0, at_most=1)
    """Choose the smallest circuit that gives the full model's answer on at least this fraction of
    the validation prompts. Without any of these four settings: the smallest circuit whose KL is at
    most 5 % of the empty circuit's; with trainer=paper or tracr one as sparse as the gates."""
    cleanup: float | None = setting(None, at_least=0)
    """At the end, remove edges as long as all removals together move the circuit, on the training
    prompts, no farther from the full model than this: KL in nats above its own, or an absolute
    error where outputs are values. null: no clean-up."""
    run_dir: str = setting("", **FREE)
    """Directory of the run: absent, empty, or with resume=auto or overwrite=true an earlier run."""
    resume: str = setting("never", **FREE, choices=("never", "auto"))
    """auto: continue from the last checkpoint in run_dir, if there is one."""
    overwrite: bool = setting(False, **FREE)
    """Replace the run in run_dir, as a whole, once model and data of the new one are loaded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run_dir:
            raise ConfigError("run_dir is empty; name a folder, such as run_dir=runs/mine")
        if self.overwrite and self.resume == "auto":
            raise ConfigError("overwrite=true replaces what resume=auto would continue; give one")
        if self.task.path is None and self.task.train < 1:
            raise ConfigError(f"task.train={self.task.train} must be at least 1")

    @property
    def choice(self) -> tuple[str, float | None]:
        """How the circuit is chosen: one of `SIZES` and its value, `DEFAULT_CHOICE`, or "threshold"
        and None."""
        return given_size(self) or self.default_choice

    @property
    def title(self) -> str:
        """Name for people, such as 'ioi in embedded'."""
        return f"{self.task.title} in {self.model.title}"


@dataclass
class PruneConfig(RunConfig):
    """Rank the edges of a model by how much a task needs them, and choose a circuit."""

    trainer: TrainerConfig = setting(TrainerConfig)
    tracker: TrackerConfig = setting(TrackerConfig)
    seed: int = setting(0, distinguishes=False, at_least=0, at_most=2**31 - 1)
    """Seed of the initial values, the noise and the order of the data."""
    start: str | None = None
    """With trainer=every_size: a run, such as one of `edgeprune attribute`, whose ranking learning
    starts from; null: from scratch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.sparsity, self.num_edges, getattr(self.trainer, "target_sparsity", 1.0))
        if sizes == (None, None, None):
            raise ConfigError(
                "the published method aims at one sparsity: give sparsity=, num_edges= or "
                "trainer.target_sparsity="
            )
        one_process = {
            "cleanup=": self.cleanup, "trainer.cuda_graph=": self.trainer.cuda_graph,
            "model.fused=": self.model.fused, "model.bits=": self.model.bits,
        }  # fmt: skip
        given = [name for name, value in one_process.items() if value not in (None, False)]
        if self.launcher.shard and given:
            raise ConfigError(f"launcher.shard=true does not work with {given[0]}; leave out one")

    @property
    def default_choice(self) -> tuple[str, float | None]:
        """See `choice`."""
        return self.trainer.default_choice

    @property
    def method_name(self) -> str:
        """The method that scores the edges."""
        return self.trainer.method

    @property
    def label(self) -> str:
        """What the run is called in pictures."""
        return f"{self.title}, seed {self.seed}"

    @property
    def variant(self) -> str:
        """How the run differs from others of its task and model."""
        return f"{self.trainer.method}, seed {self.seed}"

    @property
    def evaluation_batch_size(self) -> int:
        """Pairs per pass without gradients, which needs half the memory of one with them."""
        trainer = self.trainer
        in_training = min(trainer.batch_size, trainer.micro_batch_size or trainer.batch_size)
        return min(MAX_EVALUATION_BATCH, 2 * in_training)


@dataclass
class AttributeConfig(RunConfig):
    """Score the edges of a model without learning (EAP, EAP-IG, ACDC), and choose a circuit."""

    method: str = setting("eap_ig", choices=ATTRIBUTIONS)
    """By the gradient of the metric: eap, at the clean prompts (attribution patching); eap_ig,
    integrated from corrupted to clean token embeddings; eap_ig_activations, from corrupted to clean
    outputs of one layer after another; clean_corrupted, at the clean and the corrupted prompts;
    gates, with all gates half open. At the clean prompts, by other rules than the gradient's: relp,
    relevance patching; gim, corrected for attention that moves elsewhere. By cutting edges, which
    runs the model once per edge: exact, one edge at a time; acdc, from the output backwards, so
    that what does not matter stays cut."""
    metric: str = setting("kl", choices=("kl", "logit_difference"))
    """What edges are scored by: kl, the KL divergence from the full model (or where outputs are
    values, the unexplained variance); logit_difference, between answers and distractors."""
    steps: int = setting(5, at_least=1)
    """Number of points over which eap_ig, eap_ig_activations and gates integrate."""
    threshold: float = setting(0.01, above=0)
    """For acdc: an edge stays cut if the metric gets worse by less than this."""
    circuit: str | None = None
    """For exact and acdc: a run directory or circuit file, whose edges alone are cut; null: all."""
    batch_size: int = setting(16, at_least=1)
    """Pairs run at a time; where outputs are values, all are."""
    trainer: Any = setting(None, hidden=True)
    """Not used: what an experiment sets for `prune`."""

    def __post_init__(self) -> None:
        self.trainer = None
        super().__post_init__()
        if self.method in AT_CLEAN and self.metric == "kl":
            raise ConfigError(
                f"method={self.method} with metric=kl scores all edges 0, since the KL has no "
                "gradient at the clean prompts; give metric=logit_difference or method=eap_ig"
            )
        if self.circuit is not None and self.method not in CUTTING:
            raise ConfigError(f"circuit= is for method={' and '.join(CUTTING)}, got {self.method}")
        if self.launcher.shard:
            raise ConfigError("launcher.shard=true is for `edgeprune prune`; leave it out")

    @property
    def default_choice(self) -> tuple[str, float | None]:
        """See `choice`."""
        return ("threshold", None) if self.method == "acdc" else DEFAULT_CHOICE

    @property
    def method_name(self) -> str:
        """The method that scores the edges."""
        return self.method

    @property
    def label(self) -> str:
        """What the run is called in pictures."""
        return f"{self.title}, {self.method}"

    @property
    def variant(self) -> str:
        """How the run differs from others of its task and model."""
        return f"{self.method} by {self.metric}"

    @property
    def evaluation_batch_size(self) -> int:
        """Pairs per pass without gradients, which needs half the memory of one with them."""
        return min(MAX_EVALUATION_BATCH, 2 * self.batch_size)


@dataclass
class ExportConfig(Settings):
    """Choose a circuit from a run's scores and write it as edges.json or as an EAP-IG graph."""

    run: str = ""
    """Run directory; or a circuit file, to convert it, or to cut another size from its scores."""
    checkpoint: int | None = None
    """Step of the checkpoint; null: the last."""
    sparsity: float | None = setting(None, at_least=0, at_most=1)
    """Fraction of the edges to remove, exactly."""
    num_edges: int | None = setting(None, at_least=0)
    """Number of edges to keep, exactly."""
    max_kl: float | None = setting(None, above=0)
    """Choose the smallest circuit whose KL on the run's validation prompts is at most this."""
    min_exact_match: float | None = setting(None, above=0, at_most=1)
    """Choose the smallest circuit that gives the full model's answer on at least this fraction of
    the validation prompts. Without any of these four settings: as the run asked for."""
    threshold: bool = False
    """Find a threshold by binary search, for gates of the published method or of trainer=tracr."""
    choose: str = setting("best", choices=("best", "greedy"))
    """best: the edges of the highest scores; greedy: grow the circuit from the output, adding the
    best edge into a node that already has an edge to follow, as EAP-IG and MIB do."""
    cleanup: float | None = setting(None, at_least=0)
    """Then remove edges as long as all removals together move the circuit, on the training prompts,
    no farther from the full model than this: KL in nats above its own, or an absolute error where
    outputs are values. null: no clean-up."""
    format: str | None = setting(None, choices=("edges", "circuit", "eap_json", "eap_pt"))
    """edges: [writer, reader] pairs; circuit: these with graph and origin; eap_json, eap_pt: the
    graphs of EAP-IG and MIB; null: eap_pt where output ends in .pt, else edges."""
    output: str | None = None
    """File to write, outside of run directories; null: the run's edges.json and circuit.json, or
    its graph.json or graph.pt."""
    model: ModelConfig | None = None
    """The model of a circuit file that does not identify it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.threshold and given:
            raise ConfigError(f"threshold=true finds the size itself; leave out {given[0]}")


@dataclass
class EvaluateConfig(Settings):
    """Measure a circuit, the full model and the empty circuit on the same prompts."""

    circuit: str = ""
    """Run directory or circuit file."""
    model: ModelConfig | None = None
    """null: the model in which the circuit was found."""
    task: TaskConfig | None = None
    """null: the task on which it was found."""
    ablation: AblationConfig | None = None
    """null: the ablation with which it was found, or interchange."""
    split: str = setting("test", choices=SPLITS)
    """Which prompts."""
    batch_size: int | None = setting(None, at_least=1)
    """Pairs per forward pass; null: twice as many as in the run's training, or 64."""
    head_permuted: int = setting(0, at_least=0)
    """Number of head-permuted circuits to measure for comparison: the heads of each layer are
    shuffled, so they have equally many edges and are equally well connected."""
    output: str | None = None
    """JSON file to write. null: evaluation-<split>.json next to the circuit if model, prompts and
    ablation are those of its run, otherwise none."""


@dataclass
class TestConfig(Settings):
    """Test a circuit as a sceptic would; several circuits: each on the others' prompts."""

    circuits: list[str] = setting(list)
    """Run directory or circuit file; with several of one model, each circuit is measured on, and
    cut out of the model on, the prompts of every other."""
    model: ModelConfig | None = None
    """null: the model in which the circuit was found."""
    task: TaskConfig | None = None
    """null: the task on which it was found."""
    ablation: AblationConfig | None = None
    """null: the ablation with which it was found, or interchange."""
    split: str = setting("test", choices=SPLITS)
    """Which prompts."""
    prompts: int = setting(100, at_least=2)
    """Number of prompts, drawn at random; more make intervals narrower and tests more powerful."""
    random_circuits: int = setting(100, at_least=1)
    """Number of random circuits, and of random edges, to compare with. Fewer than 29 are too
    few for a verdict."""
    repeat: str | None = None
    """bootstrap:N learns N times again from bootstrap samples of the training prompts, seeds:N with
    other seeds, templates:N from random halves of the templates, to see how stable the circuit is.
    What has been learned is kept in the run."""
    launcher: LauncherConfig = setting(partial(LauncherConfig, timeout=24 * 60))
    """Several processes share the repetitions."""
    batch_size: int | None = setting(None, at_least=1)
    """Pairs per forward pass; null: twice as many as in the run's training, or 64."""
    seed: int = 0
    """Of the prompts, the random circuits and the random sets of nodes."""
    output: str | None = None
    """Folder to write; an earlier result there is replaced. null: test.json and test.png next to
    the circuit if model, prompts and ablation are those of its run, otherwise none; with several
    circuits: specificity, next to the first run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeat is not None:
            known = re.fullmatch(r"(bootstrap|seeds|templates):[0-9]+", self.repeat)
            if not known or self.repeats[1] < 2:
                raise ConfigError(
                    f"repeat={self.repeat} must be bootstrap:N, seeds:N or templates:N, with N at "
                    "least 2"
                )
            if len(self.circuits) > 1:
                raise ConfigError("repeat= takes one run; test the runs one after another")
            if self.repeats[0] == "templates" and self.task is not None:
                raise ConfigError("repeat=templates measures the run's own prompts; omit task=")
        if self.launcher.shard:
            raise ConfigError("launcher.shard=true is for `edgeprune prune`; leave it out")

    @property
    def repeats(self) -> tuple[str, int]:
        """What differs between repetitions, "bootstrap", "seeds" or "templates"; their number."""
        kind, _, number = (self.repeat or "none:0").partition(":")
        return kind, int(number)


@dataclass
class ExplainConfig(Settings):
    """Find out what each edge of a circuit is for, and how it got there."""

    circuit: str = ""
    """Run directory or circuit file."""
    model: ModelConfig | None = None
    """null: the model in which the circuit was found."""
    task: TaskConfig | None = None
    """null: the task on which it was found."""
    ablation: AblationConfig | None = None
    """null: the ablation with which it was found, or interchange."""
    split: str = setting("test", choices=SPLITS)
    """On which prompts edges are cut."""
    prompts: int = setting(100, at_least=2)
    """Number of prompts, drawn at random."""
    edges: int | None = setting(None, at_least=1)
    """Number of edges, and of nodes, to cut, the highest-ranked first; null: all of the circuit."""
    pairs: int = setting(200, at_least=0)
    """Number of training pairs, drawn at random, whose pushes on the edges are measured, in a run
    with trainer=every_size; 0: none."""
    snapshots: int = setting(10, at_least=2)
    """Number of the run's snapshots at which they are measured; each pair takes a forward and a
    backward pass at each."""
    verify: int = setting(0, at_least=0)
    """Number of seeds with which the run is trained again, without the training pairs that pushed
    an edge most and without as many random ones, to see whether the edge falls; 0: none. All
    training pairs are then measured."""
    verify_edges: int = setting(5, at_least=1)
    """Number of edges for which this is tried, those whose cut does most; one training each."""
    verify_share: float = setting(0.25, above=0, at_most=0.9)
    """Share of the training pairs that are left out."""
    batch_size: int | None = setting(None, at_least=1)
    """Pairs per forward pass; null: twice as many as in the run's training, or 64."""
    seed: int = 0
    """Of the prompts, the pairs and the random edges."""
    output: str | None = None
    """JSON file to write. null: explain.json next to the circuit if model, prompts and ablation are
    those of its run, otherwise none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verify and not self.pairs:
            raise ConfigError("verify= leaves out pairs that pushed an edge: leave out pairs=0")


@dataclass
class MibConfig(Settings):
    """Measure scores as the MIB benchmark does: CPR, CMD and ten faithfulness values."""

    scores: str = ""
    """Run directory, or a graph of EAP-IG or MIB with scores."""
    model: ModelConfig | None = None
    """null: the model whose edges were scored."""
    task: TaskConfig | None = None
    """null: the task for which they were scored."""
    split: str = setting("test", choices=SPLITS)
    """Which prompts; all need a distractor."""
    batch_size: int = setting(MAX_EVALUATION_BATCH, at_least=1)
    """Pairs per forward pass."""
    output: str | None = None
    """Folder for submissions, of several runs: importances/TASK_MODEL/ with the scores, and
    circuits/TASK_MODEL/ with nine circuits from .1 to 50 % of the edges; earlier ones of this task
    and model are replaced. Upload importances or circuits."""
    truth: str | None = None
    """File of the true circuit, with which the ranking is compared; null: that of a compiled
    model's folder, if it has one."""


@dataclass
class DrawConfig(Settings):
    """Draw a circuit with Graphviz."""

    circuit: str = ""
    """Run directory or circuit file."""
    checkpoint: int | None = None
    """Step of the run's checkpoint to draw; null: the run's circuit, or else the last. Without a
    size, circuits are measured to choose one."""
    sparsity: float | None = setting(None, at_least=0, at_most=1)
    """Draw the circuit with exactly this fraction of the edges removed."""
    num_edges: int | None = setting(None, at_least=0)
    """Draw the circuit with exactly this many edges."""
    formats: list[str] = setting(lambda: [*DRAWINGS], choices=DRAWINGS)
    """Files to write."""
    output: str | None = None
    """Path without suffix; FOLDER/ means FOLDER/circuit; null: circuit next to the circuit file,
    or the file's own name."""
    dangling: bool = False
    """Also draw dangling edges."""
    title: str | None = None
    """null: the run's model and task."""
    model: ModelConfig | None = None
    """The model of a circuit file that does not identify it."""


@dataclass
class HeadsConfig(Settings):
    """Find out what each attention head attends to, and name the kinds of heads."""

    run: str = ""
    """Run directory or circuit file, whose model and task are used; or give model= and task=."""
    model: ModelConfig | None = None
    """null: the run's."""
    task: TaskConfig | None = None
    """null: the run's, or without a run only random tokens."""
    split: str = setting("test", choices=SPLITS)
    """Which of the task's prompts."""
    prompts: int = setting(100, at_least=1)
    """Number of the task's prompts to average over."""
    random_prompts: int = setting(50, at_least=1)
    """Number of prompts of repeated random tokens."""
    length: int = setting(50, at_least=2)
    """Number of random tokens of a prompt, before they are repeated."""
    batch_size: int = setting(16, at_least=1)
    """Prompts per forward pass."""
    output: str | None = None
    """Folder for heads.json, heads.csv and heads.png; null: the run's directory if the model is
    its own, else `heads`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run and self.model is None:
            raise ConfigError("give a run directory, or model= and, for its prompts, task=")


@dataclass
class AblateConfig(Settings):
    """Ablate heads or other nodes of a model, and measure whether they matter more than others."""

    run: str = ""
    """Run directory or circuit file, whose model and task are used; or give model= and task=."""
    heads: str | None = None
    """KIND:N, the N heads with the highest score of a kind: induction:16, previous_token:8,
    duplicate_token:4, name_mover:9, ...; see `edgeprune heads`."""
    scores: str | None = None
    """heads.json of `edgeprune heads`, for heads=; null: the run's, or scores made anew."""
    nodes: list[str] = setting(list)
    """Or nodes by name, such as [a5.h1,m3]."""
    circuit: str | None = None
    """Or the heads and MLPs of a circuit: a run directory or a circuit file."""
    complement: bool = False
    """Ablate all other heads and MLPs instead."""
    model: ModelConfig | None = None
    """null: the run's."""
    task: TaskConfig | None = None
    """null: the run's."""
    ablation: AblationConfig = setting(AblationConfig)
    """What takes the place of the nodes' outputs. Means are over the training prompts; tokens that
    are generated get the mean over all positions."""
    split: str = setting("test", choices=SPLITS)
    """Which of the task's prompts."""
    prompts: int = setting(200, at_least=2)
    """Number of prompts."""
    generate: int = setting(0, at_least=0)
    """Number of tokens to generate after each prompt; right are texts that contain an answer."""
    random_sets: int = setting(20, at_least=0)
    """Number of random sets with as many heads in each layer."""
    batch_size: int = setting(32, at_least=1)
    """Prompts of equal length per forward pass."""
    seed: int = setting(0, at_least=0)
    """Seed of the random sets."""
    output: str | None = "ablation.json"
    """JSON file to write; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run and (self.model is None or self.task is None):
            raise ConfigError("give a run directory, or model= and task=")
        given = [name for name in ("heads", "nodes", "circuit") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"got {' and '.join(given) or 'no nodes'}; give one of heads=, nodes= and circuit="
            )
        if self.heads is not None and not re.fullmatch(r"[\w-]+:[1-9]\d*", self.heads):
            raise ConfigError(f"heads={self.heads} must be KIND:N, such as induction:16")


@dataclass
class TokensConfig(Settings):
    """Find out to which tokens of the prompt answers are due, through model and circuit."""

    run: str = ""
    """Run directory or circuit file, whose model, task, ablation and circuit are used; or give
    model= and task= for the full model alone."""
    model: ModelConfig | None = None
    """null: the run's."""
    task: TaskConfig | None = None
    """null: the run's."""
    ablation: AblationConfig | None = None
    """null: the run's, or interchange."""
    launcher: LauncherConfig = setting(LauncherConfig)
    """Several processes share one model: launcher.shard=true launcher.processes=2."""
    target: str | None = setting(None, choices=(*TOKEN_TARGETS,))
    """What is attributed: the answer's logit, its probability, or contrast, its logit minus the
    distractor's. null: contrast if every prompt has a distractor, else logit."""
    steps: int | None = setting(None, at_least=1)
    """Steps between the corrupted and the clean prompt. null: 8 to 64, as many as bring the sum of
    the attributions within 1 % of the effect."""
    split: str = setting("test", choices=SPLITS)
    """Which of the task's prompts."""
    prompts: int = setting(20, at_least=1)
    """Number of prompts."""
    batch_size: int = setting(8, at_least=1)
    """Prompts per forward and backward pass."""
    output: str | None = None
    """Folder for tokens.json, tokens-inseq.json and tokens.html; null: the run's directory if
    model, task and ablation are its own, else `tokens`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run and (self.model is None or self.task is None):
            raise ConfigError("give a run directory, or model= and task=")
        if self.launcher.processes != 1 and not self.launcher.shard:
            raise ConfigError(
                f"launcher.processes={self.launcher.processes} needs launcher.shard=true: several "
                "processes can only share one model; add it, or use one process"
            )


@dataclass
class CompareConfig(Settings):
    """Compare circuits: what they share, what only one has, and how similar they are."""

    circuits: list[str] = setting(list)
    """Run directories or circuit files."""
    reference: str | None = None
    """A circuit against which the others' precision, recall and F1 are measured."""
    formats: list[str] = setting(lambda: [*DRAWINGS], choices=DRAWINGS)
    """Drawings to write."""
    output: str = "comparison"
    """Folder to write; an earlier comparison there is replaced."""
    model: ModelConfig | None = None
    """The model of circuit files that do not identify it."""


@dataclass
class PageConfig(Settings):
    """Write a page to look into circuits of every size: one file, which opens offline."""

    runs: list[str] = setting(list)
    """Run directories. Several runs, of one graph, are shown on one page and compared."""
    output: str | None = None
    """HTML file to write; null: page.html in the run directory, or for several runs in the current
    one."""
    edges: int = setting(5000, at_least=1)
    """Number of edges that the page carries, the strongest of each run."""
    prompts: int = setting(10, at_least=0)
    """Number of prompts, half of them typical and half those on which the chosen circuit is least
    faithful; 0: measure nothing."""
    cuts: int | None = setting(None, at_least=0)
    """Maximum number of nodes and edges of the chosen circuit that are cut one at a time; null: as
    many as take about a minute."""


@dataclass
class ReportConfig(Settings):
    """Summarise all runs below a folder: frontiers, stability over seeds, and specificity."""

    folder: str = ""
    """Run directories are searched here, at any depth, and what `edgeprune test RUN RUN` wrote."""
    split: str | None = setting(None, choices=SPLITS)
    """Whose evaluations are shown; null: the one that most runs have, test before validation."""
    output: str | None = None
    """Folder to write; null: report in that folder. An earlier report there is replaced."""


@dataclass
class PrepareConfig(Settings):
    """Write a task's prompts, or those of MIB's datasets, as JSONL."""

    task: TaskConfig = setting(TaskConfig)
    model: ModelConfig = setting(ModelConfig)
    """Its tokenizer decides which prompts fit."""
    counterfactual: str | None = None
    """With task.path: make prompts of rows of a dataset of the MIB benchmark, a JSONL file, or a
    folder with train.jsonl, validation.jsonl and test.jsonl, of which the first (task.train etc.)
    are kept. This is the column with the corrupted prompts; null: s2_io_flip_counterfactual,
    symbol_counterfactual or random_counterfactual, as in the benchmark."""
    output: str | None = None
    """File to write; null: TASK.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = self.output or f"{Path(self.task.path or self.task.name).stem}.jsonl"


COMMANDS = {
    "prune": PruneConfig,
    "attribute": AttributeConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "test": TestConfig,
    "explain": ExplainConfig,
    "mib": MibConfig,
    "draw": DrawConfig,
    "heads": HeadsConfig,
    "ablate": AblateConfig,
    "tokens": TokensConfig,
    "compare": CompareConfig,
    "page": PageConfig,
    "report": ReportConfig,
    "prepare": PrepareConfig,
}
"""Settings class per command; the first line of its docstring is the command's help."""

RUN_COMMANDS = ("prune", "attribute")
"""Commands that make runs."""


# ------------------------------------------------------------------------------------- functions


to_dict = dataclasses.asdict
"""A settings object as JSON values, as written to config.yaml."""


def from_dict(schema: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`; also converts keyword arguments as the command line does.

    Args:
        schema: a settings class. For `TrainerConfig` the class that `values["method"]` names.
        values: settings by name; missing ones keep their defaults.

    Raises ConfigError for an unknown name, or a value of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if schema is TrainerConfig:
        schema = TRAINERS.get(values.get("method", ""), TrainerConfig)
    hints, arguments = get_type_hints(schema), {}
    config = OmegaConf.structured(schema)
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, hints)}")
        part = dataclass_of(hints[name])
        if part is not None and isinstance(value, dict):
            arguments[name] = from_dict(part, value)
            continue
        try:  # NumPy and torch numbers have an item()
            config[name] = value.item() if hasattr(value, "item") else value
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{name}={value!r} cannot be used: {reason}") from None
        arguments[name] = OmegaConf.to_container(config)[name]
    return schema(**arguments)


def dataclass_of(hint: Any) -> type | None:
    """The settings class in a type hint, such as `ModelConfig | None`; None if there is none."""
    return next((h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)), None)


def chosen_by(choice: tuple[str, float | None]) -> str:
    """How circuit.json names a choice, see `PruneConfig.choice`."""
    name, value = choice
    return name if value is None else f"{name}={value}"


def given_size(settings: Settings) -> tuple[str, float] | None:
    """The one of `SIZES` that is set, and its value; None if none is."""
    given = [(name, getattr(settings, name, None)) for name in SIZES]
    return next((choice for choice in given if choice[1] is not None), None)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'trainer': {'steps': 600}} -> {'trainer.steps': 600}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def each_setting(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every setting of a class by name, such as 'trainer.steps'; those of all trainers."""
    hints = get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        part, name = dataclass_of(hints[entry.name]), f"{prefix}{entry.name}"
        if part is None and not entry.metadata.get("hidden"):
            yield name, entry
        for one in TRAINERS.values() if part is TrainerConfig else [part] if part else []:
            yield from each_setting(one, f"{name}.")


def settings_with(flag: str, value: Any) -> frozenset[str]:
    """Names of the settings of runs whose metadata has a value, see `setting`."""
    every = (entry for command in RUN_COMMANDS for entry in each_setting(COMMANDS[command]))
    return frozenset(name for name, entry in every if entry.metadata.get(flag) == value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the nearest known name, or an empty string."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # "steps" for "trainer.steps"
        near = [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    return f"; did you mean {near[0]!r}?" if near else ""
