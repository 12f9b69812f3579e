"""The reference zoo and its data sets: plain `nn.Module`s and tensors, with nothing of the compiler in them."""

from .batches import TensorBatches
from .binarised import binarised_cnn, binarised_mlp
from .data import DATASETS, Batches, Dataset, load, loaders
from .gpt import gpt
from .graph import gat, gcn
from .integer import integer_cnn, integer_mlp
from .mlp import mlp, sign_mlp
from .quantised import quantised_cnn
from .recurrent import gru_text, lstm_text, rnn_text
from .registry import MODELS, TWINS, DatasetInfo, build, build_for, twin_of
from .resnet import resnet5, resnet9, resnet18
from .spiking import spiking_cnn, spiking_mlp
from .vgg import vgg8
from .vit import vit

__all__ = [
    "DATASETS",
    "MODELS",
    "TWINS",
    "Batches",
    "Dataset",
    "DatasetInfo",
    "TensorBatches",
    "binarised_cnn",
    "binarised_mlp",
    "build",
    "build_for",
    "gat",
    "gcn",
    "gpt",
    "gru_text",
    "integer_cnn",
    "integer_mlp",
    "load",
    "loaders",
    "lstm_text",
    "mlp",
    "quantised_cnn",
    "resnet5",
    "resnet9",
    "resnet18",
    "rnn_text",
    "sign_mlp",
    "spiking_cnn",
    "spiking_mlp",
    "twin_of",
    "vgg8",
    "vit",
]
