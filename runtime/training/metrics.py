"""Where a run's numbers go: JSON lines, TensorBoard, a progress bar.

A record is a flat dict with ``"kind": "step"`` (one an optimizer step) or ``"kind": "epoch"``. Numbers that are not
finite are written as null: JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ...compiler.columns import magnitude
from ...compiler.files import fsync
from ...passes.errors import CheckpointError, OptionError


class Sink(Protocol):
    """A place for records."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        ...

    def flush(self) -> None:
        """See that everything logged so far is on the disk."""
        ...

    def close(self) -> None:
        """Flush and let go of the file."""
        ...


def jsonable(value: Any) -> Any:
    """`value` with every number that is not finite replaced by None, and tuples by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def _belongs(line: str, step: int, epoch: int) -> bool:
    """Whether a line of a metrics file is whole and not after `step` steps and `epoch` finished epochs."""
    try:
        record = json.loads(line)
        return bool(record["epoch"] <= epoch if record["kind"] == "epoch" else record["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


class JsonLines:
    """One JSON object a line, appended to `path` as it happens.

    Opening keeps only the lines up to `step` optimizer steps and `epoch` finished epochs (0 and 0: none), so that
    after a resume nothing appears twice. The shortened file replaces the old one in one rename.
    """

    def __init__(self, path: Path, *, step: int = 0, epoch: int = 0) -> None:
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            kept = [line + "\n" for line in lines if _belongs(line, step, epoch)]
            temporary.write_text("".join(kept), encoding="utf-8")
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line; it is out of this process when the call returns."""
        self._file.write(json.dumps(jsonable(record), allow_nan=False) + "\n")

    def flush(self) -> None:
        """Flush the file to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def require_tensorboard() -> None:
    """Raise `OptionError` if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "tensorboard=True needs the package tensorboard: pip install 'onward[tensorboard]'"
        ) from error


class TensorBoard:
    """Scalars for TensorBoard, in event files under `directory`.

    Step records appear under ``train/``, epoch records under ``epoch/`` and ``validation/``, all over the number of
    optimizer steps. After a resume at `step`, TensorBoard hides what an earlier process wrote beyond it.
    Raises `OptionError` if TensorBoard is not installed.
    """

    def __init__(self, directory: Path, *, step: int = 0) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        purge_step = step + 1 if step else None
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write every number of the record."""
        prefix = "train" if record["kind"] == "step" else "epoch"
        for name, value in record.items():
            if name in ("kind", "step"):
                continue
            if name == "validation":
                scalars = {f"validation/{key}": item for key, item in value.items()}
            elif isinstance(value, list | tuple):
                scalars = {f"{prefix}/{name}_{index}": item for index, item in enumerate(value)}
            else:
                scalars = {f"{prefix}/{name}": value}
            for tag, scalar in scalars.items():
                self._writer.add_scalar(tag, scalar, record["step"])

    def flush(self) -> None:
        """Write out what is queued."""
        self._writer.flush()

    def close(self) -> None:
        """Write out what is queued and close the event file."""
        self._writer.close()


class ProgressBar:
    """A rich progress bar over all steps on standard error: loss, validation, forwards spent, time left.

    Silent when not `shown` or when standard error is no terminal. It has no thread of its own: it redraws at most
    ten times a second, from `step`.
    """

    def __init__(
        self, shown: bool, epochs: int, steps_per_epoch: int | None, done: int, console: Console | None = None
    ):
        console = console or Console(stderr=True)
        self._epochs = epochs
        self._progress: Progress | None = None
        self._drawn = 0.0
        if shown and console.is_terminal:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[validation]}"),
                TextColumn("{task.fields[forwards]} forwards"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                auto_refresh=False,
            )
            fields: dict[str, Any] = {
                "epoch": 1,
                "epochs": epochs,
                "loss": "–",
                "validation": "",
                "forwards": "0",
                "note": "",
            }
            total = None if steps_per_epoch is None else epochs * steps_per_epoch
            self._task: TaskID = self._progress.add_task("train", total=total, completed=done, **fields)

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()

    def _update(self, force: bool, **fields: Any) -> None:
        if self._progress is None:
            return
        self._progress.update(self._task, **fields)
        now = time.monotonic()
        if force or now - self._drawn >= 0.1:
            self._progress.refresh()
            self._drawn = now

    def step(self, step: int, epoch: int, loss: float, forwards: float) -> None:
        """Show that `step` steps are done, in `epoch` (from 1), with the running mean `loss`."""
        self._update(False, completed=step, epoch=epoch, loss=f"{loss:.4f}", forwards=magnitude(forwards))

    def validated(self, values: Mapping[str, float]) -> None:
        """Show the values of the last validation."""
        self._update(True, validation="  ".join(f"val {name} {value:.4f}" for name, value in values.items()))

    def note(self, text: str) -> None:
        """Show a short message at the end of the line."""
        self._update(True, note=text)
