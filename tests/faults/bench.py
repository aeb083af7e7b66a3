"""The searches that faults are injected into, and what is measured of them."""

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from saltray import demo
from saltray.contest import rle
from saltray.records import study
from tests.cluster.hosts import HEAD, PATIENCE, SHARED, Hosts, wait_for

TRIALS, EPOCHS = 6, 3
Figures = dict[str, Any]
JOINS = (
    "RAY_AUTH_MODE=token RAY_grpc_client_keepalive_time_ms=11000 RAY_grpc_client_keepalive_timeout_ms=10000"
)
"""What a driver needs that is no job: the token, and the cluster's own keepalive."""


SPACE = """
def space(trial):
    filters = trial.suggest_int("filters", 2, 5)
    rate = trial.suggest_float("rate", 3e-3, 2e-2, log=True)
    return {
        "model": {"filters": filters, "levels": 2, "dropout": 0.0, "normalisation": "batch"},
        "optim": {"learning_rate": rate},
        "batch_size": 8,
    }
"""
# Adam at a rate of 1 in a deep plain network: the activations overflow within an epoch.
DIVERGES = (
    SPACE.replace('"learning_rate": rate', '"learning_rate": 1.0 if trial.number == 1 else rate')
    .replace('"levels": 2', '"levels": 5 if trial.number == 1 else 2')
    .replace('"batch"', '"none" if trial.number == 1 else "batch"')
)
GREEDY = SPACE.replace('"batch_size": 8', '"batch_size": 2048 if trial.number == 1 else 8').replace(
    '"filters": filters', '"filters": 96 if trial.number == 1 else filters'
)
# A batch that two and three workers can share.
SHARED_BATCH = SPACE.replace('"batch_size": 8', '"batch_size": 6')


