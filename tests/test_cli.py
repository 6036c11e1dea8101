"""The command as a program: help, exit statuses, terminals."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from command import assert_one_line, assert_refused, mnist_like, program
from torch import nn

import torchreg
from torchreg.cli import main


def test_version_help_and_no_arguments(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchreg {torchreg.__version__}\n"
    assert main([]) == 0
    alone = capsys.readouterr()
    assert alone.err == ""
    assert main(["--help"]) == 0
    assert capsys.readouterr() == alone
    assert "compare" in alone.out
    assert "inspect" in alone.out
    for command in ("compare", "inspect", "path", "report"):
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: torchreg {command}")


def test_unknown_commands_are_refused(capsys):
    assert_refused(capsys, ["comparr"], "comparr")
    assert_refused(capsys, ["--loud"], "--loud")


def test_the_module_runs_as_a_program(tmp_path):
    path = mnist_like(tmp_path / "toy.npz")
    done = program(
        *("compare", "--data", path, "--steps", 3, "--seeds", 1, "--no-figure", "--json"), "--logdir", tmp_path / "runs"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["settings"]["seeds"] == 1


def test_the_program_reports_an_error_in_one_line(tmp_path):
    path = tmp_path / "module.pt"
    torch.save(nn.Linear(2, 2), path)
    done = program("inspect", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("torchreg inspect: error: ")
    assert done.stderr.count("\n") == 1


def test_an_ascii_terminal_gets_the_table_too(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"0.weight": torch.zeros(2, 3)}, path)
    done = program("inspect", path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.weight" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_any_terminal_gets_the_help(encoding):
    done = program("compare", "--help", env={**os.environ, "PYTHONIOENCODING": encoding}, errors="replace")
    assert (done.returncode, done.stderr) == (0, "")
    assert "strength of L1" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments", [pytest.param(["--help"], marks=pytest.mark.slow), ["inspect", "model.pt"]], ids=" ".join
)
def test_an_output_that_takes_nothing_is_one_line(arguments, tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.pt")
    with open("/dev/full", "w") as full:
        done = program(*arguments, stdout=full, cwd=tmp_path)
    done.stdout = ""  # what is read from there is no output
    assert_one_line(done, "writing to standard output failed: No space left")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_output_is_one_line():
    assert_one_line(program("--help", before=("sh", "-c", 'exec "$@" >&-', "sh")), "standard output is closed")
    assert program("--unknown", before=("sh", "-c", 'exec "$@" 2>&-', "sh")).returncode == 2


def test_lack_of_memory_is_one_line(monkeypatch, capsys):
    def exhaust(path):
        raise MemoryError

    monkeypatch.setattr("torchreg.cli.inspect.load", exhaust)
    assert_refused(capsys, ["inspect", "model.pt"], "out of memory")


def test_a_name_too_long_for_a_file_is_refused(tmp_path, capsys):
    name = "x" * 300
    assert_refused(capsys, ["inspect", name], "File name too long")
    assert_refused(capsys, ["compare", "--no-figure", "--data", name], "--data", "File name too long")
    path = mnist_like(tmp_path / "toy.npz")
    assert_refused(capsys, ["compare", "--no-figure", "--data", path, "--logdir", tmp_path / "new" / name], "--logdir")
    assert not (tmp_path / "new").exists()


def test_a_reader_that_leaves_is_no_error(tmp_path):
    path = tmp_path / "many.pt"
    torch.save({f"layer{i}.weight": torch.zeros(2, 2) for i in range(3000)}, path)
    process = subprocess.Popen(
        [sys.executable, "-m", "torchreg", "inspect", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal")
def test_a_terminal_sees_a_progress_bar_and_an_interrupt_ends_quietly(tmp_path):
    path = mnist_like(tmp_path / "toy.npz")
    parent, child = os.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torchreg", "compare", "--data", str(path), "--steps", "1000000", "--no-figure"),
            *("--logdir", str(tmp_path / "runs")),
        ],
        stdout=subprocess.PIPE,
        stderr=child,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits that it is ignored
    )
    os.close(child)
    seen = b""
    while b"no penalty" not in seen:
        seen += os.read(parent, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(parent, 4096):
            seen += chunk
    except OSError:  # the program has ended
        pass
    os.close(parent)
    assert process.wait(timeout=60) == 130
    process.stdout.close()
    assert b"seed 1 of 3" in seen
    assert b"Traceback" not in seen
