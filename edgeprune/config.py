"""Every setting, as dataclasses. Hydra fills them, `__main__` converts them once; no torch here."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from edgeprune.errors import ConfigError

MAX_EVALUATED = 64
"""Pairs of a pass without gradients, unless more are asked for."""

DTYPES = ("float32", "bfloat16", "float16")

CUSTOM = "custom"
"""The task and the model that are one's own: `task.path`, `model.path`."""


class AblationKind(Enum):
    interchange = "interchange"
    zero = "zero"
    mean = "mean"


class Constraint(Enum):
    exact = "exact"
    lagrangian = "lagrangian"


class Warmup(Enum):
    linear = "linear"
    logarithmic = "logarithmic"


class Resume(Enum):
    never = "never"
    auto = "auto"


class TrackerKind(Enum):
    none = "none"
    wandb = "wandb"


class Split(Enum):
    train = "train"
    validation = "validation"
    test = "test"


class CircuitFormat(Enum):
    edges = "edges"
    eap_json = "eap_json"
    eap_pt = "eap_pt"


@dataclass
class ModelConfig:
    """Which language model, and how it is loaded."""

    name: str = ""
    """For people and for the run directory."""
    path: str = ""
    """Hub name; a folder with config.json, tokenizer.json and safetensors; a .gguf file; a Tracr
    folder; or what comes with the project: `embedded`, `tracr/NAME`."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    attention: str = "auto"
    """Attention implementation of the transformers library: sdpa, eager, flash_attention_2, ...;
    auto is sdpa, or eager where the model caps its scores."""
    bits: int | None = None
    """4 or 8: hold the weights in so many bits (bitsandbytes; Llama family)."""
    fused: bool = False
    """On a GPU, in bfloat16, norm and project what heads read in Triton kernels, which moves less
    memory; does nothing elsewhere."""
    embedding_writers: bool = True
    """Whether the embeddings are writers with edges; without, they always flow."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""


@dataclass
class TaskConfig:
    """Where the clean/corrupted prompts come from."""

    name: str = ""
    """One of the tasks that `edgeprune prepare` writes, or any name for a file of your own."""
    path: str | None = None
    """JSONL of prompts; null: the task's own are generated."""
    train: int = 200
    """Training prompts to generate."""
    validation: int = 200
    """Validation prompts to generate."""
    test: int = 1000
    """Test prompts to generate."""
    max_length: int | None = None
    """Leave out prompts of more tokens than this."""
    seed: int = 0
    """Of the generated prompts; apart from the run's seed, so that runs share their data."""


@dataclass
class AblationConfig:
    """What a closed edge carries."""

    kind: AblationKind = AblationKind.interchange
    """interchange: the value on the corrupted prompt; zero: nothing, nor the share of the attention
    output's bias that goes with each head; mean: a mean over prompts."""
    per_position: bool = True
    """For mean: one mean a position, or one over all positions."""


