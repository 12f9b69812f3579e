"""From an ``nn.Module`` to the normal form: one functional ATen graph with dynamic batch (see `passes.graph`)."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from ..passes.errors import BatchError, CaptureError, UnsupportedModelError
from ..passes.graph import Output, Role, describe, finish, origin

_aten = torch.ops.aten
_RECURRENT = (_aten.lstm.input, _aten.gru.input, _aten.rnn_tanh.input, _aten.rnn_relu.input)
"""Recurrent layers are unrolled to their cells; every other operation stays as coarse as the user wrote it."""


Bias = Tensor | None


def _lstm_cell(
    x: Tensor, state: list[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None
) -> tuple[Tensor, Tensor]:
    gates = F.linear(x, w_ih, b_ih) + F.linear(state[0], w_hh, b_hh)
    i, f, g, o = gates.chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_cell(x: Tensor, state: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None) -> Tensor:
    r_x, z_x, n_x = F.linear(x, w_ih, b_ih).chunk(3, -1)
    r_h, z_h, n_h = F.linear(state, w_hh, b_hh).chunk(3, -1)
    z = (z_x + z_h).sigmoid()
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return n + z * (state - n)


def _rnn_cell(
    activation: Callable[[Tensor], Tensor],
    x: Tensor,
    state: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Bias = None,
    b_hh: Bias = None,
) -> Tensor:
    return activation(F.linear(x, w_ih, b_ih) + F.linear(state, w_hh, b_hh))


def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Bias = None) -> Tensor:
    product = torch.einsum("...i,oij,...j->...o", x, weight, y)
    return product if bias is None else product + bias


_FORMULAS = {
    _aten.lstm_cell.default: _lstm_cell,
    _aten.gru_cell.default: _gru_cell,
    _aten.rnn_tanh_cell.default: functools.partial(_rnn_cell, torch.tanh),
    _aten.rnn_relu_cell.default: functools.partial(_rnn_cell, torch.relu),
    _aten.bilinear.default: _bilinear,
}
"""Written out by their formulas. Fused cells fix the batch size, and an LSTM's has two results: noise on the first
would miss what the parameters do through the second. Torch cannot trace a bilinear layer's derivative."""


@dataclass(frozen=True)
class Signature:
    """What a batch must look like: the structure and leaves of the example inputs."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    """One a leaf: ``(shape, dtype, device, batched)`` for tensors, the value itself for anything else."""
    batch: int
    """Batch size of the example."""
    whole: bool = False
    """Whether the user's inputs are one sample without a batch dimension (`compiler.whole`): the described shapes have
    one in front, and a tensor that is no sample's but the graph's own stands for itself."""

    @property
    def device(self) -> torch.device:
        """Of the first tensor among the inputs."""
        device: torch.device = next(leaf[2] for leaf in self.leaves if isinstance(leaf, tuple))
        return device

    def lead(self, leaves: list[Any]) -> list[Any]:
        """The user's leaves with the batch dimension that the graph has."""
        if not self.whole:
            return leaves
        pairs = zip(leaves, self.leaves, strict=True)
        return [leaf[None] if isinstance(leaf, Tensor) and isinstance(known, tuple) else leaf for leaf, known in pairs]


@dataclass(frozen=True)
class CapturedModel:
    """A model in normal form."""

    module: fx.GraphModule
    signature: Signature
    out_spec: pytree.TreeSpec
    constants: dict[str, Any]
    """Values of the placeholders of role CONSTANT."""
    training: dict[str, bool]
    """The training flag of every submodule at capture time; a step insists on the same."""
    how: str
    """``"export"`` or ``"symbolic_trace"``."""


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model's forward: a tensor, a tuple or list of arguments, or a dict."""
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def capture(model: nn.Module, example_inputs: Any) -> CapturedModel:
    """Capture `model` as a functional ATen graph whose batch size is dynamic.

    ``torch.export`` is tried first (non-strict, then strict), then ``torch.fx.symbolic_trace`` followed by export of
    the traced module.

    Raises:
        BatchError: the example holds no tensor with a batch dimension.
        CaptureError: no way of tracing worked; the message holds each one's reason.
        UnsupportedModelError: the model writes into its inputs.
    """
    args, kwargs = as_call(example_inputs)
    leaves = pytree.tree_leaves((args, kwargs))
    batch = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), 0)
    if batch == 0:
        raise BatchError("the example inputs hold no tensor with a first (batch) dimension of at least one sample.")
    signature = _signature(args, kwargs, batch)
    if batch == 1:  # export would take a size of 1 for a constant
        args, kwargs = pytree.tree_map(
            lambda leaf: torch.cat([leaf, leaf]) if _is_batched(leaf, 1) else leaf, (args, kwargs)
        )
    check_arguments(model, args, kwargs)
    exported, how = _export(model, args, kwargs, 2 if batch == 1 else batch)
    return captured_model(exported, model, signature, how)


