"""Files are written whole or not at all, and removed only as they were listed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, flush it to disk, and move it into place.

    Whatever was at `path` stays untouched if anything fails. Where `path` is a link, what it points
    to is replaced.

    Raises:
        OSError: it cannot be written; names `path`. See also `check_can_be_file`.
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
    """Raises OSError where a path is a folder, a device or a pipe, or lies below a file."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give the path of a file", str(path))
    is_device = str(path.absolute()).startswith(("/dev/", "/proc/"))
    if is_device or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "is a device or a pipe; give the path of a file", str(path))
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            reason = f"cannot be written, since {parent} is no folder; give another path"
            raise NotADirectoryError(errno.ENOTDIR, reason, str(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(note: Path) -> dict[str, str]:
    """What a list of files has: each path, from the list's own folder, and its digest.

    Nothing if there is no list, or what is there is none.
    """
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_listed(note: Path) -> None:
    """Remove listed files that are as they were listed, then folders left empty, and the list."""
    folder = note.parent
    for name, digest in listed(note).items():
        path = folder / name
        if path.is_file() and file_digest(path) == digest:
            path.unlink()
            for parent in path.parents[: len(Path(name).parents) - 1]:  # below the list's folder
                if not any(parent.iterdir()):
                    parent.rmdir()
    note.unlink(missing_ok=True)
