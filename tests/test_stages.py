import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.models.zoo import Classifier, ModelConfig, build_model
from edgereg.regularize.dropout import Dropout
from edgereg.regularize.placement import place
from edgereg.regularize.stages import freeze_stages, stages

# each model, its stages, and a parameter with the stage that it belongs to
KNOWN = {
    "resnet": (5, "backbone.blocks.1.shortcut.0.weight", 2),
    "convnet": (5, "backbone.stages.1.4.weight", 2),
    "vit": (6, "backbone.position", 0),
    "torchvision:resnet18": (10, "backbone.layer2.0.downsample.0.weight", 3),
    "torchvision:mobilenet_v3_small": (13, "backbone.classifier.0.weight", 11),
    "torchvision:densenet121": (11, "backbone.features.transition1.conv.weight", 3),
}


def model_of(name):
    return build_model(ModelConfig(name), num_classes=3)


@pytest.mark.parametrize("name", KNOWN)
def test_each_parameter_is_in_one_stage_from_the_stem_to_the_head(name):
    model = model_of(name)
    rows = stages(model)
    count, example, place_of_example = KNOWN[name]
    flat = [p for _, parameters in rows for p in parameters]
    assert [id(p) for p in flat] == [id(p) for p in model.parameters()], "the order is another"
    assert len(rows) == count and all(parameters for _, parameters in rows)
    assert {id(p) for p in rows[-1][1]} == {id(p) for p in model.head.parameters()}
    wanted = id(model.get_parameter(example))
    assert [n for n, (_, ps) in enumerate(rows) if wanted in map(id, ps)] == [place_of_example]


def test_an_unknown_backbone_is_cut_at_its_children():
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    backbone = nn.Sequential(inner, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rows = stages(Classifier(backbone, feature_dim=4, num_classes=2))
    assert [name for name, _ in rows] == [
        "backbone.0.0", "backbone.0.1", "backbone.0.3", "head"
    ]  # fmt: skip


def test_dropout_that_was_placed_is_no_stage():
    model = model_of("torchvision:resnet18")
    before = [name for name, _ in stages(model)]
    place(model, [Dropout(0.1, "stages"), Dropout(0.1, "head")])
    assert [name for name, _ in stages(model)] == before


@pytest.mark.parametrize("name", ["resnet", "vit", "torchvision:resnet18"])
def test_frozen_stages_stay_as_they_are_and_the_others_learn(name):
    model = model_of(name)
    rows = stages(model)
    freeze_stages(model, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(images).logsumexp(1).sum().backward()
    optimizer.step()

    paths = {id(p): path for path, p in model.named_parameters()}
    frozen = {paths[id(p)] for _, parameters in rows[:2] for p in parameters}
    modules = {path.rpartition(".")[0] for path in frozen}  # statistics, too
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(before[key], value)
    }
    assert not {key for key in moved if key.rpartition(".")[0] in modules}
    assert {paths[id(p)] for _, ps in rows[2:] for p in ps if p.ndim > 1} <= moved
    assert any("running_mean" in key for key in moved) == (name != "vit"), "in its stem alone"


def test_freezing_none_changes_nothing():
    model = model_of("resnet")
    freeze_stages(model, 0)
    assert all(p.requires_grad for p in model.parameters()) and not model.resting
    assert all(m.training for m in model.train().modules())


def test_all_but_the_head_can_be_frozen_and_no_more():
    model = model_of("torchvision:mobilenet_v3_small")
    freeze_stages(model, 12)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight", "head.bias"
    }  # fmt: skip
    assert not any(m.training for m in model.train().modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(RecipeError, match=r"frozen_stages: 13; the model has 12; .*stem, backbone"):
        freeze_stages(model, 13)
