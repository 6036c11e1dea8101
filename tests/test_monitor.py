"""The monitor logs what is true, reads nothing between logs, and never stops a training."""

import json
import re
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter

import torchreg
from torchreg import L1, L2, ElasticNet, ProxAdamW, ProxSGD, Regularizer, SparsityMonitor
from torchreg.monitor import counting, transfer
from torchreg.monitor import tensorboard as monitor_module


class Recorder:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        assert isinstance(value, (int, float))
        self.scalars.setdefault(tag, []).append((step, value))


def linear(*rows) -> nn.Linear:
    w = torch.tensor(rows)
    net = nn.Linear(w.shape[1], w.shape[0], bias=False)
    net.weight.data = w
    return net


def read(logdir) -> EventAccumulator:
    return EventAccumulator(
        str(logdir), size_guidance=dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    ).Reload()


def test_logs_every_so_many_steps_and_the_rest_when_closed():
    writer = Recorder()
    with SparsityMonitor(linear([0.0, 1.0]), writer, every=3) as monitor:
        for _ in range(7):
            monitor.step()
    assert writer.scalars["sparsity/total"] == [(3, 0.5), (6, 0.5), (7, 0.5)]
    monitor.close()
    assert len(writer.scalars["sparsity/total"]) == 3, "closing twice logs nothing twice"


def test_values_are_those_of_the_model():
    net = nn.Sequential(linear([0.0, 3.0, -4.0, 0.0]), linear([1.0], [0.0]))
    reg = Regularizer(net, {"0.weight": L1(0.5), "1.weight": L2(1.0)})
    opt = ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    reg.strength_scale = 0.5
    writer = Recorder()
    SparsityMonitor(reg, writer, every=1, optimizer=opt).step(loss=torch.tensor(2.5, requires_grad=True))
    last = {tag: entries[-1][1] for tag, entries in writer.scalars.items()}
    assert last == pytest.approx(
        {
            "sparsity/total": 0.5,
            "sparsity/0.weight": 0.5,
            "sparsity/1.weight": 0.5,
            "zeros/new": 0,
            "zeros/revived": 0,
            "loss/data": 2.5,
            "loss/penalty": 0.5 * (0.5 * 7 + 1.0),
            "strength_scale/group0": 0.5,
            "strength_scale/group1": 0.5,
            "threshold/group0": 0.1 * 10 * 0.5 * 0.5,
            "threshold/group1": 0.0,
        }
    )


def test_an_optimizer_whose_weights_have_thresholds_of_their_own_logs_the_scale_alone():
    writer = Recorder()
    opt = ProxAdamW(Regularizer(linear([1.0, 1.0]), L1(0.3)).param_groups())
    SparsityMonitor(opt, writer, every=1, optimizer=opt).step()
    penalised = {i for i, group in enumerate(opt.param_groups) if group["penalty"] is not None}
    assert {tag for tag in writer.scalars if "/group" in tag and "sparsity" not in tag} == {
        f"strength_scale/group{i}" for i in penalised
    }


def test_threshold_is_where_the_step_starts_to_give_zero():
    net = linear([1.0, 1.0])
    opt = ProxSGD(Regularizer(net, ElasticNet(0.3, 2.0)).param_groups(), lr=0.2, momentum=0.5)
    writer = Recorder()
    SparsityMonitor(net, writer, every=1, optimizer=opt).step()
    threshold = writer.scalars["threshold/group0"][0][1]
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[threshold * 0.999, threshold * 1.001]]))
    net.weight.grad = torch.zeros(1, 2)
    opt.step()
    assert (net.weight == 0).tolist() == [[True, False]]


