"""What a person sees of a run in TensorBoard: a tour of the real page, `make test-browser`.

Screenshots are kept in runs/tour, or where TOUR says.
"""

import os
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from command import run_json
from torch import nn

import torchreg

pytestmark = [pytest.mark.slow, pytest.mark.browser]

RUNS = ("none", "l2-loss", "l1-loss", "l1-prox", "elastic-net-prox", "l1-loss-adam", "l1-prox-adam")
SHADES = "const c = document.createElement('canvas'), i = arguments[0]; c.width = i.naturalWidth; c.height = "
SHADES += "i.naturalHeight; const x = c.getContext('2d'); x.drawImage(i, 0, 0); "
SHADES += "return [c.width, c.height, Array.from(x.getImageData(0, 0, c.width, c.height).data)];"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """The runs of a comparison, and one in which channels die."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("tour")
    run_json(["compare", "--seeds", "1", "--steps", "500", "--no-figure", "--logdir", str(folder)])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    x = torch.randn(256, 1, 8, 8)
    y = (x.mean((1, 2, 3)) * 8).sigmoid().mul(10).long()
    reg = torchreg.Regularizer(model, {nn.Conv2d: torchreg.GroupLasso(0.005, "out_channels")})
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.05, momentum=0.9)
    with SummaryWriter(str(folder / "channels")) as writer:
        shown = {"histograms": True, "images": True, "custom_scalars": True, "text": True}
        with torchreg.SparsityMonitor(reg, writer, every=10, optimizer=optimizer, **shown) as monitor:
            for _ in range(300):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
    return folder


@pytest.fixture(scope="module")
def tour(logdir):
    if reason := browser.missing():
        pytest.skip(reason)
    pictures = Path(os.environ.get("TOUR", "runs/tour"))
    with browser.tensorboard(logdir) as address, browser.chromium() as driver:
        yield browser.Tour(driver, address, pictures)


def picture(tour, card):
    find = "return arguments[0].shadowRoot.querySelector('img')"
    browser.wait_until(lambda: tour.driver.execute_script(find, card), "a card has no picture")
    return tour.driver.execute_script(find, card)


def pixels(tour, image):
    browser.wait_until(
        lambda: tour.driver.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", image),
        "an image does not load",
    )
    width, height, values = tour.driver.execute_script(SHADES, image)
    return np.array(values, dtype=np.uint8).reshape(height, width, 4)[:, :, :3]


def lines(tour, element):
    """What an element says, shadow trees included."""
    return tour.driver.execute_script(browser.TEXT.replace("document.body", "arguments[0]"), element).splitlines()


def cards(tour, selector, tag, run=None):
    """The cards whose heading is the tag, and whose run is this."""
    found = []
    for card in tour.wait_for_all(selector, 1):
        text = lines(tour, card)
        if tag in text and (run is None or run in text):
            found.append(card)
    return found


def test_scalars_have_a_section_for_each_subject_and_all_runs(tour):
    tour.open("scalars", "accuracy", "final", "loss", "sparsity", *(f"{run}-seed0" for run in RUNS))
    for heading in tour.all("button.heading"):
        name = heading.text.split()[0]
        if (name in ("loss", "sparsity")) != (heading.get_attribute("open-button") is not None):
            tour.click(heading)  # opens these two and closes the others
    tour.wait_for("loss/penalty", "sparsity/0.weight", "sparsity/total")
    tour.wait_for_all("tf-line-chart-data-loader", 4)
    tour.keep("scalars")


def test_custom_scalars_put_the_penalty_beside_the_data_loss(tour):
    names = ("exact zeros", "exact zeros of each parameter", "weights that became zero", "weights that woke up")
    tour.open("custom_scalars", "data loss", "penalty", *names, "threshold of the proximal step", "groups alive")
    charts = tour.wait_for_all("tf-custom-scalar-multi-line-chart-card", 8)
    loss, penalty = (next(c for c in charts if name in lines(tour, c)) for name in ("data loss", "penalty"))
    assert loss.location["y"] == penalty.location["y"]
    assert penalty.location["x"] > loss.location["x"]
    tour.wait_for("Matches (8)")
    assert "Matches (0)" not in tour.text(), "no chart is empty"
    tour.keep("custom-scalars")


def test_histograms_show_the_weights_of_each_layer(tour):
    tour.open("histograms", "weights", "weights/0.weight", "l1-prox-seed0")
    tour.wait_for_all("vz-histogram-timeseries, tf-histogram-loader", 4)
    tour.keep("histograms")


def test_masks_are_legible(tour):
    tour.open("images", "mask/0.weight", "l1-prox-seed0", "l1-loss-seed0", tagFilter="mask/0")
    images = {}
    for run in ("l1-prox-seed0", "l1-loss-seed0"):
        browser.wait_until(lambda run=run: cards(tour, "tf-image-loader", "mask/0.weight", run), f"no mask of {run}")
        card, *_ = cards(tour, "tf-image-loader", "mask/0.weight", run)
        tour.driver.execute_script("arguments[0].scrollIntoView()", card)
        image = picture(tour, card)
        images[run] = pixels(tour, image)
        assert 300 <= image.size["width"] <= 400
        assert image.size["height"] <= image.size["width"] + 4, "no taller than its card is wide"
    sparse, dense = ((i == 255).all(2).sum() / ((i == i[:, :, :1]).all(2)).sum() for i in images.values())
    assert sparse < 0.5
    assert dense == 1
    tour.driver.execute_script("window.scrollTo(0, 0)")
    tour.keep("masks")


def test_the_barcode_shows_channels_die(tour):
    tour.open("images", "barcode/0.weight", "barcode/2.weight", tagFilter="barcode")
    card, *_ = cards(tour, "tf-image-loader", "barcode/2.weight", "channels")
    image = pixels(tour, picture(tour, card))
    grey = image[(image == image[:, :, :1]).all(2)]
    assert {0, 255} == set(grey[:, 0].tolist()), "some were alive, some died, and nothing is blurred"
    tour.keep("barcodes")


def test_texts_are_tables(tour):
    tour.open("text", "torchreg/penalties/text_summary", "torchreg/sparsity/text_summary", runFilter="channels")
    headings = {"parameter", "shape", "rule", "penalty", "zeros", "alive"}
    browser.wait_until(lambda: headings <= {e.text for e in tour.all("th")}, f"no tables with {headings}")
    assert "GroupLasso strength=0.005, groups=out_channels" in tour.text()
    assert "| parameter" not in tour.text(), "Markdown is rendered"
    tour.keep("text")


def test_hparams_compare_the_methods(tour):
    names = ("l1", "l2", "method", "seed", "final/accuracy", "final/sparsity")
    tour.open("hparams", "Hyperparameters", *names, *RUNS)
    tour.keep("hparams")
