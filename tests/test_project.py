"""The shape of the project: who may import whom, and that every experiment is valid."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import edgeprune
from edgeprune.config import COMMANDS, DTYPES
from edgeprune.models.load import DTYPES as MODEL_DTYPES
from edgeprune.paths import CONF, TRACR_MODELS
from edgeprune.prompts.tasks import FROM_MODEL, TASKS

PACKAGE = Path(edgeprune.__file__).parent
EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix(""))
    for path in (CONF / "experiment").rglob("*.yaml")
)
LAYERS = (
    ("errors", "paths", "files", "config"),
    ("graph",),
    ("circuit",),
    ("scores", "prompts", "metrics", "formats"),
    ("engine",),
    ("models", "scale"),
    ("methods", "training", "evaluation", "drawing"),
    ("runs",),
    ("api",),
    ("commands",),
)
"""Parts of the package, the lowest first; a part imports from its own layer and from lower ones."""
WITHOUT_SETTINGS = ("graph", "circuit", "scores", "metrics", "methods", "engine")


def part_of(module: str) -> str:
    """edgeprune.engine.outbox -> engine."""
    return module.split(".")[1]


def imports() -> dict[str, set[str]]:
    """Of every module of the package, what it imports anywhere in its code, by full name."""
    paths = {
        ".".join(("edgeprune", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in PACKAGE.rglob("*.py")
    }
    paths = {module.removesuffix(".__init__"): path for module, path in paths.items()}
    names = {}
    for module, path in paths.items():
        names[module] = found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if name in paths else node.module for name in full}
    return names


def test_imports_point_down():
    layer = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    for module, imported in imports().items():
        if module in ("edgeprune", "edgeprune.__main__"):
            continue
        own = part_of(module)
        for name in imported:
            if name.startswith("edgeprune."):
                assert layer[part_of(name)] <= layer[own], f"{module} imports {name}"
                assert not (own in WITHOUT_SETTINGS and part_of(name) == "config"), module


def test_there_are_no_import_cycles():
    found = imports()
    graph = {module: names & found.keys() - {module} for module, names in found.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_transformers_is_imported_where_models_and_tokens_are():
    for module, imported in imports().items():
        if any(name.split(".")[0] == "transformers" for name in imported):
            assert module.startswith(("edgeprune.models.", "edgeprune.prompts.encode")), module


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("edgeprune", "torch"),
        ("edgeprune.circuit", "torch"),
        ("edgeprune.drawing.plots", "torch"),
        ("edgeprune.drawing.graphviz", "torch"),
        *((f"edgeprune.commands.{command}", "torch") for command in COMMANDS),
        ("edgeprune.api.circuits", "transformers"),
    ],
)
def test_heavy_libraries_are_imported_only_when_needed(module, heavy):
    code = f"import sys, {module}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_dtypes_are_those_in_which_models_load():
    """Two lists, since `config` may not import torch, nor `models` the settings."""
    assert set(DTYPES) == set(MODEL_DTYPES)


def test_public_names_exist():
    for name in edgeprune.__all__:
        assert getattr(edgeprune, name).__doc__, name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_valid(experiment):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("prune", [f"experiment={experiment}"]))
    if config.task.name == FROM_MODEL:  # the prompts of tracr/NAME come with the model NAME
        assert experiment == f"{FROM_MODEL}/{config.model.name}" == config.model.path
        assert (TRACR_MODELS / config.model.name / "config.json").exists()
    else:
        assert config.task.name in TASKS
        assert config.task.name == experiment.split("/")[-1]


def test_every_task_has_an_experiment_on_the_embedded_model():
    """Except the list with commas, which that model has never seen, and questions beyond it."""
    assert set(TASKS) - {"induction_list", "whereabouts"} <= set(EXPERIMENTS)
