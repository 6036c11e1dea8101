"""Figures of linear models and penalties: paths, cross-validation, geometry, shrinkage."""

import warnings

import numpy as np
import pytest
import torch

import torchreg
from torchreg import L1, NM, TopK, plots
from torchreg.one_standard_error import one_standard_error
from torchreg.penalties import Penalty

pytest.importorskip("matplotlib")
NAN = float("nan")


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # what earlier tests left open is collected at any time
        yield


@pytest.fixture(scope="module")
def diabetes():
    x, y = pytest.importorskip("sklearn.datasets").load_diabetes(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def test_the_path_draws_what_it_is_given(axes):
    alphas, coefs = torch.tensor([0.1, 1.0, 0.01]), torch.tensor([[2.0, 0.0, 3.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    assert plots.coefficient_path(alphas, coefs, axes, ["a", "$b$", "c"]) is axes
    lines = {line.get_color(): line.get_xydata() for line in axes.lines[1:]}
    assert len(lines) == 3
    first = next(iter(lines.values()))
    assert np.allclose(first, [[1.0, 0.0], [0.1, 2.0], [0.01, 3.0]])
    assert [text.get_text() for text in axes.texts] == ["$b$", "a"]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    (above,) = axes.child_axes
    assert [tick.get_text() for tick in above.get_xticklabels()] == ["0", "1", "2"]
    axes.figure.canvas.draw()


def test_only_the_largest_features_have_names(axes):
    coefs = np.outer(np.arange(30.0), [0.0, 1.0])
    plots.coefficient_path([1.0, 0.1], coefs, axes, labels=4)
    assert [text.get_text() for text in axes.texts] == ["x27", "x28", "x29", "x30"]
    assert len(axes.lines) == 1 + 4 + 25  # the axis, the named ones, and the others but the one that stays zero


def test_what_is_never_in_the_model_has_no_name(axes):
    plots.coefficient_path([1.0, 0.1], [[0.0, 0.5], [0.0, 0.0], [0.0, -0.2]], axes, ["a", "b", "c"])
    assert {text.get_text() for text in axes.texts} >= {"a", "c"}
    assert "b" not in {text.get_text() for text in axes.texts}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("apart", [0.0, 1.0], ids=["alone", "with another"])
def test_names_do_not_overlap_nor_leave_the_axes(apart, sign, axes):
    ends = np.append(np.linspace(1, 1.001, 9), 1 + 10 * apart)
    plots.coefficient_path([1.0, 0.1], np.outer(sign * ends, [0.0, 1.0]), axes)
    axes.figure.canvas.draw()
    assert all(0 <= text.xyann[1] <= 1 for text in axes.texts)
    heights = np.sort([text.xyann[1] for text in axes.texts]) * axes.bbox.height
    assert np.diff(heights).min() > axes.texts[0].get_fontsize() * axes.figure.dpi / 72


@pytest.mark.parametrize(
    "coefs", [[[NAN, 1.0]], [[NAN, NAN]], [[float("inf"), 1.0]], [[0.0, 0.0]], [[1e300, -1e300]]], ids=str
)
def test_odd_paths_are_drawn(coefs, axes):
    plots.coefficient_path([1.0, 0.1], coefs, axes)
    axes.figure.canvas.draw()


def test_a_path_of_one_strength_is_drawn(axes):
    plots.coefficient_path([1.0], [[1.0], [0.0]], axes)
    plots.cv_curve([1.0], [[1.0]], axes)
    axes.figure.canvas.draw()


@pytest.mark.parametrize(
    ("alphas", "coefs", "error", "words"),
    [
        ([1.0, 0.0], [[1.0, 1.0]], ValueError, "logarithmic"),
        ([1.0, NAN], [[1.0, 1.0]], ValueError, "logarithmic"),
        ([1.0, 2.0], [[1.0]], ValueError, "2 strengths"),
        ([1.0], [1.0], ValueError, "a matrix"),
        ([], [[1.0]], ValueError, "not empty"),
        (["a"], [[1.0]], TypeError, "real numbers"),
        ([1.0], [[1j]], TypeError, "real numbers"),
    ],
)
def test_wrong_paths_are_refused(alphas, coefs, error, words, axes):
    with pytest.raises(error, match=words):
        plots.coefficient_path(alphas, coefs, axes)


def test_a_name_too_many_is_refused(axes):
    with pytest.raises(ValueError, match="2 names of features, got 3"):
        plots.coefficient_path([1.0], [[1.0], [2.0]], axes, ["a", "b", "c"])


def test_the_curve_marks_the_least_error_and_the_simplest_within_its_standard_error(axes):
    errors = np.array([[9.0, 9.5], [2.4, 3.0], [2.0, 3.0], [2.5, 3.5]])
    assert plots.cv_curve([0.1, 0.5, 0.01, 0.001], errors, axes) is axes
    means, marked = errors.mean(1), [line.get_xydata()[0].tolist() for line in axes.lines if len(line.get_xdata()) == 1]
    assert marked == [[0.5, means[1]], [0.01, means[2]]]
    axes.figure.canvas.draw()


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([[9.0], [2.0], [1.0]], (2, 2)),  # a single fold has no spread
        ([[1.0, 3.0], [1.0, 2.0], [1.0, 1.5]], (2, 1)),
        ([[1.0, 2.1], [1.0, 2.0], [1.0, 2.0]], (1, 0)),
        ([[NAN, 1.0], [3.0, 4.0], [2.0, 3.0]], (2, 2)),
        ([[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]], (0, 0)),
    ],
)
def test_the_rule_of_one_standard_error(errors, expected):
    assert one_standard_error([1.0, 0.1, 0.01], errors) == expected
    best, simple = one_standard_error([0.01, 0.1, 1.0], errors[::-1])
    assert (errors[::-1][best], errors[::-1][simple]) == (errors[expected[0]], errors[expected[1]]) or expected == (
        1,
        0,
    )


@pytest.mark.parametrize("errors", [[[NAN]], [[1.0], [2.0]], [1.0], [[]]], ids=str)
def test_errors_without_a_choice_are_refused(errors):
    with pytest.raises(ValueError, match="Expected"):
        one_standard_error([1.0], errors)


def optimum(axes):
    return axes.lines[-1].get_xydata()[0]


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("columns", [(2, 3), (4, 5), (0, 8)], ids=str)
@pytest.mark.parametrize("size", [0.2, 0.8])
def test_the_marked_point_is_the_solution_of_the_penalised_problem(diabetes, l1_ratio, columns, size, axes):
    from sklearn.linear_model import ElasticNet, LinearRegression, Ridge

    x, y = diabetes[0][:, columns], diabetes[1]
    plots.geometry(x, y, axes, l1_ratio=l1_ratio, size=size)
    w, alpha = optimum(axes), None
    reach = size * LinearRegression().fit(x, y).coef_

    def penalty(w):
        return l1_ratio * np.abs(w).sum() + 0.5 * (1 - l1_ratio) * (w**2).sum()

    assert penalty(w) == pytest.approx(penalty(reach), rel=1e-9)
    gradient = x.T @ (x @ w - y) / len(y)
    slope = l1_ratio * np.sign(w) + (1 - l1_ratio) * w
    alpha = -gradient[np.abs(w).argmax()] / slope[np.abs(w).argmax()]
    assert f"{alpha:.2g}" in axes.get_title()
    model = ElasticNet(alpha, l1_ratio=l1_ratio, tol=1e-13, max_iter=10**6) if l1_ratio else Ridge(alpha * len(y))
    assert np.allclose(model.fit(x, y).coef_, w, atol=1e-8)
    assert (axes.get_title().endswith("exactly 0")) == bool((w == 0).any())


def test_a_corner_is_exactly_zero_and_named(axes):
    x = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [2.0, 1.0]])
    y = torch.tensor([3.0, -2.0, -1.0, 4.0])
    plots.geometry(x, y, axes, size=0.4, names=("$a$", "b"))
    assert optimum(axes)[1] == 0
    assert axes.get_title().endswith("b is exactly 0")
    axes.figure.canvas.draw()


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_equal_columns_are_drawn(l1_ratio, scale, axes):
    column = torch.tensor([0.0, 1.0, 2.0, 4.0]) * scale
    plots.geometry(torch.stack([column, column], 1), column, axes, l1_ratio=l1_ratio)
    axes.figure.canvas.draw()
    assert np.isfinite(optimum(axes)).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[1.0, 2.0, 3.0]] * 3, [1.0, 2.0, 3.0]), "two features"),
        (([[1.0, 2.0], [3.0, 5.0]], [1.0, 2.0, 3.0]), "two features of 3"),
        (([[1.0, NAN], [3.0, 5.0]], [1.0, 2.0]), "finite"),
        (([[1.0, 1.0], [1.0, 1.0]], [1.0, 2.0]), "correlated"),
        (([[1e200, 1.0], [2e200, 3.0]], [1.0, 2.0]), "beyond float64"),
        (([[1.0, 1.0]], [1.0]), "correlated"),
        (([[1.0, 2.0], [3.0, 5.0]], [2.0, 2.0]), "correlated"),
    ],
)
def test_data_without_geometry_are_refused(arguments, words, axes):
    with pytest.raises(ValueError, match=words):
        plots.geometry(*arguments, axes)


