import copy
import itertools
import sys

import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.models.resnet import SmallResNet
from edgereg.models.zoo import MODELS, ModelConfig, build_model, check_input


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_turns_images_into_logits(name, size):
    model = build_model(ModelConfig(name, image_size=size), num_classes=7).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert model.backbone(images).shape == (2, model.feature_dim)
        logits = model(images)
    assert logits.shape == (2, 7) and logits.isfinite().all()
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_depend_on_the_seed_alone(name):
    states = []
    for seed in (4, 4, 5):
        before = torch.random.get_rng_state()
        model = build_model(ModelConfig(name), num_classes=3, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state()), "the global generator moved"
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        torch.rand(3)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [32, 224])
def test_batchnorm_follows_every_convolution_which_has_no_bias(name, size):
    model = build_model(ModelConfig(name, image_size=size), num_classes=3)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    followed = [
        (first, second)
        for row in model.modules()
        if isinstance(row, nn.Sequential)
        for first, second in itertools.pairwise(row)
        if isinstance(first, nn.Conv2d)
    ]
    assert convolutions and {id(c) for c in convolutions} == {id(c) for c, _ in followed}
    for convolution, norm in followed:
        assert isinstance(norm, nn.BatchNorm2d) and convolution.bias is None
        assert norm.num_features == convolution.out_channels


@pytest.mark.parametrize("side", [8, 11, 32])
def test_the_small_resnet_takes_the_patches_of_pirl(side):
    assert SmallResNet().eval()(torch.zeros(1, 3, side, side)).shape == (1, 64)


def test_a_torchvision_classifier_gets_our_head():
    config = ModelConfig("torchvision:mobilenet_v3_small")
    model = build_model(config, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert model.backbone(images).shape == (2, model.feature_dim) == (2, 1024)
        assert model(images).shape == (2, 7)
    outputs = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    assert outputs == [1024, 7], "the old head is still there"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnt", r"model\.name: 'resnt'; remedy: did you mean 'resnet'\?"),
        ("vitt", "did you mean 'vit'"),
        ("???", "choose one of: convnet, resnet, timm:NAME, torchvision:NAME, vit"),
        ("timm:", "choose one of|did you mean"),
        ("torchvision:mobilenet_v3_smal", "did you mean 'mobilenet_v3_small'"),
        ("torchvision:squeezenet1_1", "must end in a linear layer"),
    ],
)
def test_an_impossible_model_is_refused_and_the_nearest_named(name, match):
    with pytest.raises(RecipeError, match=match):
        build_model(ModelConfig(name), num_classes=3)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"image_size": 8}, r"model\.image_size: 8"),
        ({"image_size": 33}, r"model\.image_size: 33"),
        ({"image_size": 2048}, r"model\.image_size: 2048"),
        ({"width": -1}, r"model\.width: -1"),
        ({"blocks": (2, 0)}, r"model\.blocks: \(2, 0\)"),
        ({"name": "vit", "dim": 33}, r"model\.dim: 33"),
        ({"name": "vit", "depth": -1}, r"model\.depth: -1"),
        ({"name": "vit", "heads": -1}, r"model\.heads: -1"),
        ({"name": "vit", "width": 8}, r"only resnet.*model\.width of vit"),
        ({"depth": 8}, r"only vit.*model\.depth of resnet"),
        ({"name": "torchvision:resnet18", "blocks": (2, 2)}, r"model\.blocks of torchvision"),
    ],
)
def test_impossible_settings_are_named(settings, match):
    with pytest.raises(RecipeError, match=match):
        ModelConfig(**settings)


def test_a_transformer_needs_a_size_that_its_patches_divide():
    with pytest.raises(RecipeError, match=r"model\.image_size: 104"):
        build_model(ModelConfig("vit", image_size=104), num_classes=3)


def test_the_heads_of_a_transformer_divide_its_width():
    with pytest.raises(RecipeError, match=r"model\.dim: 64, model\.heads: 5"):
        build_model(ModelConfig("vit", heads=5), num_classes=3)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_at_rest(name):
    model = build_model(ModelConfig(name), num_classes=3).eval()
    model.apply(lambda m: m.train(not isinstance(m, nn.BatchNorm2d)) if not len(m._modules) else m)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), model(images))
    model.dropout.p = 0.5
    torch.manual_seed(0)
    assert not torch.equal(model(images), model(images))


def test_a_resnet_has_the_width_and_the_blocks_that_are_asked_for():
    model = build_model(ModelConfig(width=24, blocks=(2, 1, 3)), num_classes=3)
    outputs = [block.second[0].out_channels for block in model.backbone.blocks]
    assert outputs == [24, 24, 48, 96, 96, 96] and model.feature_dim == 96
    assert model.backbone.stage_ends == (1, 2, 5)


def test_a_transformer_has_the_size_that_is_asked_for():
    model = build_model(ModelConfig("vit", dim=48, depth=2, heads=3), num_classes=3)
    assert model.feature_dim == 48 and len(model.backbone.blocks) == 2
    assert model.backbone.blocks[0].attention.heads == 3


def test_the_dropout_before_torchvisions_head_is_before_ours():
    model = build_model(ModelConfig("torchvision:mobilenet_v2"), num_classes=7)
    rates = {path: m.p for path, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert rates == {"dropout": 0.2}
    model = build_model(ModelConfig("torchvision:resnet18"), num_classes=7)
    assert model.dropout.p == 0, "there was none"


def test_what_rests_stays_in_evaluation_mode_in_training_and_in_a_copy():
    model = build_model(ModelConfig(), num_classes=3)
    model.resting = frozenset({"backbone.stem.1"})
    for instance in (model, copy.deepcopy(model)):
        modes = {path for path, m in instance.train().named_modules() if not m.training}
        assert modes == {"backbone.stem.1"}
        assert all(m.training is False for m in instance.eval().modules())


def test_a_torchvision_transformer_refuses_images_that_its_patches_do_not_tile():
    with pytest.raises(RecipeError, match=r"images of this size; found: .*100x100"):
        build_model(ModelConfig("torchvision:vit_b_16", image_size=100), num_classes=3)


def test_a_timm_model_gets_our_head():
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    model = build_model(ModelConfig("timm:mobilenetv3_small_050"), num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert model.backbone(images).shape == (2, model.feature_dim) == (2, 1024)
        assert model(images).shape == (2, 7)


def test_a_timm_transformer_is_made_for_the_images():
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    config = ModelConfig("timm:vit_tiny_patch16_224", image_size=64)
    model = build_model(config, num_classes=7).eval()
    assert model.backbone.patch_embed.num_patches == 16
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "timm:vit_tiny_patch16_22",
            "timm must have the model.*did you mean 'vit_tiny_patch16_224'",
        ),
        ("timm:xcit_nano_12_p16_224", "made for images of this size; found: .*xcit_nano"),
        ("timm:levit_128s", "levit_128s does not take 40x40"),
    ],
)
def test_an_impossible_timm_model_is_refused(name, match):
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    with pytest.raises(RecipeError, match=match):
        build_model(ModelConfig(name, image_size=40), num_classes=3)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"pip install 'edgereg\[timm\]'"):
        build_model(ModelConfig("timm:vit_tiny_patch16_224"), num_classes=3)


def test_a_backbone_that_answers_with_a_map_is_refused():
    with pytest.raises(RecipeError, match=r"one vector; found: it turns it into \(1, 4, 30, 30\)"):
        check_input(nn.Conv2d(3, 4, 3), 32, what="it")
