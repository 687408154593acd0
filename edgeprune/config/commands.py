"""Settings of the commands that look into circuits and models, and the table of all commands."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from edgeprune.config.groups import AblationConfig, LauncherConfig, ModelConfig, TaskConfig
from edgeprune.config.runs import AttributeConfig, ExportConfig, PruneConfig, SizeConfig
from edgeprune.config.settings import (
    DRAWINGS,
    MAX_EVALUATION_BATCH,
    SPLITS,
    TOKEN_TARGETS,
    Settings,
    setting,
)
from edgeprune.errors import ConfigError


@dataclass
class PromptsConfig(Settings):
    """A model, and a split of a task's prompts."""

    model: ModelConfig | None = None
    """null: that of the run or circuit."""
    task: TaskConfig | None = None
    """null: that of the run or circuit."""
    split: str = setting("test", choices=SPLITS)
    """Which of the task's prompts."""


@dataclass
class CircuitConfig(PromptsConfig):
    """How the circuits of a run or file are measured."""

    ablation: AblationConfig | None = None
    """null: the ablation with which the circuit was found, or interchange."""
    batch_size: int | None = setting(None, at_least=1)
    """Pairs per forward pass; null: twice as many as in the run's training, or 64."""


@dataclass
class InspectConfig(PromptsConfig):
    """Look into a model, which is named by itself or through a run."""

    needs_task: ClassVar[bool] = True

    run: str = ""
    """Run directory or circuit file, whose model, task and, for tokens, circuit and ablation are
    used; or give model= and task=."""
    seed: int = setting(0, at_least=0)
    """Seed of what is drawn at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run and (self.model is None or (self.needs_task and self.task is None)):
            task = "and task=" if self.needs_task else "and, for its prompts, task="
            raise ConfigError(f"give a run directory, or model= {task}")


@dataclass
class EvaluateConfig(CircuitConfig):
    """Measure a circuit, the full model and the empty circuit on the same prompts."""

    circuit: str = ""
    """Run directory or circuit file."""
    head_permuted: int = setting(0, at_least=0)
    """Number of head-permuted circuits to measure for comparison: the heads of each layer are
    shuffled, so they have equally many edges and are equally well connected."""
    output: str | None = None
    """JSON file to write. null: evaluation-<split>.json next to the circuit if model, prompts and
    ablation are those of its run, otherwise none."""


@dataclass
class TestConfig(CircuitConfig):
    """Test a circuit as a sceptic would; several circuits: each on the others' prompts."""

    circuits: list[str] = setting(list)
    """Run directories or circuit files. Several circuits of one model are measured on each other's
    prompts, and cut out of the model there."""
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
    seed: int = 0
    """Seed of the prompts that are drawn, the random circuits and the random sets of nodes."""
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
            raise ConfigError("launcher.shard=true is for prune, attribute and tokens; omit it")
        if self.launcher.processes != 1 and self.repeat is None:
            raise ConfigError(
                f"launcher.processes={self.launcher.processes} needs repeat=: several processes "
                "can only share its repetitions; add it, or use one process"
            )

    @property
    def repeats(self) -> tuple[str, int]:
        """What differs between repetitions, "bootstrap", "seeds" or "templates"; their number."""
        kind, _, number = (self.repeat or "none:0").partition(":")
        return kind, int(number)


