"""Where what is shipped lies, and what a path may be."""

import os
from pathlib import Path

from edgeprune.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
# in a wheel conf/ and data/ lie inside the package, in a checkout beside it

CONF = _ROOT / "conf"
"""The Hydra configs."""
EMBEDDED_MODEL = _ROOT / "data" / "embedded"
"""The small GPT-2 that comes with the project."""
TRACR_MODELS = _ROOT / "data" / "tracr_models"
"""The compiled transformers that come with the project."""


def require_utf8(text: str | os.PathLike[str]) -> None:
    """Raise ConfigError for a path or other text with bytes that are not UTF-8.

    Python has them as lone surrogates, which safetensors and JSON Lines cannot hold.
    """
    try:
        os.fspath(text).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(text)
        raise ConfigError(
            f"{shown!r} is not UTF-8; rename the file or folder, or choose another name"
        ) from None
