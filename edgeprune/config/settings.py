"""What all settings classes share: how a field is declared, and how its value is checked."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

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
            `digest` ("model" or "data") if the value is a path, whose content this digest of the
            run identifies wherever it lies; `hidden=True` if users do not set it; the bounds
            `at_least`, `at_most`, `above`; and the `choices` of a value.
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
            if isinstance(value, Settings):
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

    def require_path(self) -> None:
        """Raise ConfigError where settings name the user's own model or data but not its place."""


def _expand(value: Any) -> Any:
    """A value with the home directory in place of a leading `~/`; raises ConfigError for text that
    is not UTF-8."""
    if not isinstance(value, str):
        return value
    require_utf8(value)
    return os.path.expanduser(value) if re.match(r"~\w*/", value) else value


to_dict = dataclasses.asdict
"""A settings object as JSON values, as written to config.yaml."""


def is_given(value: Any) -> bool:
    """Whether a setting whose default is null or false has another value; 0 is one."""
    return value is not None and value is not False


def given_size(settings: Settings) -> tuple[str, float] | None:
    """The one of `SIZES` that is set, and its value; None if none is."""
    given = [(name, getattr(settings, name, None)) for name in SIZES]
    return next((choice for choice in given if choice[1] is not None), None)
