"""The reference zoo and its data sets: plain `nn.Module`s and tensors, with nothing of the compiler in them."""

from .batches import TensorBatches
from .data import DATASETS, Dataset, load, loaders
from .mlp import mlp
from .registry import MODELS, DatasetInfo, build, build_for
from .resnet import resnet5, resnet9
from .vgg import vgg8

__all__ = [
    "DATASETS",
    "MODELS",
    "Dataset",
    "DatasetInfo",
    "TensorBatches",
    "build",
    "build_for",
    "load",
    "loaders",
    "mlp",
    "resnet5",
    "resnet9",
    "vgg8",
]
