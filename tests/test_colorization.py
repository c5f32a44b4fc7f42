import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from deploy.errors import BadInputError
from deploy.runtime.decode import decode
from edgereg.augment.chain import build_chain
from edgereg.augment.draws import Draws
from edgereg.errors import DataError, RecipeError
from edgereg.models.resnet import SmallResNet
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.report.colorization_grid import write_colorization_grid
from edgereg.ssl.ab_bins import bin_centres
from edgereg.ssl.colorization import Colorization, ColorizationConfig, is_coloured
from edgereg.ssl.lab import grey_of, lab_to_rgb, rgb_to_lab
from edgereg.ssl.method import Setup

TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")


def pictures(count, size=32, seed=0):
    """Return smooth coloured noise, (count, 3, size, size) uint8."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    return (smooth * 255).to(torch.uint8)


def floats(count, size=32, seed=0):
    return pictures(count, size, seed).float() / 255


def normalize(images):
    return (images - 0.5) / 0.25


def method(backbone=None, *, size=32, sample=None, steps=(), feature_dim=32, **options):
    torch.manual_seed(0)
    setup = Setup(
        backbone=backbone or SmallResNet(width=8),
        feature_dim=feature_dim,
        image_size=size,
        size=100,
        sample=pictures(8, size) if sample is None else sample,
        chain=build_chain(list(steps), (0.5, 0.5, 0.5), key="augment"),
        normalize=normalize,
    )
    return Colorization(setup, ColorizationConfig(**({"width": 16} | options)))


def views_of(model, images):
    indices = torch.arange(len(images))
    return model.views(images, lambda view: Draws(0, view, indices))


def loss_of(model, images):
    return model(views_of(model, images), torch.arange(len(images)))


class Fixed(nn.Module):
    """Answers with what it was given, whatever it is asked."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, features):
        return self.answers