@dataclass
class TrainerConfig:
    """How the gates are learned."""

    steps: int = 600
    """Optimisation steps."""
    batch_size: int = 16
    """Pairs a step."""
    micro_batch_size: int | None = None
    """Pairs run at a time, for less memory; null: the whole batch."""
    recompute: bool = False
    """Run blocks again in the backward pass: slower, for less memory."""
    cuda_graph: bool = False
    """On a GPU, record the circuit's pass, forward and backward, once for each shape of batch and
    replay it, which saves what Python takes to start its many operations: for small models."""
    learning_rate: float = 0.1
    """Of log alpha."""
    adam_epsilon: float = 1e-8
    """Adam divides a gradient by its size plus this, so gradients far below this move slowly. With
    constraint=exact gradients have a mean size of 1."""
    weight_decay: float = 0.0
    """AdamW's, of log alpha and the multipliers; a share of the learning rate by which they shrink
    each step."""
    constraint: Constraint = Constraint.lagrangian
    """How gates are held at the target. lagrangian: by learned multipliers; exact: at each step one
    number is added to all log alphas, so that the sampled gates are just so sparse (trainer=fast
    has the settings for that)."""
    multiplier_learning_rate: float = 3.0
    """Of a Lagrangian's multipliers, which are maximised."""
    lr_warmup_steps: int | None = None
    """Both learning rates rise linearly over these steps, then fall linearly to 0; null: a 60th."""
    start_sparsity: float = 0.25
    """Target at step 0."""
    target_sparsity: float | None = None
    """Target after the warm-up; null: as follows from the sparsity asked for, see target_lead."""
    target_lead: float = 0.07
    """How far a target that is not set lies beyond the sparsity asked for, where multipliers hold
    the gates and the warm-up is linear: gates lag behind, and above 1 a target pushes harder."""
    sparsity_warmup_steps: int | None = None
    """Steps over which the target rises; null: two thirds of all."""
    edge_price: float | None = None
    """In place of a target sparsity, where the circuit's size is to be found too: what each edge
    that is expected to be open adds to the loss. null: there is a target."""
    warmup: Warmup = Warmup.linear
    """Shape of that rise: logarithmic in 1 - target, so that the number of open edges falls by the
    same share each step; or linear."""
    node_gates: bool = False
    """Whether writers have gates too."""
    start_node_sparsity: float = 0.25
    """Target of the node gates at step 0."""
    target_node_sparsity: float = 0.7
    """Target of the node gates after the warm-up."""
    init_mean: float = 1.0
    """Mean of log alpha at the start."""
    init_std: float = 0.01
    """Standard deviation of log alpha at the start."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    @property
    def lr_warmup(self) -> int:
        """`lr_warmup_steps`, or its default for this many steps."""
        return self.steps // 60 if self.lr_warmup_steps is None else self.lr_warmup_steps

    @property
    def sparsity_warmup(self) -> int:
        """`sparsity_warmup_steps`, or its default for this many steps."""
        given = self.sparsity_warmup_steps
        return self.steps * 2 // 3 if given is None else given


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    kind: TrackerKind = TrackerKind.none
    """none, or wandb (offline without an API key)."""
    project: str = "edgeprune"
    """wandb project."""


@dataclass
class LauncherConfig:
    """The processes of a run."""

    processes: int | None = 1
    """Started on this machine by `accelerate launch`; null: one for each GPU."""
    shard: bool = False
    """Split the model's layers over the processes (FSDP2), where it is too large for one."""
    offload: bool = False
    """With shard: keep what is not in use in the CPU's memory."""
    timeout: int = 30
    """Minutes after which a process that waits for another gives up."""


@dataclass
class PruneConfig:
    """Learn the gates of a model's edges on a task."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    sparsity: float | None = None
    """The circuit keeps exactly this fraction less of the edges; null: see num_edges."""
    num_edges: int | None = None
    """The circuit keeps exactly so many edges; null, and no sparsity: found by binary search."""
    cleanup: float | None = None
    """At the end, remove edges as long as the circuit, on the training prompts, comes no farther
    from the full model by all removals together than this: KL in nats above its own, or, where
    outputs are values, an absolute error. null: no clean-up."""
    seed: int = 0
    """Of the start, the noise and the order of the data."""
    run_dir: str = ""
    """Everything of the run is written here."""
    resume: Resume = Resume.never
    """auto: go on from the last checkpoint in run_dir, if there is one."""
    overwrite: bool = False
    """Throw away what an earlier run left in run_dir, once model and data are loaded."""


@dataclass
class ExportConfig:
    """Make a circuit of a run's checkpoint and write it as edges.json or as an EAP-IG graph."""

    run: str = ""
    """Run directory; or a circuit's file, to write it in another format, or, of a graph of EAP-IG
    or MIB with scores, in another size: the edges of the largest scores by magnitude."""
    checkpoint: int | None = None
    """Step of the checkpoint; null: the last."""
    sparsity: float | None = None
    """Exactly this fraction less of the edges."""
    num_edges: int | None = None
    """Exactly so many edges. Neither: as the run asked for."""
    threshold: bool = False
    """By a threshold found by binary search, as where the run asked for no size."""
    cleanup: float | None = None
    """Then remove edges as long as the circuit, on the training prompts, comes no farther from the
    full model by all removals together than this: KL in nats above its own, or, where outputs are
    values, an absolute error. null: no clean-up."""
    format: CircuitFormat | None = None
    """edges: [writer, reader] pairs; eap_json, eap_pt: the graphs of EAP-IG and MIB; null: eap_pt
    where output ends in .pt, else edges."""
    output: str | None = None
    """File to write; null: edges.json, graph.json or graph.pt in the run directory. Beside one
    elsewhere (as edges) lies FILE.origin, by which its model and run are known: keep both."""


