import time

import pytest
from board_trees import CPU0, INA, OC, ORIN_GPU, desktop, orin, thor, write

from deploy.board.clocks import read_clocks
from deploy.board.files import natural_order, read_int, read_text
from deploy.board.identity import board_model, is_jetson, l4t_version, power_mode
from deploy.board.power import Rail, read_rails, throttle_events, total_power_mw
from deploy.board.releases import RELEASES, find_release, is_version_of
from deploy.board.state import read_state, temperatures


def test_a_board_says_its_name_without_the_nul_at_its_end(tmp_path):
    root = orin(tmp_path)
    assert board_model(root) == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (is_jetson(root), l4t_version(root)) == (True, "36.4.3")


def test_a_desktop_is_no_jetson_and_has_nothing_to_say(tmp_path):
    root = desktop(tmp_path)
    assert (is_jetson(root), board_model(root), l4t_version(root)) == (False, None, None)
    assert power_mode(root) is None and read_rails(root) == ()


@pytest.mark.parametrize("text", ["", "R36", "# R36 (release), REVISION: x", "\0\0"])
def test_a_release_file_that_names_no_version_has_none(tmp_path, text):
    assert l4t_version(write(tmp_path, {"etc/nv_tegra_release": text})) is None


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("35.6.0", "5"),
        ("36.3.0", "6.0"),
        ("36.4.0", "6.1"),
        ("36.4.3", "6.2"),
        ("36.5.2", "6.2"),
        ("38.2.0", "7.0"),
        ("38.4.0", "7.1"),
        ("39.2.1", "7.2"),
    ],
)
def test_each_l4t_belongs_to_its_jetpack(l4t, jetpack):
    assert find_release(l4t).name == jetpack


@pytest.mark.parametrize("l4t", ["3.6", "360.4", "36.40", "40.1.0"])
def test_an_unknown_l4t_belongs_to_none(l4t):
    assert find_release(l4t) is None


def test_a_version_is_compared_number_by_number():
    assert is_version_of("10.3.0.30", "10.3.0") and is_version_of("10.3.0", "10.3.0")
    assert not is_version_of("10.30.0", "10.3") and not is_version_of("10", "10.3")
    assert all(release.python and release.cuda and release.tensorrt for release in RELEASES)


def test_the_power_mode_is_named_and_the_fastest_is_not_the_highest_number(tmp_path):
    mode = power_mode(orin(tmp_path))
    assert str(mode) == "MAXN_SUPER (mode 2)" and mode.unconstrained == 2
    write(
        tmp_path,
        {"etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=50W >"},
    )
    assert power_mode(tmp_path).unconstrained == 0
    assert str(power_mode(tmp_path)) == "mode 2"


def test_rails_are_read_but_for_unconnected_ones_and_the_sum(tmp_path):
    rails = read_rails(orin(tmp_path))
    assert rails == (Rail("VDD_IN", 5000.0), Rail("VDD_CPU_GPU_CV", 1000.0))
    assert total_power_mw(rails) == 5000.0


def test_the_total_of_a_thor_is_its_input(tmp_path):
    rails = read_rails(thor(tmp_path))
    assert [rail.name for rail in rails] == ["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN"]
    assert total_power_mw(rails) == 31500.0


@pytest.mark.parametrize(
    ("rails", "total"),
    [
        ({}, None),
        ({"VDD_GPU_SOC": 3000, "VDD_CPU_CV": 1000, "VIN_SYS_5V0": 4000}, 8000),
        ({"VDD_GPU_SOC": 3000, "VIN_SYS_5V0": 4000, "VDDQ_VDD2_1V8AO": 900}, 7000),
        ({"POM_5V_IN": 4000, "POM_5V_GPU": 900}, 4000),
        ({"GPU": 1, "SYSTEM_POWER": 12}, 12),
    ],
)
def test_the_total_is_the_feeding_rail_or_the_sum_of_those_apart(rails, total):
    assert total_power_mw([Rail(name, mw) for name, mw in rails.items()]) == total


