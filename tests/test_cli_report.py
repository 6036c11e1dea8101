"""``torchreg report``: the runs of a log folder as one HTML page, whatever is in the folder."""

import base64
import itertools
import math
import os
import random
import re
import stat
import struct
import zlib
from html.parser import HTMLParser

import pytest
import torch
from command import assert_refused, mnist_like

import torchreg
from torchreg.cli import main
from torchreg.cli.report.charts import line_chart, thinned
from torchreg.cli.report.runs import Curve, event_files, png_size, read_run

VOID = {"meta", "input", "img", "line", "rect", "circle", "polyline"}
HOSTILE = "a\"'><script>alert(1)</script><img src=x onerror=alert(1)>&\x1b[31m\u202e"


class Page(HTMLParser):
    """The elements of a page and its text; fails where tags don't match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def reported(logdir, *arguments):
    """The page of a folder, which must be whole and closed to the world."""
    assert main(["report", str(logdir), *map(str, arguments)]) == 0
    text = (logdir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {name for name, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "a", "base", "form"})
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert "url(" not in text
    return page


def written(folder, **scalars):
    """A run with these values of scalars, at the steps 0, 10, 20, …"""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for i, value in enumerate(values):
                writer.add_scalar(tag, value, 10 * i)
    return folder


def event_file(folder):
    (path,) = folder.glob("*tfevents*")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run under the monitor with all that it logs."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("logs") / "l1"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
    reg = torchreg.Regularizer(model, torchreg.GroupLasso(0.05, "rows"))
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1)
    x = torch.randn(40, 6)
    with SummaryWriter(str(folder)) as writer:
        everything = {"optimizer": optimizer, "histograms": True, "images": True, "custom_scalars": True}
        with torchreg.SparsityMonitor(reg, writer, every=10, **everything) as monitor:
            for _ in range(60):
                optimizer.zero_grad()
                loss = (model(x)[:, 0] - x[:, 0]).square().mean()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
        monitor.hparams({"l1": 0.05, "kind": "rows"}, {"final/accuracy": 0.875})
    return folder


def test_the_page_shows_what_tensorboard_shows(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    page = reported(trained.parent)
    accumulator = EventAccumulator(str(trained), size_guidance={"images": 0, "scalars": 0}).Reload()
    tags = accumulator.Tags()
    for tag in (*tags["scalars"], *tags["histograms"]):
        assert tag.removeprefix("final/") in page.text, tag
    for start, heading in (("barcode/", "Which groups were alive"), ("mask/", "Masks")):
        assert heading in page.text
        latest = [accumulator.Images(tag)[-1].encoded_image_string for tag in tags["images"] if tag.startswith(start)]
        there = [base64.b64decode(image["src"].partition(",")[2]) for image in page.all("img")]
        assert latest
        assert all(picture in there for picture in latest)
    assert "87.5" in page.text
    assert "rows" in page.text
    sizes = [float(v) for line in page.all("polyline") for pair in line["points"].split() for v in pair.split(",")]
    assert all(0 <= v <= 440 for v in sizes)


def test_no_scalar_is_left_out(tmp_path):
    tags = [
        "loss/data",
        "loss/data_2",
        "loss/train",
        "zeros/other",
        "lr",
        "sparsity/x",
        "final/x",
        "groups/x",
        "accuracy",
    ]
    page = reported(written(tmp_path / "run", **{tag: [1.0] for tag in tags}))
    for tag in tags:
        assert tag in page.words or (tag == "final/x" and "x" in page.words), tag


def test_the_runs_of_a_comparison_stand_side_by_side(tmp_path):
    data = mnist_like(tmp_path / "toy.npz")
    settings = ["--steps", "20", "--seeds", "2", "--no-figure", "--json", "--refit", "1"]
    assert main(["compare", "--data", str(data), "--logdir", str(tmp_path / "runs"), *settings]) == 0
    page = reported(tmp_path / "runs")
    assert [box["id"] for box in page.all("input")] == [f"g{i}" for i in range(7)]
    assert "l1-prox-adam × 2" in " ".join(page.text.split())
    assert "±" in page.text
    for column in ("accuracy %", "zeros %", "inputs used", "kkt residual", "l1 norm"):
        assert column in page.text
    only = reported(tmp_path / "runs", "--runs", "l1-prox-seed*")
    assert "elastic-net" not in only.text
    assert only.all("input")[1:] == []


def test_a_curve_is_drawn_where_its_values_are():
    points = [(0, 0.0), (50, 0.5), (100, 1.0)]
    chart = Page(line_chart([torchreg_line(points)], percent=True))
    (drawn,) = [
        [tuple(map(float, pair.split(","))) for pair in line["points"].split()] for line in chart.all("polyline")
    ]
    assert [x for x, _ in drawn] == pytest.approx([54, 241, 428], abs=0.1)
    assert [y for _, y in drawn] == pytest.approx([204, 107, 10], abs=0.1)


def torchreg_line(points):
    from torchreg.cli.report.charts import Line

    return Line(points, "c0", "label")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [float("nan")],
        [float("inf"), 1.0],
        [0.0],
        [1e-320, 1e300],
        [-1.7e308, 1.7e308],
        [1.0, 1.0 + 2e-16],
        [-5.0, float("nan"), 5.0],
        [1e-300, 2e-300],
        [1e300, 1e-300],
    ],
    ids=str,
)
def test_odd_values_are_drawn_inside_the_chart(values, log):
    chart = Page(line_chart([torchreg_line(list(enumerate(values)))], log=log))
    numbers = [v for line in chart.all("polyline") for pair in line["points"].split() for v in pair.split(",")]
    numbers += [dot[key] for dot in chart.all("circle") for key in ("cx", "cy")]
    numbers += [line["y1"] for line in chart.all("line")]
    assert all(-1 <= float(v) <= 441 for v in numbers)


def test_odd_steps_are_drawn():
    for steps in ([-5, 2**62], [7, 7], [0, 1], [-(2**63), 2**63 - 1]):
        Page(line_chart([torchreg_line([(step, 1.0) for step in steps])]))


def test_a_long_curve_keeps_its_end_and_its_spikes():
    curve = Curve()
    for i in range(100_000):
        curve.add(i, float(i))
    assert len(curve.points()) <= 2001
    assert curve.points()[-1] == (99_999, 99_999.0)
    points = [(i, 1.0 if i == 777 else 0.0) for i in range(2000)]
    assert (777, 1.0) in thinned(points)
    assert len(thinned(points)) <= 300


@pytest.mark.parametrize("count", [2000, 2001, 50_001])
def test_a_long_curve_keeps_every_extreme_evenly(count):
    curve, special = Curve(), {count // 3: 100.0, count // 2: math.nan, count - 7: -100.0}
    for i in range(count):
        curve.add(i, special.get(i, i % 7.0))
    points = curve.points()
    assert [i for i, v in points if not 0 <= v < 7] == sorted(special)
    assert max(b[0] - a[0] for a, b in itertools.pairwise(points)) < max(2, count / 100)
    assert len(points) <= 2001


def test_a_resumed_run_replaces_its_steps():
    curve = Curve()
    for step, value in [(0, 1.0), (10, 2.0), (20, 3.0), (10, 5.0)]:
        curve.add(step, value)
    assert curve.points() == [(0, 1.0), (10, 5.0), (20, 3.0)]
    assert curve.last == 3.0


def test_values_that_are_not_finite_are_named(tmp_path):
    nan = float("nan")
    page = reported(written(tmp_path / "run", **{"loss/data": [1.0, nan, nan, 2.0], "sparsity/total": [nan]}))
    assert "not finite at step 10" in page.text
    assert "NaN" in page.text


def test_a_truncated_file_is_shown_as_far_as_it_goes(tmp_path, capsys):
    folder = written(tmp_path / "logs" / "run", **{"loss/data": [1.0, 2.0, 3.0]})
    whole = event_file(folder).read_bytes()
    values = set()
    for end in range(len(whole)):
        event_file(folder).write_bytes(whole[:end])
        run = read_run("run", [event_file(folder)])
        values.add(len(run.curves["loss/data"].steps) if run.curves else 0)
        assert len(run.problems) <= 1
    assert values == {0, 1, 2}
    event_file(folder).write_bytes(whole[:-3])
    page = reported(tmp_path / "logs")
    assert "ends in the middle of a record" in page.text
    assert capsys.readouterr().err.count("warning: run: ") == 1


def test_a_flipped_bit_is_found(tmp_path):
    folder = written(tmp_path / "run", **{"loss/data": [1.0, 2.0, 3.0]})
    whole = event_file(folder).read_bytes()
    place = whole.index(struct.pack("<f", 2.0))
    event_file(folder).write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    run = read_run("run", [event_file(folder)])
    assert run.curves["loss/data"].points() == [(0, 1.0)]
    assert "damaged at byte" in run.problems[0]


def test_damaged_files_never_break_the_page(trained, tmp_path, capsys):
    whole = max(trained.glob("*tfevents*"), key=lambda path: path.stat().st_size).read_bytes()
    draw, sound = random.Random(0), 0
    target = tmp_path / "logs"
    target.mkdir()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (target / "events.out.tfevents.1").write_bytes(damaged)
        status = main(["report", str(target)])
        sound += status == 0
        said = capsys.readouterr().err
        assert status == 0 or said.count("\n") == 1
        if status == 0:
            Page((target / "report.html").read_text(encoding="utf-8"))
    assert sound > 30


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"\0" * 100, b"\xff" * 100, struct.pack("<QI", 1 << 60, 0) + b"x"],
    ids=["empty", "text", "zeros", "ones", "a length beyond the file"],
)
def test_files_that_are_none_are_refused(content, tmp_path, capsys):
    (tmp_path / "events.out.tfevents.1").write_bytes(content)
    assert_refused(capsys, ["report", tmp_path], "hold nothing to show")
    assert [path.name for path in tmp_path.iterdir()] == ["events.out.tfevents.1"]


def test_a_record_larger_than_memory_is_passed_over(tmp_path):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    folder = written(tmp_path / "run", **{"loss/data": [1.0]})
    length = struct.pack("<Q", 1 << 50)
    event_file(folder).write_bytes(length + struct.pack("<I", masked_crc32c(length)) + event_file(folder).read_bytes())
    assert read_run("run", [event_file(folder)]).curves == {}


def test_hostile_names_are_text(tmp_path):
    folder = tmp_path / "logs" / "<b>bold</b>&amp;"
    picture = torch.zeros(1, 4, 4)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for start in ("", "loss/", "sparsity/", "groups/", "final/", "threshold/"):
            writer.add_scalar(start + HOSTILE, 1.0, 1)
        for start in ("", "mask/", "barcode/"):
            writer.add_image(start + HOSTILE, picture, 1)
        writer.add_histogram(HOSTILE, torch.ones(3), 1)
        writer.add_hparams({HOSTILE: HOSTILE}, {"final/" + HOSTILE: 1.0}, run_name=".")
        writer.add_scalar("x" * 10_000, 1.0, 1)
    page = reported(tmp_path / "logs")
    assert not page.all("b")
    assert "<b>bold</b>&amp;" in page.text
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    assert "x" * 200 not in page.text


def test_only_whole_png_files_become_pictures():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width, height, rest=b""):
        head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rest + chunk(b"IEND", b"")

    assert png_size(png(3, 4)) == (3, 4)
    assert png_size(png(3, 4)[:-1]) is None
    assert png_size(png(60_000, 60_000)) is None
    assert png_size(png(0, 4)) is None
    assert png_size(png(3, 4, b"\0\0\0\1IDATx1234")) is None
    assert png_size(b"<svg onload='alert(1)'/>") is None


def test_many_tags_are_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr("torchreg.cli.report.runs.MOST_TAGS", 20)
    page = reported(written(tmp_path / "run", **{f"sparsity/layer{i}": [0.5] for i in range(30)}))
    assert "of more than 20 tags the first are read" in page.text
    monkeypatch.undo()
    page = reported(written(tmp_path / "more", **{f"sparsity/layer{i}": [0.5] for i in range(80)}))
    assert "20 more are not shown" in page.text
    assert page.text.index("layer9 ") < page.text.index("layer10 ")


def test_of_very_many_runs_the_first_are_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchreg.cli.report.MOST_RUNS", 3)
    for i in range(5):
        written(tmp_path / f"run{i}", **{"loss/data": [1.0]})
    page = reported(tmp_path)
    assert "3 runs (2 more are left out)" in page.text
    assert "run4" not in page.text
    assert "of 5 runs the first 3 are shown" in capsys.readouterr().err


def test_images_of_a_run_are_limited(trained, monkeypatch):
    monkeypatch.setattr("torchreg.cli.report.runs.LARGEST_IMAGES", 600)
    files = event_files(trained)["."]
    run = read_run("run", files)
    assert 0 < sum(len(picture.png) for picture in run.pictures.values()) == run.image_bytes <= 600
    assert any("of images the first are read" in problem for problem in run.problems)


def test_folders_without_runs_are_refused(tmp_path, capsys):
    assert_refused(capsys, ["report", tmp_path], "holds no TensorBoard event files")
    assert_refused(capsys, ["report", tmp_path / "absent"], "does not exist")
    (tmp_path / "file").write_text("x")
    assert_refused(capsys, ["report", tmp_path / "file"], "is no folder")
    assert_refused(capsys, ["report", tmp_path / ("x" * 300)], "File name too long")
    (tmp_path / "events.out.tfevents.folder").mkdir()
    assert event_files(tmp_path) == {}
    written(tmp_path / "run", a=[1.0])
    assert_refused(capsys, ["report", tmp_path, "--runs", "other*"], "matches none of 1 runs")
    assert not (tmp_path / "report.html").exists()


def test_only_reports_are_replaced(tmp_path, capsys):
    folder = written(tmp_path / "run", **{"loss/data": [1.0]})
    out = tmp_path / "mine.html"
    out.write_text("<html>mine</html>")
    assert_refused(capsys, ["report", folder, "--out", out], "no report")
    assert out.read_text() == "<html>mine</html>"
    assert_refused(capsys, ["report", folder, "--out", tmp_path], "not a regular file")
    assert_refused(capsys, ["report", folder, "--out", tmp_path / "absent" / "x.html"], "there is no folder")
    first, again = reported(folder).text, reported(folder).text
    assert first == again
    assert stat.S_IMODE((folder / "report.html").stat().st_mode) == 0o666 & ~umask()
    assert sorted(path.suffix for path in folder.iterdir() if "tfevents" not in path.name) == [".html"]


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_that_takes_no_files_needs_another_name(tmp_path, capsys, monkeypatch):
    folder = written(tmp_path / "run", **{"loss/data": [1.0]})
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(folder) or not mode & os.W_OK)
    assert_refused(capsys, ["report", folder], "can't be written: give --out")
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert re.search(r"report of 1 run: .*page\.html\n", capsys.readouterr().out)
