import copy

import pytest
import torch
from export_models import randomized
from torch import nn
from torchvision import models

from edgereg.errors import RecipeError
from edgereg.models.families import FAMILIES, family_of
from edgereg.models.resnet import SmallResNet
from edgereg.models.vit import SmallViT
from edgereg.models.zoo import Classifier, ModelConfig, build_model
from edgereg.regularize.dropout import (
    DropBlock,
    Dropout,
    SpatialDropout,
    StochasticDepth,
    build_regularizers,
)
from edgereg.regularize.placement import place, places
from export.passes.simplify import simplify

CNN = {"head", "blocks", "residual"}
STAGED = CNN | {"stages", "last_stages"}
TOKENS = CNN | {"attention", "mlp"}
MAPS = {"blocks", "stages", "last_stages", "residual"}


def tiny_vit():
    vit = models.VisionTransformer(32, 8, 3, 4, 32, 64)
    vit.heads = nn.Identity()
    return vit, 32


def tiny_swin():
    swin = models.SwinTransformer([4, 4], 24, [1, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0)
    swin.head = nn.Identity()
    return swin, 48


def tiny_convnext():
    block = models.convnext.CNBlockConfig
    convnext = models.ConvNeXt([block(16, 32, 2), block(32, None, 1)])
    convnext.classifier[2] = nn.Identity()
    return convnext, 32


def tiny_vgg():
    vgg = models.VGG(models.vgg.make_layers([8, "M", 16, "M"], batch_norm=True), init_weights=False)
    vgg.classifier[0], vgg.classifier[3] = nn.Linear(16 * 49, 32), nn.Linear(32, 32)
    vgg.classifier[5] = vgg.classifier[6] = nn.Identity()  # as build_model leaves it
    return vgg, 32


def tiny_timm_vit(timm):
    kind = timm.models.vision_transformer.VisionTransformer
    return kind(32, 8, num_classes=0, embed_dim=32, depth=3, num_heads=4), 32


def tiny_timm_swin(timm):
    kind = timm.models.swin_transformer.SwinTransformer
    return kind(32, 4, num_classes=0, embed_dim=24, depths=(1, 2), num_heads=(2, 4)), 48


# a representative of each family: how it is made, the places it has, and the blocks with a shortcut
MODELS = {
    "edgereg.models.resnet.SmallResNet": ("resnet", STAGED, 3),
    "edgereg.models.convnet.ConvNet": ("convnet", STAGED - {"residual"}, 0),
    "edgereg.models.vit.SmallViT": ("vit", TOKENS | {"embedding"}, 4),
    "torchvision.models.resnet.ResNet": ("torchvision:resnet18", STAGED, 8),
    "torchvision.models.regnet.RegNet": ("torchvision:regnet_y_400mf", STAGED, 16),
    "torchvision.models.mobilenetv2.MobileNetV2": ("torchvision:mobilenet_v2", CNN, 10),
    "torchvision.models.mobilenetv3.MobileNetV3": ("torchvision:mobilenet_v3_small", CNN, 6),
    "torchvision.models.efficientnet.EfficientNet": ("torchvision:efficientnet_b0", STAGED, 9),
    "torchvision.models.convnext.ConvNeXt": (tiny_convnext, STAGED, 3),
    "torchvision.models.swin_transformer.SwinTransformer": (
        tiny_swin, TOKENS | {"stages", "last_stages"}, 3
    ),
    "torchvision.models.vision_transformer.VisionTransformer": (
        tiny_vit, TOKENS | {"embedding"}, 3
    ),
    "torchvision.models.vgg.VGG": (
        tiny_vgg, {"head", "stages", "last_stages", "mlp"}, 0
    ),
    "timm.models.resnet.ResNet": ("timm:resnet18", STAGED, 8),
    "timm.models.efficientnet.EfficientNet": ("timm:efficientnet_lite0", STAGED, 9),
    "timm.models.mobilenetv3.MobileNetV3": ("timm:mobilenetv3_small_050", STAGED, 7),
    "timm.models.convnext.ConvNeXt": ("timm:convnext_atto", STAGED | {"mlp"}, 12),
    "timm.models.swin_transformer.SwinTransformer": (
        tiny_timm_swin, TOKENS | {"stages", "last_stages"}, 3
    ),
    "timm.models.vision_transformer.VisionTransformer": (
        tiny_timm_vit, TOKENS | {"embedding"}, 3
    ),
}  # fmt: skip
each_family = pytest.mark.parametrize("family", MODELS)
each_with_branches = pytest.mark.parametrize("family", [f for f, m in MODELS.items() if m[2]])
_made = {}


def made(family):
    """Return a fresh copy of a family's representative, training, its weights random."""
    if family not in _made:
        make, *_ = MODELS[family]
        timm = None
        if family.startswith("timm"):
            timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
        if isinstance(make, str):
            model = build_model(ModelConfig(make), num_classes=3)
        else:
            backbone, dim = make(timm) if timm else make()
            model = Classifier(backbone, feature_dim=dim, num_classes=3)
        # as they are made, some branches end in a gain of zero, and some answers are all bias
        _made[family] = randomized(model).train()
    return copy.deepcopy(_made[family])


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def everywhere(model):
    """Return one dropout for each place, and stochastic depth."""
    chosen = [Dropout(0.5, name) for name in places(model) if name not in ("stages", "last_stages")]
    return chosen + [StochasticDepth(0.5)] * ("residual" in places(model))


def rates_of(model):
    """Return all rates in a model, by the module's name."""
    found = {}
    for path, module in model.named_modules():
        for name in ("p", "drop_prob", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                found[path, name] = getattr(module, name)
    return found


def test_each_family_has_a_representative():
    assert set(MODELS) == set(FAMILIES)


@each_family
def test_the_places_of_a_family_are_all_found(family):
    model, (_, expected, blocks) = made(family), MODELS[family]
    offered = places(model)
    assert family_of(model.backbone).maps == FAMILIES[family].maps
    assert set(offered) == expected
    assert blocks == len({site.block for site in offered.get("residual", ())})


@each_family
def test_no_parameters_name_changes_and_nothing_changes_in_evaluation(family):
    model, x = made(family), images()
    placed = copy.deepcopy(model)
    placement = place(placed, everywhere(placed))
    assert placement.dials and list(placed.state_dict()) == list(model.state_dict())
    placed.load_state_dict(model.state_dict())
    with torch.inference_mode():
        expected = model.eval()(x)
        assert torch.equal(placed.eval()(x), expected)
        assert torch.equal(copy.deepcopy(placed)(x), expected)


@each_family
def test_each_place_drops_there_and_nowhere_else(family):
    original = made(family)
    before = rates_of(original)
    for where, sites in places(original).items():
        model = copy.deepcopy(original)
        placement = place(model, [Dropout(0.25, where)])
        assert [dial.site for dial in placement.dials] == [site.path for site in sites]
        changed = {k: v for k, v in rates_of(model).items() if before.get(k, 0) != v}
        assert len(changed) == len(sites) and set(changed.values()) == {0.25}
        for path, _ in changed:  # at the site, or hung on it
            assert any(f"{path}.".startswith(f"{s.path.partition(':')[0]}.") for s in sites), path
        assert acts(model, placement), where


def acts(model, placement):
    """Say whether what was placed, and nothing else, makes a model answer at random in training."""
    own = {(id(dial.owner), dial.attribute) for dial in placement.dials}
    for path, name in rates_of(model):
        module = model.get_submodule(path)
        if (id(module), name) not in own:
            setattr(module, name, 0.0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = False
    torch.manual_seed(1)
    with torch.no_grad():
        x = images()
        is_random = not torch.equal(model(x), model(x))
        for dial in placement.dials:
            setattr(dial.owner, dial.attribute, 0.0)
        return is_random and torch.equal(model(x), model(x))


@each_with_branches
def test_a_block_without_its_residual_branches_is_its_shortcut(family):
    model = made(family)
    shortcuts = []

    def compare(block, inputs, output):
        x = inputs[0]
        if x.shape == output.shape and not getattr(block, "downsample", None):
            shortcuts.append(torch.equal(output, x) or torch.equal(output, x.relu()))

    for site in places(model)["blocks"]:
        model.get_submodule(site.path).register_forward_hook(compare)
    placement = place(model, [StochasticDepth(1 - 1e-9, rule="uniform")])
    model.eval()
    with torch.no_grad():
        model(images())
        assert shortcuts and not any(shortcuts), "the negative control: nothing is dropped yet"
        shortcuts.clear()
        for dial in placement.dials:
            dial.owner.train()
        model(images())
    with_shortcut = [s for s in shortcuts if s]
    assert with_shortcut and (len(with_shortcut) == len(shortcuts) or "mobilenet" in family)


@each_with_branches
def test_the_linear_rule_reaches_the_rate_in_the_last_block(family):
    model, (_, _, blocks) = made(family), MODELS[family]
    placement = place(model, [StochasticDepth(0.3)])
    rates = [dial.owner.p for dial in placement.dials]
    assert sorted(set(rates)) == pytest.approx([0.3 * n / blocks for n in range(1, blocks + 1)])
    assert rates == sorted(rates), "from the stem to the head"


def test_the_schedule_moves_the_rates():
    model = build_model(ModelConfig(), num_classes=3)
    placement = place(
        model, [DropBlock(0.4, block=3), Dropout(0.2, schedule="late"), StochasticDepth(0.3)]
    )

    def rates(share):
        placement.at(share)
        return [dial.owner.p for dial in placement.dials]

    assert [dial.site for dial in placement.dials] == [
        "backbone.blocks.1",
        "backbone.blocks.2",
        "dropout",
        *(f"backbone.blocks.{n}.second" for n in range(3)),
    ]
    assert rates(0.0) == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3])
    assert rates(0.25) == pytest.approx([0.1, 0.1, 0, 0.1, 0.2, 0.3])
    assert rates(1.0) == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.2, 0.3])


