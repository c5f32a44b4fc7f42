"""The zoo's benchmark: a dozen of its architectures, and the machinery that runs hundreds."""

import json
import sys
from pathlib import Path

import pytest
import torch
from export_models import small_cnn
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from architectures import Architecture, choose, every_architecture, smallest_image
from plants import plant
from pool import GIB, Limits, run
from randomize import images, randomize
from zoo import plan, read_rows
from zoo_row import Job, measure
from zoo_summary import RESNET50, gates, summarize
from zoo_table import to_markdown

SETTING = {"machine": "m", "python": "3", "versions": {"torch": "2"}, "command": "python zoo.py"}


@pytest.fixture(scope="module")
def zoo():
    return {str(architecture): architecture for architecture in every_architecture()}


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/shufflenet_v2_x0_5",
        "timm/convnext_zepto_rms",
        "timm/ese_vovnet19b_slim_dw",
        "timm/levit_128s",
        "timm/mobilenetv3_small_050",
        "timm/repvgg_a0",
        "timm/resnet10t",
        "timm/resnetv2_18",
        "timm/starnet_s050",
        "timm/test_mambaout",
        "timm/test_nfnet",
        "timm/test_vit",
    ],
)
def test_an_architecture_with_random_weights_is_simplified_and_proved(zoo, name):
    row = measure(Job(zoo[name]))
    assert row["status"] == "simplified", row
    assert row["dependence"] > 0.05 and row["scale"] > 0.1
    assert row["error"] < 1e-12 and row["trace_error"] < 1e-12
    assert row["after"]["dropouts"] == 0
    assert row["after"]["batchnorms"] == 0 or row["left"]


def test_a_planted_fold_is_caught_and_the_onnx_file_answers_alike(zoo):
    row = measure(Job(zoo["timm/test_efficientnet"], plant=True, onnx=True))
    assert row["plant"]["is_caught"] and row["plant"]["what"] == "eps = 1e-05 forgotten"
    assert row["onnx"]["problem"] == "" and row["onnx"]["scaled_error"] < 1e-4


def test_a_weight_moved_by_one_in_a_million_is_caught_where_there_is_no_batchnorm():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    randomize(model, images(8, 8, seed=0))
    planted = plant(model, (images(2, 8, seed=1),))
    assert planted.is_caught and planted.what == "a weight moved by 1e-06"


def test_randomize_changes_every_parameter_and_statistic_also_those_that_start_at_zero():
    model = small_cnn()
    nn.init.zeros_(model[1].weight)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    randomize(model, images(8, 16, seed=0))
    for name, value in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or (value != start[name]).all(), name
    assert not model.training and (model[1].running_var > 0).all()
    assert (model[1].weight < 0).any() or (model[5].weight < 0).any()


def test_a_deep_network_without_norms_keeps_unit_size_and_depends_on_its_input():
    layers = [layer for _ in range(40) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 64, 5))
    randomize(model, images(8, 8, seed=0))
    with torch.no_grad():
        first, second = model(images(2, 8, seed=1)), model(images(2, 8, seed=2))
    assert 0.1 < first.abs().max() < 100
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


def test_what_cannot_be_built_is_a_row_and_no_exception():
    row = measure(Job(Architecture("torchvision", "resnet", "resnet_of_nobody")))
    assert row["status"] == "crashed" and "resnet_of_nobody" in row["reason"]


def test_an_output_that_does_not_depend_on_the_input_proves_nothing(zoo, monkeypatch):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 2)

    monkeypatch.setattr("zoo_row.build", lambda architecture, size: Constant())
    row = measure(Job(zoo["timm/resnet18"]))
    assert row["status"] == "vacuous"


def test_nor_does_one_that_rounding_alone_moves(zoo, monkeypatch):
    class Chaos(nn.Module):
        def forward(self, x):
            return torch.sin(1e9 * x.flatten(1)[:, :2])

    monkeypatch.setattr("zoo_row.build", lambda architecture, size: Chaos())
    row = measure(Job(zoo["timm/resnet18"]))
    assert row["status"] == "vacuous" and row["dependence"] > 0.05 and row["tremble"] > 0.05


