"""Two processes that stay for a module's tests, so that these do not wait for imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 100


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets for one of two processes on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _serve(rank: int, port: int, pipe: Any) -> None:
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while (call := pipe.recv()) is not None:
        function, args, keywords = call
        try:
            pipe.send((True, function(*args, **keywords)))
        except Exception as error:
            pipe.send((False, error))
    dist.destroy_process_group()


class Two:
    """Calls functions of a module in both processes at once."""

    def __init__(self) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        self._ends, self._processes = [], []
        for rank in range(2):
            end, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self._ends.append(end)
            self._processes.append(process)

    def outcomes(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> list[Any]:
        """What each process returned or raised."""
        for end in self._ends:
            end.send((function, args, keywords))
        found = []
        for end, process in zip(self._ends, self._processes, strict=True):
            assert end.poll(SECONDS), "a process hangs"
            try:
                found.append(end.recv())
            except EOFError:
                process.join(10)
                raise RuntimeError(f"a process ended with exit code {process.exitcode}") from None
        return [value for _, value in found]

    def __call__(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> list[Any]:
        """What each process returned; raises what the first of them to fail raised."""
        found = self.outcomes(function, *args, **keywords)
        for value in found:
            if isinstance(value, Exception):
                raise value
        return found

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for end in self._ends if self.alive else ():
            end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