def test_a_place_holds_several_kinds_in_the_order_of_the_recipe():
    for model in (made("edgereg.models.resnet.SmallResNet"), made("edgereg.models.vit.SmallViT")):
        placement = place(model, [Dropout(0.1, "residual"), StochasticDepth(0.2)])
        kinds = [type(dial.owner).__name__ for dial in placement.dials]
        assert kinds == ["Dropout", "StochasticDepth"] * (len(kinds) // 2)
        modes = {type(m).__name__ for m in model.modules() if not m.training}
        assert not modes, "a new dropout is in the model's mode"


@pytest.mark.parametrize("kind", [SpatialDropout, DropBlock])
def test_what_drops_of_maps_goes_where_maps_are(kind):
    resnet, vit = made("edgereg.models.resnet.SmallResNet"), made("edgereg.models.vit.SmallViT")
    for where in places(resnet).keys() & MAPS:
        model = copy.deepcopy(resnet)
        placement = place(model, [kind(0.5, where, "constant")])
        assert acts(model, placement)
    with pytest.raises(RecipeError, match=r"for maps.*regularize\[0\].*\.where: head.*residual"):
        place(resnet, [kind(0.5, "head")])
    with pytest.raises(RecipeError, match=r"for maps.*where: residual, of SmallViT.*use dropout"):
        place(vit, [kind(0.5, "residual")])


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([{"dropout": {"rate": 0.1, "where": "attention"}}],
         r"\[0\]\.dropout\.where: attention, of SmallResNet; "
         "remedy: choose one of: head, blocks, stages, last_stages, residual"),
        ([{"dropout": {"rate": 0.1}}, {"stochastic_depth": {"rate": 0.1, "where": "head"}}],
         r"residual branches; found: regularize\[1\]\.stochastic_depth\.where: head.*: residual"),
        ([{"dropout": {"rate": 0.1}}, {"dropout": {"rate": 0.2}}],
         r"once; found: regularize\[1\]\.dropout\.where: head, a second time"),
    ],
)  # fmt: skip
def test_an_impossible_place_is_refused(steps, match):
    with pytest.raises(RecipeError, match=match):
        place(build_model(ModelConfig(), num_classes=3), build_regularizers(steps))


