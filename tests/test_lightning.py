"""In Lightning's Trainer a callback gives the weights of the plain loop, also resumed, and logs to every logger."""

import copy
import re
from pathlib import Path

import pytest
import torch
from example import percent, printed
from feature_cases import assert_same as assert_features_same
from feature_cases import data_loss, in_a_trainer, of_trainers
from feature_cases import trained as trained_plainly
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchreg import L1, Proximal, ProxSGD, Regularizer, TargetSparsity, sparsity
from torchreg.schedules import WarmupStrength

lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from torchreg.integrations.lightning import RegularizationCallback  # noqa: E402

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
pytestmark = pytest.mark.filterwarnings("ignore", "ignore::DeprecationWarning")


class Net(lightning.LightningModule):
    def __init__(self, configure=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.configure = configure or sgd

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.configure(self)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def scheduled(model):
    optimizer = sgd(model)
    return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def fit(callback, model=None, path=None, epochs=2, more=(), **options):
    model = model or Net()
    options = {"logger": False, "enable_checkpointing": False, **QUIET, **options}
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[callback, *more], **options)
    trainer.fit(model, DataLoader(data(), batch_size=4), ckpt_path=path, **({"weights_only": True} if path else {}))
    return model, trainer


def plain(optimizer_of, route="hook", schedule=None, epochs=2, accumulate=1, model=None, scheduler_of=None):
    """The loop that Lightning replaces."""
    model = model or Net()
    reg = Regularizer(model, RULES)
    optimizer = optimizer_of(model, reg)
    if route == "hook":
        reg.attach(optimizer)
    moves = schedule(reg if route == "hook" else optimizer) if schedule else None
    scheduler = scheduler_of(optimizer) if scheduler_of else None
    for _ in range(epochs):
        for i, (x, y) in enumerate(DataLoader(data(), batch_size=4)):
            (nn.functional.cross_entropy(model.net(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                if moves:
                    moves.step()
        if scheduler:
            scheduler.step()
    return model


RULES = {"net.*.weight": L1(0.05)}


def assert_same(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def warmup(holder):
    return WarmupStrength(holder, until=9)


def target(optimizer):
    return TargetSparsity(optimizer, 0.6, until=11)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_hook_gives_the_weights_of_the_plain_loop(accumulate):
    callback = RegularizationCallback(RULES, schedule=warmup)
    model, _ = fit(callback, accumulate_grad_batches=accumulate)
    expected = plain(lambda model, reg: sgd(model), schedule=warmup, accumulate=accumulate)
    assert_same(model, expected)
    assert callback.regularization.steps == 12 // accumulate
    without = fit(lightning.Callback(), accumulate_grad_batches=accumulate)[0]
    assert not torch.equal(model.net[0].weight, without.net[0].weight)


@pytest.mark.parametrize("schedule", [None, target])
def test_the_proximal_route_divides_the_groups_and_leaves_zeros(schedule):
    model, trainer = fit(RegularizationCallback(RULES, route="proximal", schedule=schedule), Net(scheduled))

    def proximal(model, reg):
        return Proximal(torch.optim.SGD(reg.param_groups(), lr=0.1, momentum=0.9))

    def cosine(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)

    expected = plain(proximal, "proximal", schedule, scheduler_of=cosine)
    assert_same(model, expected)
    assert isinstance(trainer.optimizers[0], Proximal)
    assert sparsity(Regularizer(model, RULES)).total.zeros > 0
    if schedule:
        assert sparsity(Regularizer(model, RULES)).fraction == pytest.approx(0.6, abs=0.02)


def test_a_proximal_optimizer_built_by_the_module_stays_as_it_is():
    def configure(model):
        return ProxSGD(Regularizer(model, RULES).param_groups(), lr=0.1, momentum=0.9)

    model, trainer = fit(RegularizationCallback(route="groups", schedule=warmup), Net(configure))
    assert_same(model, plain(lambda model, reg: configure(model), "groups", warmup))
    assert type(trainer.strategy.optimizers[0]) is ProxSGD


def test_a_proximal_optimizer_without_penalties_takes_those_of_the_rules():
    def configure(model):
        return ProxSGD(model.parameters(), lr=0.1, momentum=0.9)

    model, trainer = fit(RegularizationCallback(RULES, route="proximal"), Net(configure))
    assert type(trainer.strategy.optimizers[0]) is ProxSGD
    assert_same(model, plain(lambda m, reg: ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9), "proximal"))


@of_trainers
def test_what_needs_no_more_than_the_module_gives_the_weights_of_the_plain_loop(penalty, feature):
    def train(model, part, data):
        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = model

            def training_step(self, batch, batch_idx):
                return data_loss(self.net, *batch) + part.term()

            def configure_optimizers(self):
                return part.optimizer

        quiet = {"logger": False, "enable_checkpointing": False, **QUIET}
        lightning.Trainer(max_epochs=1, **quiet).fit(Module(), DataLoader(data, batch_size=8))

    assert_features_same(in_a_trainer(penalty, feature, train), trained_plainly(feature, penalty))


def test_several_callbacks_have_names(tmp_path):
    """For one optimizer, here; their penalties, logs and states are their own."""

    def callbacks():
        first = RegularizationCallback({"net.0.weight": L1(0.05)}, schedule=warmup, every=3, name="first")
        return [first, RegularizationCallback({"net.2.weight": L1(0.05)}, schedule=warmup, every=4, name="last")]

    expected = plain(lambda model, reg: sgd(model), schedule=warmup)
    csv = CSVLogger(tmp_path, "csv")
    _, trainer = fit(callbacks()[0], epochs=1, more=callbacks()[1:], logger=csv)
    assert {"first/sparsity/total", "last/sparsity/total"} <= set(trainer.callback_metrics)
    header = Path(csv.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"first/sparsity/net.0.weight", "last/sparsity/net.2.weight"} <= set(header)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    first, last = callbacks()
    resumed, _ = fit(first, path=tmp_path / "half.ckpt", more=[last])
    assert_same(resumed, expected)
    assert first.regularization.steps == last.regularization.steps == 12
    with pytest.raises(RuntimeError, match="state_key"):
        lightning.Trainer(callbacks=[RegularizationCallback(RULES), RegularizationCallback(RULES)], **QUIET)


def test_two_networks_have_a_callback_and_an_optimizer_each():
    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.first.parameters(), lr=0.1), torch.optim.Adam(self.second.parameters(), lr=0.01)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self.second(self.first(batch[0])), batch[1]))
                optimizer.step()

    callback = RegularizationCallback({"first.weight": L1(0.1)}, "proximal", target, name="first")
    other = RegularizationCallback({"second.weight": L1(0.1)}, "proximal", name="second")
    model, trainer = fit(callback, Two(), more=[other])
    assert [type(optimizer) for optimizer in trainer.strategy.optimizers] == [Proximal, Proximal]
    assert sparsity(model.first.weight).fraction == pytest.approx(0.6, abs=0.03)
    assert callback.regularization.steps == other.regularization.steps == 12
    with pytest.raises(ValueError, match="one mapping of all rules"):
        fit(RegularizationCallback(RULES, "proximal", name="a"), more=[RegularizationCallback(RULES, "proximal")])


