"""A C compiler, if the machine has one: shared libraries built once and cached across processes.

What is in the cache is loaded as code. So the cache is used only where nobody else can write to it, and a library's
name holds the digest of its content: loading one that was cut off could kill the process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

SWITCH = "TORCHREG_NATIVE"
"""The environment variable that turns compiled CPU kernels off (``0``)."""

CACHE = "TORCHREG_CACHE_DIR"
"""The environment variable that names the cache folder (default: ``torchreg`` in the user's cache folder)."""

_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_AHEAD = ("-fprefetch-loop-arrays", "--param=prefetch-latency=1200", "--param=simultaneous-prefetches=100")
_LONGEST_BUILD = 15.0  # seconds
_CPU_INFO = Path("/proc/cpuinfo")
_IDENTIFYING = ("model name", "flags", "Features", "CPU part")


class Unavailable(Exception):
    """Why there is no compiled library, in words for the user."""


@functools.cache
def library(name: str, source: str, streams: bool = False) -> ctypes.CDLL:
    """The shared library of a C source text, built if the cache does not have it.

    Args:
        name: what its file's name begins with.
        source: the text.
        streams: whether its loops run over long arrays. Memory is then asked for some 20 cache lines ahead, if the
            compiler knows how: a step that counts on its way took 1.10 and now 0.92 times torch's that does not.

    Raises:
        Unavailable: if it is switched off, or there is no compiler, or the build fails or takes over 15 s.
    """
    if os.environ.get(SWITCH, "1") == "0":
        raise Unavailable(f"switched off by {SWITCH}=0")
    command = compiler()
    flags = (*_FLAGS, *_AHEAD) if streams else _FLAGS
    stem = f"{name}-{_key(source, flags, command)}"
    try:
        folder = _folder()
        for path in sorted(folder.glob(f"{stem}-*.so")):
            loaded = _cached(path)
            if loaded is not None:
                return loaded
        return _build(command, flags, source, folder, stem)
    except OSError as error:
        raise Unavailable(f"the library can't be built: {error}") from None


def obstacle(*builds: Callable[[], object]) -> str | None:
    """Why one of these can't be built on this machine, or None. Builds them."""
    try:
        for build in builds:
            build()
    except Unavailable as reason:
        return str(reason)
    return None


def compiler() -> str:
    """The path of the C compiler: that of the variable CC, or the first of cc, gcc and clang.

    Raises:
        Unavailable: if there is none.
    """
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return os.path.abspath(found)
    raise Unavailable("no C compiler (cc, gcc or clang) on the PATH")


def cache_folder() -> Path:
    """The user's own cache folder.

    Raises:
        Unavailable: if it can't be used. Libraries are then built anew in each process.
    """
    try:
        root = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torchreg")
        folder = Path(root).absolute()  # a bare file name would be looked for in the system's library folders
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = _private(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise Unavailable(f"there is no cache folder: {error}") from None
    if not private:
        raise Unavailable(f"{folder} is not used: it is another user's, or others can write to it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Unavailable(f"{folder} can't be written")
    return folder


def _private(path: Path) -> bool:
    """Whether the path is this user's, and no other user can write to it."""
    if os.name != "posix":
        return True
    state = path.stat()
    return state.st_uid == os.geteuid() and not state.st_mode & 0o022


def _cached(path: Path) -> ctypes.CDLL | None:
    """The library in a file of the cache; None, and the file is removed, if it can't be used."""
    try:
        if _private(path) and path.stem.endswith(f"-{_digest(path)}"):
            return ctypes.CDLL(str(path))
    except OSError:
        pass
    path.unlink(missing_ok=True)
    return None


def _build(compiler: str, flags: tuple[str, ...], source: str, folder: Path, stem: str) -> ctypes.CDLL:
    """Compile in a folder beside the target, load, and only then move it there: two processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        text, built = Path(scratch, f"{stem}.c"), Path(scratch, f"{stem}.so")
        text.write_text(source, encoding="utf-8")
        complaint = _complaint([compiler, *flags, str(text), "-o", str(built)])
        if complaint and flags != _FLAGS:  # a compiler that does not know all of them may do without
            complaint = _complaint([compiler, *_FLAGS, str(text), "-o", str(built)])
        if complaint:
            raise Unavailable(complaint)
        if not built.exists():
            raise Unavailable(f"{compiler} failed: it wrote no file")
        os.chmod(built, 0o700)
        try:
            loaded = ctypes.CDLL(str(built))
        except OSError as error:
            raise Unavailable(f"the library built by {compiler} does not load: {error}") from None
        os.replace(built, folder / f"{stem}-{_digest(built)}.so")
        return loaded


def _complaint(command: list[str]) -> str | None:
    """Run a compiler; how it failed, or None. One that takes too long is ended with all that it started."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            message = process.communicate(timeout=_LONGEST_BUILD)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            raise Unavailable(f"{command[0]} took more than {_LONGEST_BUILD:g} s") from None
    if process.returncode == 0:
        return None
    return f"{command[0]} failed: {(message.strip().splitlines() or ['no message'])[0]}"


def _folder() -> Path:
    """Where libraries are built: the cache, or else a folder that lives as long as the process."""
    try:
        return cache_folder()
    except Unavailable:
        return Path(_process_folder().name)


@functools.cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="torchreg-")


def _key(source: str, flags: tuple[str, ...], compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor (a home folder may serve several)."""
    state = os.stat(compiler)
    parts = (source, flags, os.path.realpath(compiler), state.st_size, state.st_mtime_ns, processor(*_IDENTIFYING))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def is_amd() -> bool:
    """Whether the processor is one of AMD's, as far as Linux tells."""
    return "AuthenticAMD" in processor("vendor_id")


def processor(*wanted: str) -> str:
    """The machine, and the lines that Linux has of its processor under these names; elsewhere what Python knows."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))
