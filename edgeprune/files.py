"""Files are written whole or not at all; folders are replaced only if this program made them."""

import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from edgeprune.errors import ConfigError

T = TypeVar("T")

UNFINISHED = ".tmp"
"""The end of the name of a file that is being written."""

log = logging.getLogger("edgeprune")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically; what UTF-8 lacks (lone surrogates) is escaped."""
    content = text.encode(errors="backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def json_values(value: Any) -> Any:
    """A value as JSON has it; NaN becomes None."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_if_intact(path: Path, parse: Callable[[Any], T], again: str) -> T | None:
    """Read and parse a JSON file; return None if it does not exist or is damaged.

    A damaged file is warned of; `again` says in the warning how to get an intact one.
    """
    try:
        return parse(json.loads(path.read_bytes())) if path.exists() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning(f"{path} is damaged and left out ({type(error).__name__}: {error}); {again}")
        return None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path in the same folder, flush it to disk, and move it to `path`.

    If anything fails, the file at `path` stays as it was. Of a link, the target is replaced.

    Raises OSError if the file cannot be written, or is a folder or a device; it names `path`.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}{UNFINISHED}")
    try:
        if target.exists() and not target.is_file():  # a device would be replaced by a file
            raise OSError(errno.EINVAL, "not a file; give the path of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        raise OSError(number, reason or str(error), str(path)) from error


def remove_unfinished(folder: Path) -> None:
    """Remove the files, at any depth, that processes were writing when they were killed."""
    for path in folder.rglob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replace_folder(folder: Path, marker: str) -> Iterator[Path]:
    """Yield a new folder, which replaces `folder` if the block succeeds and is removed otherwise.

    A file named `marker` in the folder identifies it as a result of the same command.

    Raises ConfigError if `folder` is not absent, empty or marked; it is then left untouched.
    """
    folder = Path(os.path.realpath(folder))  # the target of a link is replaced, not the link
    is_ours = folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))
    if folder.exists() and not is_ours:
        raise ConfigError(
            f"{folder} is not an earlier result of this command, so it is not replaced; choose "
            "another output="
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        (new / marker).write_text("edgeprune replaces this folder when the command runs again\n")
        yield new
        put_in_place(new, folder)


def put_in_place(new: Path, folder: Path) -> None:
    """Replace a folder, a link to one or nothing by another folder on the same disk."""
    folder = Path(os.path.realpath(folder))
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        new.rename(folder)
