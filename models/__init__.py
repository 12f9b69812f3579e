"""The reference zoo and its data sets: plain `nn.Module`s and tensors, with nothing of the compiler in them."""

from .batches import TensorBatches
from .data import DATASETS, Batches, Dataset, load, loaders
from .graph import gat, gcn
from .mlp import mlp, sign_mlp
from .quantised import quantised_cnn
from .registry import MODELS, DatasetInfo, build, build_for
from .resnet import resnet5, resnet9
from .vgg import vgg8
from .vit import vit

__all__ = [
    "DATASETS",
    "MODELS",
    "Batches",
    "Dataset",
    "DatasetInfo",
    "TensorBatches",
    "build",
    "build_for",
    "gat",
    "gcn",
    "load",
    "loaders",
    "mlp",
    "quantised_cnn",
    "resnet5",
    "resnet9",
    "sign_mlp",
    "vgg8",
    "vit",
]
