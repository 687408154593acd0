"""The help texts, made of the settings' own docstrings and of what lies in conf/."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

from edgeprune import config as settings
from edgeprune.config import COMMANDS
from edgeprune.paths import CONF

GROUPS = ("experiment", "model", "task", "ablation", "trainer", "tracker", "launcher")

POSITIONAL = {
    "export": "run", "evaluate": "circuit", "draw": "circuit", "compare": "circuits",
    "report": "folder",
}  # fmt: skip
"""Commands whose bare argument is a path, and the setting it fills."""

SEVERAL = ("compare",)
"""Commands that take any number of paths."""

EXAMPLES = {
    "prune": ("experiment=ioi", "experiment=ioi sparsity=0.98 seed=1",
              "task=custom task.path=my.jsonl model=custom model.path=gpt2 sparsity=0.95",
              "experiment=ioi sparsity=0.9,0.95,0.98 seed=0,1,2 --multirun",
              "experiment=ioi trainer.steps=300,600 run_dir='runs/${trainer.steps}' --multirun",
              "experiment=tracr/reverse ablation=interchange"),
    "export": ("RUN", "RUN sparsity=0.97", "RUN num_edges=40 output=small.json",
               "RUN cleanup=0.01",
               "RUN sparsity=0.97 format=eap_json output=graph.json",
               "graph.pt output=edges.json"),
    "evaluate": ("RUN", "RUN split=validation shuffled_circuits=5",
                 "edges.json model=embedded task=ioi"),
    "draw": ("RUN", "RUN num_edges=30 formats=[png] output=small", "edges.json"),
    "compare": ("RUN RUN", "RUN RUN edges.json graph.pt output=comparison",
                "RUN reference=edges.json"),
    "report": ("runs", "runs/ioi-embedded output=report"),
    "prepare": ("task=ioi output=ioi.jsonl task.train=1000",
                "task=greater_than output=gt.jsonl model=custom model.path=gpt2"),
    "benchmark": ("shape=smollm2", "shape=llama-8b dtype=bfloat16 engines=[ours] "
                  "batch_size=32 micro_batch_size=4 recompute=true", "growth=true"),
}  # fmt: skip


def overview() -> str:
    """The help of `edgeprune --help`."""
    lines = [
        "usage: edgeprune <command> [name=value ...]",
        "",
        "Finds the circuit with which a language model does a task, by pruning its edges.",
        "",
    ]
    for name, config in COMMANDS.items():
        lines.append(f"  {name:<10}{config.__doc__}")
    lines += [
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
    paths = " PATH PATH ..." if command in SEVERAL else " PATH" if command in POSITIONAL else ""
    return f"edgeprune {command}{paths} [name=value ...]"


def command_help(command: str) -> str:
    """The help of one command: settings with their defaults and meanings, choices, examples."""
    config = COMMANDS[command]
    lines = [f"usage: {usage(command)}", "", str(config.__doc__), "", "Settings:"]
    lines += [f"  {name}\n      {text}" for name, text in _described(config, "")]
    groups = [g for g in GROUPS if (g in setting_names(command)) and (CONF / g).is_dir()]
    if groups:
        lines += ["", "Choices:"]
        lines += [f"  {group}={'|'.join(choices_of(group))}" for group in groups]
    lines += ["", "Examples:"]
    lines += [f"  edgeprune {command} {example}" for example in EXAMPLES[command]]
    return "\n".join(lines)


@cache
def setting_names(command: str) -> tuple[str, ...]:
    """Every name that a command's overrides may set, config groups among them."""
    groups = [f.name for f in dataclasses.fields(COMMANDS[command]) if f.name in GROUPS]
    if command == "prune":
        groups.append("experiment")
    return (*setting_kinds(command), *groups)


@cache
def setting_kinds(command: str) -> dict[str, Any]:
    """The type of every setting: str, int, list[str], ...; where null is allowed, without it."""
    return dict(_kinds(COMMANDS[command], ""))


def _kinds(config: type, prefix: str) -> list[tuple[str, Any]]:
    rows = []
    for name, hint in get_type_hints(config, vars(settings)).items():
        nested = _dataclass_of(hint)
        if nested is not None:
            rows += _kinds(nested, f"{prefix}{name}.")
        else:
            is_optional = type(None) in get_args(hint)
            rows.append((f"{prefix}{name}", get_args(hint)[0] if is_optional else hint))
    return rows


def choices_of(group: str) -> list[str]:
    """What a config group may be set to."""
    folder = CONF / group
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def _described(config: type, prefix: str) -> list[tuple[str, str]]:
    """('trainer.steps=3000', 'Optimisation steps.') for every setting, nested ones included."""
    rows = []
    hints = get_type_hints(config, vars(settings))
    docs = _field_docs(config)
    for field in dataclasses.fields(config):
        nested = _dataclass_of(hints[field.name])
        if nested is not None:
            rows += _described(nested, f"{prefix}{field.name}.")
        else:
            rows.append((f"{prefix}{field.name}={_default(field)}", docs.get(field.name, "")))
    return rows


def _dataclass_of(hint: Any) -> type | None:
    return next((h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)), None)


def _default(field: dataclasses.Field) -> str:
    """As it is written on the command line."""
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory()
        return "[" + ",".join(value) + "]"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _field_docs(config: type) -> dict[str, str]:
    """The string literal that follows each field in the source."""
    body = ast.parse(inspect.getsource(config)).body[0].body
    docs = {}
    for statement, following in zip(body, body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = following.value.value
    return docs
