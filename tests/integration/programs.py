"""Whole saltray programs, run on a few synthetic tiles."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from saltray.study import Place, StudyError, load_study

ROOT = Path(__file__).parents[2]

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
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
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
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == code, output
        return output

    def end(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.communicate(timeout=30)


def search_arguments(files: Path, out: Path, *more: str) -> list[str | Path]:
    return ["saltray.tune", "--data", files / "data", "--space", files / "space.py", "--out", out, *more]


def wait_for_epochs(run: Path | Place, epochs: int) -> None:
    """Wait until the study holds so many epochs in all."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            study = load_study(run)
        except StudyError:
            time.sleep(0.5)  # the database is being made
            continue
        while time.monotonic() < end:
            if sum(len(t.intermediate_values) for t in study.get_trials()) >= epochs:
                close(study)
                return
            time.sleep(0.5)
    raise AssertionError("the search does not get on")


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
