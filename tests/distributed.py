"""Real processes for tests: a pool of them, which take functions to run together in a process group."""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
import uuid
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = 60
"""Seconds after which a run is given up."""

_pool = []


def run(ranks, function, *args):
    """What ``function(*args)`` returns in each of so many processes, which form the default process group.

    The function must be importable (of a module, not local). An error in any of them is raised here, with its trace.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        import pytest

        pytest.skip("needs torch.distributed with gloo")
    while len(_pool) < ranks:
        _pool.append(_started())
    store = os.path.join(tempfile.gettempdir(), f"torchreg-{uuid.uuid4().hex}")
    for rank, (_, pipe) in enumerate(_pool[:ranks]):
        pipe.send_bytes(pickle.dumps((rank, ranks, store, function, args)))
    answers, failures = _answers(ranks)
    if os.path.exists(store):
        os.remove(store)
    if failures:
        _stop()
        raise AssertionError("\n".join(failures))
    return answers


def _answers(ranks):
    """What the processes answer, in order; and what went wrong, if anything did."""
    pipes = {pipe: rank for rank, (_, pipe) in enumerate(_pool[:ranks])}
    answers, failures, end = [None] * ranks, [], time.monotonic() + LIMIT
    while pipes:
        ready = multiprocessing.connection.wait(list(pipes), timeout=max(0, end - time.monotonic()))
        if not ready:
            return answers, [*failures, *(f"rank {rank} did not answer" for rank in pipes.values())]
        for pipe in ready:
            rank = pipes.pop(pipe)
            try:
                good, answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, answer = False, "the process died"
            answers[rank] = answer
            if not good:
                failures.append(f"rank {rank}: {answer}")
                end = time.monotonic() + 3  # the others may wait for it
    return answers, failures


def _started():
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    parts = ("checkpoint.state_dict", "device_mesh", "fsdp", "tensor.debug", "tensor.parallel")
    context.set_forkserver_preload(["torchreg", *(f"torch.distributed.{part}" for part in parts)])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return process, ours


def _serve(pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while True:
        try:
            rank, ranks, store, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=LIMIT - 10),
            )
            torch.manual_seed(0)
            answer = True, function(*args)
            dist.barrier()
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))


@atexit.register
def _stop():
    for process, _ in _pool:
        process.kill()
    _pool.clear()
