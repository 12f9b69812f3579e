"""One row an operator of `onward.compiler.from_onnx`, and small files made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Fed:
    """An input of the file; the other operands are initializers."""

    array: np.ndarray


def x(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> Fed:
    return Fed(c(*shape, low=low, high=high, seed=seed))


def c(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).uniform(low, high, shape).astype(np.float32)


def whole(*shape: int, low: int = 0, high: int = 5, dtype: Any = np.int64, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def one(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array(value, dtype=dtype)


@dataclass(frozen=True)
class Row:
    op: str
    operands: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    judge: str = "onnxruntime"
    """"onnx": its reference evaluator, where onnxruntime does not know the operator."""


def row(
    op: str, *operands: Any, outputs: int = 1, opset: int = 21, judge: str = "onnxruntime", **attributes: Any
) -> Row:
    return Row(op, operands, attributes, outputs, opset, judge)


def model_of(row: Row) -> onnx.ModelProto:
    """A file of one node."""
    domain, _, op = row.op.rpartition(".")
    names, fed, held = [], [], []
    for k, operand in enumerate(row.operands):
        name = "" if operand is None else f"i{k}"
        names.append(name)
        if isinstance(operand, Fed):
            kind = helper.np_dtype_to_tensor_dtype(operand.array.dtype)
            fed.append(helper.make_tensor_value_info(name, kind, operand.array.shape))
        elif operand is not None:
            held.append(numpy_helper.from_array(operand, name))
    outputs = [f"o{k}" for k in range(row.outputs)]
    node = helper.make_node(op, names, outputs, name="the_node", domain=domain, **row.attributes)
    returned = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph([node], "row", fed, returned, held)
    opsets = [helper.make_opsetid("", row.opset)] + ([helper.make_opsetid(domain, 3)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds(row: Row) -> dict[str, np.ndarray]:
    return {f"i{k}": operand.array for k, operand in enumerate(row.operands) if isinstance(operand, Fed)}


_X = x(2, 3, 4)
_IMAGE = x(2, 3, 7, 8)
_POSITIVE = x(2, 3, 4, low=0.1)
_INSIDE = x(2, 3, 4, low=-0.9, high=0.9)
_FLAGS = Fed(c(2, 3, 4, seed=5) > 0)
_BYTES: Any = {"low": 0, "high": 256, "dtype": np.uint8}
_SIGNED: Any = {"low": -127, "high": 128, "dtype": np.int8}
_GATED: Any = {"hidden_size": 5}

ROWS = [
    *(row(op, _X) for op in ("Abs", "Neg", "Exp", "Floor", "Ceil", "Sign", "Erf", "Sin", "Cos", "Tan", "Atan", "Sinh",
                             "Cosh", "Tanh", "Asinh", "Relu", "Sigmoid", "Softplus", "Softsign", "HardSwish", "Mish",
                             "IsNaN", "Identity", "Dropout", "LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu",
                             "HardSigmoid", "Gelu", "Shrink", "Round", "Softmax", "LogSoftmax", "Hardmax", "Flatten",
                             "Transpose", "Shape", "Size", "GlobalLpPool", "GlobalMaxPool", "GlobalAveragePool",
                             "ReduceLogSumExp", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSum",
                             "ReduceMean", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "LpNormalization", "Squeeze")),
    *(row(op, _POSITIVE) for op in ("Sqrt", "Log", "Reciprocal", "ReduceLogSum")),
    *(row(op, _INSIDE) for op in ("Asin", "Acos", "Atanh")),
    row("Acosh", x(2, 3, low=1.1, high=4.0)),
    row("IsInf", _X, detect_negative=0),
    *(row(op, _X, c(3, 1)) for op in ("Add", "Sub", "Mul", "Div", "Greater", "Less", "GreaterOrEqual", "LessOrEqual",
                                      "Max", "Min", "Sum", "Mean", "PRelu")),
    row("Equal", Fed(whole(2, 3)), whole(3)),
    row("Pow", _POSITIVE, c(3, 1)),
    row("Div", Fed(whole(2, 3, low=-9, high=9)), ints(2, 3, 4)),
    row("Mod", Fed(whole(2, 3, low=-9, high=9)), ints(2, 3, 4)),
    row("Mod", _X, one(0.7), fmod=1),
    *(row(op, _FLAGS, c(3, 4) > 0) for op in ("And", "Or", "Xor")),
    row("Not", _FLAGS),
    *(row(op, Fed(whole(2, 3, dtype=np.int32)), whole(3, dtype=np.int32)) for op in
      ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    row("BitwiseNot", Fed(whole(2, 3, dtype=np.int32))),
    row("BitShift", Fed(whole(2, 3, **_BYTES)), whole(3, dtype=np.uint8), direction="LEFT"),
    row("Det", x(2, 3, 3)),
    row("Where", _FLAGS, c(3, 4), _X),
    row("Clip", _X, one(-0.5), one(1.0)),
    row("Clip", _X, min=-0.5, max=1.0, opset=6 + 1),
    row("Cast", _X, to=TensorProto.INT32),
    row("CastLike", _X, ints(1)),
    row("Swish", _X, alpha=1.5, opset=24, judge="onnx"),
    row("Gelu", _X, approximate="tanh"),
    row("Softmax", _X, axis=1, opset=11),
    row("Hardmax", _X, axis=1),
    row("MatMul", x(2, 3, 4), c(4, 5)),
    row("Gemm", x(2, 3), c(4, 3), c(4), transB=1),
    row("Gemm", x(3, 2), c(3, 4), c(1, 4), transA=1, alpha=0.5, beta=2.0),
    row("Einsum", x(2, 3, 4), c(4, 5), equation="bij, jk -> bik"),
    row("Conv", _IMAGE, c(6, 3, 3, 3), c(6), pads=[1, 1, 1, 1], strides=[2, 1]),
    row("Conv", x(2, 4, 7), c(6, 2, 3), group=2, auto_pad="SAME_UPPER", strides=[2]),
    row("Conv", x(2, 2, 4, 4, 4), c(3, 2, 2, 2, 2), pads=[0, 0, 1, 1, 0, 0], dilations=[1, 2, 1]),
    row("ConvTranspose", _IMAGE, c(3, 2, 3, 3), c(2), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    row("ConvTranspose", _IMAGE, c(3, 2, 3, 3), strides=[2, 2], pads=[0, 1, 1, 0]),
    row("ConvTranspose", _IMAGE, c(3, 2, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    row("MaxPool", _IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1),
    row("MaxPool", _IMAGE, kernel_shape=[2, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    row("MaxPool", _IMAGE, kernel_shape=[2, 2], strides=[2, 2], outputs=2),
    row("MaxPool", Fed(whole(1, 2, 6, 6, **_BYTES)), kernel_shape=[2, 2]),
    row("AveragePool", _IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    row("AveragePool", _IMAGE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    row("AveragePool", _IMAGE, kernel_shape=[3, 3], pads=[1, 0, 0, 1], count_include_pad=1),
    row("LpPool", _IMAGE, kernel_shape=[3, 3], strides=[2, 2], p=3),
    row("BatchNormalization", _IMAGE, c(3), c(3), c(3), c(3, low=0.5)),
    row("LayerNormalization", _X, c(4), c(4)),
    row("LayerNormalization", _X, c(3, 4), axis=1, outputs=3),
    row("RMSNormalization", _X, c(4), opset=23, judge="onnx"),
    row("InstanceNormalization", _IMAGE, c(3), c(3)),
    row("GroupNormalization", x(2, 6, 3), c(6), c(6), num_groups=2, judge="onnx"),
    row("GroupNormalization", x(2, 6, 3), c(2), c(2), num_groups=2, opset=18),
    row("LRN", x(2, 6, 4, 4), size=3, alpha=0.1),
    row("MeanVarianceNormalization", _IMAGE),
    row("LSTM", x(4, 2, 3), c(2, 20, 3), c(2, 20, 5), c(2, 40), direction="bidirectional", outputs=3, **_GATED),
    row("LSTM", x(4, 2, 3), c(1, 20, 3), c(1, 20, 5), c(1, 40), None, c(1, 2, 5), c(1, 2, 5), c(1, 15),
        direction="reverse", input_forget=0, clip=1.0, **_GATED),
    row("GRU", x(4, 2, 3), c(1, 15, 3), c(1, 15, 5), c(1, 30), linear_before_reset=1, outputs=2, **_GATED),
    row("GRU", x(4, 2, 3), c(2, 15, 3), c(2, 15, 5), c(2, 30), None, c(2, 2, 5), direction="bidirectional", **_GATED),
    row("RNN", x(4, 2, 3), c(1, 5, 3), c(1, 5, 5), None, ints(4, 4).astype(np.int32), activations=["Relu"], **_GATED),
    row("ReduceSum", _X, ints(0, -1), keepdims=0),
    row("ReduceMean", _X, axes=[1], opset=13),
    row("ReduceMax", Fed(whole(2, 3)), ints(1)),
    row("ArgMax", Fed(whole(4, 5, high=3)), axis=1, keepdims=0, select_last_index=1),
    row("TopK", _X, ints(2), axis=1, outputs=2, largest=0),
    row("CumSum", _X, one(1, np.int64), exclusive=1, reverse=1),
    row("Reshape", _X, ints(0, -1)),
    row("Transpose", _X, perm=[1, 2, 0]),
    row("Squeeze", x(2, 1, 3, 1), ints(-1)),
    row("Unsqueeze", _X, ints(0, -1)),
    row("Unsqueeze", _X, axes=[1, 2], opset=11),
    row("Concat", _X, c(2, 2, 4), axis=1),
    row("Split", _X, ints(1, 3), axis=2, outputs=2),
    row("Split", x(2, 7), axis=1, num_outputs=3, outputs=3),
    row("Slice", _X, ints(0, -1), ints(2**62, -9), ints(1, 2), ints(2, -2)),
    row("Slice", _X, starts=[1], ends=[3], axes=[2], opset=9),
    row("Expand", x(3, 1), ints(2, 1, 4)),
    row("Tile", _X, ints(1, 2, 3)),
    row("ConstantOfShape", Fed(ints(2, 3)), value=numpy_helper.from_array(one(7.0).reshape(1))),
    row("Range", Fed(one(2.0)), one(9.0), one(1.5)),
    row("EyeLike", x(3, 4), k=1),
    row("Trilu", _X, one(1, np.int64), upper=0),
    row("DepthToSpace", x(2, 8, 2, 3), blocksize=2),
    row("DepthToSpace", x(2, 8, 2, 3), blocksize=2, mode="CRD"),
    row("SpaceToDepth", x(2, 2, 4, 6), blocksize=2),
    row("Pad", _X, ints(0, 1, 2, 0, 0, 1), one(3.0)),
    row("Pad", _X, ints(1, 2, 2, 1), None, ints(1, 2), mode="reflect"),
    row("Pad", _X, ints(0, 1, 2, 0, 3, 1), mode="edge"),
    row("Pad", _X, ints(0, 1, 2, 0, 0, 1), mode="wrap"),
    row("Pad", _X, pads=[0, 1, 2, 0, 0, 1], value=1.5, opset=10),
    row("CenterCropPad", _X, ints(5, 2), axes=[1, 2], judge="onnx"),
    row("Gather", _X, whole(2, 2, low=-3, high=3), axis=1),
    row("Gather", Fed(whole(2, 4)), one(1, np.int64), axis=1),
    row("GatherElements", _X, whole(2, 3, 2, low=-4, high=4), axis=2),
    row("GatherND", _X, whole(2, 2, 1, low=-3, high=3), batch_dims=1),
    row("ScatterElements", _X, whole(2, 2, 4, high=3), c(2, 2, 4), axis=1, reduction="add"),
    row("Scatter", _X, np.array([[[0, 2, 1, 0]], [[1, 0, 2, 2]]]), c(2, 1, 4), axis=1, opset=9),
    row("ScatterND", _X, np.array([[0, 2], [1, -3]]), c(2, 4)),
    row("OneHot", Fed(whole(2, 3, low=-5, high=5)), one(5, np.int64), c(2), axis=1),
    row("ReverseSequence", x(4, 3, 2), ints(2, 4, 1)),
    row("Resize", _IMAGE, None, np.array([1, 1, 2.0, 1.5], np.float32), mode="nearest"),
    row("Resize", _IMAGE, None, None, ints(2, 3, 4, 13), mode="linear"),
    row("Resize", _IMAGE, None, None, ints(2, 3, 10, 10), mode="linear",
        coordinate_transformation_mode="align_corners"),
    row("Resize", _IMAGE, None, None, ints(2, 3, 9, 5), mode="cubic", cubic_coeff_a=-0.5),
    row("Resize", _IMAGE, None, np.array([1, 1, 2, 2], np.float32), nearest_mode="floor",
        coordinate_transformation_mode="asymmetric", opset=13),
    row("Resize", _IMAGE, np.array([1, 1, 2, 2], np.float32), mode="linear", opset=10),
    row("Upsample", _IMAGE, np.array([1, 1, 2, 3], np.float32), opset=9),
    row("GridSample", _IMAGE, c(2, 5, 4, 2, low=-1.1, high=1.1)),
    row("QuantizeLinear", _X, one(0.03), one(100, np.uint8)),
    row("QuantizeLinear", _X, c(3, low=0.01, high=0.05), whole(3, **_SIGNED), axis=1),
    row("DequantizeLinear", Fed(whole(2, 3, **_BYTES)), c(3, low=0.01, high=0.05), whole(3, **_BYTES)),
    row("DequantizeLinear", Fed(whole(4, 6, **_SIGNED)), c(2, 6, low=0.01, high=0.05), axis=0, block_size=2),
    row("DynamicQuantizeLinear", _X, outputs=3),
    row("MatMulInteger", Fed(whole(3, 8, **_BYTES)), whole(8, 4, **_SIGNED), one(7, np.uint8), one(3, np.int8)),
    row("ConvInteger", Fed(whole(2, 3, 6, 6, **_BYTES)), whole(4, 3, 3, 3, **_BYTES), one(7, np.uint8),
        one(9, np.uint8), pads=[1, 1, 1, 1]),
    row("QLinearConv", Fed(whole(2, 3, 6, 6, **_BYTES)), one(0.02), one(128, np.uint8), whole(4, 3, 3, 3, **_SIGNED),
        c(4, low=0.005, high=0.01), np.zeros(4, np.int8), one(0.1), one(120, np.uint8),
        whole(4, low=-500, high=500, dtype=np.int32), strides=[2, 2]),
    row("QLinearMatMul", Fed(whole(3, 8, **_BYTES)), one(0.02), one(128, np.uint8), whole(8, 4, **_BYTES), one(0.01),
        one(100, np.uint8), one(0.05), one(110, np.uint8)),
    row("ai.onnx.ml.Scaler", x(3, 4), offset=[0.1, 0.2, 0.3, 0.4], scale=[2.0, 1.0, 0.5, 3.0]),
    *(row("ai.onnx.ml.Normalizer", x(3, 4), norm=norm) for norm in ("MAX", "L1", "L2")),
    row("ai.onnx.ml.Binarizer", x(3, 4), threshold=0.5),
    row("ai.onnx.ml.Imputer", Fed(np.array([[np.nan, 1.0], [2.0, np.nan]], np.float32)),
        imputed_value_floats=[5.0, 6.0], replaced_value_float=float("nan")),
    row("ai.onnx.ml.FeatureVectorizer", x(3, 2), x(3, 4), inputdimensions=[2, 4]),
    row("ai.onnx.ml.ArrayFeatureExtractor", x(3, 4), ints(2, 0)),
    *(row("ai.onnx.ml.LinearClassifier", x(3, 4), coefficients=c(12).tolist(), intercepts=c(3).tolist(),
          classlabels_ints=[0, 1, 2], post_transform=post, outputs=2) for post in ("NONE", "LOGISTIC", "SOFTMAX")),
    row("ai.onnx.ml.LinearRegressor", x(3, 4), coefficients=c(8).tolist(), intercepts=c(2).tolist(), targets=2),
]  # fmt: skip
