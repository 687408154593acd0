"""Every setting, as dataclasses that validate themselves. Hydra fills them; torch is not imported.

The string below a field is its help text. A field's metadata, set by `setting`, states its range,
whether it may change when a run is resumed, and whether it distinguishes experiments in a report.
"""

from edgeprune.config.commands import (
    COMMANDS,
    RUN_COMMANDS,
    AblateConfig,
    CompareConfig,
    DrawConfig,
    EvaluateConfig,
    ExplainConfig,
    HeadsConfig,
    MibConfig,
    PageConfig,
    PrepareConfig,
    ReportConfig,
    TestConfig,
    TokensConfig,
)
from edgeprune.config.convert import (
    chosen_by,
    dataclass_of,
    did_you_mean,
    each_setting,
    flatten,
    from_dict,
    settings_with,
)
from edgeprune.config.groups import (
    TRAINERS,
    AblationConfig,
    LauncherConfig,
    ModelConfig,
    TaskConfig,
    TrainerConfig,
)
from edgeprune.config.runs import (
    AttributeConfig,
    ExportConfig,
    PruneConfig,
    RunConfig,
)
from edgeprune.config.settings import (
    ATTRIBUTIONS,
    CUSTOM,
    DRAWINGS,
    DTYPES,
    LESS_MEMORY,
    MAX_EVALUATION_BATCH,
    OBJECTIVES,
    SIZES,
    SPLITS,
    TOKEN_TARGETS,
    given_size,
    to_dict,
)

__all__ = [
    "ATTRIBUTIONS", "COMMANDS", "CUSTOM", "DRAWINGS", "DTYPES", "LESS_MEMORY",
    "MAX_EVALUATION_BATCH", "OBJECTIVES", "RUN_COMMANDS", "SIZES", "SPLITS", "TOKEN_TARGETS",
    "TRAINERS", "AblateConfig", "AblationConfig", "AttributeConfig", "CompareConfig",
    "DrawConfig", "EvaluateConfig", "ExplainConfig", "ExportConfig", "HeadsConfig",
    "LauncherConfig", "MibConfig", "ModelConfig", "PageConfig", "PrepareConfig", "PruneConfig",
    "ReportConfig", "RunConfig", "TaskConfig", "TestConfig", "TokensConfig", "TrainerConfig",
    "chosen_by", "dataclass_of", "did_you_mean", "each_setting", "flatten", "from_dict",
    "given_size", "settings_with", "to_dict",
]  # fmt: skip
