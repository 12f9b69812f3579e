"""``python -m onward.runtime.onnx``: train an exported folder where there is no torch."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ...compiler.files import check_writable
from ...passes.errors import OnwardError, OptionError
from ..training.schedules import SCHEDULES
from .data import read_splits
from .folder import Folder, read_folder
from .session import Device
from .trainer import EXECUTORS, Record, Settings, Trainer
from .write import check_onnx, write_trained


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m onward.runtime.onnx", description="Train what `onward export` has written, on ONNX Runtime."
    )
    commands = made.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an exported folder on the arrays of an .npz file")
    train.add_argument("folder", type=Path, help="what `onward export` has written")
    train.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help=".npz with x, y and, to test, x_test, y_test"
    )
    train.add_argument("--output", "-o", type=Path, metavar="FILE", help="write the trained model, an .onnx file")
    train.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the run's state here, after each epoch")
    train.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="and every N steps")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    train.add_argument("--epochs", type=int, help="default: as exported")
    train.add_argument("--batch-size", type=int, help="default: as exported")
    train.add_argument("--lr", type=float, help="learning rate; default: as exported")
    train.add_argument("--schedule", choices=tuple(SCHEDULES), help="of the learning rate; default: as exported")
    train.add_argument("--seed", type=int, default=0, help="of the order of the samples (default: 0)")
    train.add_argument(
        "--executor", choices=EXECUTORS, default="fused", help="one model a step or a task (default: fused)"
    )
    train.add_argument(
        "--workers", type=int, default=1, help="with tasks, threads that run them side by side (default: 1)"
    )
    train.add_argument(
        "--threads", type=int, default=0, help="of one model (default: all cores, or 1 with several workers)"
    )
    train.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one"
    )
    info = commands.add_parser("info", help="say what an exported folder holds")
    info.add_argument("folder", type=Path, help="what `onward export` has written")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 130 after Ctrl-C. Errors of a user's are one line on standard error."""
    given = parser().parse_args(arguments)
    try:
        folder = read_folder(given.folder)
        if given.command == "info":
            print(about(folder))
            return 0
        return _train(folder, given)
    except OnwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def about(folder: Folder) -> str:
    """What a folder holds, in lines."""
    trained = {f"parameter:{name}" for name in folder.parameters}
    weights = sum(_count(form.shape) for form in folder.state if form.key in trained)
    kept = sum(_count(form.shape) for form in folder.state) - weights
    forms = [f"{form.key} {form.dtype} {'×'.join(map(str, form.shape))}" for form in (*folder.inputs, *folder.targets)]
    options = ", ".join(f"{key} {value}" for key, value in folder.optimizer.items() if key != "name")
    return "\n".join(
        [
            f"{folder.model}: {len(folder.tasks)} tasks, {weights:,} weights to train, {kept:,} other numbers of state",
            f"takes {'; '.join(forms)}",
            f"{folder.optimizer['name']}: {options}",
            f"{folder.forwards:g} perturbed forwards a sample in a step with perturbed runs; seed {folder.seed}, "
            f"step {folder.step}",
        ]
    )


def _count(shape: tuple[int | str, ...]) -> int:
    return math.prod(size for size in shape if isinstance(size, int))


def _train(folder: Folder, given: argparse.Namespace) -> int:
    if given.resume and given.checkpoint is None:
        raise OptionError("--resume needs --checkpoint FILE.")
    if given.checkpoint_every and given.checkpoint is None:
        raise OptionError("--checkpoint-every needs --checkpoint FILE.")
    written = [path.resolve() for path in (given.output, given.checkpoint) if path is not None]
    if len({given.data.resolve(), *written}) <= len(written):
        raise OptionError("--data, --output and --checkpoint have to be several files.")
    saved = folder.training
    settings = Settings(
        epochs=given.epochs if given.epochs is not None else saved.get("epochs", 1),
        batch_size=given.batch_size if given.batch_size is not None else saved.get("batch_size", 32),
        lr=given.lr if given.lr is not None else folder.optimizer["lr"],
        schedule=given.schedule or saved.get("schedule", "constant"),
        seed=given.seed,
        executor=given.executor,
        workers=given.workers,
        threads=given.threads,
        checkpoint_every=given.checkpoint_every,
    )
    if given.output is not None:
        check_onnx()
    for path in (given.output, given.checkpoint):
        if path is not None:
            check_writable(path)
    train, test = read_splits(given.data, folder)
    device = Device.find(given.device)
    trainer = Trainer(folder, settings, device)
    if given.checkpoint is not None and given.checkpoint.exists():
        if not given.resume:
            raise OptionError(f"{given.checkpoint} exists: --resume goes on with it, or name another file.")
        trainer.load(given.checkpoint)
    samples = f"{train.samples} samples, {test.samples if test else 0} to test"
    print(f"{folder.model} on onnxruntime, {device.note()}; {samples}")
    started, before = time.perf_counter(), trainer.step
    finished = trainer.fit(train, test, checkpoint=given.checkpoint, report=_print)
    if given.output is not None:
        write_trained(folder, trainer.state, given.output)
        print(f"the trained model: {given.output}")
    if not finished:
        hint = "" if given.checkpoint is None else "; --resume goes on"
        print(f"stopped behind step {trainer.step}{hint}", file=sys.stderr)
        return 130
    print(f"{trainer.step - before} steps in {time.perf_counter() - started:.1f} s")
    return 0


def _print(record: Record) -> None:
    tested = "" if math.isnan(record.loss) else f"  test loss {record.loss:.4f}"
    tested += "" if math.isnan(record.accuracy) else f"  accuracy {record.accuracy:.4f}"
    print(f"epoch {record.epoch}  loss {record.train_loss:.4f}{tested}  {record.seconds:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