def captured_model(exported: ExportedProgram, model: nn.Module, signature: Signature, how: str) -> CapturedModel:
    """What was exported, in normal form."""
    with quiet():
        unrolled = {op: decomposition_table[op] for op in _RECURRENT}
        exported = exported.run_decompositions({**unrolled, **_FORMULAS})
    module, constants = _normal_form(exported, model)
    _check_static(module)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    training = {name: submodule.training for name, submodule in model.named_modules()}
    return CapturedModel(module, signature, out_spec, constants, training, how)


def check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise BatchError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}. Pass a tensor, a tuple of "
            "positional arguments, or a dict of keyword arguments."
        ) from error
    except ValueError:  # no signature to be had
        return


def _check_static(module: fx.GraphModule) -> None:
    """Refuse sizes and numbers that depend on the values of tensors: they cannot differ between samples and copies."""
    for node in module.graph.nodes:
        val = node.meta.get("val")
        parts = val.shape if isinstance(val, Tensor) else val if isinstance(val, (tuple, list)) else (val,)
        if any(isinstance(part, _SYMBOLIC) and free_unbacked_symbols(part) for part in parts):
            raise UnsupportedModelError(
                f"{describe(node)} makes a Python number or a shape of a tensor's values, which would have to be the "
                "same for all samples and copies. Keep it a tensor: without .item(), and with torch.where or a mask "
                "instead of nonzero, masked_select or boolean indexing."
            )


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _is_batched(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> Signature:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device, _is_batched(leaf, batch)) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )
    return Signature(spec, described, batch)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> tuple[ExportedProgram, str]:
    dim = Dim("batch")
    shapes = pytree.tree_map(lambda leaf: {0: dim} if _is_batched(leaf, batch) else None, (args, kwargs))

    def export(target: nn.Module, strict: bool) -> ExportedProgram:
        # torch.export wants one entry a parameter of forward, *args and **kwargs being one each
        dynamic = dict(inspect.signature(target.forward).bind(*shapes[0], **shapes[1]).arguments)
        return torch.export.export(target, args, kwargs, dynamic_shapes=dynamic, strict=strict)

    def retrace() -> ExportedProgram:
        traced = fx.symbolic_trace(model)
        traced.train(model.training)
        return export(traced, strict=False)

    attempts: list[tuple[str, Callable[[], ExportedProgram]]] = [
        ("torch.export", lambda: export(model, strict=False)),
        ("torch.export (strict)", lambda: export(model, strict=True)),
        ("torch.fx.symbolic_trace", retrace),
    ]
    flags = {submodule: submodule.training for submodule in model.modules()}
    reasons = []
    for name, attempt in attempts:
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                exported = attempt()
        except Exception as error:  # whatever a tracer raises is a reason to try the next
            reasons.append(f"  {name}: {first_lines(error)}")
        else:
            return exported, "symbolic_trace" if "symbolic" in name else "export"
        finally:
            for submodule, training in flags.items():
                submodule.training = training
    check_runs(model, args, kwargs)
    raise CaptureError(
        f"{type(model).__name__} could not be captured with a dynamic batch size. Tried:\n"
        + "\n".join(reasons)
        + "\nUsual causes: a Python `if` or loop on a tensor's values (use torch.where, or masks); a batch size or the "
        "example's values written into the code (use x.shape[0]); `.item()` or `.numpy()` inside forward; an output "
        "that is no tensor (a cache of keys and values: for a Hugging Face model set `model.config.use_cache = False`)."
    )


