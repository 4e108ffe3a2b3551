"""What is drawn is what was given; nothing is left behind on the way."""

import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from topkd.reporting import plots

RUNS = {"kd": [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], "student": [[2.0, 2.0, 2.0]]}


def only_axes(figure):
    (axes,) = figure.axes
    return axes


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_drawing_leaves_no_settings_behind():
    before = dict(matplotlib.rcParams)
    plots.to_png(plots.curves(RUNS, title="a", ylabel="b"))
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")  # other packages import it
    assert pyplot is None or pyplot.get_fignums() == []


def test_curves_draw_each_seed_and_the_mean():
    axes = only_axes(plots.curves(RUNS, title="Accuracy", ylabel="accuracy, %"))
    lines = [line.get_ydata().tolist() for line in axes.lines]
    assert lines == [[1, 2, 3], [3, 4, 5], [2, 3, 4], [2, 2, 2]]  # one seed is its own mean
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert labels(axes) == ["kd", "student"]
    assert (axes.get_ylabel(), axes.get_yscale()) == ("accuracy, %", "linear")


def test_a_variant_looks_the_same_in_every_picture():
    colors = plots.palette(["kd", "exact", "student"])
    all_variants = only_axes(plots.curves(dict.fromkeys(colors, [[1.0, 2.0]]), title="", ylabel=""))
    alone = only_axes(plots.curves({"student": [[1.0, 2.0]]}, title="", ylabel="", colors=colors))
    for look in ("get_color", "get_linestyle"):
        assert getattr(alone.lines[0], look)() == getattr(all_variants.lines[2], look)()


@pytest.mark.parametrize(
    ("values", "scale"), [([1.0, 2.0], "linear"), ([1.0, 1e-3], "log"), ([0.0, 0.0], "linear")]
)
def test_wide_values_get_a_logarithmic_axis(values, scale):
    figure = plots.curves({"topkd": [values]}, title="", ylabel="", wide=True)
    assert only_axes(figure).get_yscale() == scale
    assert "mathdefault" not in plots.to_svg(figure, prefix="a", alt="")


def test_runs_of_different_length_are_drawn_as_far_as_all_go():
    axes = only_axes(plots.curves({"kd": [[1.0, 2.0], [3.0]]}, title="", ylabel=""))
    assert axes.lines[-1].get_ydata().tolist() == [2.0]


def test_gradient_shares_are_percents_with_a_line_at_a_thousandth():
    figure = plots.gradient_shares({"ce": [[0.25, 0.9]], "topkd": [[0.75, 1e-4]]}, title="student")
    axes = only_axes(figure)
    assert axes.lines[0].get_ydata().tolist() == [25, 90]
    assert axes.lines[1].get_ydata().tolist() == pytest.approx([75, 0.01])
    assert list(axes.lines[2].get_ydata()) == [0.1, 0.1]


def test_a_barcode_has_a_bar_for_each_death_and_the_longest_below():
    axes = only_axes(plots.barcode([0.5, 2.0, 1.0], title="teacher", end=4.0, unit="mean = 1"))
    (bars,) = axes.collections
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends == [[0, 2.0], [0, 1.0], [0, 0.5]]
    assert axes.get_xlim() == pytest.approx((0, 4.12))


def test_sorted_deaths_are_sorted():
    axes = only_axes(plots.sorted_deaths({"teacher": [3, 1, 2], "kd": [1, 1, 4]}, title=""))
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1, 2, 3], [1, 1, 4]]
    assert labels(axes) == ["teacher", "kd"]


def test_exact_images_stand_above_the_approximated_on_one_scale():
    exact = np.linspace(0, 1, 800).reshape(2, 400)
    figure = plots.persistence_images(exact, exact / 2, resolution=20)
    drawn = [axes.images[0] for axes in figure.axes[:4]]
    for image, value in zip(drawn, [*exact, *(exact / 2)], strict=True):
        np.testing.assert_array_equal(image.get_array(), value.reshape(20, 20))
        assert image.get_clim() == (0, 1)
        assert image.origin == "lower"


def test_vectors_are_drawn_as_bars():
    exact = np.arange(40.0).reshape(2, 20)
    figure = plots.persistence_images(exact, exact + 1, resolution=20)
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    np.testing.assert_array_equal(heights, [*exact, *(exact + 1)])
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


@pytest.mark.parametrize(
    ("exact", "guess", "message"),
    [
        (np.zeros((2, 400)), np.zeros((3, 400)), "shapes differ"),
        (np.zeros((2, 30)), np.zeros((2, 30)), "30 numbers are no image of resolution 20"),
    ],
)
def test_images_that_do_not_fit_are_refused(exact, guess, message):
    with pytest.raises(ValueError, match=message):
        plots.persistence_images(exact, guess, resolution=20)


