"""The shape of the project: who may import whom, and that every experiment is a valid one."""

import ast
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import edgeprune
from edgeprune.config import COMMANDS, DTYPES, check_model, check_prune
from edgeprune.models.load import TOLERANCE
from edgeprune.paths import CONF, TRACR_MODELS
from edgeprune.prompts.tasks import FROM_MODEL, TASKS

PACKAGE = Path(__file__).parents[1] / "edgeprune"
EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix(""))
    for path in (CONF / "experiment").rglob("*.yaml")
)


def imported_by(path: Path) -> set[str]:
    """Modules that a file imports, by full name, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@pytest.mark.parametrize(
    ("place", "forbidden"),
    [
        *((f"{name}.py", ["edgeprune"]) for name in ("config", "dataset", "files", "graph")),
        *((f"{name}.py", ["edgeprune"]) for name in ("gates", "outbox")),
        ("metrics.py", ["edgeprune.models", "edgeprune.methods.masks", "edgeprune.config"]),
        ("circuit.py", ["torch", "edgeprune.models", "edgeprune.methods.masks"]),
        ("masks.py", ["edgeprune.models", "edgeprune.training"]),
        ("modeling", [f"edgeprune.{name}" for name in ("masks", "config", "files", "training")]),
        ("drawing", ["torch", "transformers", "edgeprune.models"]),
        ("tasks", ["torch", "edgeprune.models", "edgeprune.training"]),
        ("analysis", ["edgeprune.training", "edgeprune.drawing"]),
        ("training", ["edgeprune.commands", "edgeprune.evaluation"]),
    ],
)  # fmt: skip
def test_imports_point_one_way(place, forbidden):
    files = [PACKAGE / place] if place.endswith(".py") else list((PACKAGE / place).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_by(path):
            assert not any(name == f or name.startswith(f"{f}.") for f in forbidden), (path, name)


def test_modeling_alone_imports_transformers():
    for path in PACKAGE.rglob("*.py"):
        if "modeling" not in path.parts:
            assert not any(name.split(".")[0] == "transformers" for name in imported_by(path)), path


@pytest.mark.parametrize(
    "module",
    ["edgeprune", "edgeprune.circuit"]
    + [f"edgeprune.drawing.{path.stem}" for path in sorted((PACKAGE / "drawing").glob("[!_]*.py"))]
    + [f"edgeprune.commands.{command}" for command in COMMANDS],
)
def test_what_needs_no_torch_does_not_load_it(module):
    """Not by way of another module either; commands load it when they run."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_dtypes_are_those_that_models_load_in():
    """Two lists, since `config` may not import torch, nor `modeling` the settings."""
    assert set(DTYPES) == {str(dtype).removeprefix("torch.") for dtype in TOLERANCE}


def test_the_public_names_are_shown():
    assert {"prune", "Circuit", "Ablation"} <= set(edgeprune.__all__) <= set(dir(edgeprune))
    text = pydoc.plaintext.document(edgeprune)
    for name in edgeprune.__all__:
        assert f"    {name}(" in text or f"    class {name}(" in text, name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_valid(experiment):
    ConfigStore.instance().store(name="prune_schema", node=COMMANDS["prune"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = compose("prune", [f"experiment={experiment}"])
    config = OmegaConf.to_object(settings)
    check_prune(config)
    check_model(config.model)
    if config.task.name == FROM_MODEL:  # the prompts of tracr/NAME come with the model NAME
        assert experiment == f"{FROM_MODEL}/{config.model.name}" == config.model.path
        assert (TRACR_MODELS / config.model.name / "config.json").exists()
    else:
        assert config.task.name in TASKS
        assert config.task.name == experiment.split("/")[-1]


def test_every_task_has_an_experiment_on_the_embedded_model():
    """Except the list with commas, which that model has never seen."""
    assert set(TASKS) - {"induction_list"} <= set(EXPERIMENTS)
