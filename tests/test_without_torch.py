"""Where torch is not installed: the trainer on ONNX Runtime runs, and what needs more says what."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_cases import data_file, exported

import onward

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""

TORCH = ("torch", "typer", "rich", "networkx", "sklearn", "safetensors", "numba", "scipy")


def run(folder: Path, blocked: tuple[str, ...], *command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python where some packages cannot be imported; warnings are errors."""
    (folder / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked))
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    (tmp_path / "packages").mkdir()
    return tmp_path / "packages"


@pytest.mark.parametrize("executor", ["fused", "tasks"])
def test_it_trains(executor: str, packages: Path, tmp_path: Path) -> None:
    """NumPy and onnxruntime are enough; for the trained model onnx too."""
    data = data_file("layerwise", tmp_path / "data.npz")
    command = ("-m", "onward.runtime.onnx", "train", exported("layerwise").path, "--data", data, "--threads", "1")
    done = run(packages, (*TORCH, "onnx"), *command, "--executor", executor, "--checkpoint", tmp_path / "run.npz")
    assert done.stdout.splitlines()[-1].startswith("14 steps in ")
    assert not done.stderr
    assert len(np.load(tmp_path / "run.npz")["progress"].item()) > 100
    if executor == "fused":
        run(packages, TORCH, *command, "-o", tmp_path / "out.onnx")
        onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
        done = run(packages, (*TORCH, "onnx"), *command, "-o", tmp_path / "other.onnx", code=1)
        assert done.stderr == "error: writing a model needs the package onnx: pip install 'onward[onnx]'\n"
        assert "weights" in run(packages, TORCH, "-m", "onward.runtime.onnx", "info", exported("layerwise").path).stdout


def test_it_imports_nothing_else(packages: Path) -> None:
    foreign = (*TORCH, "onnx", "onward.compiler.driver", "onward.models", "onward.cli")
    script = f"""
import sys
import onward, onward.runtime.onnx, onward.runtime.onnx.__main__
print([name for name in {foreign!r} if name in sys.modules])
"""
    assert run(packages, (), "-c", script).stdout == "[]\n"


def test_without_onnxruntime_it_says_what_is_missing(packages: Path) -> None:
    done = run(packages, ("onnxruntime",), "-m", "onward.runtime.onnx", "--help", code=1)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: training an exported folder needs onnxruntime, which is not installed: "
        "pip install 'onward[onnx]'"
    )


def test_an_onnxruntime_that_reads_files_from_outside_is_refused(packages: Path) -> None:
    (packages / "onnxruntime.py").write_text("__version__ = '1.23.2'")
    done = run(packages, (), "-m", "onward.runtime.onnx", "--help", code=1)
    assert done.stderr.splitlines()[-1].startswith("ImportError: onnxruntime 1.23.2 reads files outside")


# --- the package --------------------------------------------------------------------------------------------------


def test_names_are_there_when_they_are_asked_for() -> None:
    assert set(onward.__all__) == set(onward._HOMES)
    assert set(onward.__all__) <= set(dir(onward))
    for name in onward.__all__:
        value = getattr(onward, name)
        assert value is not None
        if name not in ("errors", "losses", "models"):
            assert value.__module__.startswith("onward.")
            assert value.__name__ == onward._CALLED.get(name, name)
    names: dict[str, object] = {}
    exec("from onward import *", names)
    assert set(onward.__all__) <= set(names)
    assert names["compile"] is onward.compile
    with pytest.raises(AttributeError, match="module 'onward' has no attribute 'Trainr'"):
        onward.Trainr  # noqa: B018
    with pytest.raises(ImportError, match="Trainr"):
        from onward import Trainr  # noqa: F401


def test_settings_can_be_pickled() -> None:
    estimator = onward.LikelihoodRatio.auto(warmup=3)
    assert pickle.loads(pickle.dumps(estimator)) == estimator


def test_a_name_that_needs_torch_says_so(packages: Path) -> None:
    script = """
import onward
assert "compile" in dir(onward) and onward.__version__ and issubclass(onward.errors.DataError, RuntimeError)
for name in sorted(set(onward.__all__) - {"errors"}):
    try:
        getattr(onward, name)
    except ModuleNotFoundError as error:
        print(name, error.name, error)
try:
    from onward import compile
except ImportError as error:
    print(error)
"""
    lines = run(packages, TORCH, "-c", script).stdout.splitlines()
    assert len(lines) == len(onward.__all__)
    for line in lines:
        assert "pip install 'onward[torch]'" in line, line
        assert "python -m onward.runtime.onnx" in line, line


@pytest.mark.parametrize("missing", ["torch", "typer"])
def test_the_console_script_says_what_is_missing(missing: str, packages: Path) -> None:
    script = "import sys; sys.argv = ['onward', '--help']; from onward.command import main; main()"
    done = run(packages, (missing,), "-c", script, code=1)
    assert done.stderr.startswith(f"onward's command line needs {missing}, which is not installed: ")
    assert "pip install 'onward[torch]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_does_not_need_onnx(packages: Path) -> None:
    script = "import sys; sys.argv = ['onward', '--help']; from onward.command import main; main()"
    assert "export" in run(packages, ("onnx", "onnxruntime"), "-c", script).stdout
