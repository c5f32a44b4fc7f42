import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.ssl.feature_map import FeatureMap, evaluating, find_feature_map

TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
CASES = [  # model, image size; then path, layout, prefixes, channels, side
    ("resnet", 32, "blocks", "channels_first", 0, 64, 8),
    ("convnet", 32, "stages", "channels_first", 0, 256, 4),
    ("vit", 32, "norm", "tokens", 0, 64, 8),
    ("torchvision:resnet18", 64, "layer4", "channels_first", 0, 512, 2),
    ("torchvision:mobilenet_v3_small", 64, "features", "channels_first", 0, 576, 2),
    ("torchvision:swin_t", 64, "permute", "channels_first", 0, 768, 2),
    pytest.param("timm:resnet10t", 64, "layer4", "channels_first", 0, 512, 2, marks=TIMM),
    pytest.param("timm:lcnet_050", 64, "blocks", "channels_first", 0, 256, 2, marks=TIMM),
    pytest.param("timm:vit_tiny_patch16_224", 64, "norm", "tokens", 1, 192, 4, marks=TIMM),
    pytest.param(
        *("timm:vit_small_patch14_reg4_dinov2", 56, "norm", "tokens", 5, 384, 4), marks=TIMM
    ),
    pytest.param(
        *("timm:swin_tiny_patch4_window7_224", 64, "norm", "channels_last", 0, 768, 2), marks=TIMM
    ),
]


def backbone_of(name, size):
    return build_model(ModelConfig(name=name, image_size=size), num_classes=2).backbone


class Tokens(nn.Module):
    """Patches of 4x4 pixels as tokens behind a number of others; the answer is the first token."""

    def __init__(self, prefixes):
        super().__init__()
        self.others = nn.Parameter(torch.randn(1, prefixes, 12))
        self.patch = nn.Conv2d(3, 12, 4, stride=4)
        self.norm = nn.LayerNorm(12, elementwise_affine=False)

    def forward(self, images):
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        return self.norm(torch.cat([self.others.expand(len(tokens), -1, -1), tokens], dim=1))[:, 0]


class TinyVit(nn.Module):
    """torchvision's vision transformer, small."""

    def __init__(self):
        super().__init__()
        from torchvision.models import VisionTransformer

        self.net = VisionTransformer(32, 8, 1, 2, 16, 32)
        self.net.heads = nn.Identity()

    def forward(self, images):
        return self.net(images)


@pytest.mark.parametrize(("name", "size", "path", "layout", "prefixes", "channels", "side"), CASES)
def test_the_map_of_a_model_is_found(name, size, path, layout, prefixes, channels, side):
    backbone = backbone_of(name, size)
    found = find_feature_map(backbone, size, what=name)
    expected = path, layout, prefixes, channels, side
    assert (found.path, found.layout, found.prefixes, found.channels, found.side) == expected
    features = found.of(backbone, torch.rand(2, 3, size, size))
    assert features.shape == (2, channels, side, side) and features.requires_grad


def test_a_class_token_of_torchvisions_transformer_is_left_out():
    backbone = TinyVit()
    found = find_feature_map(backbone, 32, what="it")
    assert (found.path, found.prefixes, found.side) == ("net.encoder", 1, 4)


@pytest.mark.parametrize("prefixes", [0, 1, 2, 5])
def test_tokens_keep_their_places(prefixes):
    backbone = Tokens(prefixes)
    found = find_feature_map(backbone, 32, what="it")
    assert (found.path, found.prefixes, found.side) == ("norm", prefixes, 8)
    images = torch.rand(1, 3, 32, 32)
    before = found.of(backbone, images)
    images[:, :, 4:8, 20:24] += 1  # the patch of row 1, column 5
    changed = (found.of(backbone, images) - before).abs().amax(dim=(0, 1)) > 0
    assert changed.nonzero().tolist() == [[1, 5]]


def test_a_map_with_channels_last_keeps_its_places():
    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(dim=(1, 2))

    backbone = nn.Sequential(nn.Conv2d(3, 12, 4, stride=4), Last(), Mean())
    found = find_feature_map(backbone, 32, what="it")
    assert (found.path, found.layout, found.channels, found.side) == ("1", "channels_last", 12, 8)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.of(backbone, images), backbone[0](images))


def test_the_map_is_what_the_backbone_pools():
    backbone = backbone_of("resnet", 32).eval()
    images = torch.rand(2, 3, 32, 32)
    features = find_feature_map(backbone, 32, what="it").of(backbone, images)
    assert torch.allclose(features.mean(dim=(2, 3)), backbone(images), atol=1e-6)


def test_looking_leaves_no_trace():
    backbone = backbone_of("resnet", 32)
    backbone.train()
    backbone.blocks[0].eval()
    modes = [module.training for module in backbone.modules()]
    before = copy.deepcopy(backbone.state_dict())
    state = torch.get_rng_state()
    found = find_feature_map(backbone, 32, what="it")
    assert [module.training for module in backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    backbone.eval()
    found.of(backbone, torch.rand(1, 3, 32, 32))
    assert not any(m._forward_hooks for m in backbone.modules())
    after = backbone.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in backbone.parameters())


def test_a_failing_backbone_is_left_without_hooks():
    backbone = backbone_of("resnet", 32)
    found = find_feature_map(backbone, 32, what="it")
    with pytest.raises(RuntimeError):
        found.of(backbone, torch.rand(1, 5, 32, 32))
    assert not any(m._forward_hooks for m in backbone.modules())


def test_a_copy_of_a_backbone_gives_its_own_map():
    backbone = backbone_of("resnet", 32).eval()
    found, other = find_feature_map(backbone, 32, what="it"), copy.deepcopy(backbone)
    with torch.no_grad():
        other.stem[0].weight.zero_()
    images = torch.rand(1, 3, 32, 32)
    assert not torch.equal(found.of(backbone, images), found.of(other, images))


def test_evaluation_mode_ends_with_an_error_too():
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(ValueError, match="so"), evaluating(module):
        assert not module.training and not module[0].training
        raise ValueError("so")
    assert [module.training, module[0].training, module[1].training] == [True, True, False]


def test_what_stands_behind_the_map_is_named():
    backbone = backbone_of("torchvision:mobilenet_v3_small", 64)
    found = find_feature_map(backbone, 64, what="it")
    assert found.unused == ("classifier.0.weight", "classifier.0.bias")
    found.of(backbone, torch.rand(2, 3, 64, 64)).sum().backward()
    without = tuple(name for name, p in backbone.named_parameters() if p.grad is None)
    assert found.unused == without


def test_a_backbone_without_a_map_is_refused():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8))
    with pytest.raises(RecipeError, match="more than one pixel; found: none in net at 16x16"):
        find_feature_map(backbone, 16, what="net")


@pytest.mark.parametrize(
    "name",
    ["torchvision:resnet18", pytest.param("timm:swin_tiny_patch4_window7_224", marks=TIMM)],
)
def test_images_too_small_for_the_last_stage_are_refused(name):
    with pytest.raises(RecipeError, match=r"only heads may stand behind it.*model\.image_size"):
        find_feature_map(backbone_of(name, 32), 32, what=name)


def test_a_feature_map_holds_nothing_of_the_backbone():
    found = find_feature_map(backbone_of("resnet", 32), 32, what="it")
    assert found == FeatureMap("blocks", "channels_first", 0, 64, 8, ())
