"""Training steps on ONNX Runtime beside the PyTorch executor: the same gradients, the speed, the accuracy, the size.

    python benchmarks/onnx_runtime.py parity
    python benchmarks/onnx_runtime.py speed
    python benchmarks/onnx_runtime.py accuracy --seeds 0 1 2
    python benchmarks/onnx_runtime.py footprint

``parity``: each model of the zoo that needs no network trains 30 steps in PyTorch, is exported there, and then takes
100 steps in both from the same state on the same batches: are the signs of the noise the same bits, how far apart are
the gradients of the first step (the largest difference of a parameter's gradient in units of its largest entry), and
the losses on the way (the largest relative difference) and the weights after it (relative to their norm)? Where a model
has kinks or thresholds, rounding alone takes runs apart: the twin, in PyTorch as well, starts from weights that are off
by one unit in their last place.

``speed``: one thread, medians of the process's own time, steps interleaved; a step with and without perturbed runs
beside plain inference of the same number of forwards (the batch times one plus the perturbed forwards), as ONNX Runtime
runs it with constant weights, and with weights that are inputs, which is all that a training step can have.

``footprint`` installs ``onward[onnx]`` into an empty virtual environment and weighs it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import CLOCKS, announce, interleave
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

import onward
from onward.cli.recipes import Recipe, recipe_for
from onward.cli.training import make_optimizer
from onward.models import Dataset, build_for, load, loaders
from onward.passes import ops
from onward.passes.errors import ExportError
from onward.runtime.export.save import export
from onward.runtime.onnx import Folder, Settings, Trainer, read_folder, write_trained
from onward.runtime.onnx.data import read_splits
from onward.runtime.onnx.fused import StepInput
from onward.runtime.onnx.session import Device, Model
from onward.runtime.program import Program
from onward.runtime.training.update import update

ZOO = (
    "mlp", "mlp-12", "resnet5", "resnet9", "resnet18", "vgg8", "vit", "rnn_text", "gru_text", "lstm_text", "gpt", "gcn",
    "gat", "quantised_cnn", "sign_mlp", "spiking_mlp", "spiking_cnn", "binarised_mlp", "binarised_cnn", "integer_mlp",
    "integer_cnn",
)  # fmt: skip
SPEED = ("mlp", "resnet5", "vgg8", "resnet9", "vit", "gru_text")
PLAIN = "resnet5, plain, 64 copies"
"""A program without feedback, layer by layer: many forwards a step."""

WARM = 30
STEPS = 100


@dataclass
class Case:
    """A recipe's program, with its optimizer and batches."""

    recipe: Recipe
    dataset: Dataset
    program: Program
    optimizer: torch.optim.Optimizer
    batches: Any

    @classmethod
    def of(cls, name: str, seed: int = 0, estimator: onward.LikelihoodRatio | None = None) -> Case:
        recipe = recipe_for(name)
        dataset = load(recipe.data)
        torch.manual_seed(seed)
        model = build_for(recipe.model, dataset, **recipe.model_options)
        example, _ = dataset.batch(recipe.training.batch_size)
        program = onward.compile(
            model, example, loss=dataset.loss, estimator=estimator or recipe.estimator, seed=seed,
            unbatched=dataset.unbatched,
        )  # fmt: skip
        batches, _ = loaders(dataset, recipe.training.batch_size, seed, "none")
        return cls(recipe, dataset, program, make_optimizer(model, recipe.training), batches)

    def stream(self) -> Any:
        """Batches without end."""
        while True:
            yield from ((inputs[0] if len(inputs) == 1 else tuple(inputs), y) for *inputs, y in self.batches)

    def export(self, folder: Path, name: str) -> Folder:
        batch, target = self.dataset.batch(self.recipe.training.batch_size)
        settings = {"training": asdict(self.recipe.training)}
        export(self.program, self.optimizer, batch, target, folder, name=name, settings=settings)
        return read_folder(folder)

    def arrays(self, inputs: Any, target: Any) -> dict[str, Any]:
        """A batch by key."""
        whole = self.program.compiled.captured.signature.whole
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        if whole:
            leaves = [leaves[0][None]]
        return {f"input:{i}": leaf.numpy() for i, leaf in enumerate(leaves)} | {"target:0": target.numpy()}


