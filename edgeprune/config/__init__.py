"""Every setting, as dataclasses that validate themselves. Hydra fills them; torch is not imported.

The string below a field is its help text. A field's metadata, set by `setting`, states its range,
whether it may change when a run is resumed, and whether it distinguishes experiments in a report.
"""

from edgeprune.config.commands import (
    COMMANDS,
    RUN_COMMANDS,
    AblateConfig,
    CircuitConfig,
    CompareConfig,
    DrawConfig,
    EvaluateConfig,
    ExplainConfig,
    HeadsConfig,
    InspectConfig,
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
    AT_CLEAN,
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
    is_given,
    to_dict,
)