@dataclass
class ExplainConfig(CircuitConfig):
    """Find out what each edge of a circuit is for, and how it got there."""

    circuit: str = ""
    """Run directory or circuit file."""
    prompts: int = setting(100, at_least=2)
    """Number of prompts, drawn at random."""
    edges: int | None = setting(None, at_least=1)
    """Number of edges, and of nodes, to cut, the highest-ranked first; null: all of the circuit."""
    pairs: int = setting(200, at_least=0)
    """Number of training pairs, drawn at random, for which it is measured how they push the scores
    of the edges; only for runs with trainer=every_size. 0: none."""
    snapshots: int = setting(10, at_least=2)
    """Number of the run's snapshots at which these pushes are measured; each pair takes a forward
    and a backward pass per snapshot."""
    verify: int = setting(0, at_least=0)
    """Number of seeds with which the run is trained again, without the training pairs that pushed
    an edge most and without as many random ones, to see whether the edge falls; 0: none. A verdict
    takes at least 6. All training pairs are then measured."""
    verify_edges: int = setting(5, at_least=1)
    """Number of edges to verify, those whose cut changes most; each takes a training per seed."""
    verify_share: float = setting(0.25, above=0, at_most=0.9)
    """Share of the training pairs that are left out."""
    seed: int = 0
    """Seed of the prompts and training pairs that are drawn, and of the random edges."""
    output: str | None = None
    """JSON file to write. null: explain.json next to the circuit if model, prompts and ablation are
    those of its run, otherwise none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verify and not self.pairs:
            raise ConfigError(
                f"verify={self.verify} needs the pushes of training pairs, but pairs=0 measures "
                "none; omit pairs=0"
            )


@dataclass
class MibConfig(PromptsConfig):
    """Measure scores as the MIB benchmark does: CPR, CMD and ten faithfulness values."""

    scores: str = ""
    """Run directory, or a graph of EAP-IG or MIB with scores."""
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
class DrawConfig(SizeConfig):
    """Draw a circuit with Graphviz."""

    circuit: str = ""
    """Run directory or circuit file."""
    checkpoint: int | None = None
    """Step of the run's checkpoint to draw; null: the run's circuit, or else the last. Without a
    size, circuits are measured to choose one."""
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
class HeadsConfig(InspectConfig):
    """Find out what each attention head attends to, and name the kinds of heads."""

    needs_task = False

    prompts: int = setting(100, at_least=1)
    """Number of the task's prompts, drawn at random; without a run and a task, only random tokens
    are used."""
    random_prompts: int = setting(50, at_least=1)
    """Number of prompts of repeated random tokens."""
    length: int = setting(50, at_least=2)
    """Number of random tokens of a prompt, before they are repeated."""
    batch_size: int = setting(16, at_least=1)
    """Prompts per forward pass."""
    output: str | None = None
    """Folder for heads.json, heads.csv and heads.png; null: the run's directory if model and task
    are its own, else `heads`."""


@dataclass
class AblateConfig(InspectConfig):
    """Ablate heads or other nodes of a model, and measure whether they matter more than others."""

    heads: str | None = None
    """KIND:N, the N heads with the highest score of a kind: induction:16, previous_token:8,
    duplicate_token:4, name_mover:9, ...; see `edgeprune heads`."""
    scores: str | None = None
    """For heads=: a heads.json of `edgeprune heads`. null: the run's if it has one; otherwise the
    heads are scored first."""
    nodes: list[str] = setting(list)
    """Instead of heads=: nodes by name, such as [a5.h1,m3]."""
    circuit: str | None = None
    """Instead of heads=: the heads and MLPs of a circuit, a run directory or circuit file."""
    complement: bool = False
    """Ablate all other heads and MLPs instead."""
    ablation: AblationConfig = setting(partial(AblationConfig, kind="zero"))
    """What takes the place of the nodes' outputs. Means are over the training prompts; tokens that
    are generated get the mean over all positions."""
    prompts: int = setting(200, at_least=2)
    """Number of prompts, drawn at random."""
    generate: int = setting(0, at_least=0)
    """Number of tokens to generate after each prompt; a text is right if it contains an answer."""
    random_sets: int = setting(20, at_least=0)
    """Number of random sets with as many heads in each layer."""
    batch_size: int = setting(32, at_least=1)
    """Prompts of equal length per forward pass."""
    output: str | None = "ablation.json"
    """JSON file to write; null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("heads", "nodes", "circuit") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"got {' and '.join(given) or 'no nodes'}; give one of heads=, nodes= and circuit="
            )
        if self.heads is not None and not re.fullmatch(r"[\w-]+:[1-9]\d*", self.heads):
            raise ConfigError(
                f"heads={self.heads} must be KIND:N, such as induction:16; "
                "nodes= takes heads by name"
            )


@dataclass
class TokensConfig(InspectConfig):
    """Attribute answers to the tokens of their prompts, through the model and the circuit."""

    ablation: AblationConfig | None = None
    """null: the run's, or interchange. Without a run, only the full model is looked into."""
    launcher: LauncherConfig = setting(LauncherConfig)
    """Several processes share one model: launcher.shard=true launcher.processes=2."""
    target: str | None = setting(None, choices=(*TOKEN_TARGETS,))
    """What is attributed: the answer's logit, its probability, or contrast, its logit minus the
    distractor's. null: contrast if every prompt has a distractor, else logit."""
    steps: int | None = setting(None, at_least=1)
    """Steps between the corrupted and the clean prompt. null: 8 to 64, as many as bring the sum of
    the attributions within 1 % of the effect."""
    prompts: int = setting(20, at_least=1)
    """Number of prompts, drawn at random."""
    batch_size: int = setting(8, at_least=1)
    """Prompts per forward and backward pass."""
    output: str | None = None
    """Folder for tokens.json, tokens-inseq.json and tokens.html; null: the run's directory if
    model, task and ablation are its own, else `tokens`."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    """Where task.path has rows of a dataset of the MIB benchmark (a JSONL file, or a folder with
    train.jsonl, validation.jsonl and test.jsonl, of which the first task.train etc. are used): the
    column with the corrupted prompts. null: s2_io_flip_counterfactual, symbol_counterfactual or
    random_counterfactual, as in the benchmark."""
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
