"""The code of docs/onnx.md runs as it stands, and its tables name what there is."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "onnx.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    namespace: dict = {}
    for block in BLOCKS:
        exec(compile(block, "docs/onnx.md", "exec"), namespace)
    losses = [float(loss) for loss in capsys.readouterr().out.split()]
    assert losses[-1] < losses[0] == losses[1]  # it learns, after the warm-up
    manifest = namespace["manifest"]
    held = re.search(r"The manifest, .*?\n\n(\|.*?)\n\n", PAGE, re.DOTALL)
    assert held is not None
    named = set(re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in held[1].splitlines()[2:])))
    assert named | {"format", "version"} == set(manifest)
    session = namespace["session"]
    prefixes = {value.name.split(":")[0] for value in session.get_inputs()}
    assert prefixes <= {"parameter", "optimizer", "runtime", "feedback", "input", "target", "seed", "step", "lr"}


def test_no_table_is_missing():
    assert not re.findall(r"^[A-Z]{4,}$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("section", ["parity", "speed", "accuracy", "footprint"])
def test_every_table_has_its_command(section):
    assert f"python benchmarks/onnx_runtime.py {section}" in PAGE
