"""Under Accelerate penalties give the weights of the plain loop, are in its states, and in all its trackers."""

import json

import pytest
import torch
from example import percent, printed
from feature_cases import assert_same as assert_features_same
from feature_cases import data_loss, in_a_trainer, of_trainers
from feature_cases import trained as trained_plainly
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchreg import L1, ProxAdamW, Proximal, ProxSGD, Regularizer, SparsityMonitor, TargetSparsity
from torchreg.schedules import WarmupStrength

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from torchreg.integrations.accelerate import (  # noqa: E402
    AcceleratedRegularization,
    TrackersWriter,
    WriterTracker,
)

pytestmark = pytest.mark.filterwarnings("ignore")
RULES = {"*.weight": L1(0.03)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size=4)


def accelerator(**options):
    accelerate.state.AcceleratorState._reset_state(True)
    return accelerate.Accelerator(cpu=True, **options)


def built(model, route):
    reg = Regularizer(model, RULES)
    if route == "hook":
        return RULES, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return reg, Proximal(torch.optim.SGD(reg.param_groups(), lr=0.1, momentum=0.9))


def warmup(holder):
    return WarmupStrength(holder, until=11)


def target(optimizer):
    return TargetSparsity(optimizer, 0.6, until=15)


def train(acc, route, schedule=None, epochs=3, load=None, **options):
    model = network()
    rules, optimizer = built(model, route)
    model, optimizer, batches = acc.prepare(model, optimizer, loader())
    options = {"route": route, "schedule": schedule, **options}
    regularization = AcceleratedRegularization(acc, model, optimizer, rules, **options)
    if load:
        acc.load_state(load)
    for _ in range(epochs):
        for x, y in batches:
            with acc.accumulate(model):
                acc.backward(nn.functional.cross_entropy(model(x), y))
                if acc.sync_gradients:
                    acc.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return model, regularization


def plain(route, schedule=None, epochs=3, accumulate=1):
    """The same loop without Accelerate."""
    model = network()
    reg = Regularizer(model, RULES)
    _, optimizer = built(model, route)
    if route == "hook":
        reg.attach(optimizer)
    moves = schedule(reg if route == "hook" else optimizer) if schedule else None
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if moves:
                    moves.step()
    return model


def assert_same(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("route", "schedule"), [("hook", warmup), ("groups", target)])
def test_a_training_gives_the_weights_of_the_plain_loop(route, schedule, accumulate):
    model, regularization = train(accelerator(gradient_accumulation_steps=accumulate), route, schedule)
    assert_same(model, plain(route, schedule, accumulate=accumulate))
    assert regularization.steps == 18 // accumulate


@pytest.mark.parametrize(("route", "schedule"), [("hook", warmup), ("groups", target)])
def test_a_resumed_training_ends_with_the_same_weights(route, schedule, tmp_path):
    acc = accelerator()
    train(acc, route, schedule, epochs=1)
    acc.save_state(str(tmp_path))
    torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    model, regularization = train(accelerator(), route, schedule, epochs=2, load=str(tmp_path))
    assert_same(model, plain(route, schedule))
    assert regularization.steps == regularization.monitor.steps == 18