@pytest.mark.parametrize("options", [{"l1_ratio": 2}, {"l1_ratio": NAN}, {"size": 1}, {"size": 0}, {"names": ["a"]}])
def test_wrong_settings_of_the_geometry_are_refused(options, axes):
    with pytest.raises(ValueError, match=next(iter(options))):
        plots.geometry([[1.0, 2.0], [3.0, 5.0], [0.0, 1.0]], [1.0, 2.0, 3.0], axes, **options)


def drawn(axes):
    v, w = axes.lines[-1].get_data()
    return np.asarray(v), np.asarray(w)


def test_a_shrinkage_curve_is_the_prox_with_gaps_where_it_jumps(axes):
    assert plots.shrinkage_curve(L1(1.0), axes, step=0.5) is axes
    v, w = drawn(axes)
    assert np.allclose(w, np.sign(v) * np.maximum(np.abs(v) - 0.5, 0))
    plots.shrinkage_curve(torchreg.L0(0.5), axes)
    v, w = drawn(axes)
    (gaps,) = np.isnan(w).nonzero()
    assert len(gaps) == 2
    assert all(abs(w[gap + 1] - w[gap - 1]) > 0.9 for gap in gaps)
    assert np.abs(w[(w != 0) & ~np.isnan(w)]).min() > 0.99
    assert sum(line.get_gid() == "identity" for line in axes.lines) == 1


