import dataclasses
import time

import pytest
from board_trees import CPU0, INA, OC, ORIN_GPU, desktop, orin, write
from deploy_bundle import write_small_bundle
from test_bench import CountingRunner

from deploy.board.power import Rail
from deploy.board.state import BoardState, read_state
from deploy.measure.bench import bench
from deploy.measure.energy import measure_energy
from deploy.measure.monitor import Monitor, judge_states, watch_idle


class MeddlingRunner(CountingRunner):
    """Changes the board's files when it is called for the n-th time."""

    def __init__(self, bundle, root, files, *, at):
        super().__init__(bundle)
        self._change, self._at = lambda: write(root, files), at

    def __call__(self, batch):
        if self.calls == self._at:
            self._change()
        return super().__call__(batch)


def run_on_board(tmp_path, files, *, at=10):
    bundle, root = write_small_bundle(tmp_path / "bundle"), orin(tmp_path / "board")
    runner = MeddlingRunner(bundle, root, files, at=at)
    return bench(bundle, runner, count=40, warmup=5, root=root)


def states_of(root, changes):
    """Readings after each change of files, a second apart."""
    return [read_state(write(root, files), time_s=float(i)) for i, files in enumerate(changes)]


def test_a_run_on_a_board_that_keeps_its_pace_is_valid(tmp_path):
    result = run_on_board(tmp_path, {})
    assert result.validity.verdict == "valid"
    assert len(result.states) >= 2 and result.states[0].power_mw == 5000.0


