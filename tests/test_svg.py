import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.report.svg import Series, bar_chart, plot, thin, ticks

NUMBERS = st.floats(-1e9, 1e9).map(lambda x: round(x, 6))
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20)


def drawn(points, **options):
    return plot([Series("a", points, "dots")], title="t", x_label="x", y_label="y", **options)


def circles(svg):
    tree = ElementTree.fromstring(svg)
    return [(float(c.get("cx")), float(c.get("cy"))) for c in tree.iter("circle")]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(POINTS, st.booleans())
def test_every_point_lies_inside_the_plot(points, from_zero):
    places = circles(drawn(points, from_zero=from_zero))
    assert len(places) == len(points)
    assert all(64 <= x <= 744 and 30 <= y <= 196 for x, y in places)


def test_larger_values_stand_higher_and_further_right():
    (x0, y0), (x1, y1) = circles(drawn([(0, 1), (10, 3)]))
    assert x1 > x0 and y1 < y0


def test_half_way_is_drawn_half_way():
    (_, _), (x, y), (_, _) = places = circles(drawn([(0, 0), (5, 2), (10, 4)]))
    assert x == pytest.approx((places[0][0] + places[2][0]) / 2)
    assert y == pytest.approx((places[0][1] + places[2][1]) / 2)


def test_an_axis_that_begins_at_zero_does_and_another_does_not():
    assert ">0<" in drawn([(1, 90), (2, 100)])
    assert ">0<" not in drawn([(1, 90), (2, 100)], from_zero=False)


def test_equal_data_give_equal_text_and_other_data_another():
    assert drawn([(0, 1), (1, 2)]) == drawn([(0, 1), (1, 2)])
    assert drawn([(0, 1), (1, 2)]) != drawn([(0, 1), (1, 2.5)])


def test_text_is_escaped_and_xml_well_formed():
    series = [Series("<a>", [(0, 1), (1, 2)]), Series("b&", [(0, 2), (1, 1)], "steps")]
    svg = plot(series, title="<t>", x_label="&x", y_label="y", marks=[("<p>", 0.5)])
    texts = [element.text for element in ElementTree.fromstring(svg).iter()]
    assert {"<t>", "<a>", "b&", "&x", "<p>"} <= set(texts)


def test_marks_that_are_close_do_not_stand_on_each_other():
    svg = drawn([(0, 0), (100, 1)], marks=[("p50", 10), ("p90", 11), ("p99", 90)])
    texts = {e.text: float(e.get("y")) for e in ElementTree.fromstring(svg).iter("text")}
    assert texts["p90"] < texts["p50"] == texts["p99"]


def test_the_parts_of_a_bar_are_as_long_as_their_values():
    svg = bar_chart([("r", (1.0, 3.0)), ("s", (2.0, 0.0))], ("a", "b"), title="t", x_label="ms")
    rects = [r for r in ElementTree.fromstring(svg).iter("rect") if r.get("height") == "26"]
    first, second, third, nothing = (float(r.get("width")) for r in rects)
    assert second == pytest.approx(3 * first, abs=0.05) and third == pytest.approx(
        2 * first, abs=0.05
    )
    assert nothing == 0
    assert float(rects[1].get("x")) == pytest.approx(float(rects[0].get("x")) + first, abs=0.02)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_lie_on_the_axis(low, share):
    span = share * max(1.0, abs(low))  # far above the spacing of floats there
    marks = ticks(low, low + span)
    assert 2 <= len(marks) <= 11
    assert all(low - span * 1e-6 <= mark <= low + span * (1 + 1e-6) for mark in marks)


def test_ticks_are_round():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.0, 0.7) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(NUMBERS, min_size=1, max_size=300), st.integers(2, 50))
def test_thinning_keeps_the_extremes_and_the_order(values, limit):
    points = list(enumerate(values))
    kept = thin(points, limit=limit)
    assert len(kept) <= limit + 2 and set(kept) <= set(points) and kept == sorted(kept)
    assert min(y for _, y in kept) == min(values) and max(y for _, y in kept) == max(values)


def test_few_points_are_all_kept():
    assert thin([(0, 1), (1, 1)], limit=2) == [(0, 1), (1, 1)]


def test_a_line_joins_its_points_and_steps_hold_their_values():
    points = [(0, 0), (1, 1), (2, 0)]
    line, steps = (
        re.search(r'd="(.*?)"', plot([Series("a", points, s)], title="t", x_label="", y_label=""))[
            1
        ]
        for s in ("line", "steps")
    )
    assert line.count("L") == 2 and steps.count("H") == steps.count("V") == 2