def same_signs(case: Case, folder: Folder, device: Device) -> bool | None:
    """Whether the noise of a step has the same bits; None where nothing is perturbed."""
    compiled, program = case.program.compiled, case.program
    if not compiled.runs:
        return None
    inputs, target = case.dataset.batch(case.recipe.training.batch_size)
    found = {}
    for task in folder.tasks:
        if task.name.startswith("N"):
            values = {key: device.value(array) for key, array in case.arrays(inputs, target).items()}
            values["runtime:key"] = device.value(np.array([program.seed, program.step_count], np.int64))
            found |= Model(task.file, device, 1)(values)
    samples = 1 if compiled.captured.signature.whole else len(target)
    key = torch.tensor([program.seed, program.step_count])
    for run in compiled.runs:
        draws = torch.arange(compiled.estimator.draws(run.copies))
        for index in run.sites:
            site = compiled.sites[index]
            form = site.credited if site.rows else site.grid if site.blocks else site.layout
            shape = list(form.sizes)
            if form.dim >= 0:
                shape[form.dim] *= samples
            count = int(np.prod(shape))
            for draw in draws:
                noise = ops.perturb(
                    torch.zeros(shape), draw[None], key, torch.ones(index + 1), index, compiled.estimator.noise,
                    list(form.sizes), form.dim, form.outer, False,
                )  # fmt: skip
                bits = np.packbits(noise.numpy().reshape(-1)[:count] > 0, bitorder="little")
                made = found[f"words:{run.index}.{index}.{compiled.estimator.noise}"].numpy()[int(draw)]
                if not np.array_equal(bits, made):
                    return False
    return True


def parity(names: list[str]) -> Table:
    """Gradients and 100 steps of both, and of a twin in PyTorch whose weights are off by rounding."""
    table = Table("model", "nodes", "export", "signs", "gradients", "losses", "weights", "twin: losses", "weights")
    device = Device.find("cpu")
    for name in names:
        case, twin = Case.of(name), Case.of(name)
        stream = case.stream()
        batches = [next(stream) for _ in range(WARM + STEPS)]
        for each in (case, twin):
            for batch in batches[:WARM]:
                each.program.step(*batch)
                update(each.program, each.optimizer)
        with tempfile.TemporaryDirectory() as place:
            started = time.perf_counter()
            try:
                folder = case.export(Path(place) / "step", name)
            except ExportError as error:
                table.add_row(name, str(error))
                continue
            seconds = time.perf_counter() - started
            signs = same_signs(case, folder, device)
            row = _beside(case, twin, folder, device, batches[WARM:])
            nodes = _nodes(folder)
        table.add_row(name, str(nodes), f"{seconds:.1f} s", {True: "equal", False: "DIFFER", None: "none"}[signs], *row)
        _show(table)
    return table


def _beside(case: Case, twin: Case, folder: Folder, device: Device, batches: list[Any]) -> list[str]:
    trainer = Trainer(folder, Settings(1, 1, case.optimizer.param_groups[0]["lr"], threads=1), device)
    state, gradients = trainer.state, 0.0
    apart = {"onnx": 0.0, "twin": 0.0}
    with torch.no_grad():
        for parameter in twin.program.model.parameters():
            parameter.mul_(1 + 2.0**-23 * torch.randn_like(parameter))
    for each in (case, twin):
        each.program.next_calibration = 1 << 30  # an exported step keeps its noise's scale
    for number, (inputs, target) in enumerate(batches):
        given = StepInput(case.arrays(inputs, target), case.program.step_count, trainer.settings.lr)
        theirs = _gradients(folder, device, state, given) if not number else {}
        (result,) = trainer.steps.run(state, [given], folder.seed)
        loss, other = (float(each.program.step(inputs, target)) for each in (case, twin))
        for name, gradient in theirs.items():
            mine = case.program.model.get_parameter(name).grad
            assert mine is not None
            scale = float(mine.abs().max())
            gradients = max(gradients, float((mine - torch.from_numpy(gradient)).abs().max()) / scale if scale else 0.0)
        for each in (case, twin):
            update(each.program, each.optimizer)
        for name, value in (("onnx", result.loss), ("twin", other)):
            apart[name] = max(apart[name], abs(loss - value) / max(abs(loss), 1e-3))
        state = result.state
    named = list(case.program.model.named_parameters())
    mine_ = torch.cat([parameter.detach().flatten() for _, parameter in named])
    theirs_ = torch.cat([torch.from_numpy(state[f"parameter:{name}"].numpy()).flatten() for name, _ in named])
    twins = torch.cat([parameter.detach().flatten() for parameter in twin.program.model.parameters()])
    weights = [float((other - mine_).norm() / mine_.norm()) for other in (theirs_, twins)]
    return [f"{x:.0e}" for x in (gradients, apart["onnx"], weights[0], apart["twin"], weights[1])]


