"""The models that compatibility is tried with: built offline, with random weights, at a small size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 3
CLASSES = 10
SIZES = (64, 96, 128, 224, 256)
"""Heights and widths of images; a model gets the first that it runs on."""


@dataclass(frozen=True)
class Built:
    """A model in training mode and what it is tried on."""

    model: nn.Module
    inputs: Any
    """As `onward.compile` takes them."""
    unbatched: bool = False
    """Whether the inputs are one whole graph, without a batch dimension."""


@dataclass(frozen=True)
class Library:
    """A library and the models of it that are tried."""

    title: str
    build: Callable[[str], Built]
    names: tuple[str, ...]
    operations: bool = False
    """Whether they are also tried with every operation by itself, which takes as long again: where `auto` covers most
    of such models by segments and reach."""


def declare_torchvision_operators() -> torch.library.Library:
    """What torchvision's compiled part would declare; without it the library cannot be imported (DESIGN.md, hazard 13).

    Keep what is returned: the operators go with it.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _images(make: Callable[..., nn.Module], argument: str) -> Built:
    """The model on the smallest images that it runs on; `argument` is what its factory calls their size, if it does."""
    reason: Exception | None = None
    for named in (True, False):
        for size in SIZES:
            images = torch.randn(SAMPLES, 3, size, size)
            try:
                model = make(**{argument: size} if named else {}).train()
                with torch.no_grad():
                    model(images)
                return Built(make(**{argument: size} if named else {}).train(), (images,))
            except Exception as error:  # whatever a model says of a size that is not for it
                reason = error
    assert reason is not None
    raise reason


def _timm(name: str) -> Built:
    import timm

    return _images(lambda **size: timm.create_model(name, num_classes=CLASSES, **size), "img_size")


def _torchvision(name: str) -> Built:
    import torchvision

    return _images(lambda **size: torchvision.models.get_model(name, num_classes=CLASSES, **size), "image_size")


SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_decoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "hidden_dim", "d_ff"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "d_inner"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_lora_rank", "q_lora_rank"), 16),
    **{
        "pooler_hidden_size": 32,
        "rotary_dim": 8,
        "block_sizes": [1, 1],
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_local_experts": 4,
    },
    **{"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "type_vocab_size": 2},
    **{"image_size": 32, "patch_size": 8, "attention_types": [[["global", "local"], 1]]},
}
"""Settings of a transformer's configuration, by whatever names its authors gave them."""

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | {
    "image_size": 32,
    "patch_size": 8,
}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
_PVT: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

IMAGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("vit", "beit", "dinov2"), _VIT),
    **dict.fromkeys(("swin", "swinv2"), _SWIN),
    **dict.fromkeys(("convnext", "convnextv2"), _STAGES),
    **{name: {"embedding_size": 16, **_STAGES} for name in ("resnet", "regnet")},
    "segformer": {"num_attention_heads": [1, 1, 2, 2], **_PVT},
    "poolformer": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
    "pvt": {"image_size": 64, "num_attention_heads": [1, 1, 2, 2], **_PVT},
    "focalnet": {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "mobilevit": {},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
}
"""Model types of `transformers` that classify images, with settings; the others classify token sequences."""