def test_steps_that_a_grad_scaler_skips_shrink_nothing():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    acc = accelerator()
    acc.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert optimizer.scaler is not None
    regularization = AcceleratedRegularization(acc, model, optimizer, RULES)
    for factor in (float("inf"), 0.0):
        acc.scaler.scale(model(torch.ones(2, 6)).sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        if factor:
            assert optimizer.step_was_skipped
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert regularization.steps == 1
    assert torch.allclose(model[0].weight, before[0] - 0.1 * 0.03 * before[0].sign(), atol=1e-7)


@of_trainers
def test_what_needs_no_more_than_the_loop_gives_its_weights(penalty, feature):
    def train(model, part, data):
        acc = accelerator()
        model, optimizer, batches = acc.prepare(model, part.optimizer, DataLoader(data, batch_size=8))
        for x, y in batches:
            optimizer.zero_grad()
            acc.backward(data_loss(model, x, y) + part.term())
            optimizer.step()

    assert_features_same(in_a_trainer(penalty, feature, train), trained_plainly(feature, penalty))


def events(folder):
    """What is logged in a run, which is one folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in folder.rglob("events*")}
    return EventAccumulator(str(folder)).Reload()


def steps_of(run, tag):
    return [event.step for event in run.Scalars(tag)]


def other_tracker():
    from accelerate.tracking import GeneralTracker

    class Lists(GeneralTracker):
        name, requires_logging_directory = "lists", False

        def __init__(self):
            super().__init__()
            self.lines, self.images, self.tables = [], [], {}

        tracker = property(lambda self: self.lines)

        def log(self, values, step=None, **kwargs):
            self.lines.append((step, json.loads(json.dumps(values))))

        def log_images(self, values, step=None, **kwargs):
            self.images += [(step, tag, image.shape) for tag, images in values.items() for image in images]

        def log_table(self, table_name, columns=None, data=None, dataframe=None, step=None, **kwargs):
            self.tables[table_name] = columns, data

    return Lists()


EVERYTHING = {"histograms": True, "images": True, "text": True, "custom_scalars": True}


def test_all_trackers_get_the_numbers(tmp_path):
    lists = other_tracker()
    acc = accelerator(log_with=["tensorboard", lists], project_dir=str(tmp_path))
    acc.init_trackers("run")
    _, regularization = train(acc, "groups", every=7, monitor=EVERYTHING)
    acc.log({"loss": 0.5}, step=18)
    regularization.detach()
    acc.end_training()
    *logs, (_, loss), last = lists.lines
    assert [step for step, _ in [*logs, last]] == [7, 14, 18]
    assert loss == {"loss": 0.5}
    assert {"sparsity/total", "loss/penalty", "threshold/group0"} <= set(last[1])
    assert lists.images[0][:2] == (7, "mask/0.weight")
    assert lists.images[0][2][2] == 3, "RGB, and the channels last"
    columns, rows = lists.tables["torchreg/sparsity"]
    assert columns[0] == "parameter"
    assert [row[0] for row in rows] == ["total", "0.weight", "2.weight"]
    run = events(tmp_path)
    assert steps_of(run, "sparsity/total") == [7, 14, 18]
    assert steps_of(run, "loss") == [18]
    assert "weights/0.weight" in run.Tags()["histograms"]
    assert "mask/0.weight" in run.Tags()["images"]
    assert "torchreg/sparsity/text_summary" in run.Tags()["tensors"]


def test_trackers_may_come_later_and_a_resumed_run_goes_on_in_the_same_one(tmp_path):
    for half in (0, 1):
        acc = accelerator(log_with="tensorboard", project_dir=str(tmp_path / "logs"))
        load = str(tmp_path / "state") if half else None
        _, regularization = train(acc, "hook", epochs=1, load=load, every=6)
        acc.init_trackers("run")  # the log of step 6 finds none, and the training goes on
        for _ in range(2):
            regularization.monitor.log()
        acc.save_state(str(tmp_path / "state"))
        assert acc.get_tracker("tensorboard").writer.log_dir == str(tmp_path / "logs" / "run")
        regularization.detach()
        acc.end_training()
    assert steps_of(events(tmp_path / "logs"), "sparsity/total") == [6, 6, 12, 12]


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_process_writes(main, monkeypatch):
    lists = other_tracker()
    acc = accelerator(log_with=lists)
    acc.init_trackers("run")
    monkeypatch.setattr(accelerate.Accelerator, "is_main_process", main)
    _, regularization = train(acc, "hook", every=3, monitor=EVERYTHING)
    regularization.detach()
    assert bool(lists.lines) is bool(lists.images) is bool(lists.tables) is main
    assert regularization.monitor.report is not None


def test_a_bare_monitor_and_the_accelerator_share_a_writer_of_the_users_own(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        acc = accelerator(log_with=WriterTracker(writer))
        acc.init_trackers("run", config={"lr": 0.1, "name": "a|b"})
        assert acc.get_tracker("writer", unwrap=True) is writer
        model = acc.prepare(network())
        with SparsityMonitor(model, TrackersWriter(acc), every=1, **EVERYTHING) as monitor:
            monitor.step(torch.tensor(0.25))
        acc.log({"accuracy": 0.5, "note": "words", "loss": {"train": 1, "test": torch.tensor(2.0)}}, step=1)
        acc.end_training()
    run = events(tmp_path)
    assert {"sparsity/total", "loss/data", "accuracy", "loss/train", "loss/test"} <= set(run.Tags()["scalars"])
    assert {"config/text_summary", "note/text_summary"} <= set(run.Tags()["tensors"])


def test_the_loss_is_logged_where_the_loop_tells_it():
    acc = accelerator()
    model, optimizer = acc.prepare(network(), None)[0], None
    optimizer = acc.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    regularization = AcceleratedRegularization(acc, model, optimizer, RULES, every=1, watch=False)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert regularization.watch(loss=2.5).fraction == 0
    assert regularization.watch() is None


def test_a_state_of_something_else_is_refused():
    acc = accelerator()
    _, hooked = train(acc, "hook", warmup, epochs=1)
    _, grouped = train(acc, "groups", target, epochs=1)
    with pytest.raises(ValueError, match="route 'hook'"):
        grouped.load_state_dict(hooked.state_dict())
    with pytest.raises(ValueError, match="keys"):
        hooked.load_state_dict({"steps": 3})
    with pytest.raises(ValueError, match="param_groups"):
        AcceleratedRegularization(acc, network(), None, RULES, route="proximal")
    model = network()
    for kind in (ProxSGD, ProxAdamW):
        with pytest.raises(ValueError, match="applies penalties itself"):
            AcceleratedRegularization(acc, model, kind(model.parameters()), RULES)


def test_the_examples_of_the_docstrings():
    import doctest

    import torchreg.integrations.accelerate as module

    accelerate.state.AcceleratorState._reset_state(True)
    found = doctest.testmod(module)
    assert (found.failed, found.attempted > 5) == (0, True)


def test_the_example(monkeypatch, capsys, tmp_path):
    pytest.importorskip("sklearn")
    accelerate.state.AcceleratorState._reset_state(True)
    arguments = ["--epochs", 10, "--logdir", tmp_path]
    out = printed("accelerate_digits.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert percent("after 230 steps: zeros", out) == pytest.approx(85, abs=0.5)
    assert percent("test accuracy", out) > 85
