"""Where the parts of known architectures are: blocks, stages, and the places that dropout goes to.

Facts about our models, torchvision's and timm's, for regularize/ to read. In a pattern of module
names `*` stands for one part of a dotted name, `[1357]` for one of these characters, and what
follows a colon for the module's class.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from torch import nn

from edgereg.models.resnet import SmallResNet

__all__ = ["FAMILIES", "Family", "blocks_of", "family_of", "matching"]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        blocks: Pattern of the blocks; empty if they have no common form.
        maps: Whether a block's output is (B, C, H, W).
        stages: Pattern of the modules whose outputs end a stage.
        within: For a place, the modules of a block. "bn3|bn2" is the first that a block has, and
            "attention:rate" a module's attribute that is a rate itself.
        outside: For a place, patterns of modules that are in no block.
    """

    blocks: str = ""
    maps: bool = False
    stages: str = ""
    within: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# What a block adds to its shortcut has passed "residual"; placement.py leaves out blocks that have
# no shortcut.
FAMILIES: dict[str, Family] = {
    "edgereg.models.resnet.SmallResNet": Family(
        "blocks.*", maps=True, within={"residual": ("second",)}
    ),
    "edgereg.models.convnet.ConvNet": Family("stages.*", maps=True, stages="stages.*"),
    "edgereg.models.vit.SmallViT": Family(
        "blocks.*",
        within={
            "residual": ("attention.output_dropout", "perceptron.4"),
            "attention": ("attention.weights_dropout",),
            "mlp": ("perceptron.2",),
        },
        outside={"embedding": ("dropout",)},
    ),
    "torchvision.models.resnet.ResNet": Family(
        "layer[1-4].*", maps=True, stages="layer[1-4]", within={"residual": ("bn3|bn2",)}
    ),
    "torchvision.models.regnet.RegNet": Family(
        "trunk_output.*.*", maps=True, stages="trunk_output.*", within={"residual": ("f",)}
    ),
    "torchvision.models.mobilenetv2.MobileNetV2": Family(
        "features.*:InvertedResidual", maps=True, within={"residual": ("conv",)}
    ),
    "torchvision.models.mobilenetv3.MobileNetV3": Family(
        "features.*:InvertedResidual", maps=True, within={"residual": ("block",)}
    ),
    "torchvision.models.efficientnet.EfficientNet": Family(
        "features.*.*:*MBConv",
        maps=True,
        stages="features.*:Sequential",
        within={"residual": ("stochastic_depth",)},
    ),
    "torchvision.models.convnext.ConvNeXt": Family(
        "features.[1357].*",
        maps=True,
        stages="features.[1357]",
        within={"residual": ("stochastic_depth",)},
    ),
    "torchvision.models.swin_transformer.SwinTransformer": Family(
        "features.[1357].*",
        stages="features.[1357]",
        within={
            "residual": ("stochastic_depth",),
            "attention": ("attn:attention_dropout",),
            "mlp": ("mlp.2",),
        },
    ),
    "torchvision.models.vision_transformer.VisionTransformer": Family(
        "encoder.layers.*",
        within={
            "residual": ("dropout", "mlp.4"),
            "attention": ("self_attention:dropout",),
            "mlp": ("mlp.2",),
        },
        outside={"embedding": ("encoder.dropout",)},
    ),
    "torchvision.models.vgg.VGG": Family(
        maps=True, stages="features.*:MaxPool2d", outside={"mlp": ("classifier.2",)}
    ),
    "timm.models.resnet.ResNet": Family(
        "layer[1-4].*", maps=True, stages="layer[1-4]", within={"residual": ("drop_path",)}
    ),
    "timm.models.efficientnet.EfficientNet": Family(
        "blocks.*.*", maps=True, stages="blocks.*", within={"residual": ("drop_path",)}
    ),
    "timm.models.mobilenetv3.MobileNetV3": Family(
        "blocks.*.*", maps=True, stages="blocks.*", within={"residual": ("drop_path",)}
    ),
    "timm.models.convnext.ConvNeXt": Family(
        "stages.*.blocks.*",
        maps=True,
        stages="stages.*",
        within={"residual": ("drop_path",), "mlp": ("mlp.drop1",)},
    ),
    "timm.models.swin_transformer.SwinTransformer": Family(
        "layers.*.blocks.*",
        stages="layers.*",
        within={
            "residual": ("drop_path1", "drop_path2"),
            "attention": ("attn.attn_drop",),
            "mlp": ("mlp.drop1",),
        },
    ),
    "timm.models.vision_transformer.VisionTransformer": Family(
        "blocks.*",
        within={
            "residual": ("drop_path1", "drop_path2"),
            "attention": ("attn.attn_drop",),
            "mlp": ("mlp.drop1",),
        },
        outside={"embedding": ("pos_drop",)},
    ),
}


def family_of(backbone: nn.Module) -> Family:
    """Return what is known of a backbone; an empty Family if nothing is."""
    if isinstance(backbone, SmallResNet):
        ends = "|".join(map(str, backbone.stage_ends))
        return dataclasses.replace(FAMILIES[_name(SmallResNet)], stages=f"blocks.({ends})")
    known = (FAMILIES[_name(kind)] for kind in type(backbone).__mro__ if _name(kind) in FAMILIES)
    return next(known, Family())


def blocks_of(backbone: nn.Module) -> list[str]:
    """Return the names of a backbone's blocks, from the stem on.

    In an unknown architecture each child with parameters counts as one, below the children that
    are the only such.
    """
    family = family_of(backbone)
    if family.blocks:
        return [
            path
            for path in matching(backbone, family.blocks)
            if _has_parameters(backbone.get_submodule(path))
        ]
    prefix, module = "", backbone
    while True:
        children = [(name, m) for name, m in module.named_children() if _has_parameters(m)]
        if len(children) != 1 or not any(True for _ in children[0][1].children()):
            return [f"{prefix}{name}" for name, _ in children]
        ((name, module),) = children
        prefix = f"{prefix}{name}."


def matching(backbone: nn.Module, pattern: str) -> list[str]:
    """Return the names of the modules that a pattern means, in the order of definition."""
    names, _, kind = pattern.partition(":")
    regex = re.compile(names.replace(".", r"\.").replace("*", "[^.]+"))
    return [
        path
        for path, module in backbone.named_modules()
        if regex.fullmatch(path) and fnmatch(type(module).__name__, kind or "*")
    ]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
