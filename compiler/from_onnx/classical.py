"""Operators of ``ai.onnx.ml`` that linear models, scalers and small networks of scikit-learn are exported to.

Coefficients are attributes of a node there, not initializers; `graph` reads those of `COEFFICIENTS` as parameters and
hands them to the functions here as further inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .node import ML, Node, operator, refuse

COEFFICIENTS = {
    f"{ML}.LinearClassifier": ("coefficients", "intercepts"),
    f"{ML}.LinearRegressor": ("coefficients", "intercepts"),
}
"""Attributes that are weights."""

_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "NONE": lambda scores: scores,
    "LOGISTIC": torch.sigmoid,
    "SOFTMAX": lambda scores: torch.softmax(scores, -1),
    "PROBIT": lambda scores: math.sqrt(2) * torch.erfinv(2 * scores - 1),
}


def transformed(node: Node, scores: Tensor) -> Tensor:
    name = node.get("post_transform", "NONE")
    if name not in _TRANSFORMS:
        raise refuse(node, f"post_transform {name!r}")
    return _TRANSFORMS[name](scores)


@operator(f"{ML}.LinearClassifier", trains=(1, 2), limits="its first output is the class's position, not its label")
def linear_classifier(node: Node, value: Tensor, coefficients: Tensor, intercepts: Tensor | None = None) -> Any:
    """Of two classes there may be the row of one: its score is the second's, and ``1 - score`` or ``-score`` the
    first's."""
    features, rows = value.shape[-1], 1 if intercepts is None else intercepts.shape[0]
    if coefficients.shape[0] % features or (intercepts is not None and coefficients.shape[0] != rows * features):
        raise refuse(node, f"{coefficients.shape[0]} coefficients for {features} features and {rows} intercepts")
    scores = torch.matmul(value.to(coefficients.dtype), coefficients.reshape(-1, features).t())
    scores = scores if intercepts is None else scores + intercepts
    labels = node.get("classlabels_ints") or node.get("classlabels_strings") or []
    if len(labels) == 2 and scores.shape[-1] == 1:
        made = transformed(node, scores)
        other = -made if node.get("post_transform", "NONE") == "NONE" else 1 - made
        made = torch.cat([other, made], -1)
        return made.argmax(-1), made
    return scores.argmax(-1), transformed(node, scores)


@operator(f"{ML}.LinearRegressor", trains=(1, 2))
def linear_regressor(node: Node, value: Tensor, coefficients: Tensor, intercepts: Tensor | None = None) -> Tensor:
    scores = torch.matmul(value.to(coefficients.dtype), coefficients.reshape(node.get("targets", 1), -1).t())
    return transformed(node, scores if intercepts is None else scores + intercepts)


@operator(f"{ML}.Scaler")
def scaler(node: Node, value: Tensor) -> Tensor:
    offset = torch.tensor(node.get("offset", [0.0]), dtype=torch.float32, device=value.device)
    scale = torch.tensor(node.get("scale", [1.0]), dtype=torch.float32, device=value.device)
    return (value.to(torch.float32) - offset) * scale


@operator(f"{ML}.Normalizer")
def normalizer(node: Node, value: Tensor) -> Tensor:
    value = value.to(torch.float32)
    name = node.get("norm", "MAX")
    if name == "MAX":
        norm = value.amax(-1, keepdim=True)  # signed, as the standard has it
    elif name == "L1":
        norm = value.abs().sum(-1, keepdim=True)
    else:
        norm = value.square().sum(-1, keepdim=True).sqrt()
    return torch.where(norm == 0, value, value / norm)


@operator(f"{ML}.Binarizer")
def binarizer(node: Node, value: Tensor) -> Tensor:
    return torch.gt(value, node.get("threshold", 0.0)).to(value.dtype)


@operator(f"{ML}.Imputer", limits="floats")
def imputer(node: Node, value: Tensor) -> Tensor:
    filling = torch.tensor(node.get("imputed_value_floats"), dtype=value.dtype, device=value.device)
    missing = node.get("replaced_value_float", math.nan)
    found = torch.isnan(value) if math.isnan(missing) else value == missing
    return torch.where(found, filling, value)


@operator(f"{ML}.FeatureVectorizer")
def feature_vectorizer(node: Node, *values: Tensor) -> Tensor:
    return torch.cat([each.to(torch.float32) for each in values], -1)


@operator(f"{ML}.ArrayFeatureExtractor")
def array_feature_extractor(node: Node, value: Tensor, index: Tensor) -> Tensor:
    return value.index_select(-1, index.reshape(-1).to(torch.int64))


@operator(f"{ML}.ZipMap", limits="the dictionaries are left out: it gives the numbers that they would hold")
def zip_map(node: Node, value: Tensor) -> Tensor:
    return value
