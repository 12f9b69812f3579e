"""Models by name: those of the zoo, and anybody's factory as ``"package.module:factory"``."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from ..passes.errors import OnwardError, OptionError, unknown_name
from .binarised import binarised_cnn, binarised_mlp
from .gpt import gpt
from .graph import gat, gcn
from .integer import integer_cnn, integer_mlp
from .mlp import mlp, sign_mlp
from .quantised import quantised_cnn
from .recurrent import gru_text, lstm_text, rnn_text
from .resnet import resnet5, resnet9, resnet18
from .spiking import spiking_cnn, spiking_mlp
from .vgg import vgg8
from .vit import vit

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "sign_mlp": sign_mlp,
    "resnet5": resnet5,
    "resnet9": resnet9,
    "resnet18": resnet18,
    "vgg8": vgg8,
    "quantised_cnn": quantised_cnn,
    "vit": vit,
    "spiking_mlp": spiking_mlp,
    "spiking_cnn": spiking_cnn,
    "binarised_mlp": binarised_mlp,
    "binarised_cnn": binarised_cnn,
    "integer_mlp": integer_mlp,
    "integer_cnn": integer_cnn,
    "rnn_text": rnn_text,
    "gru_text": gru_text,
    "lstm_text": lstm_text,
    "gpt": gpt,
    "gcn": gcn,
    "gat": gat,
}

_STRAIGHT: Mapping[str, object] = {"straight_through": True}

TWINS: dict[str, Mapping[str, object]] = {
    "sign_mlp": _STRAIGHT,
    "quantised_cnn": _STRAIGHT,
    "spiking_mlp": {"surrogate": True},
    "spiking_cnn": {"surrogate": True},
    "binarised_mlp": _STRAIGHT,
    "binarised_cnn": _STRAIGHT,
    "integer_mlp": _STRAIGHT,
    "integer_cnn": _STRAIGHT,
}
"""Of each model without derivative the options of its twin: same weights and forward, but backpropagation can train it.

What backpropagation reaches in place of such a model is what its twin reaches."""


class DatasetInfo(Protocol):
    """What a model needs to know of the data it is for. `onward.models.Dataset` has it."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input; of an image ``(channels, height, width)``, of a text ``(length,)``."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary of inputs that are tokens; 0 where they are not."""


def find_factory(name: str) -> Callable[..., nn.Module]:
    """The factory with this name.

    Args:
        name: A name in `MODELS`, or ``"package.module:factory"``, which is imported.

    Raises:
        UnknownNameError: No model of the zoo has this name, or the module has no such factory.
        OptionError: The module cannot be imported, or what it holds under that name cannot be called.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        if name not in MODELS:
            raise unknown_name("model", name, [*MODELS, "package.module:factory"])
        return MODELS[name]
    if not module_name or not attribute:
        raise OptionError(f"model {name!r} must be written package.module:factory.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # Importing runs the user's code.
        raise OptionError(
            f"model {name!r}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}. "
            "Its folder must be on PYTHONPATH."
        ) from error
    if not hasattr(module, attribute):
        public = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise unknown_name(f"factory of module {module_name!r}", attribute, public)
    factory: Callable[..., nn.Module] = getattr(module, attribute)
    if not callable(factory):
        raise OptionError(f"model {name!r} is a {type(factory).__name__}, which cannot be called.")
    return factory


def find_signature(name: str) -> inspect.Signature | None:
    """That of the factory with this name (`find_factory`, and its errors); None where it has none to read."""
    factory = find_factory(name)
    try:
        return inspect.signature(factory)
    except ValueError:  # A callable written in C need not have one.
        return None


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise UnknownNameError if the factory has no such options; one whose signature cannot be read is not asked.

    Raises:
        UnknownNameError: So, or as `find_factory`.
        OptionError: As `find_factory`.
    """
    signature = find_signature(name)
    if signature is None or any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()):
        return
    for option in options:
        if option not in signature.parameters:
            raise unknown_name(f"option of model {name!r}", option, signature.parameters)


def build(name: str, **options: object) -> nn.Module:
    """Build a model by name.

    Args:
        name: A name in `MODELS`, or ``"package.module:factory"``.
        **options: Arguments of the factory.

    Raises:
        UnknownNameError: As `find_factory`; or an option that the factory does not have.
        OptionError: As `find_factory`; or the factory needs further options, fails, or does not return an `nn.Module`.
    """
    factory = find_factory(name)
    check_options(name, options)
    signature = find_signature(name)
    if signature is not None:  # else the call itself must tell
        try:
            signature.bind(**options)
        except TypeError as error:
            raise OptionError(f"model {name!r}: {error}. It takes {signature}.") from error
    try:
        model = factory(**options)
    except OnwardError:
        raise
    except Exception as error:  # Such as a width that is a word. A factory may be anybody's code.
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise OptionError(f"model {name!r} cannot be built with {given}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"model {name!r} returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def build_for(name: str, dataset: DatasetInfo, **options: object) -> nn.Module:
    """Build a model that fits a data set.

    Those of the parameters `num_classes`, `in_features`, `in_channels`, `image_size`, `num_tokens` and `length` that
    the factory's signature names come from `dataset`: `in_channels` and `image_size` only if its inputs are images, of
    shape ``(channels, height, width)``, the last two only if they are tokens, of shape ``(length,)``.

    Args:
        name: As for `build`.
        dataset: What the model is for.
        **options: Further arguments of the factory; they go before what the data set says.

    Raises:
        UnknownNameError: As `find_factory`.
        OptionError: As `build`; or the factory has a parameter `image_size` and the images are not square.
    """
    shape = dataset.input_shape
    facts: dict[str, object] = {"num_classes": dataset.num_classes, "in_features": math.prod(shape)}
    if len(shape) == 3:
        facts |= {"in_channels": shape[0], "image_size": shape[1]}
    if dataset.num_tokens:
        facts |= {"num_tokens": dataset.num_tokens, "length": shape[0]}
    signature = find_signature(name)
    parameters = set(signature.parameters) if signature is not None else set()
    if "image_size" in parameters - set(options) and len(shape) == 3 and shape[1] != shape[2]:
        raise OptionError(f"model {name!r} needs square images; those of the data set are {shape[1]}×{shape[2]}.")
    return build(name, **{key: value for key, value in facts.items() if key in parameters} | options)


def twin_of(name: str, dataset: DatasetInfo, model: nn.Module, **options: object) -> nn.Module:
    """What backpropagation trains in place of `model`, with weights of its own: equal to the model's, frozen like them.

    The twin of `TWINS` where the model has one, else a copy. It is where `model` is, and draws no random numbers of the
    global generator.

    Args:
        name: As for `build`.
        dataset: What the model is for.
        model: What `build_for` made of `name`, `dataset` and `options`.
        **options: The model's arguments.
    """
    if name not in TWINS:
        return copy.deepcopy(model)
    with torch.random.fork_rng(devices=()):
        twin = build_for(name, dataset, **{**options, **TWINS[name]})
    twin.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        twin.get_parameter(name).requires_grad_(parameter.requires_grad)
    parameter = next(model.parameters())
    return twin.to(parameter.device)