def test_newly_zero_and_revived_weights_are_counted_since_the_last_log():
    net = linear([0.0, 0.0, 1.0, 1.0, 1.0])
    writer = Recorder()
    monitor = SparsityMonitor(net, writer, every=2)
    for values in ([9.0, 9.0, 9.0, 9.0, 9.0], [1.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 5, [0.0, 1.0, 1.0, 0.0, 0.0]):
        net.weight.data = torch.tensor([values])
        monitor.step()
    assert writer.scalars["zeros/new"] == [(2, 2), (4, 2)]
    assert writer.scalars["zeros/revived"] == [(2, 1), (4, 2)]


def test_one_transfer_per_log_and_no_read_between_logs(monkeypatch):
    """Fetching is the only place where a device is waited for: nothing before it reads a tensor's value."""
    transfers = []

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    def counting_fetch(tensors):
        transfers.append(Reads.count)
        return [t.detach().clone() for t in tensors]

    monkeypatch.setattr(transfer, "fetch", counting_fetch)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Conv1d(8, 3, 1))
    opt = ProxSGD(net.parameters(), lr=0.1, penalty=L1(0.1))
    writer = SummaryWriter.__new__(SummaryWriter)  # its methods are asked for, not called
    monitor = SparsityMonitor(net, writer, every=5, optimizer=opt, histograms=True, images=True)
    monkeypatch.setattr(monitor, "_write", lambda *args, **kwargs: None)
    loss = torch.tensor(1.0)
    with Reads():
        for _ in range(4):
            monitor.step(loss=loss)
        assert (transfers, Reads.count) == ([], 0)
        monitor.step(loss=loss)
    assert transfers == [0]