def test_throttle_events_are_counted_by_alarm_and_by_monitor(tmp_path):
    root = write(orin(tmp_path), {f"{OC}/oc3_event_cnt": 37})
    assert throttle_events(root) == {"oc1": 0, "oc2": 0, "oc3": 37}
    write(root, {"sys/class/hwmon/hwmon5/oc3_event_cnt": 2})
    assert throttle_events(root)["hwmon5/oc3"] == 2


def test_a_clock_is_what_the_hardware_says_not_what_was_asked(tmp_path):
    root = write(orin(tmp_path), {f"{CPU0}/cpuinfo_cur_freq": 729600})
    cpu0, *_, gpu = read_clocks(root)
    assert (cpu0.name, cpu0.current_hz, cpu0.requested_hz) == ("cpu0", 729_600_000, 1_728_000_000)
    assert (gpu.name, gpu.limit_hz, gpu.max_hz, gpu.load) == (
        "17000000.gpu",
        *[1_020_000_000] * 2,
        0.9,
    )
    assert [clock.name for clock in read_clocks(thor(tmp_path))][-1] == "gpu-gpc-0"


def test_where_the_hardware_clock_is_roots_alone_the_governors_is_taken(tmp_path):
    (clock,) = read_clocks(desktop(tmp_path))
    assert clock.current_hz == clock.requested_hz == 2_100_000_000 and clock.load is None


def test_a_zone_that_is_off_is_left_out(tmp_path):
    zones = temperatures(write(orin(tmp_path), {"sys/class/thermal/thermal_zone3/temp": -256000}))
    assert zones == {"cpu-thermal": 48.5, "gpu-thermal": 47.25, "tj-thermal": 49.125}


def test_zones_of_one_name_are_kept_apart(tmp_path):
    zone = "sys/class/thermal/thermal_zone7"
    zones = temperatures(
        write(desktop(tmp_path), {f"{zone}/type": "x86_pkg_temp", f"{zone}/temp": 40000})
    )
    assert zones == {"x86_pkg_temp": 51.0, "x86_pkg_temp (thermal_zone7)": 40.0}


def test_a_state_holds_everything_that_moves(tmp_path):
    state = read_state(orin(tmp_path), time_s=1.5)
    assert state.watched == ("clocks", "temperatures", "throttle events", "power")
    assert (state.time_s, state.power_mw, state.hottest) == (1.5, 5000.0, ("tj-thermal", 49.125))


def test_an_empty_tree_has_nothing_to_watch(tmp_path):
    state = read_state(tmp_path, time_s=0.0)
    assert (state.watched, state.power_mw, state.hottest) == ((), None, None)


@pytest.mark.parametrize("content", ["", "x", "1.5", "0x10", "- 3"])
def test_what_is_no_number_is_not_read_as_one(tmp_path, content):
    assert read_int(write(tmp_path, {"n": content}) / "n") is None


def test_a_folder_where_a_file_should_be_is_as_good_as_absent(tmp_path):
    (tmp_path / "n").mkdir()
    assert read_text(tmp_path / "n") is None and read_int(tmp_path / "none") is None
    root = orin(tmp_path / "b")
    write(root, {f"{INA}/curr1_input": None})
    (root / INA / "curr1_input").mkdir()
    assert read_rails(root) == (Rail("VDD_CPU_GPU_CV", 1000.0),)


def test_cpu10_comes_after_cpu9(tmp_path):
    names = [tmp_path / f"cpu{i}" for i in (10, 9, 0)]
    assert [path.name for path in sorted(names, key=natural_order)] == ["cpu0", "cpu9", "cpu10"]


def test_a_state_is_read_in_a_few_milliseconds(tmp_path):
    root, times = orin(tmp_path), []
    for _ in range(20):
        started = time.perf_counter()
        read_state(root, time_s=0.0)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.02  # a sample of the board must not disturb the run that it watches


def test_the_gpu_is_found_by_its_own_folder_only(tmp_path):
    root = write(
        orin(tmp_path), {"sys/class/devfreq/gpu-nvd-0/cur_freq": 1, f"{ORIN_GPU}/cur_freq": None}
    )
    assert not any(clock.is_gpu for clock in read_clocks(root))
