"""Each method's loss in two gloo processes is that of one, and so is its gradient."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from edgereg.ssl.gather import gather, gather_with_gradient, mean_over_processes, rank
from edgereg.ssl.lejepa import lejepa_loss
from edgereg.ssl.memory_bank import MemoryBank
from edgereg.ssl.simclr import nt_xent
from edgereg.ssl.vicreg import VicRegConfig, vicreg_loss

BATCH, PROCESSES = 12, 2


def data():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, BATCH, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    slices = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return draw, weight, F.normalize(slices, dim=0)


def losses(first, second, slices):
    return {
        "simclr": nt_xent(first, second, temperature=0.5),
        "vicreg": vicreg_loss(first, second, VicRegConfig()),
        "lejepa": lejepa_loss(torch.stack([first, second]), slices, weight=0.05),
    }


def work(part):
    """Return each loss, its gradient, and the memory bank, for one part of the batch."""
    views, weight, slices = data()
    mine = slice(part * BATCH // PROCESSES, (part + 1) * BATCH // PROCESSES)
    views = views[:, mine] if dist.is_initialized() else views
    found = {}
    for name in ("simclr", "vicreg", "lejepa"):
        moved = weight.clone().requires_grad_()
        loss = losses(views[0] @ moved, views[1] @ moved, slices)[name]
        loss.backward()
        found[name] = mean_over_processes(loss), mean_over_processes(moved.grad)
    torch.manual_seed(0)
    bank = MemoryBank(30, 5)
    order = torch.arange(BATCH) * 2
    embeddings = F.normalize(views[0], dim=1).float()
    bank.update(order[mine] if dist.is_initialized() else order, embeddings)
    found["bank"] = (bank.rows,)
    return found


def in_process(number, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=PROCESSES
    )
    try:
        torch.save(work(number), f"{folder}/{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    mp.spawn(in_process, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{number}.pt") for number in range(PROCESSES)]


@pytest.mark.parametrize("name", ["simclr", "vicreg", "lejepa", "bank"])
def test_two_processes_come_to_what_one_comes_to(both, name):
    alone = work(0)[name]
    for found in both:
        for theirs, ours in zip(found[name], alone, strict=True):
            assert torch.allclose(theirs, ours, rtol=1e-9, atol=1e-12 if name != "bank" else 1e-7)


def test_the_parts_losses_alone_would_be_others():
    """The negative control: a batch cut in two has other negatives and other covariances."""
    views, weight, slices = data()
    whole = losses(views[0] @ weight, views[1] @ weight, slices)
    halves = [
        losses(views[0, part] @ weight, views[1, part] @ weight, slices)
        for part in (slice(0, 6), slice(6, 12))
    ]
    for name, value in whole.items():
        assert abs(value - sum(half[name] for half in halves) / 2) > 1e-3


def test_alone_nothing_is_gathered():
    values = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(values) is values
    assert torch.equal(gather(values), values) and not gather(values).requires_grad
    assert torch.equal(mean_over_processes(values), values)
    assert rank() == 0
