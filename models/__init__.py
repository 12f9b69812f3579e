"""The reference zoo and its data sets: plain `nn.Module`s and tensors, with nothing of the compiler in them."""

from .batches import TensorBatches
from .data import DATASETS, Dataset, load, loaders
from .gpt import gpt
from .mlp import mlp, sign_mlp
from .quantised import quantised_cnn
from .recurrent import gru_text, lstm_text, rnn_text
from .registry import MODELS, DatasetInfo, build, build_for
from .resnet import resnet5, resnet9
from .vgg import vgg8
from .vit import vit

__all__ = [
    "DATASETS",
    "MODELS",
    "Dataset",
    "DatasetInfo",
    "TensorBatches",
    "build",
    "build_for",
    "gpt",
    "gru_text",
    "load",
    "loaders",
    "lstm_text",
    "mlp",
    "quantised_cnn",
    "resnet5",
    "resnet9",
    "rnn_text",
    "sign_mlp",
    "vgg8",
    "vit",
]
