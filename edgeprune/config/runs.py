"""Settings of the commands that rank edges and choose circuits: prune, attribute, export."""

from dataclasses import dataclass
from typing import Any

from edgeprune.config.groups import (
    AblationConfig,
    LauncherConfig,
    ModelConfig,
    TaskConfig,
    TrackerConfig,
    TrainerConfig,
)
from edgeprune.config.settings import (
    AT_CLEAN,
    ATTRIBUTIONS,
    CUTTING,
    DEFAULT_CHOICE,
    FREE,
    MAX_EVALUATION_BATCH,
    SIZES,
    Settings,
    given_size,
    setting,
)
from edgeprune.errors import ConfigError


@dataclass
class SizeConfig(Settings):
    """The size of a circuit that is cut from scores. At most one of `SIZES` is given."""

    sparsity: float | None = setting(None, at_least=0, at_most=1)
    """Fraction of the edges to remove, exactly."""
    num_edges: int | None = setting(None, at_least=0)
    """Number of edges to keep, exactly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name, None) for name in SIZES}
        given = [f"{name}={value}" for name, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(
                f"got {' and '.join(given)}; give only one; where an experiment sets the other, "
                f"add {given[0].split('=')[0]}=null"
            )


@dataclass
class ChoiceConfig(SizeConfig):
    """How a circuit is chosen from scores."""

    max_kl: float | None = setting(None, above=0)
    """Choose the smallest circuit whose KL on the validation prompts is at most this, in nats; a
    clean-up comes later and may add to it."""
    min_exact_match: float | None = setting(None, above=0, at_most=1)
    """Choose the smallest circuit that gives the full model's answer on at least this fraction of
    the validation prompts."""
    cleanup: float | None = setting(None, at_least=0)
    """At the end, remove edges as long as all removals together move the circuit, on the training
    prompts, no farther from the full model than this: KL in nats above its own, or an absolute
    error where outputs are values. null: no clean-up."""


@dataclass
class RunConfig(ChoiceConfig):
    """What makes a run: `prune` and `attribute` differ in how edges are scored."""

    model: ModelConfig = setting(ModelConfig)
    task: TaskConfig = setting(TaskConfig)
    ablation: AblationConfig = setting(AblationConfig)
    launcher: LauncherConfig = setting(LauncherConfig)
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
        self.launcher.check_shard(self.model, {"cleanup=": self.cleanup})

    @property
    def choice(self) -> tuple[str, float | None]:
        """How the circuit is chosen: one of `SIZES` and its value, `DEFAULT_CHOICE`, or "threshold"
        and None."""
        return given_size(self) or self.default_choice

    @property
    def title(self) -> str:
        """Name for people, such as 'ioi in embedded'."""
        return f"{self.task.title} in {self.model.title}"

    @property
    def label(self) -> str:
        """What the run is called in pictures."""
        return f"{self.title}, {self.variant}"


@dataclass
class PruneConfig(RunConfig):
    """Rank the edges of a model by how much a task needs them, and choose a circuit.

    Without sparsity=, num_edges=, max_kl= or min_exact_match=, it is the smallest circuit whose KL
    is at most 5 % of the empty circuit's; with trainer=paper or tracr, one as sparse as the gates.
    `edgeprune export` chooses another one at any time.
    """

    trainer: TrainerConfig = setting(TrainerConfig)
    tracker: TrackerConfig = setting(TrackerConfig)
    seed: int = setting(0, distinguishes=False, at_least=0, at_most=2**31 - 1)
    """Seed of the initial values, the noise and the order of the data."""
    start: str | None = None
    """With trainer=every_size: a run, such as one of `edgeprune attribute`, whose ranking learning
    starts from; null: from scratch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            self.trainer.check_start()
        sizes = (self.sparsity, self.num_edges, getattr(self.trainer, "target_sparsity", 1.0))
        if sizes == (None, None, None):
            raise ConfigError(
                "the published method aims at one sparsity: give sparsity=, num_edges= or "
                "trainer.target_sparsity="
            )
        cuda_graph = {"trainer.cuda_graph=": self.trainer.cuda_graph}
        self.launcher.check_shard(self.model, cuda_graph)

    @property
    def default_choice(self) -> tuple[str, float | None]:
        """See `choice`."""
        return self.trainer.default_choice

    @property
    def method_name(self) -> str:
        """The method that scores the edges."""
        return self.trainer.method

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
    """Score the edges of a model without learning (EAP, EAP-IG, ACDC), and choose a circuit.

    Without sparsity=, num_edges=, max_kl= or min_exact_match=, it is the smallest circuit whose KL
    is at most 5 % of the empty circuit's; with method=acdc, the circuit of its threshold.
    """

    method: str = setting("eap_ig", choices=ATTRIBUTIONS)
    """By the gradient of the metric: eap, at the clean prompts (attribution patching); eap_ig,
    integrated from corrupted to clean token embeddings; eap_ig_activations, from corrupted to clean
    outputs of one layer after another; clean_corrupted, at the clean and the corrupted prompts;
    gates, with all gates half open. At the clean prompts, by other rules than the gradient's: relp,
    relevance patching; gim, corrected for attention that moves elsewhere. By cutting edges, which
    runs the model once per edge: exact, one edge at a time; acdc, from the output backwards, so
    that what does not matter stays cut."""
    metric: str | None = setting(None, choices=("kl", "logit_difference"))
    """What edges are scored by: kl, the KL divergence from the full model (or where outputs are
    values, the unexplained variance); logit_difference, between answers and distractors. null:
    logit_difference for eap, relp and gim, since the KL has no gradient at the clean prompts; kl
    for the others."""
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
        if self.metric is None:
            self.metric = "logit_difference" if self.method in AT_CLEAN else "kl"
        super().__post_init__()
        if self.method in AT_CLEAN and self.metric == "kl":
            raise ConfigError(
                f"method={self.method} with metric=kl scores all edges 0, since the KL has no "
                "gradient at the clean prompts; leave out metric=, or give method=eap_ig"
            )
        if self.circuit is not None:
            self.check_cuts()

    def check_cuts(self) -> None:
        """Raise ConfigError unless the method cuts edges, as `circuit` requires."""
        if self.method not in CUTTING:
            raise ConfigError(f"circuit= is for method={' and '.join(CUTTING)}, got {self.method}")

    @property
    def default_choice(self) -> tuple[str, float | None]:
        """See `choice`."""
        return ("threshold", None) if self.method == "acdc" else DEFAULT_CHOICE

    @property
    def method_name(self) -> str:
        """The method that scores the edges."""
        return self.method

    @property
    def variant(self) -> str:
        """How the run differs from others of its task and model."""
        return f"{self.method} by {self.metric}"

    @property
    def evaluation_batch_size(self) -> int:
        """Pairs per pass without gradients, which needs half the memory of one with them."""
        return min(MAX_EVALUATION_BATCH, 2 * self.batch_size)


@dataclass
class ExportConfig(ChoiceConfig):
    """Choose a circuit from a run's scores and write it as edges.json or as an EAP-IG graph.

    Without sparsity=, num_edges=, max_kl= or min_exact_match=, the circuit is chosen as the run
    asked for. Without output=, it becomes the run's circuit.
    """

    run: str = ""
    """Run directory; or a circuit file, to convert it, or to cut another size from its scores."""
    checkpoint: int | None = None
    """Step of the checkpoint; null: the last."""
    threshold: bool = False
    """Choose by a threshold: with trainer=paper or tracr one that is found by binary search and
    makes the circuit as sparse as the gates, with method=acdc the run's own."""
    choose: str = setting("best", choices=("best", "greedy"))
    """best: the edges of the highest scores; greedy: grow the circuit from the output, adding the
    best edge into a node that already has an edge to follow, as EAP-IG and MIB do."""
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
        size = given_size(self)
        if self.threshold and size:
            raise ConfigError(f"threshold=true finds the size itself; leave out {size[0]}")