def test_the_smallest_image_leaves_no_last_map_of_one_pixel(zoo):
    assert smallest_image(zoo["timm/resnet10t"]) == 64
    assert smallest_image(zoo["timm/levit_128s"]) == 128  # its stride is 64
    assert smallest_image(zoo["timm/eva02_tiny_patch14_224"]) in (56, 64)


def test_the_zoo_has_every_torchvision_classifier_and_choose_takes_all_families(zoo):
    costs = {name: 5.0 + number / 1e4 for number, name in enumerate(zoo)}
    chosen = choose(list(zoo.values()), costs, per_family=4)
    timm = [a for a in chosen if a.library == "timm"]
    assert len(chosen) - len(timm) == len([name for name in zoo if name.startswith("torchvision")])
    assert len(timm) >= 300 and len({a.family for a in timm}) >= 60
    assert not any(a.name.startswith("test_") for a in timm)


def test_choose_prefers_other_kinds_and_smaller_ones_to_another_resolution():
    names = {"vit_a_224": 1, "vit_a_384": 1.1, "vit_b_224": 2, "eva_224": 3, "eva_huge": 500}
    members = [Architecture("timm", "vits", name) for name in names]
    costs = {f"timm/{name}": float(cost) for name, cost in names.items()}
    chosen = [a.name for a in choose(members, costs, per_family=4)]
    assert chosen == ["vit_a_224", "eva_224", "vit_b_224"]


def _row(name, family, status="simplified", **more):
    counts = {"nodes": 9, "parameters": 1000, "batchnorms": 2, "dropouts": 1}
    row = {"name": name, "family": family, "status": status, "size": 64, "dependence": 0.5}
    if status == "simplified":
        row |= {"before": counts, "after": {**counts, "batchnorms": 0, "nodes": 7}}
        row |= {"changed": {"fold_batchnorm": 2, "dead": 0}, "left": {"a | reason": 3}}
        row |= {"error": 2e-15, "trace_error": 0.0, "seconds": 1.5}
    return row | more


CAUGHT = {"what": "eps", "is_caught": True, "found": "1e-6 at bn"}
MISSED = {**CAUGHT, "is_caught": False}
SAME = {"problem": "", "scaled_error": 1e-6, "batchnorms": 0, "unnamed": []}


def test_the_summary_counts_what_ran_and_the_gates_name_what_is_missed():
    rows = [
        _row("timm/a", "timm/f", plant=CAUGHT, onnx=SAME),
        _row("timm/b", "timm/g", plant=MISSED, onnx={**SAME, "problem": "differs"}),
        _row("timm/c", "timm/g", "refused", reason="no"),
        _row("timm/d", "timm/g", "timed out", reason="slow"),
        _row(RESNET50, "torchvision/resnet", seconds=6.0),
    ]
    summary = summarize(rows)
    assert (summary.run, summary.timm, summary.timm_families) == (3, 3, 2)
    assert (summary.planted, summary.caught, summary.exported, summary.same) == (2, 1, 2, 1)
    assert summary.simplified == 2 / 3 and summary.resnet50_s == 6.0
    missed = {text for text, passed in gates(summary, families=None).items() if not passed}
    assert missed == {
        ">= 99% simplified",
        "every planted wrong fold is caught",
        "every ONNX file gives the same answers",
    }
    missed = {text for text, passed in gates(summary, families=2).items() if not passed}
    assert "ResNet-50 <= 5 s" in missed and ">= 300 timm architectures" in missed


