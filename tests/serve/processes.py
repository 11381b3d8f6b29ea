"""Runs Python in a process of its own, as a user or vLLM would."""

from __future__ import annotations

import subprocess
import sys


def run_python(*arguments: object, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)
