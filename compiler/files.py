"""Files and folders that are on the disk whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..passes.errors import OutputError


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` at the end, or is deleted if anything went wrong."""
    target = Path(os.path.abspath(folder))
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
        temporary.chmod(0o755)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if target.exists():
            old = temporary.with_name(f"{temporary.name}-old")
            os.rename(target, old)
            try:
                os.rename(temporary, target)
            except OSError:
                os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, target)
        fsync(target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` at the end, its folder made if missing; or is gone if anything
    went wrong.

    Raises:
        OutputError: it cannot be written. What was there stays.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_file():
        raise OutputError(f"cannot write {path}: it is {'a folder' if target.is_dir() else 'no ordinary file'}.")
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".tmp-{target.name}-", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


class _OnlyTryingError(Exception):
    """Nothing is to be written."""


def check_writable(path: Path) -> None:
    """Raise `OutputError` if `replacing` could not write `path`: before the work, not after it."""
    with contextlib.suppress(_OnlyTryingError), replacing(path):
        raise _OnlyTryingError


def write_whole(path: Path, content: str) -> None:
    """Write `path` in one rename, its folder made if missing.

    Raises:
        OutputError: it cannot be written. What was there stays.
    """
    with replacing(path) as file:
        file.write(content.encode())
