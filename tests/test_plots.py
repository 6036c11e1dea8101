"""Figures: axes in, axes out."""

import warnings

import pytest
import torch

from torchreg import plots

pytest.importorskip("matplotlib")


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def bars(axes):
    """The heights of the bars by their colour."""
    from matplotlib.colors import to_hex

    heights = {}
    for patch in axes.patches:
        heights.setdefault(to_hex(patch.get_facecolor()), []).append(patch.get_height())
    return heights


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # what earlier tests left open is collected at any time
        yield


def test_exact_zeros_are_a_bar_of_their_own(axes):
    weights = [torch.tensor([[0.0, -0.0, 1e-9]]), torch.tensor([0.5, -2.0])]
    assert plots.weight_histogram(weights, axes) is axes
    heights = bars(axes)
    assert heights[plots.ZERO] == [2]
    assert sum(heights[plots.NONZERO]) == 3
    assert axes.texts[0].get_text() == "40.0 % exactly 0"


def test_a_tiny_weight_is_no_zero(axes):
    plots.weight_histogram(torch.tensor([1e-30, 5e-40]), axes)
    assert bars(axes)[plots.ZERO] == [0]
    assert axes.texts[0].get_text() == "none exactly 0"


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [float("nan")], [float("inf"), 1.0]], ids=str)
def test_odd_weights_are_drawn(values, axes):
    plots.weight_histogram(torch.tensor(values), axes)
    axes.figure.canvas.draw()


@pytest.mark.parametrize("shape", [None, (2, 2), (1, 4), (2, 1, 2)], ids=str)
def test_inputs_never_read_are_masked_in_the_image(shape, axes):
    weight = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 4.0, 1.0, 0.0]])
    assert plots.inputs_read(weight, axes, shape) is axes
    shown = axes.images[0].get_array()
    if shape == (2, 1, 2):
        assert shown.filled(-1).tolist() == [[5.0], [1.0]]
    else:
        assert shown.compressed().tolist() == [5.0, 1.0]
        assert shown.mask.ravel().tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", [(1, 2, 5), (3, 2, 5), (2, 5, 3), (1, 2, 1)], ids=str)
def test_channels_are_summed_wherever_they_stand(shape, axes):
    image = torch.rand(shape)
    plots.inputs_read(image.reshape(1, -1), axes, shape)
    channels = 2 if shape[2] in (1, 3) else 0
    assert torch.allclose(torch.tensor(axes.images[0].get_array().filled(0)), image.double().norm(dim=channels))


def test_inputs_that_form_no_image_are_bars(axes):
    plots.inputs_read(torch.tensor([[0.0, 3.0, 0.0], [0.0, 4.0, 1.0]]), axes)
    heights = bars(axes)
    assert heights[plots.NONZERO] == [0.0, 5.0, 1.0]
    assert heights[plots.SILENT] == [-0.25]


def test_wrong_shapes_are_refused(axes):
    with pytest.raises(ValueError, match="to be a matrix"):
        plots.inputs_read(torch.ones(3), axes)
    with pytest.raises(ValueError, match="to hold 4 inputs"):
        plots.inputs_read(torch.ones(2, 4), axes, (3, 3))