def _gradients(folder: Folder, device: Device, state: dict[str, Any], given: StepInput) -> dict[str, Any]:
    """The gradients of a step with perturbed runs, by parameter, from its tasks one after the other."""
    values = {**state, **{key: device.value(array) for key, array in given.batch.items()}}
    values["runtime:key"] = device.value(np.array([folder.seed, given.number], np.int64))
    values["runtime:step"] = device.value(np.array(given.number, np.int64))
    found: dict[str, Any] = {}
    for task in folder.tasks:
        if task.name.startswith(("U:", "T", "C")):
            continue
        made = Model(task.file, device, 1)(values)
        values |= made
        for key in (key for key in made if key.startswith("gradient:")):
            name = key.removeprefix("gradient:").rsplit("@", 1)[0]
            found[name] = found.get(name, 0) + made[key].numpy()
    return found


def _nodes(folder: Folder) -> int:
    return len(onnx.load(str(folder.file("training_step.onnx"))).graph.node)


def speed(names: list[str]) -> Table:
    """Milliseconds of a step and of inference."""
    columns = ("PyTorch", "tasks", "one model", "inference, weights fed", "constant", "ratio to fed", "to constant")
    table = Table("model", "step", *columns)
    torch.set_num_threads(1)
    for name in [*names, PLAIN]:
        estimator = None
        if name == PLAIN:
            estimator = onward.LikelihoodRatio(groups="layerwise", copies=64, sigma=0.1)
        case = Case.of(name.split(",")[0], estimator=estimator)
        with tempfile.TemporaryDirectory() as place:
            folder = case.export(Path(place) / "step", name)
            probes = case.program.feedback is not None and bool(case.program.compiled.runs)
            for perturbed in (True, False) if probes else (True,):
                table.add_row(name, "perturbed" if perturbed else "clean", *_times(case, folder, perturbed))
        _show(table)
    return table


def _times(case: Case, folder: Folder, perturbed: bool) -> list[str]:
    device = Device.find("cpu")
    batch = case.arrays(*case.dataset.batch(case.recipe.training.batch_size))
    inputs, target = case.dataset.batch(case.recipe.training.batch_size)
    settings = Settings(1, 1, 1e-3, threads=1)
    fused = Trainer(folder, settings, device)
    tasks = Trainer(folder, replace(settings, executor="tasks"), device)
    state = dict(fused.state)
    if case.program.feedback is not None:
        state["feedback:steps"] = device.value(np.array(100))
        state["feedback:next_probe"] = device.value(np.array(0 if perturbed else 10**6))
        case.program.feedback = replace(case.program.feedback, steps=100)

    def torch_step() -> None:
        case.program.next_probe = 0 if perturbed else 10**6
        case.program.next_calibration = 10**6
        case.program.step(inputs, target)
        update(case.program, case.optimizer)

    given = StepInput(batch, 50, 1e-3)
    forwards = 1 + (folder.forwards if perturbed else 0.0)
    key = folder.inputs[0].key
    rows = {key: np.concatenate([batch[key]] * (int(forwards) + 1))[: round(len(batch[key]) * forwards)]}
    if folder.whole:
        rows = {key: batch[key]}
    fed, constant = _inference(folder, constant=False), _inference(folder, constant=True)
    weights = {k: v.numpy() for k, v in state.items() if k.startswith(("parameter:", "buffer:"))}
    named = {k: v for k, v in weights.items() if k in {i.name for i in fed.get_overridable_initializers()}}
    calls: dict[str, Any] = {
        "torch": torch_step,
        "tasks": lambda: list(tasks.steps.run(state, [given], 0)),
        "fused": lambda: list(fused.steps.run(state, [given], 0)),
        "fed": lambda: fed.run(None, rows | named),
        "constant": lambda: constant.run(None, rows),
    }
    found = interleave(calls, 31, CLOCKS["cpu"], torch.device("cpu"), warmup=3)
    times = [median(found[name]) * 1e3 for name in calls]
    scale = forwards if folder.whole else 1.0  # a graph is one row: as many runs as forwards
    limits = [times[3] * scale, times[4] * scale]
    shown = [f"{t:.2f} ms" for t in (*times[:3], *limits)]
    return [*shown, f"{times[2] / limits[0]:.1f}", f"{times[2] / limits[1]:.1f}"]