@dataclass
class EvaluateConfig:
    """Measure a circuit beside the full model and the fully corrupted one."""

    circuit: str = ""
    """Run directory, or a circuit's file: edges.json, or a graph of EAP-IG or MIB."""
    model: ModelConfig | None = None
    """null: the run's."""
    task: TaskConfig | None = None
    """null: the run's."""
    ablation: AblationConfig | None = None
    """null: the run's, or interchange."""
    split: Split = Split.test
    """Which prompts."""
    batch_size: int | None = None
    """Pairs a forward pass; null: twice as many as in the run's training, or 64."""
    shuffled_circuits: int = 0
    """Measure the circuit so many times between other heads, too: the heads of each layer change
    places, so it has as many edges and is as well connected."""
    output: str | None = None
    """JSON to write; null: evaluation-<split>.json beside the circuit. What is not the run's own
    (another circuit's file, model, task or ablation) is named before the split, models and
    prompts with the beginning of their SHA-256; where there is no run, all are."""


@dataclass
class DrawConfig:
    """Draw a circuit by Graphviz."""

    circuit: str = ""
    """Run directory, or a circuit's file: edges.json, or a graph of EAP-IG or MIB."""
    checkpoint: int | None = None
    """Step of the run's checkpoint to draw; null: the exported circuit, or else the last."""
    sparsity: float | None = None
    """Draw the circuit with exactly this fraction less of the edges."""
    num_edges: int | None = None
    """Draw the circuit with exactly so many edges."""
    formats: list[str] = field(default_factory=lambda: ["pdf", "svg", "png", "dot"])
    """Files to write."""
    output: str | None = None
    """Path without suffix; FOLDER/ is FOLDER/circuit; null: circuit beside edges.json, and beside
    another file its name."""
    dangling: bool = False
    """Draw dangling edges too."""
    title: str | None = None
    """null: the run's model and task."""


@dataclass
class CompareConfig:
    """Compare circuits: what they share, what only one has, and how alike they are."""

    circuits: list[str] = field(default_factory=list)
    """Run directories, or circuits' files: edges.json, or graphs of EAP-IG or MIB."""
    reference: str | None = None
    """A circuit by which the others' precision, recall and F1 are measured."""
    formats: list[str] = field(default_factory=lambda: ["pdf", "svg", "png", "dot"])
    """Drawings to write."""
    output: str = "comparison"
    """Folder to write."""


@dataclass
class ReportConfig:
    """Sum up all runs below a folder: frontiers, and stability over seeds."""

    folder: str = ""
    """Run directories are looked for here, at any depth."""
    split: Split | None = None
    """Whose evaluations are shown; null: that which most runs have, test before validation."""
    output: str | None = None
    """Folder to write; null: report in that folder."""


@dataclass
class PrepareConfig:
    """Write a task's prompts as JSONL."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    """Its tokenizer decides which prompts fit."""
    output: str = ""
    """File to write."""


LESS_MEMORY = (
    "Take fewer examples at a time (trainer.micro_batch_size, or more processes; of evaluate: "
    "batch_size), run blocks again (trainer.recompute=true), hold the weights in less "
    "(model.dtype=bfloat16, model.bits=4), or split them over processes (launcher.shard=true, "
    "launcher.offload=true)"
)
"""What to do where memory is short."""

FREE_TO_CHANGE = ("resume", "overwrite", "run_dir", "tracker", "launcher", "model.device",
                  "model.name", "trainer.log_every", "trainer.checkpoint_every",
                  "trainer.cuda_graph")  # fmt: skip
"""Settings that do not change what is computed, so a run may be resumed with others."""

KNOWN_BY_DIGEST = {"model.path": "model", "task.path": "data"}
"""Settings of what a run knows by a digest, wherever it lies, and what run.json calls it."""

ENGINES = ("ours", "ours_kept", "ours_graph", "naive", "stock")
"""What `edgeprune benchmark` can measure."""


@dataclass
class BenchmarkConfig:
    """Time a step beside the published way and the model's own passes."""

    shape: str = "gpt2"
    """gpt2, smollm2, llama-8b, codellama-13b, or a folder with config.json; random weights."""
    batch_size: int = 8
    """Pairs a step."""
    micro_batch_size: int | None = None
    """Pairs run at a time; null: the whole batch."""
    length: int = 32
    """Tokens a prompt."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""
    recompute: bool = False
    """Run blocks again in the backward pass."""
    fused: bool = False
    """On a GPU, in bfloat16, ours with Triton kernels (see model.fused of prune)."""
    engines: list[str] = field(default_factory=lambda: ["ours", "ours_kept", "naive", "stock"])
    """What is measured, in turns: ours with all passes; ours with the unchanging ones kept from
    before; the published way; the stock model's passes. On a GPU ours_graph too: ours_kept,
    replayed from CUDA graphs."""
    repetitions: int = 5
    """Timed steps of each."""
    compare_float32: bool = False
    """Also compare the gate gradients with those in float32."""
    growth: bool = False
    """Measure instead how ours grows with layers, heads, tokens and batch, on a small Llama."""
    output: str = "benchmark.json"
    """File to write."""


COMMANDS = {
    "prune": PruneConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "draw": DrawConfig,
    "compare": CompareConfig,
    "report": ReportConfig,
    "prepare": PrepareConfig,
    "benchmark": BenchmarkConfig,
}
"""Each command's settings; its first docstring line is its help."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, as written to config.yaml."""

    def plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value.name if isinstance(value, Enum) else value for key, value in fields}

    return dataclasses.asdict(config, dict_factory=plain)


