"""The wheel holds every source file where ``import onward`` looks for it, and works away from the repository."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Folder in the repository -> where it is installed.
FOLDERS = {
    "onward": "onward",
    "compiler": "onward/compiler",
    "passes": "onward/passes",
    "runtime": "onward/runtime",
    "models": "onward/models",
    "evidence": "onward/evidence",
}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that nothing old in ``build/`` gets in, by a setuptools that must not complain."""
    source = tmp_path_factory.mktemp("packaging")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    script = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    run(sys.executable, "-W", "error", "-c", script, cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def test_wheel_holds_every_file(wheel: Path) -> None:
    expected = {
        f"{installed}/{path.relative_to(REPOSITORY / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "onward/py.typed" in expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_only_numpy_is_always_installed(wheel: Path) -> None:
    """What else is needed, an extra brings."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [re.match("[a-z-]+", one)[0] for one in needed if "extra ==" not in one] == ["numpy"]
    for extra, package in (("torch", "torch"), ("onnx", "onnxruntime"), ("gpu", "onnxruntime-gpu")):
        assert [one for one in needed if re.match(f"{package}[<>]", one) and f'extra == "{extra}"' in one], extra


def test_installed_wheel_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip_install = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile")
    run(*pip_install, "--target", site, wheel, cwd=tmp_path)
    # PYTHONPATH stands before the editable installation that the tests themselves use.
    modules = ", ".join(installed.replace("/", ".") for installed in FOLDERS.values())
    script = f"import {modules}; print(*(module.__file__ for module in ({modules},)), sep='\\n')"
    files = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert files == [str(site / installed / "__init__.py") for installed in FOLDERS.values()]
    run(sys.executable, site / "bin" / "onward", "--help", cwd=tmp_path, PYTHONPATH=str(site))