def _inference(folder: Folder, *, constant: bool) -> ort.InferenceSession:
    """The model in evaluation mode on one thread, its weights constant or inputs."""
    path = folder.file("inference.onnx")
    if constant:
        path = folder.path.with_name("constant.onnx")
        write_trained(folder, {}, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def accuracy(seeds: list[int]) -> Table:
    """The main job in both: a ResNet-5 on digits, after each seed's whole run."""
    table = Table("seed", "PyTorch: accuracy", "seconds", "ONNX Runtime: accuracy", "seconds")
    for seed in seeds:
        case = Case.of("resnet5", seed)
        training = case.recipe.training
        with tempfile.TemporaryDirectory() as place:
            folder = case.export(Path(place) / "step", "resnet5")
            arrays = {}
            for split, suffix in ((case.dataset.train, ""), (case.dataset.test, "_test")):
                x, y = split.tensors
                arrays |= {f"x{suffix}": x.numpy(), f"y{suffix}": y.numpy()}
            np.savez(Path(place) / "data.npz", **arrays)
            train, test = read_splits(Path(place) / "data.npz", folder)
            settings = Settings(training.epochs, training.batch_size, training.lr, seed=seed, threads=1)
            trainer = Trainer(folder, settings, Device.find("cpu"))
            started = time.perf_counter()
            trainer.fit(train, test)
            theirs, their_seconds = trainer.records[-1].accuracy, time.perf_counter() - started
        batches, tests = loaders(case.dataset, training.batch_size, seed, "none")
        started = time.perf_counter()
        history = onward.Trainer(case.program, case.optimizer, progress=False).fit(
            batches, training.epochs, validation=tests
        )
        mine, seconds = history.records[-1].validation["accuracy"], time.perf_counter() - started
        table.add_row(str(seed), f"{mine:.4f}", f"{seconds:.0f}", f"{theirs:.4f}", f"{their_seconds:.0f}")
        _show(table)
    return table


def footprint() -> Table:
    """What an environment without torch takes on disk."""
    table = Table("package", "MB")
    repository = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        python = Path(place) / "bin" / "python"
        before = _weights(Path(place))
        pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
        pip = (*pip, "-c", repository / "constraints.txt")
        subprocess.run([*pip, f"{repository}[onnx]"], check=True)
        after = _weights(Path(place))
        for name, size in sorted(after.items(), key=lambda item: -item[1]):
            if size >= 1 and name not in before:
                table.add_row(name, f"{size:.0f}")
        table.add_row("all", f"{sum(after.values()) - sum(before.values()):.0f}")
        check = "import sys, onward.runtime.onnx; print('torch' in sys.modules)"
        found = subprocess.run([python, "-c", check], check=True, capture_output=True, text=True, cwd=place)
        table.add_row("imports torch", found.stdout.strip())
    return table


def _weights(environment: Path) -> dict[str, float]:
    """Megabytes by what stands in site-packages."""
    (site,) = environment.glob("lib/python*/site-packages")
    files = {entry.name: [entry] if entry.is_file() else list(entry.rglob("*")) for entry in site.iterdir()}
    return {name: sum(f.stat().st_size for f in found if f.is_file()) / 1e6 for name, found in files.items()}


def _show(table: Table) -> None:
    """The table so far, for those who wait."""
    Console(stderr=True).print(table)


def markdown(table: Table) -> str:
    """A table for a page."""
    headers = [str(column.header) for column in table.columns]
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parity", "speed", "accuracy", "footprint"))
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    announce(1)
    match given.what:
        case "parity":
            table = parity(given.models or list(ZOO))
        case "speed":
            table = speed(given.models or list(SPEED))
        case "accuracy":
            table = accuracy(given.seeds)
        case _:
            table = footprint()
    print(f"onnxruntime {ort.__version__}, {os.cpu_count()} cores")
    print(markdown(table))


if __name__ == "__main__":
    sys.exit(main())
