"""How the long benches measure: contenders take turns, and peak memory is measured in a process of its own."""

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
    """Median milliseconds of each contender over its own number of rounds, after one round that warms it up.

    The contenders take turns, so that other work on the machine affects all of them alike.
    """
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
    return {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not say {field}: peak memory is measured on Linux")


def peak_beyond(run: Callable[[], Any]) -> int:
    """Bytes of resident memory at the peak of ``run()``, its result included, beyond what was resident before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def in_a_process(script: str, *arguments: str) -> Any:
    """The last line that ``script`` prints, read as JSON."""
    command = [sys.executable, script, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def commit() -> str:
    """The commit that was measured, as ``git describe`` names it."""
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return described.stdout.strip() or "unknown"


def where_measured(environment: dict[str, Any], measured_commit: str) -> str:
    """The line of a page that names the machine and the code."""
    return (
        f"{environment['processor']}, {environment['threads']} threads, target {environment['target']}, "
        f"torch {environment['torch']}, commit {measured_commit}."
    )