def train(model, views, *, steps, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    indices = torch.arange(len(views[0]))
    for _ in range(steps):
        optimizer.zero_grad()
        model(views, indices).backward()
        optimizer.step()
        schedule.step()


def _reference_soft_encoding(ab, neighbours):
    """The paper's Z over all bins, for one colour."""
    squares = ((bin_centres().double() - ab.double()) ** 2).sum(dim=1)
    kept = squares.argsort()[:neighbours]
    z = torch.zeros(313, dtype=torch.float64)
    z[kept] = torch.exp(-squares[kept] / (2 * 5**2))
    return z / z.sum()


def _reference_loss(logits, ab, prior, *, neighbours, uniform):
    """Equations 2 to 4, pixel by pixel in float64."""
    weights = 1 / ((1 - uniform) * prior.double() + uniform / 313)
    weights = weights / (prior.double() * weights).sum()
    total, count = 0.0, 0
    for image, colours in zip(logits.double(), ab, strict=True):
        for answer, colour in zip(image.flatten(1).T, colours.flatten(1).T, strict=True):
            z = _reference_soft_encoding(colour, neighbours)
            log_answer = answer - answer.exp().sum().log()
            total += -(weights[z.argmax()] * (z * log_answer).sum()).item()
            count += 1
    return total / count


@pytest.mark.parametrize("neighbours", [5, 10])
def test_the_loss_is_the_papers(neighbours):
    model = method(size=16, neighbours=neighbours, rebalance=0.3)
    grey, ab = views_of(model, pictures(3, 16))
    logits = torch.randn(3, 313, 4, 4)
    model.decoder = Fixed(logits)
    found = model((grey, ab), torch.arange(3)).item()
    expected = _reference_loss(logits, ab, model.prior, neighbours=neighbours, uniform=0.3)
    assert found == pytest.approx(expected, rel=1e-5)
    other = _reference_loss(logits, ab, model.prior, neighbours=neighbours, uniform=0.9)
    assert abs(other - expected) > 0.01


def test_the_loss_of_a_uniform_answer_is_log_313():
    model = method(rebalance=1.0)
    model.decoder = Fixed(torch.zeros(4, 313, 8, 8))
    assert loss_of(model, pictures(4)).item() == pytest.approx(math.log(313), rel=1e-6)


def test_l2_is_half_the_sum_of_squares():
    model = method(loss="l2")
    grey, ab = views_of(model, pictures(4))
    answers = torch.randn(4, 2, 8, 8)
    model.decoder = Fixed(answers)
    expected = 0.5 * ((answers.double() - ab.double() / 110) ** 2).sum().item() / (4 * 8 * 8)
    assert model((grey, ab), torch.arange(4)).item() == pytest.approx(expected, rel=1e-5)


def test_the_views_are_the_lightness_and_every_fourth_pixels_colour():
    model, images = method(), pictures(4)
    grey, ab = views_of(model, images)
    lab = rgb_to_lab(images.float() / 255)
    shown = grey * 0.25 + 0.5
    assert (rgb_to_lab(shown)[:, 0] - lab[:, 0]).abs().max() < 1e-3
    assert (shown - shown[:, :1]).abs().max() < 1e-6
    assert ab.shape == (4, 2, 8, 8)
    assert (ab[:, :, 3, 5] - lab[:, 1:, 12, 20]).abs().max() < 1e-4


def test_the_recipes_chain_makes_the_view():
    images = pictures(4)
    grey, ab = views_of(method(steps=[{"flip": {"probability": 1.0}}]), images)
    expected_grey, expected_ab = views_of(method(), images.flip(3))
    assert torch.allclose(grey, expected_grey, atol=1e-5)
    assert torch.allclose(ab, expected_ab, atol=1e-3)


@pytest.mark.parametrize("loss", ["classification", "l2"])
def test_images_without_colour_are_left_out(loss):
    model = method(loss=loss).eval()  # BatchNorm would tie the images together
    images = pictures(4)
    images[1:3] = images[1:3, :1]
    assert is_coloured(views_of(model, images)[1]).tolist() == [True, False, False, True]
    without = loss_of(model, images[[0, 3]])
    assert loss_of(model, images).item() == pytest.approx(without.item(), rel=1e-5)
    counted = method(loss=loss, skip_grey=False).eval()
    assert abs(loss_of(counted, images).item() - without.item()) > 1e-3
    none = loss_of(model, images[1:3])
    none.backward()
    assert none.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("tint", [0, 2])
def test_a_data_set_without_colour_is_refused(tint):
    sample = pictures(6)[:, :1].repeat(1, 3, 1, 1).clamp(max=250)
    sample[:, 0] += tint
    with pytest.raises(DataError, match=r"images in colour.*found: 6 images.*all of them grey"):
        method(sample=sample)
    sample[4] = pictures(1)[0]
    method(sample=sample)


def test_the_prior_is_that_of_the_sample():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
    model = method(sample=red.expand(4, 3, 32, 32))
    assert model.prior.sum().item() == pytest.approx(1, abs=1e-6)
    assert bin_centres()[model.prior.argmax()].tolist() == [80, 70]  # red is (80.1, 67.2)


def test_one_image_is_learnt_by_heart():
    model, images = method(size=16, rebalance=1.0, width=32), pictures(1, 16)
    before = model.divergence(images.float() / 255).item()
    train(model, views_of(model, images), steps=250, lr=2e-2)
    after = model.divergence(images.float() / 255).item()
    assert before > 2 and after < 1e-2


def test_where_colour_is_uncertain_l2_answers_grey_and_classification_a_colour():
    """Half of the images are magenta, half green in four shades; their lightness is the same."""
    magenta, greens = (40, -30), [(-50, 30), (-30, 30), (-40, 10), (-40, 50)]
    colours = torch.tensor([magenta] * 4 + greens, dtype=torch.float32)
    assert (colours.mean(dim=0) == 0).all()
    lightness = 60 + 10 * torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    lab = torch.cat(
        [lightness.expand(8, 1, 16, 16), colours[:, :, None, None].expand(8, 2, 16, 16)], 1
    )
    images = lab_to_rgb(lab)
    assert (rgb_to_lab(images) - lab).abs().max() < 0.01, "the colours can be shown"
    answers = {}
    for loss in ("l2", "classification"):
        model = method(size=16, loss=loss, rebalance=1.0, sample=(images * 255).to(torch.uint8))
        grey = normalize(grey_of(images[:1])).expand(8, 3, 16, 16)
        train(model, (grey, lab[:, 1:, ::4, ::4]), steps=120, lr=1e-2)
        answers[loss] = model.predict_ab(images[:1]).mean(dim=(0, 2, 3))
    assert answers["l2"].norm() < 3
    assert (answers["classification"] - torch.tensor(magenta)).norm() < 12
    assert answers["classification"].norm() > 35


@pytest.mark.parametrize("loss", ["classification", "l2"])
def test_predicted_colours_stand_where_the_true_ones_were_taken(loss):
    model = method(loss=loss)
    ab = 40 * torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    if loss == "l2":
        answers = ab / 110
    else:
        bins, _ = model.bins.encode(ab)
        answers = torch.full((2, 313, 8, 8), -1e4).scatter(1, bins[:, :1], 0.0)
        ab = model.bins.centres[bins[:, 0]].movedim(-1, 1)
    model.decoder = Fixed(answers)
    found = model.predict_ab(floats(2))
    assert found.shape == (2, 2, 32, 32)
    assert (found[:, :, ::4, ::4] - ab).abs().max() < 1e-3
    middle = (ab[:, :, 1, 1] + ab[:, :, 1, 2]) / 2
    assert (found[:, :, 4, 6] - middle).abs().max() < 1e-3
    assert (found[:, :, 30, 31] - found[:, :, 30, 28]).abs().max() < 1e-3  # beyond the last one


def test_the_temperature_sharpens_what_is_shown():
    logits, chroma = torch.randn(2, 313, 8, 8), []
    for temperature in (0.01, 0.38, 1.0):
        model = method(temperature=temperature)
        model.decoder = Fixed(logits)
        shown = model.predict_ab(floats(2))[:, :, ::4, ::4]
        shares = (logits / temperature).softmax(dim=1)
        mean = torch.einsum("bqhw,qc->bchw", shares, bin_centres())
        assert (shown - mean).abs().max() < 1e-3
        chroma.append(shown.norm(dim=1).mean().item())
    assert chroma == sorted(chroma, reverse=True) and chroma[0] > 2 * chroma[2]


def test_a_painted_image_keeps_its_lightness_and_has_the_models_colours():
    model, images = method(), floats(2)
    painted, lab = model.paint(images), rgb_to_lab(images)
    ab = model.predict_ab(images)
    shown = rgb_to_lab(painted)
    inside = ((painted > 0.001) & (painted < 0.999)).all(dim=1)
    assert inside.float().mean() > 0.5
    assert (shown[:, 0] - lab[:, 0])[inside].abs().max() < 0.01
    assert (shown[:, 1:] - ab).movedim(1, -1)[inside].abs().max() < 0.01


def test_only_the_lightness_is_looked_at():
    model, images = method(), floats(2)
    assert torch.allclose(model.predict_ab(images), model.predict_ab(grey_of(images)), atol=1e-2)
    assert not torch.allclose(model.predict_ab(images), model.predict_ab(images.flip(3)), atol=1e-2)


def test_predicting_changes_nothing():
    model = method().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.paint(floats(2))
    model.divergence(floats(2))
    assert model.training and model.backbone.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_perfect_answer_has_no_divergence():
    model, images = method(), floats(2)
    bins, shares = model.bins.encode(rgb_to_lab(images)[:, 1:, ::4, ::4])
    model.decoder = Fixed(torch.full((2, 313, 8, 8), -1e4).scatter(1, bins, shares.log()))
    assert model.divergence(images).abs().max() < 1e-5
    model.decoder = Fixed(torch.zeros(2, 313, 8, 8))
    assert (model.divergence(images) > 3).all()
    assert method(loss="l2").divergence(images) is None


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet", 32),
        ("convnet", 32),
        ("vit", 32),
        ("torchvision:resnet18", 64),
        ("torchvision:mobilenet_v3_small", 64),
        pytest.param("timm:lcnet_050", 64, marks=TIMM),
        pytest.param("timm:vit_tiny_patch16_224", 64, marks=TIMM),
    ],
)
def test_backbones_of_all_kinds_learn(name, size):
    built = build_model(ModelConfig(name=name, image_size=size), num_classes=2)
    model = method(built.backbone, size=size, feature_dim=built.feature_dim)
    loss_of(model, pictures(4, size)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert model.has_unused_parameters == bool(without)
    assert all(name.startswith("backbone.") for name in without) and len(without) <= 2
    first = next(model.backbone.parameters())
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize(("size", "doublings"), [(32, 0), (36, 0), (64, 0), (96, 3)])
def test_the_decoder_answers_at_a_quarter_of_the_resolution(size, doublings):
    built = build_model(ModelConfig(name="resnet", image_size=size), num_classes=2)
    model = method(built.backbone, size=size)
    grey, ab = views_of(model, pictures(2, size))
    seen = []
    model.decoder.register_forward_hook(lambda module, x, y: seen.append((x[0].shape, y.shape)))
    model((grey, ab), torch.arange(2))
    ((came, went),) = seen
    assert went == (2, 313, size // 4, size // 4) and ab.shape[2:] == went[2:]
    assert sum(isinstance(layer, nn.Upsample) for layer in model.decoder) == doublings
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.decoder) == max(2, doublings) + 1
    assert came[2] * 2**doublings == size // 4


@pytest.mark.parametrize("loss", ["classification", "l2"])
def test_the_loss_is_computed_in_float32_under_autocast(loss):
    model, images = method(loss=loss), pictures(4)
    views = views_of(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(views, torch.arange(4))
    half.backward()
    assert half.dtype == torch.float32 and half.isfinite()
    assert half.item() == pytest.approx(model(views, torch.arange(4)).item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_state_holds_the_prior_and_the_backbone_nothing_of_the_method():
    backbone = SmallResNet(width=8)
    names = list(backbone.state_dict())
    model = method(backbone)
    loss_of(model, pictures(4)).backward()
    assert list(backbone.state_dict()) == names
    assert not any(m._forward_hooks for m in backbone.modules())
    assert "prior" in model.state_dict() and "prior" not in dict(model.named_parameters())
    other = method(sample=pictures(8, seed=5))
    assert not torch.equal(other.prior, model.prior)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.prior, model.prior)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", "huber"),
        ("neighbours", 7),
        ("rebalance", 0),
        ("rebalance", 1.5),
        ("temperature", 0),
        ("width", 0),
    ],
)
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"colorization\.{key}: {value}"):
        ColorizationConfig(**{key: value})


