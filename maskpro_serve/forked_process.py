"""A process forked before this one has threads or sockets, which later becomes one that ``multiprocessing`` starts."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import signal
import traceback
from multiprocessing import Pipe, popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Waiting:
    """A process that waits to be told what to run, and ends without a word if this one ends first."""

    def __init__(self) -> None:
        resource_tracker.ensure_running()  # one for both
        cores = os.sched_getaffinity(0)
        self.told, self.tells = Pipe(duplex=False)
        self.sentinel, ended = os.pipe()
        # A collection writes into every object it looks at, and would copy the pages that the two share.
        gc.collect()
        gc.freeze()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        self.pid = os.fork()
        if not self.pid:
            _wait(self, cores, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.told.close()
        os.close(ended)


def _wait(here: _Waiting, cores: set[int], signals: set[int | signal.Signals]) -> NoReturn:
    """What the forked process does until its end."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; whoever forked this ends, and this with it
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        here.tells.close()
        os.close(here.sentinel)
        # If this one is killed, nobody else would tell it to end, and it would keep its memory and its cores.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.sched_setaffinity(0, cores)  # Intel's OpenMP leaves a forked process one core
        try:
            environment = here.told.recv()
        except EOFError:
            os._exit(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _set_environment(environment)
        code = spawn._main(os.dup(here.told.fileno()), here.told.fileno())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _set_environment(wanted: dict[str, str]) -> None:
    # What stays must stay where it is in memory: setproctitle finds the command line by it.
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})


class _Started(popen_spawn_posix.Popen):
    """What ``multiprocessing`` knows of a process that had been waiting."""

    def __init__(self, process: BaseProcess, waiting: _Waiting) -> None:
        self._waiting = waiting
        self._fds: list[int]
        super().__init__(process)

    def _launch(self, process: BaseProcess) -> None:
        message = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process.name), message)
            reduction.dump(process, message)
        finally:
            set_spawning_popen(None)
        if self._fds:  # it needs files that are open here, which only a new process can be given
            self._waiting.tells.close()
            os.waitpid(self._waiting.pid, 0)
            self._fds = []
            super()._launch(process)  # type: ignore[misc]
            return
        self.pid, self.sentinel = self._waiting.pid, self._waiting.sentinel
        self.finalizer = util.Finalize(self, os.close, (self.sentinel,))
        self._waiting.tells.send(dict(os.environ))
        with open(self._waiting.tells.fileno(), "wb", closefd=False) as rest:
            rest.write(message.getbuffer())


class _Process(SpawnProcess):
    waiting: _Waiting | None = None

    @staticmethod
    def _Popen(process: BaseProcess) -> popen_spawn_posix.Popen:  # noqa: N802 (multiprocessing's name)
        waiting, _Process.waiting = _Process.waiting, None
        return _Started(process, waiting) if waiting else popen_spawn_posix.Popen(process)


class ForkedContext(SpawnContext):
    """``multiprocessing``'s ``spawn``, but the first process it starts was forked when this was made.

    It has all that was imported by then, and shares the memory of it; to a caller it is like one that was spawned: its
    environment is that of the moment when it starts, and none of what has happened in between is seen by it. Make it
    while there are no threads but those of libraries that know of forks. Linux only; one in a process.
    """

    Process = _Process

    def __init__(self) -> None:
        super().__init__()
        _Process.waiting = _Waiting()
