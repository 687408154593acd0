"""Files are written whole or not at all; folders are replaced only if this program made them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeprune.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path in the same folder, flush it to disk, and move it to `path`.

    If anything fails, the file at `path` stays as it was. If `path` is a link, its target is
    replaced.

    Raises:
        OSError: the file cannot be written; names `path`. See also `check_can_be_file`.
    """
    check_can_be_file(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_can_be_file(path: Path) -> None:
    """Raise OSError if a path is a folder, a device or a pipe, or lies below a file."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give the path of a file", str(path))
    is_device = str(path.absolute()).startswith(("/dev/", "/proc/"))
    if is_device or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "is a device or a pipe; give the path of a file", str(path))
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            reason = f"cannot be written, since {parent} is not a folder; give another path"
            raise NotADirectoryError(errno.ENOTDIR, reason, str(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replace_folder(folder: Path, marker: str) -> Iterator[Path]:
    """Build a folder next to `folder`, and put it in its place if the block succeeds.

    If the block raises, the new folder is removed and the old one stays as it was.

    Args:
        folder: the result. It must be absent, empty, or contain the marker file.
        marker: name of a file that is written into the new folder, which identifies it as a
            result of the same command.

    Yields:
        The new folder, which contains only the marker file.

    Raises:
        ConfigError: `folder` is something else, which is then left untouched.
    """
    folder = Path(os.path.realpath(folder))  # the target of a link is replaced, not the link
    new, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    for path in (folder, new, old):
        _check_replaceable(path, marker)
    _remove(new)
    new.mkdir(parents=True)
    try:
        (new / marker).write_text("edgeprune replaces this folder when the command runs again\n")
        yield new
        put_in_place(new, folder)
    except BaseException:
        _remove(new)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def put_in_place(new: Path, folder: Path) -> None:
    """Replace a folder, which may be absent, by another one next to it."""
    old = folder.with_name(f".{folder.name}.old")
    _remove(old)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _remove(old)


def _check_replaceable(folder: Path, marker: str) -> None:
    is_ours = folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))
    if folder.exists() and not is_ours:
        raise ConfigError(
            f"{folder} is not an earlier result of this command, so it is not replaced; choose "
            "another output="
        )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
