"""How the long benches measure: contenders in turn, and peak memory in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def medians(contenders: dict[str, tuple[Callable[[], Any], int]]) -> dict[str, float]:
    """Median milliseconds. Each contender has its number of rounds, after one that warms it up; they take turns, so
    that what else the machine does falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    most = max(rounds for _, rounds in contenders.values())
    for turn in range(-1, most):
        for name, (run, rounds) in contenders.items():
            if turn < rounds:
                begun = time.perf_counter()
                result = run()
                took = time.perf_counter() - begun
                del result
                if turn >= 0:
                    times[name].append(took)
    return {name: statistics.median(found) * 1e3 for name, found in times.items()}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not say {field}: peak memory is measured on Linux")


def peak_beyond(run: Callable[[], Any]) -> int:
    """Bytes of resident memory at the peak of ``run()``, beyond what is resident before; its result counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would hide some of the peak
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def in_a_process(script: str, *arguments: str) -> Any:
    """What ``script`` prints as its last line, as JSON."""
    command = [sys.executable, script, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def commit() -> str:
    """What was measured, as git names it."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def where_measured(environment: dict[str, Any], of: str) -> str:
    """One line for a table: the machine, and the code."""
    return (
        f"{environment['processor']}, {environment['threads']} threads, target {environment['target']}, "
        f"torch {environment['torch']}, commit {of}."
    )