def _transformers(name: str) -> Built:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(name)
    for setting, value in IMAGES.get(name, SMALL).items():
        now = getattr(config, setting, None)
        known = now is not None or setting.endswith("_token_id")
        if known and isinstance(now, (list, tuple)) == isinstance(value, list):
            with contextlib.suppress(NotImplementedError, AttributeError):  # some are derived from others
                setattr(config, setting, value)
    if getattr(config, "layer_types", None) and hasattr(config, "num_hidden_layers"):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.num_labels, config.use_cache = CLASSES, False
    if name in IMAGES:
        size = config.image_size if isinstance(getattr(config, "image_size", None), int) else 64
        images = torch.randn(SAMPLES, config.num_channels, size, size)
        model = transformers.AutoModelForImageClassification.from_config(config)
        return Built(model.train(), {"pixel_values": images})
    tokens = torch.randint(3, getattr(config, "vocab_size", 99), (SAMPLES, 12))
    tokens[:, -1] = config.eos_token_id or 2
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    return Built(model.train(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


NODES, WIDTH = 12, 8


class _OneConvolution(nn.Module):
    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution, self.head = convolution, nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        logits: Tensor = self.head(self.convolution(x, edge_index))
        return logits


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "ChebConv": lambda: {"in_channels": WIDTH, "out_channels": WIDTH, "K": 2},
    "SSGConv": lambda: {"in_channels": WIDTH, "out_channels": WIDTH, "alpha": 0.1},
    "CGConv": lambda: {"channels": WIDTH},
    "GINConv": lambda: {"nn": nn.Linear(WIDTH, WIDTH)},
    "EdgeConv": lambda: {"nn": nn.Linear(2 * WIDTH, WIDTH)},
    "GatedGraphConv": lambda: {"out_channels": WIDTH, "num_layers": 2},
    "APPNP": lambda: {"K": 2, "alpha": 0.1},
    "AGNNConv": dict,
    "LGConv": dict,
    "GENConv": lambda: {"in_channels": WIDTH, "out_channels": WIDTH},
    "ARMAConv": lambda: {"in_channels": WIDTH, "out_channels": WIDTH},
}
"""Arguments of convolutions that do not take ``(in_channels, out_channels)`` alone."""


def _geometric(name: str) -> Built:
    import torch_geometric.nn as geometric

    given = ARGUMENTS.get(name, lambda: {"in_channels": WIDTH, "out_channels": WIDTH})()
    ring = torch.arange(NODES)
    edges = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])
    model, inputs = _OneConvolution(getattr(geometric, name)(**given)).train(), (torch.randn(NODES, WIDTH), edges)
    model(*inputs)  # what is lazy takes its shape
    return Built(model, inputs, unbatched=True)


TIMM = """
test_nfnet test_mambaout test_vit_relpos starnet_s050 mobilenetv3_small_050 dla46x_c mobilevit_xxs repghostnet_050
edgenext_xx_small ghostnet_050 ese_vovnet19b_slim_dw efficientvit_b0 efficientvit_m0 cspnext_tiny iformer_t fasternet_t0
cs3darknet_focus_s lcnetv2_small xcit_nano_12_p8_224 swiftformer_xs inception_next_atto efficientformerv2_s0 fastvit_t8
convnext_atto efficientnet_lite0 pvt_v2_b0 rexnet_100 mobileone_s1 hardcorenas_b hgnetv2_b0 pit_ti_224 repvit_m1
cpubone_nano tiny_vit_5m_224 regnetx_004_tv coat_tiny eva02_tiny_patch14_224 convit_tiny efficientvim_m1 gmlp_ti16_224
shvit_s1 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 deit_tiny_patch16_224 crossvit_tiny_240 skresnet18 resnet14t dpn48b
eca_botnext26ts_256 resnest14d visformer_tiny resnetv2_18 legacy_seresnet18 poolformerv2_s12
"""
"""The smallest architecture, or one of the smallest, of most families that timm has below 20 million parameters."""

TORCHVISION = """
resnet18 squeezenet1_1 shufflenet_v2_x0_5 mobilenet_v2 mobilenet_v3_small mnasnet0_5 efficientnet_b0 regnet_y_400mf
densenet121 googlenet
"""

TRANSFORMERS = """
bert roberta albert distilbert electra deberta deberta-v2 mpnet squeezebert nystromformer roformer xlnet convbert canine
modernbert gpt2 gpt_neo gpt_neox gptj opt bloom llama mistral qwen2 phi falcon gemma2 stablelm mpt ctrl t5 bart
vit beit swin swinv2 convnextv2 resnet regnet segformer dinov2 pvt mobilenet_v2 efficientnet focalnet
"""

GEOMETRIC = """
GCNConv ChebConv SAGEConv GraphConv GATConv GATv2Conv TransformerConv TAGConv GINConv ARMAConv SGConv SSGConv APPNP
MFConv CGConv EdgeConv FeaStConv LEConv ClusterGCNConv GENConv FiLMConv SuperGATConv EGConv GeneralConv
GatedGraphConv ResGatedGraphConv AGNNConv LGConv
"""

LIBRARIES: dict[str, Library] = {
    "timm": Library("timm", _timm, tuple(TIMM.split())),
    "torchvision": Library("torchvision", _torchvision, tuple(TORCHVISION.split())),
    "transformers": Library("transformers", _transformers, tuple(TRANSFORMERS.split()), operations=True),
    "torch_geometric": Library(
        "torch_geometric, one convolution", _geometric, tuple(GEOMETRIC.split()), operations=True
    ),
}