ROUTES = [("hook", warmup, None), ("proximal", target, scheduled), ("proximal", warmup, None)]


@pytest.mark.parametrize(("route", "schedule", "configure"), ROUTES, ids=["hook", "target", "proximal"])
def test_a_resumed_fit_ends_with_the_same_weights(route, schedule, configure, tmp_path):
    whole, _ = fit(RegularizationCallback(RULES, route, schedule), Net(configure), epochs=3)
    _, trainer = fit(RegularizationCallback(RULES, route, schedule), Net(configure), epochs=1)
    path = tmp_path / "first.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    callback = RegularizationCallback(RULES, route, schedule)
    model, _ = fit(callback, Net(configure), path, epochs=3)
    assert_same(model, whole)
    assert callback.regularization.steps == callback.regularization.monitor.steps == 18
    forgetful = RegularizationCallback(RULES, route, schedule)
    forgetful.load_state_dict = lambda state: None
    assert not torch.equal(fit(forgetful, Net(configure), path, epochs=3)[0].net[0].weight, whole.net[0].weight)


@pytest.mark.parametrize("route", ["hook", "proximal"])
def test_mixed_precision_leaves_the_strength_and_skipped_steps_shrink_nothing(route):
    class Overflowing(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx % 2 else loss * 0

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = Overflowing(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    before = copy.deepcopy(model.net[0])
    callback = RegularizationCallback(RULES, route)
    fit(callback, model, epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.regularization.steps == 3, "of six steps the scaler skips three"
    pull = 3 * 0.1 * 0.05
    expected = before.weight - pull * before.weight.sign()
    kept = before.weight.abs() > pull
    assert torch.allclose(model.net[0].weight[kept], expected[kept], atol=1e-6)
    assert torch.equal(model.net[0].bias, before.bias)


def test_every_logger_gets_the_numbers(tmp_path):
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    callback = RegularizationCallback(RULES, "proximal", every=5, monitor={"histograms": True})
    _, trainer = fit(callback, logger=loggers)
    lines = Path(loggers[0].log_dir, "metrics.csv").read_text().splitlines()
    assert "sparsity/total" in lines[0]
    assert [line.split(",")[lines[0].split(",").index("step")] for line in lines[1:]] == ["5", "10", "12"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(loggers[1].log_dir).Reload().Tags()
    assert {"sparsity/total", "loss/data", "loss/penalty", "threshold/group0"} <= set(tags["scalars"])
    assert "weights/net.0.weight" in tags["histograms"]
    assert trainer.callback_metrics["sparsity/total"] > 0


def test_a_fit_can_be_followed_by_another_and_leaves_nothing_behind():
    model = Net()
    fit(RegularizationCallback(RULES), model)
    optimizer = sgd(model)
    Regularizer(model, RULES).attach(optimizer)
    callback = RegularizationCallback(RULES)
    for _ in range(2):
        _, trainer = fit(callback, model)
        assert callback.regularization.steps == 12
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    fit(callback, model, max_steps=0)
    assert not callback.regularization.attached
    fit(callback, model)
    assert callback.regularization.steps == 12


def test_an_error_in_the_training_is_the_one_that_is_seen():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            raise KeyError("the user's")

    callback = RegularizationCallback(RULES)
    with pytest.raises(KeyError, match="the user's"):
        fit(callback, Failing())
    assert not callback.regularization.attached


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rules": RULES, "route": "loss"}, "'hook', 'proximal', 'groups'"),
        ({"route": "hook"}, "Expected `rules`"),
        ({"rules": RULES, "schedule": 3}, "function of the optimizer"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        RegularizationCallback(**arguments)


def test_rules_that_fit_nothing_are_refused_when_the_fit_starts():
    with pytest.raises(ValueError, match="matches none"):
        fit(RegularizationCallback({"nett.*": L1(0.1)}))
    with pytest.raises(ValueError, match="None of the 1 optimizers applies penalties"):
        fit(RegularizationCallback(route="groups"))
    with pytest.raises(ValueError, match="penalties already"):
        fit(
            RegularizationCallback(RULES, "proximal"),
            Net(lambda m: ProxSGD(Regularizer(m, RULES).param_groups(), lr=0.1)),
        )


def averaging(kind):
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    if kind == "ema":
        return EMAWeightAveraging(decay=0.9)
    return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(("kind", "model"), [("ema", Net), ("swa", Net), ("swa", Normed)])
def test_averages_get_the_zeros_of_the_weights_and_the_monitor_measures_the_weights(kind, model):
    def zeros(reprox):
        reports = {}

        class Reports(lightning.Callback):
            def on_train_epoch_end(self, trainer, module):
                reports[callback.regularization.steps] = callback.regularization.monitor.report

            def on_train_end(self, trainer, module):
                self.on_train_epoch_end(trainer, module)

        callback = RegularizationCallback(RULES, "proximal", every=1000, reprox=reprox)
        options = {"logger": False, "enable_checkpointing": False, **QUIET}
        trainer = lightning.Trainer(max_epochs=3, callbacks=[callback, averaging(kind), Reports()], **options)
        net = model()
        trainer.fit(net, DataLoader(data(), batch_size=4))
        assert all(report.weights == ("averaged" if step > 18 else "") for step, report in reports.items())
        return reports[18].total.zeros, sparsity(Regularizer(net, RULES)).total.zeros

    measured, averaged = zeros(reprox=False)
    assert measured > averaged
    measured_again, averaged = zeros(reprox=True)
    assert measured_again == measured
    assert averaged == measured or (model is Normed and averaged > measured), "Lightning's step for BatchNorm adds some"


def test_reprox_needs_an_average_and_comes_before_it():
    callback = RegularizationCallback(RULES, "proximal", reprox=True)
    with pytest.raises(ValueError, match="averages weights"):
        fit(callback)
    trainer = lightning.Trainer(max_epochs=1, callbacks=[averaging("ema"), callback], logger=False)
    with pytest.raises(ValueError, match="before"):
        trainer.fit(Net(), DataLoader(data(), batch_size=4))


def test_the_pages_file_for_lightnings_command_line_trains(tmp_path):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(data(), batch_size=4)

    page = (Path(__file__).parent.parent / "docs/trainers.md").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    options = ["accelerator=cpu", "logger=false", "enable_checkpointing=false", "max_epochs=2"]
    arguments = ["fit", "--config", str(tmp_path / "config.yaml"), *(f"--trainer.{option}" for option in options)]
    cli = LightningCLI(Net, Data, args=arguments, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, RegularizationCallback))
    assert callback.regularization.regularizer.assignments[0].penalty == L1(0.05)
    assert sparsity(callback.regularization.regularizer).fraction == pytest.approx(0.6, abs=0.02)


def test_the_example(monkeypatch, capsys, tmp_path):
    pytest.importorskip("sklearn")
    arguments = ["--epochs", 8, "--logdir", tmp_path]
    out = printed("lightning_digits.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert percent("test accuracy", out) > 85
    assert percent("zeros", out) == pytest.approx(85, abs=0.5)
    assert list(tmp_path.rglob("metrics.csv"))
    assert list(tmp_path.rglob("events*"))
