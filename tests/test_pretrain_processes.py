"""Two gloo processes, each with two parts of a batch, take the steps of one that has them whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from edgereg.checkpoint import Checkpoint, save_checkpoint
from edgereg.models.zoo import build_model
from edgereg.recipe import recipe_from_json
from edgereg.train.distributed import World
from edgereg.train.pretrain import METHODS, Pretraining
from edgereg.train.step import Part, Stepper

SIZE, BATCH, PARTS, PROCESSES, STEPS = 64, 16, 2, 2, 2
EQUAL = ("simclr", "vicreg", "distill", "colorization")  # the others draw in each process by itself
MODEL = {"name": "resnet", "width": 4, "blocks": [1, 1]}


def images():
    """Return pictures in colour, and some in grey, which are not spread evenly over the parts."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(SIZE, 3, 4, 4, generator=generator)
    pictures = (torch.nn.functional.interpolate(coarse, (32, 32)) * 255).to(torch.uint8)
    pictures[[0, 1, 2, 9, 17, 18]] = pictures[[0, 1, 2, 9, 17, 18], :1]
    return pictures


def parts(step, world):
    """Return a process's parts; of one process, the unions of those of two."""
    batch = torch.arange(step * BATCH, (step + 1) * BATCH)
    share = batch.reshape(PROCESSES, PARTS, -1)  # as World.part cuts it
    mine = share[world.rank] if world.size > 1 else share.transpose(0, 1).reshape(PARTS, -1)
    return [Part(indices, images()[indices]) for indices in mine]


def work(world, folder):
    """Return each method's loss, step by step, and its state in the end."""
    found = {}
    for method in METHODS:
        recipe = recipe_from_json(
            {
                "method": method,
                "model": MODEL,
                "augment": [{"flip": {}}, {"crop": {"padding": 2}}],
                "batchnorm": {"sync": True},
                "distill": {"teacher": f"{folder}/teacher", "mixes": False},
            }
        )
        model = build_model(recipe.model, num_classes=1, seed=0)
        objective = Pretraining(model, sample=images(), size=SIZE, recipe=recipe).train()
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.05, momentum=0.9)
        take = Stepper(objective, optimizer, recipe, world)
        start = flat(objective)
        losses = [take(parts(n, world), epoch=0, step=n).loss for n in range(STEPS)]
        found[method] = losses, start, flat(objective), objective.state_dict()
    return found


def flat(objective):
    return torch.cat([p.detach().flatten() for p in objective.parameters()])


def in_process(number, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=PROCESSES
    )
    try:
        torch.save(work(World(number, PROCESSES), folder), f"{folder}/{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    recipe = recipe_from_json({"model": MODEL})
    backbone = build_model(recipe.model, num_classes=1, seed=1).backbone
    save_checkpoint(folder / "teacher", backbone, Checkpoint("encoder", recipe, (), {}, {}))
    mp.spawn(in_process, args=(str(folder),), nprocs=PROCESSES)
    both = [torch.load(folder / f"{number}.pt") for number in range(PROCESSES)]
    return work(World(), folder), both


@pytest.mark.parametrize("method", EQUAL)
def test_two_processes_take_the_steps_of_one(results, method):
    alone, both = results
    losses, start, end, _ = alone[method]
    for theirs in both:
        assert theirs[method][0] == pytest.approx(losses, rel=1e-5)
        assert (theirs[method][2] - end).norm() < 1e-3 * (end - start).norm()


@pytest.mark.parametrize("method", METHODS)
def test_banks_queues_and_statistics_stay_alike(results, method):
    _, both = results
    first, second = (found[method][3] for found in both)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_bank_takes_in_the_images_of_both_processes(results):
    _, _, _, state = results[1][0]["pirl"]
    fresh = Pretraining(
        build_model(recipe_from_json({"model": MODEL}).model, num_classes=1, seed=0),
        sample=images(),
        size=SIZE,
        recipe=recipe_from_json({"model": MODEL}),
    )
    moved = (state["method.bank.rows"] != fresh.method.bank.rows).any(dim=1)
    assert moved.nonzero().flatten().tolist() == list(range(STEPS * BATCH))
