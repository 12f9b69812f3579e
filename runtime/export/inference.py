"""The model itself as ONNX, in evaluation mode, and its loss: what a trained folder is judged and used by."""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...compiler.capture import CapturedModel, as_call, capture
from ...compiler.program import input_keys
from ...compiler.to_onnx.builder import Builder
from ...compiler.to_onnx.emit import Emission, emit
from ...compiler.to_onnx.trace import Like, described
from ...compiler.whole import capture_whole
from ...passes.errors import ExportError
from ...passes.graph import Role, outputs, placeholders
from ..program import Program
from ..training.evaluation import evaluating, without
from .recorder import Recorder
from .step import extents, held


def inference_model(r: Recorder, model: nn.Module, example: Any, about: str) -> onnx.ModelProto:
    """``model.eval()`` as a model: inputs ``input:i``, outputs ``output:i``, and parameters and buffers as initializers
    that a caller may feed in their place (``parameter:name``, ``buffer:name``).

    Raises:
        ExportError: an operation has no rule, or in evaluation mode the model does something that cannot be traced.
    """
    with evaluating(model):
        captured = (capture_whole if r.whole else capture)(model, example)
    module = captured.module
    keys = input_keys(module)
    kinds = [described(node.meta["val"], node.name) for node in placeholders(module)]
    run = fx.Interpreter(module).run
    results = {place: output for place, (output, _) in enumerate(outputs(module)) if output.kind == "output"}
    graph = r.trace(lambda *values: [run(*values)[place] for place in results], kinds, False)
    b = Builder("model")
    values, defaults = [], {}
    for key, kind in zip(keys, kinds, strict=True):
        role, _, name = key.partition(":")
        if role == "constant":
            values.append(held(b, _tensor(captured, name)))
            continue
        if role != "input":
            defaults[key] = model.get_parameter(name) if role == "parameter" else model.get_buffer(name)
        assert isinstance(kind, Like)
        values.append(b.input(key, *extents(_whole(r, kind))))
    found, vals = emit(Emission(b), graph, values, "model")
    for output, value, val in zip(results.values(), found, vals, strict=True):
        b.output(f"output:{output.name}", value, *extents(described(val, output.name)))
    made = b.model(about)
    made.graph.initializer.extend(
        numpy_helper.from_array(value.detach().cpu().numpy(), key) for key, value in defaults.items()
    )
    return made


def class_numbers(program: Program, batch: Any, target: Any) -> dict[str, dict[str, Any]]:
    """By key of the targets that are class numbers how many ``classes`` there are, and which of the usual numbers
    beside them, and of those in the example, the loss takes for ``ignored``.

    The loss is asked: ONNX would take class -1 for the last one.
    """
    args, kwargs = as_call(batch)
    with evaluating(program.model), torch.no_grad(), torch.random.fork_rng():
        held = {name: buffer.clone() for name, buffer in program.model.named_buffers()}
        output = torch.func.functional_call(program.model, held, args, kwargs)
    scores = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    leaves, spec = pytree.tree_flatten(target)
    found = {}
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.dtype == torch.bool:
            continue

        def takes(number: int, index: int = index, leaf: Tensor = leaf) -> bool:
            changed = [*leaves[:index], torch.full_like(leaf, number), *leaves[index + 1 :]]
            try:
                with torch.no_grad():
                    program.per_sample_loss(output, pytree.tree_unflatten(changed, spec))
            except (IndexError, RuntimeError):
                return False
            return True

        sizes = [x.shape[dim] for x in scores for dim in {1, x.dim() - 1} if 0 < dim < x.dim()
                 and without(x.shape, dim) == leaf.shape]  # fmt: skip
        classes = next((size for size in sizes if takes(size - 1) and not takes(size)), None)
        if classes is not None:
            usual = {-100, -1, 255, *leaf.unique().tolist()} - set(range(classes))
            found[f"target:{index}"] = {"classes": classes, "ignored": sorted(n for n in usual if takes(n))}
    return found


def token_numbers(program: Program) -> dict[str, dict[str, Any]]:
    """By key of the inputs that an embedding reads how many rows it has: ONNX would take row -1 for the last one."""
    found: dict[str, dict[str, Any]] = {}
    for node in program.compiled.captured.module.graph.nodes:
        if node.target == torch.ops.aten.embedding.default and node.args[1].meta.get("role") == Role.INPUT:
            rows = int(node.args[0].meta["val"].shape[0])
            key = f"input:{node.args[1].meta['target']}"
            found[key] = {"classes": min(rows, found.get(key, {}).get("classes", rows))}
    return found


def _whole(r: Recorder, kind: Like) -> Like:
    """A whole graph is a batch of one."""
    if not r.whole:
        return kind
    return Like(tuple(size[0] if isinstance(size, tuple) else size for size in kind.shape), kind.dtype)


def _tensor(captured: CapturedModel, name: str) -> Tensor:
    value = captured.constants[name]
    if not isinstance(value, Tensor):
        raise ExportError(f"the constant {name!r} of the model is {type(value).__name__}, no tensor.")
    return value


def loss_model(r: Recorder, about: str) -> onnx.ModelProto:
    """The loss of every sample, ``losses`` ``(N,)``, from ``output:i`` and ``target:i``."""
    b = Builder("loss")
    leaves = r.leaves()
    targets = [f"target:{index}" for index in range(len(r.target_leaves))]
    count = len(leaves)

    def losses(*values: Any) -> list[Tensor]:
        loss = r.program.loss_of(r.target(values[count:]), torch.device("cpu"))
        return [loss(list(values[:count]), 1, values[0].shape[0] if values[0].dim() else 1)[0]]

    kinds = [r.kinds[key] for key in [*leaves, *targets]]
    graph = r.trace(losses, kinds, True)
    values = [b.input(key, *extents(kind)) for key, kind in zip([*leaves, *targets], kinds, strict=True)]
    found, vals = emit(Emission(b), graph, values, "loss")
    b.output("losses", found[0], *extents(described(vals[0], "the loss")))
    return b.model(about)
