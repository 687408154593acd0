"""Settings from and to plain values, and questions about all settings of a class."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_type_hints

from edgeprune.config.commands import COMMANDS, RUN_COMMANDS
from edgeprune.config.groups import TRAINERS, TrainerConfig
from edgeprune.errors import ConfigError


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
    """The settings class in a type hint such as `ModelConfig | None`, or None."""
    return next((h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)), None)


def chosen_by(choice: tuple[str, float | None]) -> str:
    """How circuit.json names a choice, see `PruneConfig.choice`."""
    name, value = choice
    return name if value is None else f"{name}={value}"


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