def task_title(name: str, path: str | None) -> str:
    """A task's name for people: one's own data (task=custom) goes by its file's name."""
    return Path(path).stem if name == CUSTOM and path else name


def model_title(name: str, path: str | None) -> str:
    """A model's name for people: one's own (model=custom) goes by its folder's or file's name."""
    return Path(path).name if name == CUSTOM and path else name


def check_size(sparsity: float | None, num_edges: int | None) -> None:
    """A circuit's size is asked for in one way, and is possible.

    Raises:
        ConfigError: both given, or out of range.
    """
    if sparsity is not None and num_edges is not None:
        raise ConfigError(
            f"got sparsity={sparsity} and num_edges={num_edges}; give only one; where an "
            "experiment sets the other, add sparsity=null or num_edges=null"
        )
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ConfigError(
            f"sparsity={sparsity} is out of range: it is the fraction of edges left out, 0 to 1 "
            "(to push harder than 1, set trainer.target_sparsity)"
        )
    if num_edges is not None and num_edges < 0:
        raise ConfigError(f"num_edges={num_edges} is negative")


def check_cleanup(tolerance: float | None) -> None:
    """Raises ConfigError for a tolerance below 0."""
    if tolerance is not None and not tolerance >= 0:
        raise ConfigError(f"cleanup={tolerance} is out of range: it is a distance, 0 or more")


def check_run(config: PruneConfig) -> None:
    """Raises ConfigError where `edgeprune prune` cannot run with these settings on any model."""
    check_prune(config)
    check_model(config.model)
    if not config.run_dir:
        raise ConfigError("run_dir is empty; name a folder for the run, such as run_dir=runs/mine")


def check_prune(config: PruneConfig) -> None:
    """Raises ConfigError where a setting is out of range or two contradict each other."""
    check_size(config.sparsity, config.num_edges)
    check_cleanup(config.cleanup)
    if config.overwrite and config.resume is Resume.auto:
        raise ConfigError(
            "overwrite=true throws away what resume=auto would go on from; give one of them"
        )
    if not 0 <= config.seed < 2**31:
        raise ConfigError(f"seed={config.seed} must lie between 0 and {2**31 - 1}")
    check_task(config.task)
    if config.task.path is None and config.task.train < 1:
        raise ConfigError(f"task.train={config.task.train}: gates are learned on 1 prompt or more")
    _check_numbers(config.trainer)
    _check_launcher(config)
    _check_targets(config)


_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        ("steps", "batch_size", "checkpoint_every", "log_every"),
        lambda number: number >= 1,
        "must be at least 1",
    ),
    (("micro_batch_size",), lambda number: number >= 1, "must be at least 1, or null"),
    (
        ("learning_rate", "multiplier_learning_rate", "adam_epsilon", "edge_price"),
        lambda number: number > 0,
        "must be positive",
    ),
    (("init_std", "weight_decay"), lambda number: number >= 0, "must be 0 or more"),
)
"""Settings of the trainer, what their numbers must fulfil where they are set, and that in words."""