def test_few_points_are_laid_out_by_pca_and_that_is_said():
    points = np.random.default_rng(0).normal(size=(15, 6))
    places, method = plots.project(points)
    assert "PCA" in method
    # The covariance of principal components is diagonal: its two greatest eigenvalues.
    eigenvalues = np.linalg.eigvalsh(np.cov(points.T))[::-1][:2]
    np.testing.assert_allclose(np.cov(places.T), np.diag(eigenvalues), atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3), (5,)])
def test_one_point_cannot_be_laid_out(shape):
    with pytest.raises(ValueError, match="at least two points"):
        plots.project(np.zeros(shape))


def test_points_on_a_line_can():
    places, _ = plots.project([[1.0], [2.0], [4.0]])
    assert places[:, 1].tolist() == [0, 0, 0]
    assert np.abs(np.diff(places[:, 0])).tolist() == pytest.approx([1, 2])


@pytest.mark.slow
def test_umap_keeps_clusters_and_repeats():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(center, 0.1, (40, 8)) for center in (0, 5)])
    places, method = plots.project(points, seed=3)
    assert method == "UMAP"
    np.testing.assert_array_equal(places, plots.project(points, seed=3)[0])
    first, second = places[:40], places[40:]
    gap = np.linalg.norm(first.mean(0) - second.mean(0))
    for half in (first, second):
        assert gap > 2 * np.linalg.norm(half - half.mean(0), axis=1).max()


def test_the_ten_most_frequent_classes_are_colored_and_others_gray():
    target = [number for number in range(12) for _ in range(20 - number)]
    assert list(plots.class_colors(target)) == list(range(10))
    places = np.random.default_rng(0).normal(size=(len(target), 2))
    axes = only_axes(plots.scatter(places, target, title="teacher"))
    assert [len(points.get_offsets()) for points in axes.collections] == [
        19,  # of the classes 10 and 11
        *range(20, 10, -1),
    ]
    colored = axes.collections[3]
    np.testing.assert_array_equal(colored.get_offsets(), places[np.array(target) == 2])


def test_a_legend_names_the_classes():
    figure = plots.scatter(np.eye(2), [0, 7], title="", names={0: "cat", 7: "$x_"})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "$x_"]
    plots.to_png(figure)  # a dollar begins no formula


def test_as_many_classes_as_points_are_needed():
    with pytest.raises(ValueError, match="n classes"):
        plots.scatter(np.zeros((3, 2)), [0, 1], title="")


def test_svg_is_whole_repeats_and_keeps_its_names_to_itself():
    def svg(prefix):
        figure = plots.curves({"a<b$": [[1.0, 2.0]]}, title="x & y", ylabel="")
        return plots.to_svg(figure, prefix=prefix, alt='says "<"')

    assert svg("p1") == svg("p1")
    root = ET.fromstring(svg("p1"))
    assert root.get("aria-label") == 'says "<"'
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert {"a<b$", "x & y"} <= set(texts)
    ids = [{element.get("id") for element in ET.fromstring(svg(p)).iter()} for p in ("p1", "p2")]
    assert ids[0] & ids[1] == {None}
    for reference in ("url(#", 'href="#'):
        assert all(part.startswith("p1-") for part in svg("p1").split(reference)[1:])


def test_colors_differ_in_lightness_or_hue_for_all_eyes():
    # Under deuteranopia red and green are taken for each other: what is left is yellow to blue
    # and lightness. Coarsely, by (R + G) / 2 and B.
    seen = [
        np.array([(int(c[1:3], 16) + int(c[3:5], 16)) / 2, int(c[5:7], 16)]) for c in plots.COLORS
    ]
    for i, first in enumerate(seen):
        assert all(np.abs(first - second).max() > 15 for second in seen[:i])


def test_filtration_draws_the_edges_and_triangles_there_are():
    square = [[0, 0], [1, 0], [1, 1], [0, 1]]
    apart, joined, filled = plots.filtration(square, [0.5, 1.0, 1.5]).axes
    assert [len(axes.lines) for axes in (apart, joined, filled)] == [1, 1 + 4, 1 + 6]
    assert [len(axes.patches) for axes in (apart, joined, filled)] == [0, 0, 4]


def test_diagram_has_a_point_for_every_bar():
    figure = plots.diagram({"H0": [[0, 1], [0, 2]], "H1": [], "H2": [[1.0, 3.0]]}, title="three")
    diagonal, *dimensions = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in dimensions] == [2, 0, 1]
    assert dimensions[2].get_xydata().tolist() == [[1, 3]]
    assert diagonal.get_xydata()[-1].tolist() == pytest.approx([3.15, 3.15])