def test_the_table_holds_every_architecture_and_every_reason():
    rows = [
        _row("timm/a", "timm/f", plant=CAUGHT, onnx=SAME),
        _row("timm/c", "timm/g", "refused", reason="found no"),
        _row("timm/d", "timm/g", "out of memory", reason="20 GiB"),
    ]
    text = to_markdown(rows, SETTING)
    assert "    python zoo.py" in text and "**50.0% of 2 simplified" in text
    assert (
        "| timm/a | 64 | simplified | 0.5 | 2 -> 0 | 1 | fold_batchnorm 2 | 3 (1) | 2e-15 |" in text
    )
    assert "## Refused\n\n* timm/c: found no" in text
    assert "## Not run: out of memory\n\n* timm/d: 20 GiB" in text
    assert "| 1 | a \\| reason | 3 | 1 | timm/a |" in text
    assert "| timm/f | timm/a | eps | yes | 1e-6 at bn |" in text


def test_a_run_resumes_behind_half_a_line_and_repeats_what_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == {}
    old, new = _row("timm/a", "timm/f", "crashed"), _row("timm/a", "timm/f")
    other = _row("timm/b", "timm/f", "crashed")
    path.write_text("\n".join(map(json.dumps, (old, new, other))) + '\n{"name": "timm/')
    assert read_rows(path) == {"timm/a": new, "timm/b": other}
    assert read_rows(path, again=["crashed"]) == {"timm/a": new}
    assert read_rows(path, again=["all"]) == {}


def test_the_plan_plants_and_exports_once_a_family_where_it_can_be_simplified():
    members = [Architecture("timm", "f", name) for name in ("large", "small", "middle")]
    costs = {"timm/small": 1.0, "timm/middle": 2.0, "timm/large": 3.0}
    small, middle, large = sorted(members, key=lambda a: costs[str(a)])
    jobs = plan(members, costs, {}, onnx=True)
    assert jobs == [Job(small, plant=True, onnx=True), Job(middle), Job(large)]

    refused = {"timm/small": _row("timm/small", "timm/f", "refused")}
    jobs = plan(members, costs, refused, onnx=False)
    assert jobs == [Job(middle, plant=True), Job(large)]

    done = {"timm/small": _row("timm/small", "timm/f", plant=CAUGHT)}
    assert plan(members, costs, done, onnx=False) == [Job(middle), Job(large)]
    assert plan(members, costs, done, onnx=True)[0] == Job(small, plant=True, onnx=True)


def test_a_job_that_dies_raises_hangs_or_swells_stops_no_other():
    jobs = [
        "1 + 1",
        "__import__('os')._exit(3)",
        "1 / 0",
        "__import__('time').sleep(60)",
        "[bytearray(b'x') * (700 << 20), __import__('time').sleep(60)]",
        "2 + 2",
    ]
    limits = Limits(seconds=3.0, bytes=0.5 * GIB)
    outcomes = dict(run(jobs, eval, workers=2, limits=limits))
    kinds = [outcomes[job].kind for job in jobs]
    assert kinds == ["done", "crashed", "crashed", "timed out", "out of memory", "done"]
    assert outcomes["1 + 1"].value == 2 and outcomes["2 + 2"].value == 4
    assert outcomes[jobs[1]].detail == "exit code 3"
    assert outcomes["1 / 0"].detail == "ZeroDivisionError: division by zero"


def test_a_large_job_waits_until_nothing_else_runs():
    work = "(lambda time: (time.time(), time.sleep(0.4), time.time()))(__import__('time'))"
    jobs = [work, work + " ", work + "  "]
    sizes = {jobs[0]: 0.4 * GIB, jobs[1]: 0.4 * GIB, jobs[2]: 0.8 * GIB}
    limits = Limits(seconds=30.0, bytes=GIB)
    outcomes = dict(run(jobs, eval, workers=2, limits=limits, estimate=sizes.__getitem__))
    (first, _, first_end), (second, _, second_end), (third, *_) = (
        outcomes[job].value for job in jobs
    )
    assert max(first, second) < min(first_end, second_end)
    assert third >= max(first_end, second_end)
