"""A C compiler, if the machine has one: shared libraries built once and cached across processes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SWITCH = "TORCHREG_NATIVE"
"""The environment variable that turns compiled CPU kernels off (``0``)."""

CACHE = "TORCHREG_CACHE_DIR"
"""The environment variable that names the cache folder (default: ``torchreg`` in the user's cache folder)."""

_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_LONGEST_BUILD = 15  # seconds


class Unavailable(Exception):
    """Why there is no compiled library, in words for the user."""


@functools.cache
def library(name: str, source: str) -> ctypes.CDLL:
    """The shared library of a C source text, built if the cache does not have it.

    Raises:
        Unavailable: if it is switched off, or there is no compiler, or the build fails or takes over 15 s.
    """
    if os.environ.get(SWITCH, "1") == "0":
        raise Unavailable(f"switched off by {SWITCH}=0")
    compiler = _compiler()
    path = _cache_folder() / f"{name}-{_key(source, compiler)}.so"
    if not path.exists():
        _build(compiler, source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the library built by {compiler} does not load: {error}") from None


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise Unavailable("no C compiler (cc, gcc or clang) on the PATH")


def _build(compiler: str, source: str, path: Path) -> None:
    """Compile next to the target and move it there whole: two processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        text, built = Path(scratch) / f"{path.stem}.c", Path(scratch) / path.name
        text.write_text(source, encoding="utf-8")
        command = [compiler, *_FLAGS, str(text), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_BUILD, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{compiler} failed: {error}") from None
        if done.returncode != 0 or not built.exists():
            first_line = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise Unavailable(f"{compiler} failed: {first_line}")
        os.replace(built, path)


def _cache_folder() -> Path:
    """The user's own cache folder, or one that lives as long as the process where that can't be written."""
    root = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchreg"
    folder = Path(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(_process_folder().name)


@functools.cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="torchreg-")


def _key(source: str, compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor (a home folder may serve several)."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [source.encode(), repr(_FLAGS).encode(), compiler.encode(), version, _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))
