"""A process forked before this one has threads or sockets, which later becomes one that ``multiprocessing`` starts."""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import os
import signal
import traceback
import weakref
from contextlib import suppress
from multiprocessing import Pipe, popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Waiting:
    """A process that waits to be told what to run, and ends without a word if this one ends first."""

    def __init__(self) -> None:
        resource_tracker.ensure_running()  # one for both, as of a process that is spawned
        self.started_with = _started_with()
        cores = os.sched_getaffinity(0)
        self.told, self.tells = Pipe(duplex=False)
        self.sentinel, ended = os.pipe()
        # A collection writes into every object it looks at, and would copy the pages that the two share.
        gc.collect()
        gc.freeze()
        util._flush_std_streams()  # type: ignore[attr-defined]  # or what is left of it would be written twice
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.pid = os.fork()
            if not self.pid:
                _wait(self, cores, before)
            # Python 3.12 waits at its end for the resource tracker, that for this process, and this for that end.
            atexit.register(self.end)
        finally:
            self.told.close()
            os.close(ended)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # raises what a signal raises that came meanwhile

    def end(self) -> None:
        """Of a process that was not told anything."""
        atexit.unregister(self.end)
        self.tells.close()
        with suppress(ChildProcessError):  # where children's ends are ignored, nothing is left of it
            os.waitpid(self.pid, 0)

    def tell(self, message: memoryview) -> bool:
        """Starts it with what it is to run, as ``spawn`` sends it; False if it has been killed."""
        try:
            self.tells.send(dict(os.environ))
            with open(self.tells.fileno(), "wb", closefd=False) as rest:
                rest.write(message)
        except BrokenPipeError:
            return False
        atexit.unregister(self.end)
        return True


def _started_with() -> tuple[str | None, str | bytes | None]:
    """What takes effect only where a program is started: libraries to preload, and what starts Python (numactl)."""
    return os.environ.get("LD_PRELOAD"), spawn.get_executable()


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
        # What was registered for the end of the other one.
        atexit._clear()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
        atexit.register(util._exit_function)  # type: ignore[attr-defined]
        try:
            environment = here.told.recv()
        except EOFError:
            os._exit(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _set_environment(environment)
        code = spawn._main(os.dup(here.told.fileno()), here.told.fileno())
        atexit._run_exitfuncs()
        util._flush_std_streams()  # type: ignore[attr-defined]
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
        # Only a new process can be given files that are open here, other libraries, or what vLLM starts it with.
        new = bool(self._fds) or self._waiting.started_with != _started_with()
        if new or not self._waiting.tell(message.getbuffer()):
            self._waiting.end()
            self._fds = []
            super()._launch(process)  # type: ignore[misc]
            return
        self.pid, self.sentinel = self._waiting.pid, self._waiting.sentinel
        self.finalizer = util.Finalize(self, os.close, (self.sentinel,))


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

    @staticmethod
    def end_if_waiting() -> bool:
        """Ends the process that was forked if nothing has been started as it; whether there was one."""
        waiting, _Process.waiting = _Process.waiting, None
        if waiting is None:
            return False
        waiting.end()
        return True
