"""The files, what each is trained on, and how."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_iris
from torch import Tensor

import onward


@dataclass(frozen=True)
class Task:
    """Inputs and classes; what is trained on, and what is tested on."""

    what: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(shape: tuple[int, ...] = (1, 8, 8)) -> Task:
    data = onward.models.load("digits")
    splits = [(images.reshape(-1, *shape), classes) for images, classes in (s.tensors for s in (data.train, data.test))]
    return Task("digits", splits[0], splits[1])


def large_digits() -> Task:
    """32×32."""
    small = digits()
    splits = [(F.interpolate(x, (32, 32), mode="bilinear"), y) for x, y in (small.train, small.test)]
    return Task("digits, enlarged to 32×32", splits[0], splits[1])


def turned_digits() -> Task:
    """Lines of three digits, upright (0) or upside down (1), as images of 48×96 in three channels."""
    generator = torch.Generator().manual_seed(0)

    def lines(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (count, 3), generator=generator)
        line = torch.cat([images[rows[:, k]] for k in range(3)], -1)
        turned = torch.randint(2, (count,), generator=generator)
        line = torch.where(turned[:, None, None, None] == 1, line.flip(2, 3), line)
        return F.interpolate(line, (48, 96), mode="bilinear").expand(-1, 3, -1, -1).contiguous() * 0.5, turned

    small = digits()
    return Task("lines of digits, upright or upside down", lines(small.train[0], 800), lines(small.test[0], 300))


def iris() -> Task:
    flowers, classes = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(flowers))
    x, y = torch.tensor(flowers[order], dtype=torch.float32), torch.tensor(classes[order])
    return Task("iris", (x[:100], y[:100]), (x[100:], y[100:]))


def surnames() -> Task:
    """Last names of ten languages, 20 letters, padded in front."""
    data = onward.models.load("surnames")
    splits = [(F.pad(tokens, (max(20 - tokens.shape[1], 0), 0))[:, -20:], classes)
              for tokens, classes in (s.tensors for s in (data.train, data.test))]  # fmt: skip
    return Task("surnames, 10 languages", splits[0], splits[1])


def sources() -> Task:
    """From which of three packages a Python file comes, by its first and last 1,024 bytes (as magika reads files)."""
    folder, found = Path(sysconfig.get_paths()["purelib"]), []
    for label, package in enumerate(("sklearn", "torch", "networkx")):
        files = sorted(each for each in (folder / package).rglob("*.py") if each.stat().st_size > 2048)
        chosen = np.random.default_rng(label).permutation(len(files))[:250]
        for index in chosen:
            content = files[index].read_bytes().strip()
            found.append((list(content[:1024] + content[-1024:]), label))
    order = np.random.default_rng(0).permutation(len(found))
    x = torch.tensor([found[k][0] for k in order], dtype=torch.int32)
    y = torch.tensor([found[k][1] for k in order])
    cut = len(x) * 3 // 4
    return Task("Python files of three packages", (x[:cut], y[:cut]), (x[cut:], y[cut:]))


@dataclass(frozen=True)
class Subject:
    """A file, and how it is trained.

    Attributes:
        name: What the table calls it.
        source: ``("exporter", name)`` of exporters.py, or ``("wheel", package, version, path inside)``.
        made_by: Who wrote the file with what.
        task: What it is trained on.
        epochs, batch_size, lr: How; by Adam.
        freeze: Patterns of what stays as it is.
        load: Options of `onward.compiler.from_onnx.load`.
        output: Name of the output of the file that holds scores; None for its only one of floats.
        alone: Whether it is also trained with nothing pulled back if `auto` perturbs nothing.
    """

    name: str
    source: tuple[str, ...]
    made_by: str
    task: Callable[[], Task]
    epochs: int = 10
    batch_size: int = 32
    lr: float = 2e-3
    freeze: tuple[str, ...] = ()
    load: dict[str, Any] = field(default_factory=lambda: {"logits": True})
    output: str | None = None
    alone: bool = True


SUBJECTS = (
    Subject("scikit-learn MLPClassifier", ("exporter", "skl_mlp"), "skl2onnx", lambda: digits((64,)),
            output="probabilities"),
    Subject("scikit-learn StandardScaler and LogisticRegression", ("exporter", "skl_pipeline"), "skl2onnx",
            iris, epochs=40, lr=2e-2, output="output_probability"),
    Subject("Keras 3 CNN", ("exporter", "keras_cnn"), "Keras, `model.export(format=\"onnx\")`",
            lambda: digits((8, 8, 1))),
    Subject("PaddlePaddle CNN", ("exporter", "paddle_cnn"), "paddle2onnx", digits),
    Subject("timm `test_resnet`", ("exporter", "timm_resnet"), "torch.onnx.export (dynamo)", large_digits, epochs=8),
    Subject("transformers BERT, 2 layers", ("exporter", "transformers_bert"), "torch.onnx.export (dynamo)", surnames,
            epochs=6),
    Subject("torch GRU", ("exporter", "torch_gru"), "torch.onnx.export (TorchScript)", surnames, epochs=4, lr=5e-3),
    Subject("int8 CNN (QDQ), weights disturbed", ("exporter", "ort_qdq"), "onnxruntime.quantization", digits, epochs=10,
            lr=1e-3),
    Subject("PP-OCR text direction", ("wheel", "rapidocr-onnxruntime", "1.4.4",
            "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"), "PaddlePaddle; ships with RapidOCR",
            turned_digits, epochs=2, lr=1e-3),
    Subject("Magika file types", ("wheel", "magika", "1.0.3", "magika/models/standard_v3_3/model.onnx"),
            "tf2onnx (JAX); ships with Magika", sources, epochs=4,
            lr=5e-4, load={"outputs": ["jax2tf_get_logits_/pjit_get_logits_/MagikaV2/Dense_1/AddV2:0"]}, alone=False),
)  # fmt: skip
