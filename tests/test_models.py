import itertools

import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.models.resnet import SmallResNet
from edgereg.models.zoo import MODELS, ModelConfig, build_model


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
        ("???", "choose one of: resnet, torchvision:NAME, vit"),
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
        ({"dropout": 1.0}, r"model\.dropout: 1\.0"),
        ({"dropout": -0.1}, r"model\.dropout: -0\.1"),
        ({"image_size": 8}, r"model\.image_size: 8"),
        ({"image_size": 33}, r"model\.image_size: 33"),
        ({"image_size": 2048}, r"model\.image_size: 2048"),
    ],
)
def test_impossible_settings_are_named(settings, match):
    with pytest.raises(RecipeError, match=match):
        ModelConfig(**settings)


def test_a_transformer_needs_a_size_that_its_patches_divide():
    with pytest.raises(RecipeError, match=r"model\.image_size: 104"):
        build_model(ModelConfig("vit", image_size=104), num_classes=3)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_acts_in_training_only(name):
    model = build_model(ModelConfig(name, dropout=0.5), num_classes=3).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert torch.equal(model(images), model(images))
    model.dropout.train()
    assert not torch.equal(model(images), model(images))
