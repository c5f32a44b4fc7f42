import torch

from edgereg.augment.draws import Draws
from edgereg.augment.sometimes import in_some, move_some

DRAWS = Draws(0, 0, torch.arange(400))
IMAGES = torch.rand(400, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def negative(images, draws):
    return -images - draws.uniform("x")[:, :, None, None]


def test_a_chosen_sample_is_what_it_would_be_if_all_were_chosen():
    some, every = (in_some(IMAGES, DRAWS, p, negative) for p in (0.3, 1.0))
    changed = (some < 0).flatten(1).all(dim=1)
    assert 90 < changed.sum() < 150
    assert torch.equal(some[changed], every[changed])
    assert torch.equal(some[~changed], IMAGES[~changed])


def test_the_change_sees_the_chosen_samples_alone():
    seen = []
    in_some(IMAGES, DRAWS, 0.3, lambda images, draws: seen.append((images, draws)) or images)
    ((images, draws),) = seen
    assert len(images) == len(draws) < 150
    assert torch.equal(images, IMAGES[draws.indices])


def test_a_change_of_none_is_not_called():
    def fail(images, draws):
        raise AssertionError

    assert in_some(IMAGES, DRAWS, 0.0, fail) is IMAGES


def test_the_input_is_left_alone():
    before = IMAGES.clone()
    in_some(IMAGES, DRAWS, 0.5, lambda images, _: images.zero_())
    assert torch.equal(IMAGES, before)


def test_the_same_samples_are_chosen_in_any_batch():
    whole = in_some(IMAGES, DRAWS, 0.5, negative)
    for one in range(20):
        alone = in_some(IMAGES[one : one + 1], DRAWS.of(torch.tensor([one])), 0.5, negative)
        assert torch.equal(alone[0], whole[one])


def test_some_matrices_become_those_of_no_move():
    matrices = torch.full((400, 3, 3), 2.0)
    some = move_some(matrices, DRAWS, 0.25)
    still = (some == torch.eye(3)).flatten(1).all(dim=1)
    assert 260 < still.sum() < 340 and (some[~still] == 2).all()
    assert move_some(matrices, DRAWS, 1.0) is matrices
