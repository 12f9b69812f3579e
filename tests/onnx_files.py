"""Small ONNX files, as exporters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

import onward
from onward.compiler.from_onnx import OnnxModel, load

FLOAT = TensorProto.FLOAT


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    drawn: np.ndarray = np.random.default_rng(seed + sum(shape)).normal(size=shape) / np.sqrt(shape[-1])
    return drawn.astype(np.float32)


def node(op: str, inputs: str, outputs: str, domain: str = "", name: str = "", **attributes: Any) -> onnx.NodeProto:
    """Names separated by spaces; ``_`` is an input that is left out."""
    names = ["" if each == "_" else each for each in inputs.split()]
    return helper.make_node(
        op, names, outputs.split(), name=name or f"{op}_{outputs.split()[0]}", domain=domain, **attributes
    )


def tensor(name: str, *shape: Any, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def file(
    nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[str], held: dict[str, np.ndarray], opset: int = 17,
    **more: Any,
) -> onnx.ModelProto:  # fmt: skip
    returned = [helper.make_empty_tensor_value_info(name) if isinstance(name, str) else name for name in outputs]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "net", inputs, returned, initializers, doc_string="a graph's text")
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="by hand", **more)
    helper.set_model_props(model, {"author": "nobody", "note": "kept"})
    return onnx.shape_inference.infer_shapes(model)


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, *inputs: np.ndarray, outputs: list[str] | None = None) -> list[np.ndarray]:
    """What onnxruntime makes of a file, without optimising it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options)
    made: list[np.ndarray] = session.run(
        outputs, dict(zip([x.name for x in session.get_inputs()], inputs, strict=True))
    )
    return made


def cnn(batch: Any = "N", classes: int = 10) -> onnx.ModelProto:
    """On 8×8 images: a convolution with batch normalisation, a reshape as exporters write it, and a linear layer."""
    held = {
        "stem.weight": weights(4, 1, 3, 3),
        "norm.scale": np.ones(4, np.float32),
        "norm.bias": np.zeros(4, np.float32),
        "norm.mean": weights(4) * 0.1,
        "norm.var": np.ones(4, np.float32),
        "zero": np.array(0),
        "rest": np.array([-1]),
        "head.weight": weights(classes, 64),
        "head.bias": np.zeros(classes, np.float32),
        "temperature": np.array(1.0, np.float32),
    }
    nodes = [
        node("Conv", "image stem.weight", "c", pads=[1, 1, 1, 1], strides=[2, 2], name="stem/Conv"),
        node("BatchNormalization", "c norm.scale norm.bias norm.mean norm.var", "n", name="norm/BN"),
        node("Relu", "n", "r"),
        node("Shape", "r", "s"),
        node("Gather", "s zero", "b", axis=0),
        node("Reshape", "b rest", "u"),
        node("Concat", "u rest", "shape", axis=0),
        node("Reshape", "r shape", "flat"),
        node("Gemm", "flat head.weight head.bias", "z", transB=1, name="head/Gemm"),
        node("Mul", "z temperature", "logits"),
    ]
    return file(nodes, [tensor("image", batch, 1, 8, 8)], [tensor("logits", batch, classes)], held)


def mlp(features: int = 6, classes: int = 3, opset: int = 17) -> onnx.ModelProto:
    """Two products, and a softmax behind them."""
    held = {
        "first": weights(features, 8),
        "first.bias": np.zeros(8, np.float32),
        "last": weights(8, classes),
        "last.bias": np.zeros(classes, np.float32),
    }
    nodes = [
        node("MatMul", "x first", "a"),
        node("Add", "a first.bias", "b"),
        node("Relu", "b", "c"),
        node("MatMul", "c last", "d"),
        node("Add", "d last.bias", "scores"),
        node("Softmax", "scores", "probabilities", axis=1),
    ]
    return file(nodes, [tensor("x", "N", features)], ["probabilities"], held, opset)


def qdq() -> onnx.ModelProto:
    """An int8 network as quantisers write it: a convolution with a scale a channel, and a linear layer."""
    rng = np.random.default_rng(0)
    held: dict[str, Any] = {
        "x_s": np.float32(0.03), "x_z": np.uint8(128), "h_s": np.float32(0.05), "h_z": np.uint8(0),
        "w_q": rng.integers(-127, 128, (4, 1, 3, 3)).astype(np.int8),
        "w_s": np.array([0.003, 0.002, 0.004, 0.003], np.float32), "w_z": np.zeros(4, np.int8),
        "b_q": rng.integers(-900, 900, 4).astype(np.int32),
        "b_s": np.array([0.003, 0.002, 0.004, 0.003], np.float32) * np.float32(0.03), "b_z": np.zeros(4, np.int32),
        "v": weights(64, 10), "v_s": np.float32(0.01), "v_z": np.int8(0), "bias": np.zeros(10, np.float32),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "image x_s x_z", "xq"),
        node("DequantizeLinear", "xq x_s x_z", "xd"),
        node("DequantizeLinear", "w_q w_s w_z", "w", axis=0),
        node("DequantizeLinear", "b_q b_s b_z", "b", axis=0),
        node("Conv", "xd w b", "c", pads=[1, 1, 1, 1], strides=[2, 2], name="conv"),
        node("Relu", "c", "r"),
        node("QuantizeLinear", "r h_s h_z", "rq"),
        node("DequantizeLinear", "rq h_s h_z", "rd"),
        node("Flatten", "rd", "flat"),
        node("QuantizeLinear", "v v_s v_z", "vq"),
        node("DequantizeLinear", "vq v_s v_z", "vd"),
        node("MatMul", "flat vd", "m", name="head"),
        node("Add", "m bias", "logits"),
    ]
    return file(nodes, [tensor("image", "N", 1, 8, 8)], ["logits"], held)


def loaded(model: Any, path: Path, **options: Any) -> OnnxModel:
    return load(save(model, path / "model.onnx"), **options)


def images(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(
    model: OnnxModel, inputs: Any, target: torch.Tensor, steps: int = 40, lr: float = 1e-2
) -> tuple[float, float]:
    """The losses of the first and the last step."""
    program = onward.compile(
        model, inputs, loss=F.cross_entropy, estimator=onward.LikelihoodRatio.auto(sigma=0.05, warmup=2)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    for _ in range(steps):
        losses.append(float(program.step(inputs, target).mean()))
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


def blank(model: Any) -> bytes:
    """A file's bytes without what its weights hold."""
    for each in model.graph.initializer:
        for field in ("raw_data", "float_data", "int32_data"):
            each.ClearField(field)
    content: bytes = model.SerializeToString(deterministic=True)
    return content