def _check_numbers(trainer: TrainerConfig) -> None:
    """Each number by itself, and that schedules end within the run."""
    for name, value in vars(trainer).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"trainer.{name}={value} must be a finite number")
    for names, is_right, rule in _RANGES:
        for name in names:
            given = getattr(trainer, name)
            if given is not None and not is_right(given):
                raise ConfigError(f"trainer.{name}={given} {rule}")
    for name in ("lr_warmup_steps", "sparsity_warmup_steps"):
        given = getattr(trainer, name)
        if given is not None and not 0 <= given <= trainer.steps:
            raise ConfigError(
                f"trainer.{name}={given} must lie between 0 and trainer.steps={trainer.steps}; "
                f"with trainer.{name}=null it follows from the steps"
            )


def _check_launcher(config: PruneConfig) -> None:
    """The processes, and what does not go together with a model that is split over them."""
    launcher = config.launcher
    for name in ("processes", "timeout"):
        given = getattr(launcher, name)
        if given is not None and given < 1:
            raise ConfigError(f"launcher.{name}={given} must be at least 1")
    if launcher.offload and not launcher.shard:
        raise ConfigError("launcher.offload=true needs launcher.shard=true")
    if launcher.shard and config.cleanup is not None:
        raise ConfigError(
            "launcher.shard=true and cleanup= do not go together, since one process cleans up; do "
            "that afterwards: edgeprune export RUN cleanup=..."
        )
    if launcher.shard and config.trainer.cuda_graph:
        raise ConfigError(
            "launcher.shard=true and trainer.cuda_graph=true do not go together, since layers are "
            "gathered from other processes; leave out one of them"
        )
    if launcher.shard and config.model.fused:
        raise ConfigError(
            "launcher.shard=true and model.fused=true do not go together, since a sharded model is "
            "loaded on the CPU; leave out one of them"
        )
    if launcher.shard and config.model.bits is not None:
        raise ConfigError(
            f"launcher.shard=true is for whole weights, got model.bits={config.model.bits}; "
            "leave out one of them"
        )


def _check_targets(config: PruneConfig) -> None:
    """What says how sparse the circuit shall be, and how the gates get there."""
    trainer = config.trainer
    if trainer.edge_price is not None:
        if trainer.target_sparsity is not None:
            raise ConfigError(
                f"got trainer.edge_price={trainer.edge_price} and "
                f"trainer.target_sparsity={trainer.target_sparsity}; give only one"
            )
        if trainer.constraint is Constraint.exact:
            raise ConfigError(
                f"got trainer.edge_price={trainer.edge_price} and trainer.constraint=exact, which "
                "holds gates at a target; take trainer.constraint=lagrangian, or give sparsity= in "
                "place of the price"
            )
    elif trainer.target_sparsity is None and config.sparsity is None and config.num_edges is None:
        raise ConfigError(
            "nothing says how sparse the circuit shall be: give sparsity=, num_edges=, "
            "trainer.target_sparsity= or trainer.edge_price="
        )
    if trainer.constraint is Constraint.exact:
        names = ["start_sparsity", "target_sparsity"]
        if trainer.node_gates:
            names += ["start_node_sparsity", "target_node_sparsity"]
        for name in names:
            given = getattr(trainer, name)
            if given is not None and not 0 <= given <= 1:
                raise ConfigError(
                    f"trainer.{name}={given} must lie between 0 and 1, for that is where the gates "
                    "are held; trainer.constraint=lagrangian may have targets beyond"
                )
    if trainer.warmup is Warmup.logarithmic:
        targets = [trainer.start_sparsity, trainer.target_sparsity or config.sparsity or 0.0]
        if trainer.node_gates:
            targets += [trainer.start_node_sparsity, trainer.target_node_sparsity]
        if max(targets) > 1:
            raise ConfigError(
                f"trainer.warmup=logarithmic is logarithmic in 1 - target, so targets may be 1 at "
                f"most, got {max(targets)}; use trainer.warmup=linear"
            )


def evaluation_batch_size(trainer: TrainerConfig | None) -> int:
    """Pairs of a pass without gradients, which takes half of the memory of one with them.

    Args:
        trainer: of the run; None where there is none.
    """
    if trainer is None:
        return MAX_EVALUATED
    in_training = min(trainer.batch_size, trainer.micro_batch_size or trainer.batch_size)
    return min(MAX_EVALUATED, 2 * in_training)