def trained(fused, writer, steps=7, monitor=None):
    """A monitored training whose steps are fused or not; the same numbers either way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)).double()
    reg = Regularizer(net, {"0.weight": L1(0.02), "2.weight": ElasticNet(0.01, 0.02)})
    reg.strength_scale = 0.5
    opt = ProxSGD(reg.param_groups(), lr=0.2, momentum=0.9, fused=fused)
    x, y = torch.randn(64, 40, dtype=torch.float64), torch.randint(0, 4, (64,))
    with SparsityMonitor(reg, writer, every=2, optimizer=opt) as watching:
        if monitor:
            monitor(watching)
        for _ in range(steps):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            watching.step(loss=loss)
    return watching


def test_a_fused_step_s_own_counts_are_logged(monkeypatch):
    plain, fused, each = Recorder(), Recorder(), Recorder()
    report = trained(False, plain).report
    trained(False, each, monitor=lambda m: setattr(m, "every", 1))
    monkeypatch.setattr(counting, "counted", lambda w: pytest.fail("a pass over the weights"))
    monkeypatch.setattr(Regularizer, "forward", lambda self: pytest.fail("a pass over the weights"))
    counted = trained(True, fused)
    assert set(fused.scalars) == set(plain.scalars)
    for tag in set(plain.scalars) - {"zeros/new", "zeros/revived"}:
        steps, values = zip(*plain.scalars[tag], strict=True)
        assert fused.scalars[tag] == [(s, pytest.approx(v, rel=1e-9)) for s, v in zip(steps, values, strict=True)], tag
    for tag in ("zeros/new", "zeros/revived"):  # every step's changes, not those between two logs
        changes = dict(each.scalars[tag])
        expected = [sum(changes[s] for s in steps) for steps in ((1, 2), (3, 4), (5, 6), (7,))]
        assert [value for _, value in fused.scalars[tag]] == expected
        assert sum(expected) > 0
    assert counted._were_zero == {}, "no bytes are kept where the step counts"
    assert counted.report["0.weight"].zeros == report["0.weight"].zeros > 0
    assert counted.report["0.weight"].l2_norm == pytest.approx(report["0.weight"].l2_norm)
    assert counted.report["0.weight"].zero_rows is None
    monkeypatch.undo()
    assert counted.log()["0.weight"].zero_rows == report["0.weight"].zero_rows


@pytest.mark.parametrize(
    "absent", [lambda step: {step % 2}, lambda step: {0, 1} if step % 3 else set()], ids=["turns", "all"]
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_changes_are_every_step_s_whichever_parameters_had_gradients(absent, dtypes):
    def logged(fused, every):
        torch.manual_seed(0)
        params = nn.ParameterList([nn.Parameter(torch.randn(2000, dtype=dtype)) for dtype in dtypes])
        reg = Regularizer(params, {"*": L1(0.3)})
        opt = ProxSGD(reg.param_groups(), lr=0.3, fused=fused)
        writer = Recorder()
        with SparsityMonitor(reg, writer, every=every, optimizer=opt) as monitor:
            for step in range(8):
                for i, p in enumerate(params):
                    p.grad = None if i in absent(step) else torch.randn(p.shape, dtype=p.dtype)
                opt.step()
                monitor.step()
        return writer.scalars

    ours, each = logged(True, 4), logged(False, 1)
    for tag in ("zeros/new", "zeros/revived"):
        changes = dict(each[tag])
        assert ours[tag] == [(last, sum(changes[s] for s in range(last - 3, last + 1))) for last in (4, 8)]
        assert sum(changes.values()) > 0


def test_what_the_step_did_not_count_is_counted_by_the_monitor():
    net = nn.Sequential(linear([0.0, 3.0, 0.0, 0.1]), linear([1.0], [0.0]))
    net[1].weight.requires_grad_(False)
    opt = ProxSGD([net[0].weight], lr=1.0, penalty=L1(0.2), fused=True)
    writer = Recorder()
    with SparsityMonitor(net, writer, every=1, optimizer=opt) as monitor:
        net[0].weight.grad = torch.zeros(1, 4)
        opt.step()
        net[1].weight.zero_()
        monitor.step()
    assert writer.scalars["sparsity/0.weight"] == [(1, 0.75)]
    assert writer.scalars["sparsity/1.weight"] == [(1, 1.0)]
    assert writer.scalars["zeros/new"] == [(1, 2)]


def test_a_log_still_on_its_way_is_written_with_the_next_one_or_when_flushed(monkeypatch):
    """As on a GPU, where nothing waits for the counts."""
    plain, late = Recorder(), Recorder()
    trained(True, plain)
    seen = []

    class Slow(transfer.Transfer):
        def __init__(self, tensors, wait):
            super().__init__(tensors, wait=True)
            self.arrived = wait
            seen.append({tag: len(values) for tag, values in late.scalars.items()}.get("sparsity/total", 0))

        def tensors(self):
            return self._tensors

    monkeypatch.setattr(monitor_module, "Transfer", Slow)
    trained(True, late)
    assert seen == [0, 0, 1, 2]
    assert late.scalars == plain.scalars


def test_tensorboards_own_reader_finds_everything(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
    reg = Regularizer(net, L1(1e-2))
    opt = ProxSGD(reg.param_groups(), lr=0.1)
    writer = SummaryWriter(tmp_path / "run")
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    options = {"histograms": True, "images": True, "custom_scalars": True}
    with SparsityMonitor(reg, writer, every=2, optimizer=opt, **options) as monitor:
        for _ in range(4):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            monitor.step(loss=loss)
        monitor.hparams({"lr": 0.1, "penalty": reg.assignments[0].penalty}, {"final/sparsity": monitor.report.fraction})
    writer.close()

    assert [p.name for p in tmp_path.iterdir()] == ["run"], "no sub-runs"
    events = read(tmp_path / "run")
    tags = events.Tags()
    assert {"sparsity/total", "sparsity/0.weight", "loss/data", "loss/penalty", "zeros/new"} <= set(tags["scalars"])
    assert [e.step for e in events.Scalars("sparsity/total")] == [2, 4]
    assert events.Scalars("sparsity/total")[-1].value == pytest.approx(torchreg.sparsity(reg).fraction)
    histogram = events.Histograms("weights/2.weight")[-1].histogram_value
    kept = net[2].weight.detach()[net[2].weight != 0]
    assert histogram.num == sum(histogram.bucket) == kept.numel()
    assert histogram.min == pytest.approx(kept.min().item())
    assert histogram.sum == pytest.approx(kept.sum().item(), rel=1e-4)
    image = events.Images("mask/2.weight")[-1]
    assert (image.height, image.width) == (24, 292), "repeated until the longer side is at least 256, and framed"
    assert "custom_scalars__config__" in tags["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert events.Scalars("final/sparsity")[0].value == pytest.approx(torchreg.sparsity(reg).fraction)


def test_tensorboardx_works_as_well(tmp_path):
    tensorboardx = pytest.importorskip("tensorboardX")
    writer = tensorboardx.SummaryWriter(str(tmp_path / "run"))
    options = {"histograms": True, "images": True, "custom_scalars": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with SparsityMonitor(linear([0.0, 2.0], [1.0, 0.0]), writer, every=1, **options) as monitor:
            monitor.step()
            monitor.hparams({"lr": 0.1}, {"sparsity": 0.5})
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    events = read(tmp_path / "run")
    assert events.Scalars("sparsity/total")[0].value == 0.5
    assert events.Histograms("weights/weight")[0].histogram_value.num == 2


def test_tensorboards_server_serves_the_run(tmp_path):
    writer = SummaryWriter(tmp_path / "run")
    with SparsityMonitor(linear([0.0, 2.0]), writer, every=1) as monitor:
        monitor.step()
    writer.close()
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(tmp_path), "--port", "0", "--load_fast", "false"])
    url = server.launch()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    port = re.search(r":(\d+)", url.removeprefix("http://")).group(1)
    with opener.open(f"http://localhost:{port}/data/plugin/scalars/tags", timeout=60) as answer:
        tags = json.load(answer)
    assert {"sparsity/total", "sparsity/weight"} <= set(tags["run"])


class Failing(Recorder):
    def add_scalar(self, tag, value, step):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise ValueError("closed")


def test_a_failing_writer_warns_once_and_never_stops_the_training():
    monitor = SparsityMonitor(linear([0.0, 1.0]), Failing(), every=1)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        monitor.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step()
        monitor.close()
    assert monitor.report.fraction == 0.5


def test_a_method_that_fails_leaves_the_others_alone():
    class NoImages(Recorder):
        def add_image(self, *args, **kwargs):
            raise RuntimeError("no image today")

    writer = NoImages()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with SparsityMonitor(linear([0.0, 1.0]), writer, every=1, images=True) as monitor:
            for _ in range(3):
                monitor.step()
    assert len(writer.scalars["sparsity/total"]) == 3
    assert [w.filename for w in caught] == [__file__], "one warning, about the user's line"
    assert "add_image() is not called any more" in str(caught[0].message)


@pytest.mark.parametrize("flying", [None, KeyError("the user's")], ids=["no error", "an error"])
def test_a_closing_log_that_fails_does_not_replace_a_flying_error(flying):
    def train(weights):
        with SparsityMonitor(weights, Recorder()) as monitor:
            monitor.step()
            weights["w"] = torch.ones(2, device="meta")
            if flying:
                raise flying

    with pytest.raises(KeyError if flying else ValueError, match="the user's" if flying else "'w' on the meta device"):
        train({"w": torch.ones(2)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_warns_and_never_stops_the_training(tmp_path):
    """A real SummaryWriter whose file can't take a byte: its own thread fails, the next call tells."""
    writer = SummaryWriter(tmp_path, flush_secs=1)
    record_writer = writer.file_writer.event_writer._async_writer._writer
    record_writer._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with SparsityMonitor(linear([0.0, 1.0]), writer, every=1) as monitor:
            for _ in range(50):
                monitor.step()
    assert monitor.steps == 50
    assert sum("nothing more is logged" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("images", [False, True])
def test_what_the_writer_lacks_is_said_at_once(images):
    with pytest.raises(TypeError, match="add_image" if images else "add_histogram_raw"):
        SparsityMonitor(linear([1.0]), Recorder(), histograms=not images, images=images)
    with pytest.raises(TypeError, match="add_scalar"):
        SparsityMonitor(linear([1.0]), object())
    with pytest.raises(TypeError, match="add_hparams"):
        SparsityMonitor(linear([1.0]), Recorder()).hparams({}, {})


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_a_senseless_interval_is_refused(every):
    with pytest.raises(ValueError, match="positive integer"):
        SparsityMonitor(linear([1.0]), Recorder(), every=every)


def test_nothing_to_watch_is_refused():
    with pytest.raises(TypeError, match="no floating point parameter"):
        SparsityMonitor(nn.ReLU(), Recorder())


def test_tensors_without_values_are_refused_by_name():
    for net in (nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)):
        with pytest.raises(ValueError, match="'weight' on the meta device or not initialised"):
            SparsityMonitor(net, Recorder())


