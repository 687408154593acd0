"""Help texts, made from the settings' own docstrings and from what lies in conf/."""

import ast
import inspect
import json
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, get_type_hints

import yaml

from edgeprune.config import (
    COMMANDS,
    RUN_COMMANDS,
    TRAINERS,
    TrainerConfig,
    dataclass_of,
    each_setting,
    to_dict,
)
from edgeprune.paths import CONF

GROUPS = ("experiment", "model", "task", "ablation", "trainer", "tracker", "launcher")

POSITIONAL = {"export": "run", "evaluate": "circuit", "test": "circuits", "explain": "circuit",
              "mib": "scores", "draw": "circuit", "heads": "run", "ablate": "run", "tokens": "run",
              "compare": "circuits", "page": "runs", "report": "folder"}  # fmt: skip
"""Commands whose bare argument is a path, and the setting that it fills."""

SEVERAL = ("compare", "page", "test")
"""Commands that take any number of paths."""

OPTIONAL = ("heads", "ablate", "tokens")
"""Commands whose path may be left out."""

EXAMPLES = {
    "prune": ("experiment=ioi", "experiment=ioi sparsity=0.98 seed=1",
              "task.path=my.jsonl model.path=gpt2 max_kl=0.1",
              "experiment=ioi seed=0,1,2 --multirun",
              "experiment=ioi trainer.steps=300,600 run_dir='runs/${trainer.steps}' --multirun",
              "experiment=tracr/reverse ablation=interchange"),
    "attribute": ("experiment=ioi", "experiment=ioi method=eap",
                  "task.path=my.jsonl model.path=gpt2 sparsity=0.98",
                  "experiment=ioi method=acdc threshold=0.01 task.train=32",
                  "experiment=ioi method=exact circuit=RUN",
                  "experiment=ioi method=eap_ig,gates --multirun"),
    "export": ("RUN", "RUN sparsity=0.97", "RUN max_kl=0.1", "RUN num_edges=40 output=small.json",
               "RUN cleanup=0.01", "RUN sparsity=0.97 format=eap_json output=graph.json",
               "graph.pt output=edges.json model=embedded"),
    "evaluate": ("RUN", "RUN split=validation head_permuted=5",
                 "edges.json model=embedded task=ioi"),
    "test": ("RUN", "RUN prompts=300 random_circuits=200", "RUN repeat=bootstrap:10",
             "RUN repeat=templates:4 launcher.processes=2", "RUN RUN RUN",
             "edges.json model=embedded task=ioi"),
    "explain": ("RUN", "RUN edges=30 prompts=300", "RUN verify=3",
                "edges.json model=embedded task=ioi output=explain.json"),
    "mib": ("RUN", "RUN output=submission", "graph.json model=embedded task=ioi"),
    "draw": ("RUN", "RUN num_edges=30 formats=[png] output=small", "edges.json model=embedded"),
    "heads": ("RUN", "model=embedded task=ioi", "model.path=gpt2 output=gpt2-heads"),
    "ablate": ("RUN heads=induction:8", "RUN circuit=RUN complement=true ablation=interchange",
               "model=smollm2 task=whereabouts heads=induction:16 generate=5"),
    "tokens": ("RUN", "RUN target=probability prompts=50", "model=embedded task=ioi",
               "RUN launcher.shard=true launcher.processes=2"),
    "compare": ("RUN RUN", "RUN RUN edges.json graph.pt output=comparison",
                "RUN reference=edges.json"),
    "page": ("RUN", "RUN RUN output=seeds.html", "RUN edges=20000 prompts=20"),
    "report": ("runs", "runs/ioi-embedded output=report"),
    "prepare": ("task=ioi output=ioi.jsonl task.train=1000",
                "task=greater_than output=gt.jsonl model.path=gpt2",
                "task.path=arc_easy model.path=google/gemma-2-2b output=arc_easy.jsonl"),
}  # fmt: skip


