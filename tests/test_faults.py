"""Values that are not finite are named, a broken log stops nothing, a killed training goes on from its checkpoint."""

import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from torchreg import L1, ProxAdamW, Proximal, ProxSGD, Regularizer, SparsityMonitor

NAN, INF = float("nan"), float("inf")


class Sink:
    def add_scalar(self, tag, value, step):
        pass


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


OPTIMIZERS = {
    "ProxSGD": lambda reg: ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9),
    "fused": lambda reg: ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9, fused=True),
    "ProxAdamW": lambda reg: ProxAdamW(reg.param_groups(), lr=0.1),
    "Proximal": lambda reg: Proximal(torch.optim.RMSprop(reg.param_groups(), lr=0.1)),
    "hook": lambda reg: attached(torch.optim.SGD(reg.model.parameters(), lr=0.1), reg),
}


def attached(optimizer, reg):
    reg.attach(optimizer)
    return optimizer


# Values that are not finite


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_step_that_the_scaler_skips_changes_no_weight_and_is_no_news(kind, value):
    net = network()
    reg = Regularizer(net, L1(0.1))
    opt, scaler = OPTIMIZERS[kind](reg), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in net.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        monitor = SparsityMonitor(reg, Sink(), every=1)
        scaler.scale((net(torch.ones(2, 4)) * value).sum()).backward()
        scaler.step(opt)
        scaler.update()
        monitor.step(loss=1.0)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_a_scaler_nan_goes_through_and_is_named_once(kind):
    net = network()
    reg = Regularizer(net, L1(0.1))
    opt = OPTIMIZERS[kind](reg)
    monitor = SparsityMonitor(net, Sink(), every=1, optimizer=opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            opt.zero_grad()
            net(torch.ones(2, 4)).sum().backward()
            if step == 1:
                net[2].weight.grad[0, 1] = NAN
            opt.step()
            monitor.step(loss=0.5)
    assert net[2].weight[0, 1].isnan()
    told = [str(w.message) for w in caught if "finite" in str(w.message)]
    assert told == [
        "At step 2 the gradient of '2.weight' is not finite, the weight '2.weight' is not finite. "
        "The training goes on; it is said once."
    ]


def test_a_loss_that_is_nan_is_told_with_what_it_has_spoilt():
    net = network()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = SparsityMonitor(net, Sink(), every=1)
    loss = net(torch.ones(2, 4)).sum() * NAN
    loss.backward()
    opt.step()
    with pytest.warns(
        RuntimeWarning, match=r"the loss is nan, the gradient of '0.weight' and 3 more of 4 are not finite"
    ):
        monitor.step(loss=loss)
    opt.zero_grad()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    monitor.step(loss=1.0)
    with pytest.warns(RuntimeWarning, match=r"At step 3 the loss is inf\."):
        monitor.step(loss=INF)


# Logs that can't be written


@pytest.fixture
def full_disk():
    """A limit on the size of files: writes beyond it fail as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def logged_weights(writer, at_step=lambda step: None):
    net = network()
    reg = Regularizer(net, L1(0.1))
    opt = OPTIMIZERS["ProxSGD"](reg)
    monitor = SparsityMonitor(reg, writer, every=1, histograms=hasattr(writer, "add_histogram_raw"))
    for step in range(150):
        at_step(step)
        opt.zero_grad()
        net(torch.ones(2, 4)).sum().backward()
        opt.step()
        monitor.step()
    monitor.close()
    return list(net.parameters())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("writers", ["torch.utils.tensorboard", "tensorboardX"])
def test_a_full_disk_neither_stops_nor_changes_a_training(writers, full_disk, tmp_path):
    """The operating system refuses to let the file grow; tensorboardX's thread dies of it without a word."""
    writer = pytest.importorskip(writers).SummaryWriter(str(tmp_path), flush_secs=1)
    full_disk()
    with pytest.warns(RuntimeWarning, match="nothing more is logged") as caught:
        watched = logged_weights(writer)
    assert sum(w.category is RuntimeWarning for w in caught) == 1
    assert all(map(torch.equal, watched, logged_weights(None)))


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and signals")
def test_a_writer_whose_process_is_dead_neither_stops_nor_changes_a_training():
    """A writer that sends lines to another process, which is killed."""
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    class Pipe:
        def add_scalar(self, tag, value, step):
            reader.stdin.write(f"{tag} {value} {step}\n".encode())
            reader.stdin.flush()

    def kill(step):
        if step == 10:
            reader.kill()
            reader.wait()

    with pytest.warns(RuntimeWarning, match=r"BrokenPipeError.*nothing more is logged"):
        watched = logged_weights(Pipe(), kill)
    assert all(map(torch.equal, watched, logged_weights(None)))
    with pytest.raises(BrokenPipeError):
        reader.stdin.close()


@pytest.mark.skipif(os.name != "posix", reason="removes an open file's folder")
def test_a_log_folder_that_goes_away_neither_stops_nor_changes_a_training(tmp_path):
    import shutil

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path / "run", flush_secs=0)
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with SparsityMonitor(net, writer, every=1) as monitor:
            for step in range(10):
                if step == 5:
                    shutil.rmtree(tmp_path / "run")
                monitor.step()
            monitor.hparams({"lr": 0.1}, {"loss": 1.0})
    assert monitor.steps == 10


# A training that is killed

TRAINING = """
import os, sys, torch, torchreg
from torch import nn
folder, steps = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))
reg = torchreg.Regularizer(net, torchreg.L1(0.02))
opt = torchreg.ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
target = torchreg.TargetSparsity(opt, 0.7, until=steps)
monitor = torchreg.SparsityMonitor(reg, None, every=5, optimizer=opt)
parts = {"net": net, "opt": opt, "target": target, "monitor": monitor}
path, begin = os.path.join(folder, "last.pt"), 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"])
    begin = saved["step"]
print("begin", begin, flush=True)
for step in range(begin, steps):
    x = torch.randn(16, 6)
    opt.zero_grad()
    nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long()).backward()
    opt.step()
    target.step()
    monitor.step()
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, "step": step + 1, "rng": torch.get_rng_state()}, path + ".new")
    os.replace(path + ".new", path)  # a checkpoint is there as a whole, or not at all
    print("step", step + 1, flush=True)
torch.save(net.state_dict(), os.path.join(folder, "end.pt"))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_training_resumes_from_its_last_whole_checkpoint_bit_for_bit(tmp_path, monkeypatch, capsys):
    """Killed wherever it happens to be: in a step, or while it writes a checkpoint."""
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, "-c", TRAINING, str(folders[1]), "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "step 20\n":
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved = torch.load(folders[1] / "last.pt", weights_only=True)["step"]
    assert 20 <= saved < 60
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        for folder in folders:
            monkeypatch.setattr(sys, "argv", ["", str(folder), "60"])
            exec(TRAINING, {})
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    begins = [line for line in capsys.readouterr().out.splitlines() if line.startswith("begin")]
    assert begins == ["begin 0", f"begin {saved}"]
    expected = torch.load(folders[0] / "end.pt", weights_only=True)
    found = torch.load(folders[1] / "end.pt", weights_only=True)
    assert all(torch.equal(found[name], w) for name, w in expected.items())
    assert sum((w == 0).sum() for w in found.values()) > 100