def test_a_loss_of_several_elements_is_refused_at_once():
    monitor = SparsityMonitor(linear([1.0]), Recorder(), every=100)
    monitor.step(loss=torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        monitor.step(loss=torch.ones(3))
    assert monitor.steps == 1


@pytest.mark.parametrize("value", ["good", None, torch.ones(2)])
def test_a_metric_that_is_no_number_is_refused_by_name(value, tmp_path):
    writer = SummaryWriter(tmp_path)
    monitor = SparsityMonitor(linear([1.0]), writer)
    with pytest.raises(TypeError, match="metric 'final/grade'"):
        monitor.hparams({}, {"final/grade": value})
    monitor.hparams({"lr": 0.1}, {"final/loss": torch.tensor(0.5), "final/grade": np.float32(2)})
    writer.close()
    assert read(tmp_path).Scalars("final/loss")[0].value == 0.5


@pytest.mark.parametrize("method", ["parameters", "named_parameters"])
def test_a_source_that_can_be_read_only_once_is_kept(method):
    net, writer = linear([0.0, 1.0]), Recorder()
    monitor = SparsityMonitor(getattr(net, method)(), writer, every=1)
    for _ in range(2):
        monitor.step()
    assert writer.scalars["sparsity/total"] == [(1, 0.5), (2, 0.5)]


def test_empty_weights_have_no_picture():
    class Pictures(Recorder):
        add_image = add_histogram_raw = lambda self, tag, *args, **kwargs: self.scalars.setdefault(tag, [])

    writer = Pictures()
    source = {"full": torch.ones(2, 2), "empty": torch.ones(0, 2)}
    SparsityMonitor(source, writer, every=1, images=True, histograms=True).step()
    assert {"mask/full", "weights/full", "sparsity/empty"} <= set(writer.scalars)
    assert not {"mask/empty", "weights/empty"} & set(writer.scalars)


def test_a_resumed_run_goes_on_along_the_same_axis():
    net, writer = linear([0.0, 1.0]), Recorder()
    first = SparsityMonitor(net, writer, every=2)
    for _ in range(3):
        first.step()
    second = SparsityMonitor(net, writer, every=2)
    second.load_state_dict(first.state_dict())
    second.step()
    assert [step for step, _ in writer.scalars["sparsity/total"]] == [2, 4]


def test_histograms_of_awkward_weights():
    from torchreg.monitor.pictures import Histogram, nonzero_histogram

    def histogram(*values):
        return Histogram.from_vector(nonzero_histogram(torch.tensor(values)))

    assert histogram() is None
    assert histogram(0.0, float("nan")) is None
    one = histogram(0.0, 2.0, 2.0, float("inf"))
    assert (one.count, one.least, one.greatest, sum(one.counts)) == (2, 2.0, 2.0, 2)
    w = torch.randn(10_000)
    many = Histogram.from_vector(nonzero_histogram(w))
    counts, _ = np.histogram(w.numpy(), bins=64, range=(w.min().item(), w.max().item()))
    assert np.abs(np.array(many.counts) - counts).max() <= 3, "up to rounding at the bins' edges"


def test_large_masks_are_averaged_down():
    from torchreg.monitor.pictures import mask_image

    w = torch.zeros(1024, 30)
    w[::2] = 1
    image = mask_image(w)
    assert image.shape == (512, 30)
    assert set(image.unique().tolist()) <= {127, 128}


def test_a_tall_mask_is_centred_on_a_square_and_a_white_one_has_an_edge():
    from torchreg.monitor.pictures import BLUE, FRAME, enlarged

    image = enlarged(torch.full((64, 16), 255, dtype=torch.uint8))
    assert image.shape == (256 + 2 * FRAME, 256 + 2 * FRAME, 3)
    white = (image == 255).all(2)
    assert white[FRAME:-FRAME, FRAME + 96 : FRAME + 160].all()
    assert white.sum() == 256 * 64
    assert (image[~white] == BLUE).all()
    assert 255 not in BLUE, "told from a white mask"


@pytest.mark.parametrize("weights", [None, "averaged"])
def test_each_chart_of_the_layout_finds_its_tags(weights):
    seen, charts = {}, {}

    class Charts(Recorder):
        def add_custom_scalars(self, layout):
            charts.update(layout)

    reg = Regularizer(linear([0.0, 2.0]), torchreg.GroupLasso(0.1, "rows"))
    opt = ProxSGD(reg.param_groups(), lr=0.1)
    writer = Charts()
    monitor = SparsityMonitor(reg, writer, every=1, optimizer=opt, custom_scalars=True, weights=weights)
    monitor.step(loss=1.0)
    ((title, found),) = charts.items()
    assert title == ("torchreg: averaged weights" if weights else "torchreg")
    for name, (_, (pattern,)) in found.items():
        seen[name] = sorted(tag for tag in writer.scalars if re.match(pattern, tag))
    start = f"{weights}/" if weights else ""
    assert seen["data loss"] == [f"{start}loss/data"]
    assert seen["penalty"] == [f"{start}loss/penalty"]
    assert seen["exact zeros"] == [f"{start}sparsity/total"]
    assert seen["exact zeros of each parameter"] == [f"{start}sparsity/weight"]
    assert seen["weights that became zero"] == [f"{start}zeros/new"]
    assert seen["weights that woke up"] == [f"{start}zeros/revived"]
    assert seen["groups alive"] == [f"{start}groups/weight"]
    assert not [name for name in seen if not seen[name] and name != "threshold of the proximal step"]


def test_the_text_page_gets_tables_once():
    texts = []

    class Texts(Recorder):
        def add_text(self, tag, text, step):
            texts.append((tag, step, text))

    model = nn.Sequential(linear([0.0, 0.0], [1.0, 0.0]), nn.Linear(2, 1))
    reg = Regularizer(model, {"0.weight": torchreg.GroupLasso(0.5, "rows"), "1.weight": L1(torch.ones(1, 2))})
    monitor = SparsityMonitor(reg, Texts(), every=2, text=True)
    for _ in range(5):
        monitor.step()
    monitor.close()
    monitor.close()
    assert [(tag, step) for tag, step, _ in texts] == [
        ("torchreg/penalties", 2),
        ("torchreg/sparsity", 5),
        ("torchreg/groups", 5),
    ]
    penalties, zeros, groups = (text for *_, text in texts)
    assert "| `0.weight` | 2×2 | '0.weight' | GroupLasso strength=0.5, groups=rows |" in penalties
    assert "L1 strength=1…1" in penalties or "L1 1…1" in penalties
    assert "none: bias" in penalties
    assert "| `0.weight` | 2×2 | 4 | 3 | 75.0 | 1 of 2 | 1 of 2 |" in zeros
    assert "| `0.weight` | rows | 2 | 1 |" in groups
    with pytest.raises(TypeError, match="add_text"):
        SparsityMonitor(reg, Recorder(), text=True)


def test_a_text_table_has_an_end_and_takes_any_name():
    from torchreg.monitor.text import LONGEST_TABLE, markdown

    table = markdown(("name", "n"), [(f"a|`b\n{i}", "1") for i in range(LONGEST_TABLE + 7)])
    assert table.endswith("… and 7 more.")
    assert all(re.fullmatch(r"\| .+ \| .+ \|", line) for line in table.splitlines()[:-2])
    assert "`a\\|b 0`" in table
