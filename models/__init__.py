"""The reference zoo and its data sets: plain `nn.Module`s and tensors, with nothing of the compiler in them."""

from .batches import TensorBatches
from .data import DATASETS, Dataset, load, loaders
from .mlp import mlp, sign_mlp
from .quantised import quantised_cnn
from .registry import MODELS, TWINS, DatasetInfo, build, build_for, twin_of
from .resnet import resnet5, resnet9
from .vgg import vgg8
from .vit import vit

__all__ = [
    "DATASETS",
    "MODELS",
    "TWINS",
    "Dataset",
    "DatasetInfo",
    "TensorBatches",
    "build",
    "build_for",
    "load",
    "loaders",
    "mlp",
    "quantised_cnn",
    "resnet5",
    "resnet9",
    "sign_mlp",
    "twin_of",
    "vgg8",
    "vit",
]
