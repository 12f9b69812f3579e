"""Files that are on the disk whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ...passes.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` at the end, or is gone if anything went wrong.

    Raises:
        OutputError: it cannot be written. What was there stays.
    """
    target = Path(os.path.abspath(path))
    temporary: str | None = None
    if target.exists() and not target.is_file():
        raise OutputError(f"cannot write {path}: it is {'a folder' if target.is_dir() else 'no ordinary file'}.")
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
            Path(temporary).unlink(missing_ok=True)


class _OnlyTryingError(Exception):
    """Nothing is to be written."""


def check_writable(path: Path) -> None:
    """Raise OutputError if `replacing` could not write `path`: before the work, not after it."""
    with suppress(_OnlyTryingError), replacing(path):
        raise _OnlyTryingError
