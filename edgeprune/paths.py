"""Where what is shipped lies."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
# in a wheel conf/ and data/ lie inside the package, in a checkout beside it

CONF = _ROOT / "conf"
"""The Hydra configs."""
EMBEDDED_MODEL = _ROOT / "data" / "embedded"
"""The small GPT-2 that comes with the project."""
TRACR_MODELS = _ROOT / "data" / "tracr_models"
"""The compiled transformers that come with the project."""