def check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Whether the model itself runs on the example: if not, no tracer is to blame.

    Raises:
        CaptureError: it does not.
    """
    try:
        model = copy.deepcopy(model)  # a forward may move its buffers
    except Exception:  # nothing can be said then
        return
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except (RuntimeError, IndexError, ValueError) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if "/torch/" not in f.filename]
        where = f"\n  {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
        raise CaptureError(
            f"{type(model).__name__} does not run on the example: {error}{where}\nTry `model(example)`: shape, "
            "dtype and device of the example have to be the model's."
        ) from error
    except Exception:  # a mistake in its code: the tracers' messages show the line
        return


_ADVERTISEMENTS = (
    "For more", "For extended", "For C++", "If you suspect", "The error above", "Use tlparse",
    "Developer debug context",
    "Set TORCHDYNAMO",
    "consider using data-dependent", "Caused by: (_export",
)  # fmt: skip
"""How lines begin that advertise torch's own debugging and say nothing of the model."""


def first_lines(error: BaseException, count: int = 12) -> str:
    message = re.sub(r" For more information, run with TORCH_LOGS\S*", "", f"{type(error).__name__}: {error}")
    lines = [line for line in message.splitlines() if line.strip()]
    lines = [line for line in lines if not line.strip().startswith(_ADVERTISEMENTS)]
    user = [line for line in lines[count:] if line.strip().startswith("File ") and "/torch/" not in line]
    return "\n    ".join(lines[:count] + user[-2:])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch's tracers warn about themselves; nothing of it concerns the user's model."""
    import logging

    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints the graph of a failure there
                yield
        finally:
            logging.disable(before)


def _normal_form(exported: ExportedProgram, model: nn.Module) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The lifted graph with roles, tied parameters merged, and no input mutation."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph_module.graph, {}))
    module = fx.GraphModule({}, graph)
    places = [node for node in graph.nodes if node.op == "placeholder"]
    parameters: dict[int, fx.Node] = {}
    constants: dict[str, Any] = {}
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    index = 0
    for spec, node in zip(exported.graph_signature.input_specs, places, strict=True):
        match spec.kind:
            case InputKind.PARAMETER:
                assert spec.target is not None
                parameter = model.get_parameter(spec.target)
                first = parameters.setdefault(id(parameter), node)
                if first is not node:  # tied: one tensor, one placeholder
                    node.replace_all_uses_with(first)
                    graph.erase_node(node)
                    continue
                node.meta.update(
                    role=Role.PARAMETER, target=canonical[id(parameter)], trainable=parameter.requires_grad
                )
            case InputKind.BUFFER:
                node.meta.update(role=Role.BUFFER, target=spec.target)
            case InputKind.USER_INPUT:
                node.meta.update(role=Role.INPUT, target=index)
                index += 1
            case _:
                node.meta.update(role=Role.CONSTANT, target=spec.target)
                constants[str(spec.target)] = copy.copy(exported.constants[str(spec.target)])
    for node in graph.nodes:  # a perturbed run's tensors may have other strides, which view would refuse
        if node.target == _aten.view.default:
            node.target = _aten.reshape.default
    described = []
    leaf = 0
    for result in exported.graph_signature.output_specs:
        if result.kind == OutputKind.BUFFER_MUTATION:
            described.append(Output("mutation", str(result.target)))
        elif result.kind == OutputKind.USER_OUTPUT:
            described.append(Output("output", str(leaf)))
            leaf += 1
        else:
            raise UnsupportedModelError(
                f"the model writes into {result.target!r} ({result.kind.name.lower()}) while it runs; only buffers "
                "may change in forward. Clone it before writing."
            )
    graph.output_node().meta["outputs"] = described
    return finish(module), constants


def check_capturable(model: nn.Module, example_inputs: Any) -> str:
    """``""`` if `model` can be captured, otherwise the reason (what ``onward inspect`` says before compiling)."""
    try:
        capture(model, example_inputs)
    except (CaptureError, UnsupportedModelError, BatchError) as error:
        return str(error)
    return ""


__all__ = ["CapturedModel", "Signature", "as_call", "capture", "check_capturable", "origin"]