def test_an_unknown_architecture_has_its_head_alone():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert set(places(Classifier(backbone, feature_dim=4, num_classes=2))) == {"head"}


def test_a_librarys_own_rate_yields_to_the_recipes_where_it_names_the_place():
    model = build_model(ModelConfig("torchvision:efficientnet_b0"), num_classes=3)
    own = {m.p for m in model.modules() if type(m).__name__ == "StochasticDepth"}
    assert max(own) > 0.18 and model.dropout.p == 0.2
    place(model, [StochasticDepth(0.1)])
    used = [site.path for site in places(model)["residual"]]
    assert max(model.get_submodule(path).p for path in used) == pytest.approx(0.1)
    assert model.dropout.p == 0.2, "a place that the recipe does not name"


@pytest.mark.parametrize(
    "family",
    [
        "edgereg.models.resnet.SmallResNet",
        "edgereg.models.vit.SmallViT",
        "torchvision.models.resnet.ResNet",
        "torchvision.models.vision_transformer.VisionTransformer",
        "timm.models.vision_transformer.VisionTransformer",
    ],
)
def test_an_exported_model_has_no_dropout_left(family):
    model = made(family)
    chosen = everywhere(model)
    if FAMILIES[family].maps:
        chosen += [SpatialDropout(0.1, "stages"), DropBlock(0.1, "last_stages")]
    place(model, chosen)
    report = simplify(model.eval(), (images(),)).report
    assert report.before.dropouts > 0 and report.after.dropouts == 0
    assert report.model_error < 1e-11


@pytest.mark.parametrize("backbone", [SmallResNet(), SmallViT(image_size=32, patch_size=8)])
def test_a_placed_model_compiles_as_one_graph(backbone):
    model = Classifier(backbone, feature_dim=backbone.feature_dim, num_classes=3)
    chosen = everywhere(model)
    if isinstance(backbone, SmallResNet):
        chosen.append(DropBlock(0.1, "last_stages", "constant", block=3))
    place(model, chosen)
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    answers = []
    for call in (model, compiled):
        torch.manual_seed(0)
        answers.append(call(images()))
    assert torch.equal(*answers)
