"""Starts and stops a server for a measurement or a test: a process, a port, and /health."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil


class ServerError(RuntimeError):
    """The server ended before it was ready, or was not ready in time; the message ends with its log."""


def free_port() -> int:
    """A TCP port on the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """``maskpro-serve``, or another program, in a process group of its own, on the loopback interface.

    Args:
        arguments: its flags, without host and port.
        log: the file that takes its output.
        environment: variables to add.
        port: TCP port; None takes a free one.
        program: what to run instead; it must take ``--host`` and ``--port`` and answer /health.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        program: Sequence[str] = (str(Path(sys.executable).parent / "maskpro-serve"),),
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.seconds_to_ready = 0.0
        listen = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.command = [*program, *arguments, *listen]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Starts the process without waiting for it; :meth:`wait_ready` does."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        return self

    def wait_ready(self, seconds: float = 300) -> None:
        """Waits until /health answers 200.

        Raises:
            ServerError: the process ended, or the time is over.
        """
        assert self._process is not None
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            if (code := self._process.poll()) is not None:
                raise ServerError(f"server ended with exit code {code}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    self.seconds_to_ready = time.monotonic() - begin
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        raise ServerError(f"server not ready after {seconds} s:\n{self.log_tail()}")

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, or None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, not to its group."""
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has ended by itself."""
        assert self._process is not None
        return self._process.wait(timeout=seconds)

    def stop(self) -> int:
        """Asks it to end, then makes its whole process group end; returns its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def get(self, path: str) -> str:
        """The body of a GET request."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as response:
            body: bytes = response.read()
        return body.decode()

    def memory(self) -> int:
        """Bytes of memory in use by the process and all it started; what they share is counted once."""
        assert self._process is not None
        total = 0
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self._process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # ended since, or not ours to look at
                    total += process.memory_full_info().pss
        return total

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