def overview() -> str:
    """The help of `edgeprune --help`."""
    lines = [
        "usage: edgeprune <command> [name=value ...]",
        "",
        "Finds the circuit with which a language model does a task, by pruning its edges.",
        "",
        *(f"  {name:<10}{_summary(config)}" for name, config in COMMANDS.items()),
        "",
        "Begin with:  edgeprune prune experiment=ioi run_dir=runs/ioi",
        "             edgeprune evaluate runs/ioi",
        "             edgeprune draw runs/ioi",
        "",
        "`edgeprune <command> --help` lists a command's settings.",
        "Exit status: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n.",
    ]
    return "\n".join(lines)


def usage(command: str) -> str:
    """How a command is called, in one line."""
    path = " [PATH]" if command in OPTIONAL else " PATH" if command in POSITIONAL else ""
    paths = " PATH PATH ..." if command in SEVERAL else path
    return f"edgeprune {command}{paths} [name=value ...]"


def command_help(command: str, arguments: Sequence[str] = ()) -> str:
    """The help of one command: settings with their defaults and meanings, choices, examples.

    `trainer=NAME` among the other arguments chooses whose settings are listed.
    """
    given = [a.removeprefix("trainer=") for a in arguments if a.startswith("trainer=")]
    trainer = given[-1] if given and given[-1] in choices_of("trainer") else "every_size"
    config = COMMANDS[command]
    lines = [f"usage: {usage(command)}", "", inspect.getdoc(config), "", "Settings:"]
    settings = _described(config, "", trainer)
    parts = {name.split(".")[0] for name, _ in settings if "." in name.split("=")[0]}

    def place(row: tuple[str, str]) -> int:
        """The path comes first, then the command's other settings, then those of its parts."""
        name = row[0].split("=")[0].split(".")[0]
        return 0 if name == POSITIONAL.get(command) else 2 if name in parts else 1

    for name, text in sorted(settings, key=place):
        lines += [f"  {name}", textwrap.indent(text, "      ")]
    groups = [g for g in GROUPS if g in setting_names(command) and (CONF / g).is_dir()]
    if groups:
        lines += ["", "Choices:"]
        lines += [f"  {group}={'|'.join(choices_of(group))}" for group in groups]
    if command == "prune":
        lines += ["", "trainer=NAME --help lists the settings of that trainer."]
    lines += ["", "Examples:"]
    lines += [f"  edgeprune {command} {example}" for example in EXAMPLES[command]]
    return "\n".join(lines)


@cache
def setting_names(command: str) -> frozenset[str]:
    """Every name that a command's overrides may set, config groups included."""
    settings = {name for name, _ in each_setting(COMMANDS[command])}
    groups = {name.split(".")[0] for name in settings if "." in name}
    return frozenset(settings | groups | ({"experiment"} if command in RUN_COMMANDS else set()))


def choices_of(group: str) -> list[str]:
    """The values of a config group."""
    folder = CONF / group
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def _described(
    config: type, prefix: str, trainer: str, given: dict[str, Any] | None = None
) -> list[tuple[str, str]]:
    """('trainer.steps=3000', 'Optimisation steps.') for every setting, nested ones included.

    `given` are values that replace the class's defaults.
    """
    rows = []
    hints, docs = get_type_hints(config), _field_docs(config)
    for field in fields(config):
        name, part = f"{prefix}{field.name}", dataclass_of(hints[field.name])
        value = field.default_factory() if field.default is MISSING else field.default
        if part is TrainerConfig:
            values = yaml.safe_load((CONF / f"trainer/{trainer}.yaml").read_text())
            part = TRAINERS[values.pop("defaults")[0].removesuffix("_schema")]
            rows += _described(part, f"{name}.", trainer, values)
        elif part is not None:
            if field.name in docs:
                rows.append((f"{name}=null" if value is None else name, docs[field.name]))
            rows += _described(part, f"{name}.", trainer, value and to_dict(value))
        elif name != "trainer.method" and not field.metadata.get("hidden"):
            value = (given or {}).get(field.name, value)
            rows.append((f"{name}={_as_text(value)}", docs.get(field.name, "")))
    return rows


def _as_text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def _summary(config: type) -> str:
    return str(config.__doc__).splitlines()[0]


def _field_docs(config: type) -> dict[str, str]:
    """The string that follows each field in the source, base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for statement, following in zip(body, body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=text)):
                    docs[statement.target.id] = inspect.cleandoc(text)
    return docs