ALL_CORES = {
    f"{CPU0}/{name}".replace("cpu0", f"cpu{i}"): 729600
    for i in range(6)
    for name in ("scaling_cur_freq", "cpuinfo_cur_freq")
}
INVALID = {
    "the GPU's clock falls": (
        {f"{ORIN_GPU}/cur_freq": 612000000},
        "the clock of 17000000.gpu fell from 1020 to 612 MHz",
    ),
    "the CPU's clock falls": (ALL_CORES, "the clock of the CPU fell from 1728 to 730 MHz"),
    "the GPU's limit falls": (
        {f"{ORIN_GPU}/max_freq": 918000000},
        "the limit of 17000000.gpu fell from 1020 to 918 MHz",
    ),
    "the supply is too weak": (
        {f"{OC}/oc1_event_cnt": 3},
        "3 throttle events oc1 (the supply's voltage fell), the first seen",
    ),
    "it grows too hot": (
        {"sys/class/thermal/thermal_zone1/temp": 96000},
        "gpu-thermal ran away, from 47.2 to 96.0",
    ),
    "it grows hot too fast": (
        {"sys/class/thermal/thermal_zone1/temp": 78000},
        "gpu-thermal ran away, from 47.2 to 78.0",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_run_in_which_the_board_changed_is_invalid_and_says_why(tmp_path, name):
    files, reason = INVALID[name]
    result = run_on_board(tmp_path, files)
    assert result.validity.verdict == "invalid"
    (found,) = result.validity.reasons
    assert found.startswith(reason)


@pytest.mark.parametrize("name", [name for name in INVALID if name != "it grows too hot"])
def test_what_happened_before_the_timed_images_does_not_count(tmp_path, name):
    result = run_on_board(tmp_path, INVALID[name][0], at=2)  # in the warm-up
    assert result.validity.verdict == "valid"


def test_a_dip_in_the_middle_is_seen_and_one_reading_is_not_a_dip(tmp_path):
    low, high = ({f"{ORIN_GPU}/cur_freq": hz} for hz in (600_000_000, 1_020_000_000))
    root = orin(tmp_path)
    assert judge_states(states_of(root, [high] * 3 + [low] * 3 + [high] * 3)).reasons
    assert not judge_states(states_of(root, [high] * 4 + [low] + [high] * 4)).reasons


def test_heat_is_judged_by_what_it_reaches_and_by_how_much_it_rises(tmp_path):
    zone = "sys/class/thermal/thermal_zone1/temp"
    warm, hot, hotter = ({zone: celsius * 1000} for celsius in (80, 94, 95))
    assert not judge_states(states_of(orin(tmp_path), [warm, hot])).reasons
    assert judge_states(states_of(orin(tmp_path), [warm, hotter, warm])).reasons


def test_a_limit_that_once_could_not_be_read_has_not_fallen(tmp_path):
    root, limit = orin(tmp_path), f"{ORIN_GPU}/max_freq"
    assert not judge_states(states_of(root, [{}, {limit: None}, {limit: 1020000000}])).reasons


def test_a_gpu_that_does_nothing_may_slow_down(tmp_path):
    idle = {f"{ORIN_GPU}/device/load": 0}
    fast, slow = ({f"{ORIN_GPU}/cur_freq": hz, **idle} for hz in (1_020_000_000, 306_000_000))
    assert not judge_states(states_of(orin(tmp_path), [fast, slow, slow])).reasons


def test_one_core_that_slows_down_while_another_works_is_no_fault(tmp_path):
    slow = {f"{CPU0}/{name}": 729600 for name in ("scaling_cur_freq", "cpuinfo_cur_freq")}
    assert not judge_states(states_of(orin(tmp_path), [{}, slow, slow])).reasons


def test_where_nothing_can_be_watched_the_run_is_neither(tmp_path):
    validity = judge_states(states_of(tmp_path, [{}, {}]))
    assert validity.verdict == "not watched" and "not watched" in str(validity)
    assert judge_states(states_of(desktop(tmp_path), [{}, {}])).verdict == "valid"


def test_a_monitor_reads_before_during_and_after(tmp_path):
    with Monitor(orin(tmp_path), interval_s=0.01) as monitor:
        time.sleep(0.1)
    times = [state.time_s for state in monitor.states]
    assert len(times) >= 4 and times == sorted(times)
    count = len(monitor.states)
    time.sleep(0.03)
    assert len(monitor.states) == count  # the thread has ended


def test_a_monitor_of_nothing_starts_no_thread(tmp_path):
    with Monitor(tmp_path, interval_s=0.001) as monitor:
        time.sleep(0.02)
    assert len(monitor.states) == 2


def powered(*power_mw, step_s=1.0):
    blank = BoardState(0.0, {}, (), (), {})
    return [
        dataclasses.replace(blank, time_s=i * step_s, rails=(Rail("VDD_IN", mw),))
        for i, mw in enumerate(power_mw)
    ]


def test_the_energy_of_an_image_is_the_area_above_the_idle_power():
    energy = measure_energy(powered(4000, 4000), powered(4000, 10000, 10000), images=8)
    assert energy.idle_mw == 4000 and energy.run_mw == pytest.approx(8500)
    assert energy.joules_per_image == pytest.approx((6 / 2 + 6) / 8)
    assert "mJ per image" in str(energy) and energy.readings == 3


def test_energy_does_not_depend_on_how_often_it_is_read():
    coarse = measure_energy(powered(4000, 4000), powered(9000, 9000), images=10)
    fine = measure_energy(powered(4000, 4000), powered(*[9000] * 11, step_s=0.1), images=10)
    assert coarse.joules_per_image == pytest.approx(fine.joules_per_image)


@pytest.mark.parametrize(("idle", "run"), [((), (5000, 5000)), ((4000, 4000), ()), ((1,), (1, 2))])
def test_without_power_there_is_no_energy(idle, run):
    assert measure_energy(powered(*idle), powered(*run), images=1) is None


def test_a_run_on_a_board_with_a_power_monitor_has_an_energy(tmp_path):
    bundle, root = write_small_bundle(tmp_path / "bundle"), orin(tmp_path / "board")
    write(root, {f"{INA}/curr1_input": 800})  # 4 W when idle; 6 W from the first image on
    runner = MeddlingRunner(bundle, root, {f"{INA}/curr1_input": 1200}, at=0)
    result = bench(bundle, runner, count=40, warmup=5, idle_s=0.25, root=root)
    assert (result.energy.idle_mw, result.energy.run_mw) == (
        pytest.approx(4000),
        pytest.approx(6000),
    )
    seconds = result.states[-1].time_s - result.states[0].time_s
    assert result.energy.joules_per_image == pytest.approx(2.0 * seconds / 40)


def test_nobody_waits_for_idleness_where_no_power_is_measured(tmp_path):
    started = time.perf_counter()
    assert watch_idle(desktop(tmp_path), duration_s=60.0) == ()
    assert time.perf_counter() - started < 1.0