def test_the_grid_shows_grey_the_models_and_the_true_colours(tmp_path):
    model, images = method(), pictures(10)
    out = tmp_path / "grid.png"
    result = write_colorization_grid(model, images, out)
    page = decode(out.read_bytes(), name="grid.png").astype(int)

    def tile(block, row, place):
        top, left = 38 + block * (3 * 100 + 16) + row * 100, 72 + place * 100
        return page[top : top + 96 : 3, left : left + 96 : 3]

    def pixels(rgb):
        return (rgb * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    truth = images.float() / 255
    for number, (block, place) in {0: (0, 0), 7: (0, 7), 9: (1, 1)}.items():
        rows = (grey_of(truth), model.paint(truth), truth)
        for row, expected in enumerate(rows):
            assert np.abs(tile(block, row, place) - pixels(expected[number])).max() <= 1
    assert np.abs(tile(0, 1, 0) - tile(0, 2, 0)).max() > 10
    assert result.images == 10 and result.path == out
    true_chroma = rgb_to_lab(truth)[:, 1:].norm(dim=1).mean().item()
    assert result.true_chroma == pytest.approx(true_chroma, rel=1e-5)
    assert result.to_json() == {
        "colorization": str(out),
        "images": 10,
        "chroma": pytest.approx(model.predict_ab(truth).norm(dim=1).mean().item(), rel=1e-5),
        "true_chroma": result.true_chroma,
        "kl_nats": pytest.approx(model.divergence(truth).mean().item(), rel=1e-5),
    }
    with pytest.raises(BadInputError, match="a picture is written to a new file"):
        write_colorization_grid(model, images, out)
    again = write_colorization_grid(method(loss="l2"), images, out, force=True)
    assert again.divergence is None
