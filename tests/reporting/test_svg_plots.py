"""Plots as SVG: where their parts lie, what they say, and that nothing but the numbers decides about them."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from seg4diff_jax.reporting.svg_plots import BOTTOM, HEIGHT, TOP, Series, heat_plot, line_plot


def parts(drawn: str, name: str) -> list[ElementTree.Element]:
    """Groups of a drawing that have a class, in their order."""
    return ElementTree.fromstring(drawn).findall(f".//g[@class='{name}']")


def test_points_of_a_line_lie_where_their_values_are():
    values = [(10.0, 0.0), None, (30.0, 1.0), (20.0, 0.0)]
    drawn = str(line_plot("a & b", [0, 1, 2, 4], [Series(values, 2)], horizontal="x", vertical="y"))
    assert 'aria-label="a &amp; b"' in drawn
    points = np.array([centre(group) for group in parts(drawn, "point")])
    heights = (points[:, 1].max() - points[:, 1]) / np.ptp(points[:, 1])
    places = (points[:, 0] - points[0, 0]) / np.ptp(points[:, 0])
    np.testing.assert_allclose(heights, [0, 1, 0.5], atol=0.01)
    np.testing.assert_allclose(places, [0, 0.5, 1], atol=0.01)
    assert [group.findtext("title") for group in parts(drawn, "point")] == ["0: 10.0", "2: 30.0", "4: 20.0"]
    assert [group.findtext("text") for group in parts(drawn, "value")] == ["10.0", "30.0", "20.0"]


def test_an_axis_begins_where_it_is_told_to():
    drawn = str(
        line_plot("high", [0, 1], [Series([(72.0, 1.0), (91.0, 0.0)])], horizontal="x", vertical="y", bottom=70)
    )
    assert re.findall(r">(\d+)</text>", drawn) == ["0", "1", "70", "80", "90", "100"]
    low, high = (centre(group)[1] for group in parts(drawn, "point"))
    assert low - high == pytest.approx((91 - 72) / (100 - 70) * (HEIGHT - TOP - BOTTOM), abs=0.1)


def centre(group: ElementTree.Element) -> tuple[float, float]:
    """Of what a group's paths go around."""
    numbers = np.array(re.findall(r"[\d.]+", " ".join(path.attrib["d"] for path in group.iter("path"))), float)
    x, y = numbers[::2], numbers[1::2]
    return (x.min() + x.max()) / 2, (y.min() + y.max()) / 2


def test_cells_of_a_heat_map_are_darker_the_greater_their_number_and_absent_where_there_is_none():
    values = np.array([[10.0, 20.0], [np.nan, 40.0]])
    drawn = str(heat_plot("both", values, [3, 4], [2, 8], vertical="block", horizontal="noise level", mark=(1, 1)))
    cells = [path.attrib["style"] for group in parts(drawn, "cell") for path in group]
    lightness = [sum(bytes.fromhex(color)) for color in re.findall(r"fill: #(\w{6})", " ".join(cells))]
    assert lightness == sorted(lightness, reverse=True)
    assert len(lightness) == len(cells) == 3
    assert re.findall(r">(\d+\.\d)<", drawn) == ["10.0", "20.0", "40.0"]
    assert drawn.count('class="frame"') == 1


def test_equal_numbers_are_drawn_as_equal_bytes_whatever_the_settings_of_matplotlib_are():
    def drawn() -> tuple[str, str]:
        lines = [Series([(10.0, 2.0), (30.0, 1.0)], 1), Series([(20.0, 0.0), None])]
        cells = np.arange(6.0).reshape(2, 3)
        return (
            line_plot("lines", [3, 9], lines, horizontal="x", vertical="y", level=15.0),
            heat_plot("cells", cells, [3, 9], [1, 2, 3], vertical="block", horizontal="head"),
        )

    usual = drawn()
    theirs = {"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red", "lines.linewidth": 9, "axes.grid": True}
    with matplotlib.rc_context(theirs):
        assert drawn() == usual
        assert all(matplotlib.rcParams[name] == value for name, value in theirs.items())


def test_what_only_segments_does_not_import_what_draws_plots():
    code = "import sys, seg4diff_jax, seg4diff_jax.command_line as cli; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
