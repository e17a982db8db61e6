"""Persistent gloo ranks for tests: importing torch and Megatron takes seconds, a process group milliseconds.

A server process imports them once per test session and forks the workers of a pool. ``run_ranks(n, function, *args)``
runs a module-level ``function(rank, world_size, *args)`` on the first ``n`` of them, inside a default process group
made for that call, and returns their results in rank order. A failing rank fails the call with that rank's traceback;
the pool is then replaced, because its peers may still hang in a collective. Ranks that give no answer in time print the
stacks of all their threads first.

Forming the group, before any code under test has run, is the one step that is tried again, so that trouble with
sockets is not taken for a deadlock of the code under test. What the function does is never repeated.
"""

import atexit
import faulthandler
import multiprocessing as mp
import multiprocessing.forkserver
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

LONGEST_CALL_SECONDS = 300
STACKS_AFTER_SECONDS = LONGEST_CALL_SECONDS - 10
CONNECT_SECONDS = 90
"""The first group of a session waits for the server to import everything."""
IMPORTED_ONCE = (
    "modelopt.torch.distill.plugins.megatron",  # it cannot be imported once the CPU device layer is on
    "megaqad.recovery.students",
    "megaqad.export.verify",
    "transformers.models.auto.modeling_auto",
)
CONNECT_TRIES = 3
CONNECTED = "connected"
THREADS_MOST = 400
"""Of a worker before the pool is replaced: gloo and Megatron-Core leave threads and sockets of most groups behind, a
training run about fifty. After a thousand tests they were 4,600, every call was slow, and some could start no more."""


def _worker(rank: int, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:  # the session is gone
            return
        function, args, world_size, store = job
        faulthandler.dump_traceback_later(STACKS_AFTER_SECONDS)
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            dist.barrier()
            connection.send((True, CONNECTED))
            result = function(rank, world_size, *args)
            dist.barrier()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()
            if dist.is_initialized():
                dist.destroy_process_group()


def _threads(pid: int) -> int:
    """Threads of a process; 0 where the system does not say."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


class RankPool:
    """Worker processes that live as long as the test session."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTED_ONCE))
        self._workers: list[tuple[Any, Connection]] = []

    def _grow_to(self, size: int) -> None:
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}):
            mp.forkserver.ensure_running()
        while len(self._workers) < size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_worker, args=(len(self._workers), theirs))
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of ``function(rank, world_size, *args)`` for every rank, in rank order."""
        with tempfile.TemporaryDirectory() as folder:
            if any(_threads(process.pid) > THREADS_MOST for process, _ in self._workers):
                self.close()
            for attempt in range(CONNECT_TRIES):
                self._grow_to(world_size)
                active = self._workers[:world_size]
                for _, connection in active:
                    connection.send((function, args, world_size, f"{folder}/store{attempt}"))
                try:
                    self._collect(active, CONNECT_SECONDS)
                    break
                except TimeoutError:
                    if attempt == CONNECT_TRIES - 1:
                        raise
            return self._collect(active, LONGEST_CALL_SECONDS)

    def _collect(self, active: list[tuple[Any, Connection]], seconds: float) -> list[Any]:
        """The next answer of every rank, in rank order.

        Raises:
            TimeoutError: a rank gave none in time; all are ended.
            AssertionError: a rank failed; all are ended.
        """
        results: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        pending = {connection: rank for rank, (_, connection) in enumerate(active)}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(pending.values())} gave no answer in {seconds} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    passed, result = connection.recv()
                except EOFError:
                    passed, result = False, "the process died"
                if not passed:
                    self.close()
                    raise AssertionError(f"rank {rank} failed:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(len(active))]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


_POOL = RankPool()
atexit.register(_POOL.close)  # before multiprocessing's own exit handler, which would wait for the workers


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` on ``world_size`` persistent gloo ranks; results in rank order."""
    return _POOL.run(world_size, function, *args)


def close_ranks() -> None:
    """End the pool's processes; pytest calls it when the session ends."""
    _POOL.close()
