"""Compiled code: built once, loaded from a cache that nobody else can write to, and never a crash without it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time

import pytest

from torchreg.kernels import toolchain

CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
SOURCE = "int answer(void) { return 42; }\n"
USE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("toolchain", sys.argv[1])  # without the seconds that torch takes
toolchain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toolchain)
print(toolchain.library("answer", sys.argv[2]).answer())
"""

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs shell scripts and POSIX permissions"),
    pytest.mark.skipif(CC is None, reason="needs a C compiler"),
]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """A cache of the test's own, and nothing remembered from other tests."""
    monkeypatch.setenv(toolchain.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(toolchain.SWITCH, raising=False)
    monkeypatch.delenv("CC", raising=False)
    toolchain.library.cache_clear()
    yield
    toolchain.library.cache_clear()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that logs its runs and does what it is told: a function of a shell script."""

    def make(script='exec "$REAL" "$@"'):
        path = tmp_path / "bin" / "cc"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nREAL="{CC}"\necho run >> "{tmp_path}/log"\n{script}\n')
        path.chmod(0o700)
        monkeypatch.setenv("CC", str(path))

    return make


@pytest.fixture
def runs(tmp_path):
    """How often the compiler was run."""
    log = tmp_path / "log"
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


def answer():
    toolchain.library.cache_clear()
    return toolchain.library("answer", SOURCE).answer()


def reason():
    with pytest.raises(toolchain.Unavailable) as caught:
        answer()
    return str(caught.value)


def start():
    """Another process that uses the library."""
    command = [sys.executable, "-c", USE, toolchain.__file__, SOURCE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def outcome(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


def libraries(folder):
    return sorted(folder.glob("*.so"))


# The cache


def test_a_second_process_runs_no_compiler(compiler, runs, cache):
    compiler()
    assert answer() == 42
    assert runs() == 1
    assert outcome(start()) == "42"
    assert runs() == 1
    assert [path.name for path in cache.iterdir()] == [path.name for path in libraries(cache)]


def test_first_builds_at_once_agree(compiler, cache):
    compiler()
    processes = [start() for _ in range(4)]
    assert [outcome(process) for process in processes] == ["42"] * 4
    assert [path.name for path in cache.iterdir()] == [path.name for path in libraries(cache)]
    assert libraries(cache)


def test_a_compiler_that_cannot_fetch_ahead_builds_without(compiler, runs):
    compiler('case "$*" in *prefetch*) echo unknown option >&2; exit 1;; esac; exec "$REAL" "$@"')
    assert toolchain.library("answer", SOURCE, streams=True).answer() == 42
    assert runs() == 2


def test_another_source_or_compiler_is_another_library(compiler, runs, cache):
    compiler()
    answer()
    toolchain.library.cache_clear()
    assert toolchain.library("answer", SOURCE.replace("42", "43")).answer() == 43
    compiler('exec "$REAL" "$@"  # of another version')
    assert answer() == 42
    assert runs() == 3
    assert len({path.name.split("-")[1] for path in libraries(cache)}) == 3


def corruptions():
    return {
        "cut off": lambda content: content[: len(content) // 2],
        "empty": lambda content: b"",
        "text": lambda content: b"not a library",
        "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    }


@pytest.mark.parametrize("damage", corruptions().values(), ids=corruptions())
def test_a_damaged_library_is_built_again(damage, compiler, runs, cache):
    compiler()
    assert outcome(start()) == "42"
    (path,) = libraries(cache)
    path.write_bytes(damage(path.read_bytes()))
    assert outcome(start()) == "42"
    assert runs() == 2
    assert outcome(start()) == "42"
    assert runs() == 2


def test_what_does_not_load_is_built_again(compiler, runs, cache):
    compiler()
    answer()
    (path,) = libraries(cache)
    path.write_bytes(b"of another system")
    path.rename(path.with_name(f"{path.stem.rpartition('-')[0]}-{toolchain._digest(path)}.so"))
    assert answer() == 42
    assert runs() == 2
    assert len(libraries(cache)) == 1


@pytest.mark.parametrize("name", ["cache", "."])
def test_a_relative_cache_folder_is_that_of_the_working_directory(name, compiler, runs, tmp_path, monkeypatch):
    compiler()
    tmp_path.chmod(0o700)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(toolchain.CACHE, name)
    assert answer() == 42
    assert answer() == 42
    assert runs() == 1
    assert libraries(tmp_path / name)


# Who may write there


def test_a_new_cache_folder_is_private(cache):
    old = os.umask(0)
    try:
        assert answer() == 42
    finally:
        os.umask(old)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in libraries(cache)] == [0o700]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702], ids=oct)
def test_a_cache_folder_that_others_write_to_is_not_used(mode, cache):
    cache.mkdir()
    cache.chmod(mode)
    assert answer() == 42
    assert list(cache.iterdir()) == []
    with pytest.raises(toolchain.Unavailable, match="others can write to it"):
        toolchain.cache_folder()
    assert stat.S_IMODE(toolchain._folder().stat().st_mode) == 0o700


def test_a_cache_folder_of_another_user_is_not_used(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(toolchain.Unavailable, match="another user's"):
        toolchain.cache_folder()


def test_a_library_that_others_could_have_written_is_not_loaded(compiler, runs, cache):
    compiler()
    answer()
    libraries(cache)[0].chmod(0o777)
    assert answer() == 42
    assert runs() == 2


def test_a_cache_folder_that_cannot_be_made_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(toolchain.CACHE, str(tmp_path / "file" / "cache"))
    assert answer() == 42
    assert outcome(start()) == "42"


def test_an_unwritable_cache_folder_is_replaced(cache, monkeypatch):
    cache.mkdir(mode=0o500)
    access = os.access  # which lets root write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != cache and access(path, mode))
    assert answer() == 42
    assert list(cache.iterdir()) == []


def test_a_user_without_a_home_gets_a_folder(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(toolchain.CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(toolchain.Path, "home", no_home)
    assert answer() == 42


# Compilers that do not work


def test_a_failing_compiler_is_quoted(compiler, cache):
    compiler("echo 'cc: internal error' >&2; exit 1")
    assert "cc failed: cc: internal error" in reason()
    assert list(cache.iterdir()) == []


def test_a_compiler_that_writes_nothing_is_named(compiler):
    compiler("exit 0")
    assert "cc failed: it wrote no file" in reason()


def test_a_result_that_does_not_load_is_named_and_not_kept(compiler, cache):
    compiler('for last; do :; done; echo "no library" > "$last"')
    assert "does not load" in reason()
    assert list(cache.iterdir()) == []


def test_a_compiler_that_cannot_be_started_is_named(compiler, tmp_path):
    compiler()
    (tmp_path / "bin" / "cc").write_bytes(b"\0\0\0")
    assert str(tmp_path / "bin" / "cc") in reason()


def test_a_hanging_compiler_is_ended_with_its_children(compiler, cache, tmp_path, monkeypatch):
    compiler(f'sleep 60 &\necho $! > "{tmp_path}/child"\nwait')
    monkeypatch.setattr(toolchain, "_LONGEST_BUILD", 0.5)
    before = time.monotonic()
    assert "took more than 0.5 s" in reason()
    assert time.monotonic() - before < 10
    assert list(cache.iterdir()) == []
    assert _ends(int((tmp_path / "child").read_text()))


def _ends(process):
    for _ in range(100):
        try:
            os.kill(process, 0)
            with open(f"/proc/{process}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_compiler_that_reads_its_input_gets_none(compiler):
    compiler('cat > /dev/null; exec "$REAL" "$@"')
    assert answer() == 42


def test_no_compiler_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reason() == "no C compiler (cc, gcc or clang) on the PATH"


def test_the_switch_runs_no_compiler(compiler, runs, cache, monkeypatch):
    compiler()
    monkeypatch.setenv(toolchain.SWITCH, "0")
    assert reason() == "switched off by TORCHREG_NATIVE=0"
    assert runs() == 0
    assert not cache.exists()
