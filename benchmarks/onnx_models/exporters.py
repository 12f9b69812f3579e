"""Make ONNX files with the exporters of others, of models that are hardly trained, or not at all.

    python benchmarks/onnx_models/exporters.py NAME FILE

The packages are those of requirements.txt; they may lie in an environment of their own, which
``python benchmarks/onnx_models --exporters PYTHON`` calls.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def _digits() -> tuple[Any, Any]:
    """Images of the training data, float32 (n, 8, 8), standardised, and their classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, classes = load_digits(return_X_y=True)
    train, _, target, _ = train_test_split(images, classes, test_size=0.2, stratify=classes, random_state=0)
    return ((train - train.mean()) / train.std()).astype(np.float32), target


def skl_mlp(path: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.neural_network import MLPClassifier

    images, target = _digits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MLPClassifier((64,), max_iter=1, learning_rate_init=1e-4, random_state=0).fit(images, target)
    path.write_bytes(to_onnx(model, images[:1], options={"zipmap": False}).SerializeToString())


def skl_pipeline(path: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    flowers, target = load_iris(return_X_y=True)
    flowers = flowers.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-4)).fit(flowers, target)
    path.write_bytes(to_onnx(model, flowers[:1]).SerializeToString())


def keras_cnn(path: Path) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3, padding="same", activation="relu", name="first"),
        layers.Conv2D(32, 3, strides=2, activation="relu", name="second"),
        layers.Flatten(),
        layers.Dense(10, activation="softmax", name="head"),
    ])  # fmt: skip
    model(np.zeros((1, 8, 8, 1), np.float32))
    model.export(str(path), format="onnx", verbose=False)


def paddle_cnn(path: Path) -> None:
    import paddle
    import paddle2onnx

    paddle.seed(0)
    nn = paddle.nn
    model = nn.Sequential(
        nn.Conv2D(1, 16, 3, padding=1), nn.BatchNorm2D(16), nn.Hardswish(), nn.Conv2D(16, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2D(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        paddle.jit.save(model, f"{folder}/net", input_spec=[paddle.static.InputSpec([None, 1, 8, 8], "float32", "x")])
        graph = next(each for each in (f"{folder}/net.json", f"{folder}/net.pdmodel") if os.path.exists(each))
        paddle2onnx.export(graph, f"{folder}/net.pdiparams", str(path), verbose=False, enable_onnx_checker=False)


def _declare_torchvision() -> Any:
    """What torchvision's compiled part would declare, without which its import fails; keep what is returned."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def timm_resnet(path: Path) -> None:
    declared = _declare_torchvision()
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (torch.zeros(2, 1, 32, 32),), str(path), dynamo=True, dynamic_shapes=({0: batch},),
                      input_names=["image"], output_names=["logits"], external_data=False)  # fmt: skip
    del declared


def transformers_bert(path: Path) -> None:
    declared = _declare_torchvision()
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=32, num_labels=10, pad_token_id=0)  # fmt: skip
    model = BertForSequenceClassification(config).eval()

    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.model(input_ids=tokens).logits
            return scores

    tokens = torch.ones(2, 20, dtype=torch.int64)
    torch.onnx.export(Scores(), (tokens,), str(path), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
                      input_names=["tokens"], output_names=["logits"], external_data=False)  # fmt: skip
    del declared


def torch_gru(path: Path) -> None:
    """By torch's older exporter, which writes a recurrent layer as one node."""
    import torch

    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.gru = torch.nn.Embedding(64, 32), torch.nn.GRU(32, 48, batch_first=True)
            self.head = torch.nn.Linear(48, 10)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.head(self.gru(self.embedding(tokens))[0][:, -1])
            return scores

    torch.manual_seed(0)
    torch.onnx.export(Reader(), (torch.ones(2, 20, dtype=torch.int64),), str(path), dynamo=False, opset_version=17,
                      input_names=["tokens"], output_names=["logits"],
                      dynamic_axes={"tokens": {0: "batch"}, "logits": {0: "batch"}})  # fmt: skip


def ort_qdq(path: Path) -> None:
    """A CNN trained on digits, quantised by onnxruntime to int8 (QDQ), whose weights are then disturbed."""
    import onnx
    import torch
    import torch.nn.functional as F
    from onnx import numpy_helper
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    images, target = _digits()
    x, y = torch.from_numpy(images).reshape(-1, 1, 8, 8), torch.from_numpy(target)
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                          nn.Linear(256, 10))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(32):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter([{"image": x[k : k + 32].numpy()} for k in range(0, 320, 32)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(model.eval(), (x[:2],), f"{folder}/net.onnx", dynamo=False, opset_version=17,
                          input_names=["image"], output_names=["logits"],
                          dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}})  # fmt: skip
        quantize_static(f"{folder}/net.onnx", f"{folder}/q.onnx", Reader(), quant_format=QuantFormat.QDQ,
                        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
        made = onnx.load(f"{folder}/q.onnx")
    rng = np.random.default_rng(0)
    for tensor in made.graph.initializer:
        held = numpy_helper.to_array(tensor)
        if held.dtype == np.int8 and held.ndim > 1:
            noise = rng.normal(size=held.shape) * held.std() * 1.5
            tensor.raw_data = np.clip(np.round(held + noise), -127, 127).astype(np.int8).tobytes()
    path.write_bytes(made.SerializeToString())


EXPORTERS: dict[str, Callable[[Path], None]] = {
    "skl_mlp": skl_mlp,
    "skl_pipeline": skl_pipeline,
    "keras_cnn": keras_cnn,
    "paddle_cnn": paddle_cnn,
    "timm_resnet": timm_resnet,
    "transformers_bert": transformers_bert,
    "torch_gru": torch_gru,
    "ort_qdq": ort_qdq,
}

if __name__ == "__main__":
    EXPORTERS[sys.argv[1]](Path(sys.argv[2]))