class Search:
    """A search whose driver runs on the head, started over SSH."""

    def __init__(self, bench: "Bench", name: str, arguments: str) -> None:
        self.bench, self.name = bench, name
        self.folder = bench.hosts.shared / name
        self.said = bench.hosts.folder / f"{name}.log"
        command = (
            f"cd; echo $$ >/tmp/{name}.pid; exec python -m saltray.tune --address {HEAD}:6379 {arguments}"
        )
        with self.said.open("a") as log:
            self.process = subprocess.Popen(
                [*bench.hosts.command("on", "h0", f"{JOINS} bash -c {shlex.quote(command)}")],
                env=bench.hosts.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def signal(self, name: str) -> None:
        self.bench.hosts.on("h0", f"kill -{name} $(cat /tmp/{self.name}.pid)")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(timeout=seconds)
        return code

    @property
    def trials(self) -> list[FrozenTrial]:
        """The study's trials as they are now; none before there is a study."""
        # Optuna makes the tables that it misses: who looks too early makes them under the driver's hands.
        if not (self.folder / "trials").exists():
            return []
        return study.load_study(self.folder).trials

    def rows(self, host: str | None = None) -> list[tuple[int, int]]:
        """Return (trial, epoch) of all epochs that were recorded, of one address alone if it is given."""
        return [
            (t.number, row["epoch"])
            for t in self.trials
            for row in t.user_attrs.get("epochs", [])
            if host in (None, row["host"])
        ]

    def wait_rows(self, count: int, host: str | None = None) -> None:
        """Wait until so many epochs are recorded."""
        ready = wait_for(
            lambda: len(self.rows(host)) >= count or self.process.poll() is not None, PATIENCE, 0.5
        )
        assert ready and self.process.poll() is None, self.said.read_text()[-3000:]


class Refits(Search):
    """A search's refits on two folds."""

    def __init__(self, search: Search) -> None:
        self.__dict__ |= search.__dict__

    @property
    def trials(self) -> list[FrozenTrial]:
        """The refits as they are now; none before they have begun."""
        if not list((self.folder / "trials").glob("folds-2/*")):
            return []
        return study.load_study(study.Place(self.folder, name=f"{study.STUDY_NAME} folds-2")).trials


class Bench:
    """The hosts, their tiles, and what is known of the search without faults."""

    def __init__(self, these: Hosts) -> None:
        self.hosts = these
        self.data = demo.write(these.shared / "demo", demo.files(train=160, test=10, seed=0))
        for name, text in {
            "tiny": SPACE,
            "diverges": DIVERGES,
            "greedy": GREEDY,
            "six": SHARED_BATCH,
        }.items():
            (these.shared / f"{name}.py").write_text(text)

    def start(
        self, name: str, space: str = "tiny", trials: int = TRIALS, resume: bool = False, more: str = ""
    ) -> Search:
        new = (
            f"--data {SHARED}/demo/data --space {SHARED}/{space}.py "
            f"--trials {trials} --epochs {EPOCHS} --seed 0 --out {SHARED}/{name} {more}"
        )
        return Search(self, name, f"--resume {SHARED}/{name}" if resume else new)

    def heal(self) -> None:
        """Bring every host back into the cluster: power, link, and what the autoscaler repairs by itself."""
        for host in ("h0", "h1", "h2"):
            self.hosts.script("heal", host)
            if not self.hosts.up(host):
                self.hosts.script("boot", host)
        assert wait_for(lambda: len(self.hosts.alive()) == 3, PATIENCE), self.hosts.alive()

    def groups(self) -> int:
        """Count the placement groups that still hold resources."""
        rows = json.loads(self.hosts.job_api("api/v0/placement_groups?limit=1000"))
        return sum(row["state"] != "REMOVED" for row in rows["data"]["result"]["result"])

    def figures(
        self, search: Search, *, ended: dict[int, Any] | None = None, wanted: int = TRIALS, **more: Any
    ) -> Figures:
        """Judge a search that has come to its end.

        Args:
            search: the search, or the last session of it.
            ended: the trials that had ended when the fault struck, with the moment; None where it does not
                strike at a moment, or that is not known.
            wanted: how many trials it was to do.
            more: what only the fault knows.
        """
        trials = search.trials
        rows = search.rows()
        known = {t.number: t.datetime_complete for t in trials}
        said = " ".join(search.said.read_text().split())
        wait_for(lambda: self.groups() == 0, 30)
        check_submission(self, search.folder)
        best = [t for t in trials if t.intermediate_values]
        return {
            "trials wanted": wanted,
            "trials completed": sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials),
            "trials failed": sum(t.state == TrialState.FAIL for t in trials),
            "trials lost": wanted - sum(t.state.is_finished() for t in trials),
            "finished trials run again": (
                "" if ended is None else sum(known[n] != moment for n, moment in ended.items())
            ),
            "epochs redone": len(rows) - len(set(rows)),
            "leaked placement groups": self.groups(),
            "best mAP": round(max(study.score(t) for t in best), 6),
            "reasons": sorted({t.user_attrs["reason"] for t in trials if "reason" in t.user_attrs}),
            "said": re.findall(r"error: .*?(?=trial |best |$)", said)[-1:],
        } | more


def check_submission(bench: Bench, folder: Path) -> None:
    """Hold a run to a valid submission: the sample's ids in their order, masks that can be read."""
    submission = pd.read_csv(folder / "submission.csv", keep_default_na=False)
    sample = pd.read_csv(bench.data / "sample_submission.csv")
    assert submission["id"].tolist() == sample["id"].tolist()
    for code in submission["rle_mask"]:
        rle.decode(code)


def ended_now(search: Search) -> dict[int, Any]:
    return {t.number: t.datetime_complete for t in search.trials if t.state.is_finished()}


def recovery(search: Search, host: str, harm: Callable[[], Any]) -> dict[str, Any]:
    """Harm a host; measure the time until a trial that ran there has recorded another epoch."""
    running = {t.number for t in search.trials if t.state == TrialState.RUNNING}
    victims = {n for n, _ in search.rows(host) if n in running}
    before, ended = search.rows(), ended_now(search)
    harm()
    struck = time.monotonic()

    def back() -> bool:
        new = search.rows()[:]
        for row in before:
            new.remove(row)
        return any(number in victims for number, _ in new)

    def over() -> bool:
        return search.process.poll() is not None or victims <= ended_now(search).keys()

    wait_for(lambda: back() or over(), PATIENCE, 0.5)
    seconds = round(time.monotonic() - struck, 1)
    return {"recovery seconds": seconds, "ended": ended} if back() else {"ended": ended}
