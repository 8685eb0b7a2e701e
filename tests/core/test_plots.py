"""What the drawing functions put on the axes, and the files of a figure."""
import csv

import pytest

from utils.plots import (LineStyle, draw_bars, draw_estimate, draw_grid, draw_line, legend, new_figure,
                         write_figure)

STYLE = LineStyle("a curve", "#0072B2", "s", 4)


@pytest.fixture
def axes():
    figure, [[axes]] = new_figure(3, 2)
    return axes


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_have_their_length_and_whiskers_to_both_ends(axes, horizontal):
    draw_bars(axes, [0, 1], [0.5, 2], [(0.2, 0.9), (2.5, 3)], 0.8, horizontal, color="#0072B2", label="bars")
    sizes = [bar.get_width() if horizontal else bar.get_height() for bar in axes.patches]
    assert sizes == [0.5, 2]
    segments = axes.collections[0].get_segments()
    ends = [[point[0 if horizontal else 1] for point in segment] for segment in segments]
    assert ends == [[pytest.approx(0.2), pytest.approx(0.9)], [2, pytest.approx(3)]]  # never inside out


def test_a_line_has_a_band_or_whiskers_or_neither(axes):
    values, ends = [1, 2], [(0, 2), (1, 4)]
    draw_line(axes, [0, 1], values, None, STYLE)
    assert not axes.collections
    draw_line(axes, [0, 1], values, ends, STYLE)
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(0, 0), (0, 2), (1, 1), (1, 4)}
    draw_line(axes, [0, 1], values, ends, STYLE, whiskers=True)
    whiskers = [segment.tolist() for segment in axes.collections[1].get_segments()]
    assert whiskers == [[[0, 0], [0, 2]], [[1, 1], [1, 4]]]


def test_a_forest_line_has_two_intervals_a_point_and_a_note(axes):
    draw_estimate(axes, 3, 0.5, (0.2, 0.8), (0.1, 0.9), STYLE, "effect")
    assert [(line.get_xdata()[0], line.get_linewidth()) for line in axes.lines[:2]] == [(0.1, 1), (0.2, 3)]
    assert list(axes.lines[2].get_ydata()) == [3] and axes.texts[0].get_text() == "effect"


def test_a_grid_is_coloured_symmetrically(axes):
    assert draw_grid(axes, [[0.1, -2]], 2).get_clim() == (-2, 2)


def test_a_figure_is_a_png_and_a_csv(tmp_path):
    figure, [both] = new_figure(3, 2, 1, 2)
    draw_line(both[0], [0, 1], [1, 2], None, STYLE)
    legend(figure, both)
    write_figure(figure, [{"x": 0, "y": 1}, {"x": 1, "y": 2, "z": 3}], tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert list(csv.reader(open(tmp_path / "f.csv"))) == [["x", "y"], ["0", "1"], ["1", "2"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a curve"]
