"""How long a user waits: for --help, and from the command to the first epoch's end on the demo."""

import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil

from benchmarks.rows import Row, at_most, median, seconds

PROGRAMS = ("tune", "predict", "score", "report", "explore", "demo")
HELP_RUNS, RUNS = 5, 3
LIMIT = 90.0


def measure() -> list[Row]:
    """Measure both."""
    rows = []
    for program in PROGRAMS:
        command = [sys.executable, "-m", f"saltray.{program}", "--help"]
        times = [
            seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True))  # type: ignore[misc]
            for _ in range(HELP_RUNS)
        ]
        rows.append(median(f"`python -m saltray.{program} --help`", times, "s", at_most(1.0)))
    times = [first_epoch() for _ in range(RUNS)]
    note = "making 600 synthetic tiles, Ray's start, decoding and checking included"
    rows.append(
        median("from `python -m saltray.tune` to its first epoch's end", times, "s", at_most(15), note)
    )
    return rows


def first_epoch() -> float:
    """Start the demo; return when its study has a first epoch.

    Raises:
        RuntimeError: it ended, or took too long.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        study = Path(name) / "run" / "study.db"
        command = [sys.executable, "-m", "saltray.tune", "--out", str(study.parent)]
        started = time.perf_counter()
        with (Path(name) / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while process.poll() is None and time.perf_counter() - started < LIMIT:
                if _epochs(study):
                    return time.perf_counter() - started
                time.sleep(0.05)
            said = " ".join((Path(name) / "log").read_text().split())
            raise RuntimeError(f"no epoch in {LIMIT:g} s: {said[-200:]}")
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the demo and its Ray: one that is still ending would slow the next run's start."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *started):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(started, timeout=10)
    process.wait()


def _epochs(study: Path) -> int:
    if not study.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"{study.as_uri()}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT count(*) FROM trial_intermediate_values").fetchone()[0])
    except sqlite3.Error:  # its tables are being made
        return 0
