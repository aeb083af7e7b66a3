"""Whole saltray programs, run on a few synthetic tiles."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial

from saltray.records.study import Place, StudyError, load_study

ROOT = Path(__file__).parents[2]

PATIENCE = 400
"""Seconds for one program: many times what it takes, for machines that are busy. pytest's limit is above."""

SPACE = """
FIRST = {"filters": 2}

def space(trial):
    return {
        "model": {"filters": trial.suggest_int("filters", 1, 3), "levels": 1, "dropout": 0.0},
        "optim": {"learning_rate": 1e-2},
        "batch_size": 8,
    }
"""


class Program:
    """A saltray command line in a process group of its own, so that nothing outlives its test."""

    def __init__(self, *arguments: str | Path) -> None:
        # No cluster of the developer's is joined, nor are these searches logged to their server.
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS" and "MLFLOW" not in k}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self, code: int = 0) -> str:
        try:
            output, _ = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end: {self.end()}") from None
        assert self.process.returncode == code, output
        return output

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the program is to bring about."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"has ended, or does not get on: {self.end()}")
            time.sleep(0.5)

    def end(self) -> str:
        """Kill it, and its Ray ends by itself; return what it told and was not read yet."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.stdout is not None
        return "" if self.process.stdout.closed else self.process.communicate(timeout=60)[0]


def search_arguments(files: Path, out: Path, *more: str) -> list[str | Path]:
    return ["saltray.tune", "--data", files / "data", "--space", files / "space.py", "--out", out, *more]


def trials_of(run: Path | Place) -> list[FrozenTrial]:
    """Return the trials of a study; none while it is being made."""
    try:
        study = load_study(run)
    except StudyError:
        return []
    try:
        return study.trials
    finally:
        close(study)


def epochs_in(run: Path | Place) -> int:
    """Return how many epochs the study holds in all."""
    return sum(len(trial.intermediate_values) for trial in trials_of(run))


def close(study: optuna.Study) -> None:
    """Close the connections to the study's database."""
    storage: Any = study._storage
    storage.remove_session()
    storage._backend.engine.dispose()


def check_submission(run: Path, files: Path) -> None:
    submission = pd.read_csv(run / "submission.csv", keep_default_na=False)
    sample = pd.read_csv(files / "data" / "sample_submission.csv")
    assert list(submission.columns) == ["id", "rle_mask"]
    assert list(submission["id"]) == list(sample["id"])
