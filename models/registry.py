"""Models by name: those of the zoo, and anybody's factory as ``"package.module:factory"``."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Protocol

from torch import nn

from ..passes.errors import OptionError, unknown_name
from .graph import gat, gcn
from .mlp import mlp, sign_mlp
from .quantised import quantised_cnn
from .resnet import resnet5, resnet9
from .vgg import vgg8
from .vit import vit

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "sign_mlp": sign_mlp,
    "resnet5": resnet5,
    "resnet9": resnet9,
    "vgg8": vgg8,
    "quantised_cnn": quantised_cnn,
    "vit": vit,
    "gcn": gcn,
    "gat": gat,
}


class DatasetInfo(Protocol):
    """What a model needs to know of the data it is for. `onward.models.Dataset` has it."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input; of an image ``(channels, height, width)``."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""


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


def build(name: str, **options: object) -> nn.Module:
    """Build a model by name.

    Args:
        name: A name in `MODELS`, or ``"package.module:factory"``.
        **options: Arguments of the factory.

    Raises:
        UnknownNameError: As `find_factory`.
        OptionError: As `find_factory`; or the factory does not take these options, or does not return an `nn.Module`.
    """
    factory = find_factory(name)
    try:
        signature = inspect.signature(factory)
    except ValueError:  # A callable written in C need not have one; then the call itself must tell.
        signature = None
    if signature is not None:
        try:
            signature.bind(**options)
        except TypeError as error:
            raise OptionError(f"model {name!r}: {error}. It takes {signature}.") from error
    model = factory(**options)
    if not isinstance(model, nn.Module):
        raise OptionError(f"model {name!r} returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def build_for(name: str, dataset: DatasetInfo, **options: object) -> nn.Module:
    """Build a model that fits a data set.

    Those of the parameters `num_classes`, `in_features`, `in_channels` and `image_size` that the factory's signature
    names come from `dataset`, the last two only if its inputs are images, of shape ``(channels, height, width)``.

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
    try:
        parameters = set(inspect.signature(find_factory(name)).parameters)
    except ValueError:
        parameters = set()
    if "image_size" in parameters - set(options) and len(shape) == 3 and shape[1] != shape[2]:
        raise OptionError(f"model {name!r} needs square images; those of the data set are {shape[1]}×{shape[2]}.")
    return build(name, **{key: value for key, value in facts.items() if key in parameters} | options)
