"""What inspect and compile say of a program: numbers, printed Python (which is run), drawings, saved folders."""

import ast
import itertools
import json
import re
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import fx, nn

import onward
from onward import LikelihoodRatio
from onward.compiler import columns, dot, listing, picture, report, report_text, save, source, svg
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel, input_keys, output_keys
from onward.passes.errors import OutputError, UnknownNameError, UnreachedParameterError, UnsupportedModelError
from onward.passes.locate_samples import batch_symbol
from onward.runtime.plan import format_plan, make_plan


class Mixed(nn.Module):
    """A bit of everything: dropout, a norm, a constant, a buffer, a tied and a frozen parameter."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.position = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 2.0))
        self.fc.bias.requires_grad_(False)

    def forward(self, x):
        h = torch.relu(self.norm(self.fc(x)) + self.position * self.scale)
        h = F.dropout(h, 0.1, self.training) + torch.tensor([1.0])
        return self.head(torch.relu(self.head(h)))


def compiled_mixed(**settings: object) -> CompiledModel:
    torch.manual_seed(0)
    return compile_model(Mixed(), torch.randn(4, 6), LikelihoodRatio(copies=4, **settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def resnet() -> CompiledModel:
    torch.manual_seed(0)
    model = onward.models.resnet5(width=4)
    return compile_model(model, torch.randn(4, 1, 8, 8), LikelihoodRatio(copies=8))


@pytest.fixture(scope="module", params=["exact", "sign", "stochastic"])
def mixed(request: pytest.FixtureRequest) -> CompiledModel:
    return compiled_mixed(capture=request.param, groups="joint" if request.param == "stochastic" else "layerwise")


def plan_of(compiled: CompiledModel) -> str:
    return format_plan(make_plan(compiled))


def test_numbers_of_a_convolution(resnet):
    site = report.examine(resnet, name="resnet5").sites[1]
    assert site.name == "block.conv1"
    assert site.operation == "aten.conv2d"
    assert site.rule == "bilinear"
    assert site.parameters == ("block.conv1.weight", "block.conv1.bias")
    assert site.num_parameters == 8 * 4 * 9 + 8
    assert site.perturbation_dimension == 8 * 4 * 4
    assert site.forward_flops == site.gradient_flops == 2 * (8 * 4 * 4) * (4 * 9)
    assert site.exact_bytes == 4 * 8 * 8 * 4
    assert site.packed_bytes == 4 * 8 * 8 // 8  # after a ReLU: one bit
    assert "resnet.py" in site.line


def test_report_agrees_with_the_program(mixed):
    examined = report.examine(mixed, name="mixed", plan=plan_of(mixed))
    assert examined.num_parameters == 6 * 8 + 8 + 8 + 8 + 8 * 8 + 8
    assert examined.frozen == ("fc.bias",)
    assert [one.name for one in examined.passes] == [record.name for record in mixed.history]
    assert examined.passes[0].change["aten.linear"] == 3
    noise = next(one for one in examined.passes if one.name == "insert_noise")
    assert noise.change == {"onward.perturb": len(mixed.sites)}
    assert sorted(name for site in examined.sites for name in site.parameters).count("head.weight") == 2
    assert any("head.weight" in note and "summed" in note for note in examined.notes)
    for site, subgraph in zip(examined.sites, examined.subgraphs, strict=True):
        assert sum(one.bytes for one in subgraph.captures) == site.captured_bytes
        assert subgraph.gives == site.parameters
    json.dumps(examined.to_json())


def test_sign_capture_is_said_to_be_biased():
    notes = report.examine(compiled_mixed(capture="sign"), name="m").notes
    assert any("biased" in note for note in notes)


def test_norm_layers_pack_their_output():
    compiled = compiled_mixed(capture="sign")
    site = next(one for one in report.examine(compiled, name="m").sites if one.name == "norm")
    assert site.rule == "normalized"
    assert site.packed_bytes == site.captured_bytes == 2
    assert site.exact_bytes == 32


def test_text_is_laid_out_at_100_columns(resnet, mixed):
    for compiled in (resnet, mixed):
        text = report_text.text(report.examine(compiled, name="a model", plan=plan_of(compiled)))
        assert max(map(len, text.splitlines())) <= columns.WIDTH
        for heading in ("Passes", "Sites", "Perturbed runs", "Gradient subgraphs", "Plan of a step"):
            assert f"\n{heading}" in text
        for site in compiled.sites:
            assert site.name in text
    rules = report_text.rules_text()
    assert max(map(len, rules.splitlines())) <= columns.WIDTH
    assert "any other operation" in rules
    assert "aten.conv2d" in rules


def test_table_wraps_and_shortens():
    table = columns.table(["a", "b", "c"], [("x" * 30, "one two three four", "12")], "llr", wrap=("b",), width=52)
    assert max(map(len, table.splitlines())) <= 52
    assert "three" in table
    shortened = columns.table(["a", "b"], [("x" * 30, "12")], "lr", width=20)
    assert "…" in shortened
    assert max(map(len, shortened.splitlines())) <= 20


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "–"), (1, "1"), (999, "999"), (1234, "1.23k"), (2.5e6, "2.5M"), (3e12, "3T")]
)
def test_quantity(number, expected):
    assert columns.quantity(number) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, "0 B"), (1023, "1023 B"), (4096, "4.0 KiB"), (3 << 30, "3.0 GiB")])
def test_size(count, expected):
    assert columns.size(count) == expected


def executed(text: str) -> dict[str, types.FunctionType]:
    namespace: dict[str, types.FunctionType] = {}
    exec(compile(text, "printed", "exec"), namespace)
    return namespace


def test_printed_python_computes_what_the_graphs_compute(mixed):
    """Every graph of a whole step, run from its printed source beside the graph itself, agrees to the bit."""
    functions = executed(listing.python(mixed, model="mixed"))
    environment = values_of(mixed)
    for name in (mixed.history[-1].name, "split_stages", "share_prefixes", "complete_gradients"):
        for key, module in listing.graphs_after(mixed, name).items():
            arguments = [environment[key] for key in input_keys(module)]
            expected = module.forward(*arguments)
            printed = functions[key](*arguments)
            for one, other in zip(printed, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            environment.update(zip(output_keys(module), expected, strict=True))


def values_of(compiled: CompiledModel) -> dict[str, object]:
    torch.manual_seed(0)
    model, samples, copies = Mixed(), 4, 2
    environment: dict[str, object] = {f"parameter:{name}": value.detach() for name, value in model.named_parameters()}
    environment |= {f"buffer:{name}": value for name, value in model.named_buffers()}
    environment |= {f"constant:{name}": value for name, value in compiled.captured.constants.items()}
    return environment | {
        "input:0": torch.randn(samples, 6),
        "runtime:key": torch.tensor([0, 0]),
        "runtime:copies": torch.tensor([0, -1]),
        "runtime:draws": torch.tensor([0, 1]),
        "runtime:sigmas": torch.full((len(compiled.sites),), 0.1),
        "runtime:weights": torch.randn(copies, samples),
    }


def test_python_names_shapes_roles_and_places(resnet):
    text = listing.python(resnet, "share_prefixes", model="resnet5")
    ast.parse(text)
    assert 'conv2d: "f32[N, 4, 8, 8]",  # value conv2d' in text
    assert 'relu: "f32[K·N, 4, 8, 8]" = aten.relu.default(' in text
    assert "# block.conv1 — models/resnet.py:" in text
    both = listing.python(resnet, "insert_noise", model="resnet5")
    assert [node.name for node in ast.parse(both).body if isinstance(node, ast.FunctionDef)] == [
        "before_insert_noise",
        "after_insert_noise",
    ]


def test_text_of_a_pass_marks_what_it_changed(resnet):
    text = listing.pass_text(resnet, "insert_noise", model="resnet5")
    added = [line for line in text.splitlines() if line.startswith("+ ")]
    assert sum("ops.perturb" in line for line in added) == 5
    assert any(line.startswith("- ") for line in text.splitlines())
    assert "+5 onward.perturb" in text.splitlines()[0]
    for name in listing.pass_names(resnet):
        assert listing.pass_text(resnet, name)


def test_unknown_pass_names_the_nearest(resnet):
    with pytest.raises(UnknownNameError, match="Did you mean 'insert_noise'"):
        listing.graphs_after(resnet, "insert_nois")


def test_refusals():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x)

    class Mixing(Unused):
        def forward(self, x):
            return self.spare(self.fc(x - x.mean(0)) @ torch.ones(2, 3))

    for kind, error_type, word in (
        (Unused, UnreachedParameterError, "spare.weight"),
        (Mixing, UnsupportedModelError, "--credit batch"),
    ):
        model, example = kind(), torch.randn(4, 3)
        with pytest.raises(error_type) as raised:
            compile_model(model, example, LikelihoodRatio(copies=4))
        refused = report.refusal(model, example, raised.value, name="m")
        assert refused.captured
        assert refused.error == error_type.__name__
        text = report_text.refusal_text(refused)
        assert word in text
        assert max(map(len, text.splitlines())) <= columns.WIDTH
        assert json.loads(json.dumps(refused.to_json()))["supported"] is False


def test_deep_batch_normalisation_is_not_taken_for_mixing():
    """Rounding of the frozen statistics must not look like a dependence between samples (compiler.probe)."""
    torch.manual_seed(0)
    compiled = compile_model(
        onward.models.resnet9(in_channels=1, width=32, norm="batch"),
        torch.randn(32, 1, 8, 8),
        LikelihoodRatio(copies=4),
    )
    assert compiled.mixes_samples == ""
    batch_norm = next(box for box in picture.picture_of(compiled.graph).boxes if box.title == "batch_norm")
    assert batch_norm.role == "site"
    assert batch_norm.shape.endswith("32, 8, 8]")


# --- drawings ---------------------------------------------------------------------------------------------------------


def drawn(compiled: CompiledModel) -> list[tuple[str, dict[str, fx.GraphModule]]]:
    return [(name, listing.graphs_after(compiled, name)) for name in listing.pass_names(compiled)]


def test_svg_of_every_pass_parses_and_no_boxes_overlap(resnet, mixed):
    for compiled in (resnet, mixed):
        batch = batch_symbol(compiled.captured.module)
        for name, graphs in drawn(compiled):
            root = ElementTree.fromstring(svg.to_svg(graphs, title=name, batch=batch))
            space = "{http://www.w3.org/2000/svg}"
            boxes = [next(group.iter(f"{space}rect")) for group in root.iter(f"{space}g")]
            frames = [tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height")) for box in boxes]
            assert frames
            for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(frames, 2):
                apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
                assert apart, name
            width, height = float(root.attrib["width"]), float(root.attrib["height"])
            assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in frames)


def test_dot_of_every_pass(resnet, mixed):
    for compiled in (resnet, mixed):
        for name, graphs in drawn(compiled):
            text = dot.to_dot(graphs, title=name)
            assert text.startswith("digraph onward {")
            assert text.count("{") == text.count("}")
            assert text.count('"') % 2 == text.count('\\"') % 2
            nodes = set(re.findall(r"^\s*(g\d+_\d+) \[", text, re.MULTILINE))
            edges = re.findall(r"^\s*(g\d+_\d+) -> (g\d+_\d+);", text, re.MULTILINE)
            assert nodes
            assert {end for edge in edges for end in edge} <= nodes
            assert nx.is_directed_acyclic_graph(nx.DiGraph(edges))


def test_roles_are_drawn(resnet):
    drawing = picture.picture_of(resnet.graph)
    count = {role: sum(box.role == role for box in drawing.boxes) for role in picture.COLOURS}
    assert count["site"] == count["noise"] == 5
    assert count["input"] == count["output"] == 1
    assert sum(box.captured for box in drawing.boxes) == 4
    assert not any(box.title in ("copies", "key", "sigmas") for box in drawing.boxes)
    gradient = picture.picture_of(resnet.gradients[0].module)
    assert {"noise", "capture", "gradient"} <= {box.role for box in gradient.boxes}


def test_one_box_for_each_packed_capture():
    boxes = picture.picture_of(compiled_mixed(capture="stochastic").graph).boxes
    captures = [box.title for box in boxes if box.role == "capture"]
    assert captures
    assert len(captures) == len(set(captures))


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saved_program_round_trips(mixed, tmp_path):
    folder = tmp_path / "deep" / "program"
    written = save.save_program(mixed, folder, name="mixed", plan=plan_of(mixed), versions={"onward": "x"})
    manifest = save.read_manifest(folder)
    assert manifest == json.loads(json.dumps(written))
    assert manifest["format"] == "onward-program"
    assert manifest["version"] == 1
    assert manifest["versions"] == {"onward": "x"}
    assert [site["name"] for site in manifest["sites"]] == [site.name for site in mixed.sites]
    assert " ".join(manifest["plan"]) == plan_of(mixed)
    trainable = {entry["name"]: entry["sites"] for entry in manifest["parameters"] if entry["trainable"]}
    assert all(trainable.values())
    assert len(trainable["head.weight"]) == 2
    modules = {
        "passes": [record.module for record in mixed.history],
        "stages": list(mixed.stages),
        "runs": [run.module for run in mixed.runs],
        "gradients": [gradient.module for gradient in mixed.gradients],
    }
    files = {"manifest.json", "report.txt", "constants.safetensors"}
    for part, graphs in modules.items():
        for entry, module in zip(manifest[part], graphs, strict=True):
            files.add(entry["file"])
            tree = ast.parse((folder / entry["file"]).read_text(encoding="utf-8"))
            function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
            assert function.name == entry["function"]
            assert entry["inputs"] == input_keys(module)
            assert entry["outputs"] == output_keys(module)
            assert len(function.args.args) == len(entry["inputs"])
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == files
    assert load_file(folder / "constants.safetensors").keys() == set(manifest["constants"])
    assert [path.name for path in folder.parent.iterdir()] == ["program"]


def test_saving_never_replaces_anything_else(resnet, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.tex").write_text("years of work")
    for replace in (False, True):
        with pytest.raises(OutputError, match="own"):
            save.save_program(resnet, own, replace=replace)
    assert [path.name for path in own.iterdir()] == ["thesis.tex"]
    program = tmp_path / "program"
    program.mkdir()  # an empty folder is fine
    save.save_program(resnet, program)
    with pytest.raises(OutputError, match="not empty"):
        save.save_program(resnet, program)
    (program / "stale.py").write_text("")
    save.save_program(resnet, program, replace=True)
    assert not (program / "stale.py").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "program"]


def test_saving_leaves_nothing_half_written(resnet, tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "text", full)
    with pytest.raises(OutputError, match="No space left"):
        save.save_program(resnet, tmp_path / "program")
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError):
        save.save_program(resnet, file)
    with pytest.raises(OutputError):
        save.save_program(resnet, file / "below")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "other"}', '{"format": "onward-program", "version": 99}', None]
)
def test_damaged_manifest(content, tmp_path: Path):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(OutputError, match=r"manifest\.json"):
        save.read_manifest(tmp_path)


def test_short_line():
    assert source.short_line("/a/b/c/d.py:3: x = 1") == "c/d.py:3: x = 1"
    assert source.short_line("") == ""