def check_model(model: ModelConfig) -> None:
    """Raises ConfigError for a model without a path or of an unknown dtype."""
    if not model.path:
        raise ConfigError("model.path is empty; give a hub name or a folder, or model=<name>")
    if model.path == "tracr/":
        raise ConfigError("model=tracr is one of several programs; say which: model.name=reverse")
    if model.dtype not in DTYPES:
        raise ConfigError(f"model.dtype={model.dtype!r}; choose {', '.join(DTYPES)}")
    if model.fused and model.dtype != "bfloat16":
        raise ConfigError(
            f"model.fused=true is for bfloat16, got model.dtype={model.dtype}; give "
            "model.dtype=bfloat16 or leave it out"
        )


def check_task(task: TaskConfig) -> None:
    """Raises ConfigError for a number out of range, or where a file of one's own is missing."""
    for name in ("train", "validation", "test"):
        if getattr(task, name) < 0:
            raise ConfigError(f"task.{name}={getattr(task, name)} must be 0 or more")
    if task.max_length is not None and task.max_length < 1:
        raise ConfigError(f"task.max_length={task.max_length} must be at least 1, or null")
    if task.name == CUSTOM and task.path is None:
        raise ConfigError(
            f"task.path is missing: task={CUSTOM} takes a file of your own; give task.path=FILE"
        )


def check_evaluate(config: EvaluateConfig) -> None:
    """Raises ConfigError for a number out of range, or a file that is missing."""
    if config.task is not None:
        check_task(config.task)
    if config.batch_size is not None and config.batch_size < 1:
        raise ConfigError(f"batch_size={config.batch_size} must be at least 1")
    if config.shuffled_circuits < 0:
        raise ConfigError(f"shuffled_circuits={config.shuffled_circuits} must be 0 or more")


def check_benchmark(config: BenchmarkConfig) -> None:
    """Raises ConfigError for an unknown engine or dtype, or a size out of range."""
    if not config.engines:
        raise ConfigError(f"engines is empty; choose of {', '.join(ENGINES)}")
    for name in config.engines:
        if name not in ENGINES:
            raise ConfigError(f"unknown engine {name!r}; choose {', '.join(ENGINES)}")
    for name in ("batch_size", "length", "repetitions"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least 1")
    size = config.micro_batch_size
    if size is not None and (size < 1 or config.batch_size % size):
        raise ConfigError(f"micro_batch_size={size} must divide batch_size={config.batch_size}")
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype={config.dtype!r}; choose {', '.join(DTYPES)}")


def target_sparsity(config: PruneConfig, all_edges: int) -> float | None:
    """Where the edges' sparsity is to end: as set, or as follows from what is asked for.

    None where edges have a price instead.

    Raises:
        ConfigError: more edges are asked for than the graph has.
    """
    check_num_edges(config.num_edges, all_edges)
    if config.trainer.edge_price is not None:
        return None
    if config.trainer.target_sparsity is not None:
        return config.trainer.target_sparsity
    asked = asked_sparsity(config, all_edges)
    how = (config.trainer.constraint, config.trainer.warmup)
    lags = how == (Constraint.lagrangian, Warmup.linear)
    return asked + config.trainer.target_lead if lags else asked


def check_num_edges(num_edges: int | None, all_edges: int) -> None:
    """Raises ConfigError where so many edges of a graph's cannot be chosen."""
    if num_edges is not None and not 0 <= num_edges <= all_edges:
        raise ConfigError(f"num_edges={num_edges} is out of range: the graph has {all_edges} edges")


def edges_left(sparsity: float, all_edges: int) -> int:
    """Of a circuit of this sparsity, to the nearest whole edge."""
    return round((1 - sparsity) * all_edges)


def asked_sparsity(config: PruneConfig, all_edges: int) -> float | None:
    """The circuit's, where a size is asked for."""
    if config.num_edges is not None:
        return 1 - config.num_edges / all_edges
    return config.sparsity


def from_keywords(schema: type, settings: dict[str, Any]) -> Any:
    """A config from keyword arguments, which are converted as those of the command line are.

    Raises:
        ConfigError: an unknown name, with the nearest right one; or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(schema)
    known = [f.name for f in dataclasses.fields(schema)]
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, known)}")
        try:  # numbers of numpy and torch have an item()
            config[name] = value.item() if hasattr(value, "item") else value
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{name}={value!r} cannot be used: {reason}") from None
    return OmegaConf.to_object(config)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the nearest known name, or nothing."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # "steps" for "trainer.steps"
        near = [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    return f"; did you mean {near[0]!r}?" if near else ""