def test_every_penalty_of_the_library_has_a_panel():
    from matplotlib.figure import Figure

    panels = plots.shrinkage_curves(Figure().subplots(4, 4))
    titles = [panel.get_title() for panel in panels.flat if panel.get_visible()]
    penalties = {
        name
        for name in torchreg.penalties.__all__
        if isinstance(getattr(torchreg.penalties, name), type)
        and issubclass(getattr(torchreg.penalties, name), Penalty)
    } - {"Penalty"}
    assert {title.partition("(")[0] for title in titles} == penalties


def test_the_weight_beside_decides_where_it_can():
    from matplotlib.figure import Figure

    panels = plots.shrinkage_curves(Figure().subplots(1, 3), [L1(1.0), NM(1, 2), TopK(1)])
    assert [len(panel.texts) for panel in panels] == [0, 2, 2]
    v, w = drawn(panels[2])
    assert (w[np.abs(v) < 1.99] == 0).all()
    assert (w[np.abs(v) > 2.01] == v[np.abs(v) > 2.01]).all()


def test_what_is_no_penalty_is_refused(axes):
    with pytest.raises(TypeError, match="a penalty, got float"):
        plots.shrinkage_curve(0.5, axes)
    with pytest.raises(ValueError, match="`limit`"):
        plots.shrinkage_curve(L1(1.0), axes, limit=NAN)
    with pytest.raises(ValueError, match="2 penalties, got 1"):
        plots.shrinkage_curves(axes, [L1(1.0), L1(2.0)])
