"""The faults: each starts a search, does its harm, lets the search end, and returns the figures."""

import contextlib
import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from saltray import checkpoint, demo, rle, study
from tests.cluster.hosts import HEAD, PATIENCE, ROOT, SHARED, Hosts, wait_for

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
# On a host of its own, without the cluster: a run's folder on a small disk is on one machine.
DISK = """
mkdir /tmp/small && mount -t tmpfs -o size=64m tmpfs /tmp/small && cd {root}
fill() {{
  until ls -d /tmp/small/run/trials/*/*/checkpoint_*; do sleep 1; done
  head -c 64M /dev/zero >/tmp/small/fill
}}
fill >/dev/null 2>&1 &
python -m saltray.tune --data {shared}/demo/data --space {shared}/tiny.py --trials {trials} \\
  --epochs {epochs} --seed 0 --out /tmp/small/run 2>&1
code=$?
rm /tmp/small/fill
python -m saltray.tune --resume /tmp/small/run 2>&1
echo "codes $code $?"
cp -r /tmp/small/run {shared}/disk_full
"""


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


class Bench:
    """The hosts, their tiles, and what is known of the search without faults."""

    def __init__(self, these: Hosts) -> None:
        self.hosts = these
        self.data = demo.write(these.shared / "demo", train=160, test=10, seed=0)
        for name, text in {"tiny": SPACE, "diverges": DIVERGES, "greedy": GREEDY}.items():
            (these.shared / f"{name}.py").write_text(text)

    def start(self, name: str, space: str = "tiny", trials: int = TRIALS, resume: bool = False) -> Search:
        new = (
            f"--data {SHARED}/demo/data --space {SHARED}/{space}.py "
            f"--trials {trials} --epochs {EPOCHS} --seed 0 --out {SHARED}/{name}"
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

    def figures(self, search: Search, *, ended: dict[int, Any] | None = None, **more: Any) -> Figures:
        """Judge a search that has come to its end.

        Args:
            search: the search, or the last session of it.
            ended: the trials that had ended when the fault struck, with the moment; None where it does not
                strike at a moment, or that is not known.
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
            "trials wanted": TRIALS,
            "trials completed": sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials),
            "trials failed": sum(t.state == TrialState.FAIL for t in trials),
            "trials lost": TRIALS - sum(t.state.is_finished() for t in trials),
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


def none(bench: Bench) -> Figures:
    """No fault: what the others are compared with."""
    search = bench.start("none")
    assert search.wait() == 0, search.said.read_text()[-3000:]
    return bench.figures(search)


def trial_killed(bench: Bench) -> Figures:
    """A trial's process is killed as soon as it has recorded an epoch, ten times in one search."""
    search = bench.start("trial_killed")
    kill = "ps -e -o pid=,args= | awk '/ray::(ImplicitFunc|run_trial)/ {print $1}' | xargs -r kill -9"
    known: set[tuple[int, int]] = set()
    struck: dict[int, float] = {}
    kills, times = 0, []
    while search.process.poll() is None:
        for trial in search.trials:
            rows = trial.user_attrs.get("epochs", [])
            if not rows or (trial.number, len(rows)) in known:
                continue
            known.add((trial.number, len(rows)))
            if trial.number in struck:
                times.append(time.monotonic() - struck.pop(trial.number))
            if kills < 10 and trial.state == TrialState.RUNNING and rows[-1]["epoch"] < EPOCHS:
                bench.hosts.on(f"h{int(rows[-1]['host'][-1])}", kill)
                struck[trial.number] = time.monotonic()
                kills += 1
        time.sleep(0.3)
    assert search.process.returncode == 0, search.said.read_text()[-3000:]
    assert kills == 10, f"{kills} kills: the search was over too soon"
    return bench.figures(search, kills=kills) | {"recovery seconds": round(max(times), 1)}


def on_worker(name: str, harm: str) -> Callable[[Bench], Figures]:
    """Make a fault of something that happens to worker h2 after its first epoch."""

    def fault(bench: Bench) -> Figures:
        search = bench.start(name)
        search.wait_rows(1, "10.77.0.12")
        found = recovery(search, "10.77.0.12", lambda: bench.hosts.script(*harm.split()))
        assert search.wait() == 0, search.said.read_text()[-3000:]
        return bench.figures(search, **found)

    return fault


def spot_notice(bench: Bench) -> Figures:
    """A worker is told to go in ten seconds, as a spot machine is, and then loses its power."""
    search = bench.start("spot_notice")
    search.wait_rows(1, "10.77.0.12")
    nodes = json.loads(bench.hosts.job_api("api/v0/nodes?limit=100"))["data"]["result"]["result"]
    node = next(n["node_id"] for n in nodes if n["node_ip"] == "10.77.0.12" and n["state"] == "ALIVE")
    drain = (
        f"RAY_AUTH_MODE=token ray drain-node --address {HEAD}:6379 --node-id {node} "
        "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 10"
    )

    def notice() -> None:
        bench.hosts.on("h0", drain)
        time.sleep(10)
        bench.hosts.script("off", "h2")

    found = recovery(search, "10.77.0.12", notice)
    assert search.wait() == 0, search.said.read_text()[-3000:]
    return bench.figures(search, **found)


def driver_killed(bench: Bench) -> Figures:
    """The driver is killed, and the run resumed."""
    return stopped(bench, "driver_killed", ["KILL"])


def ctrl_c_once(bench: Bench) -> Figures:
    """Ctrl-C: the search ends gracefully, and is resumed."""
    return stopped(bench, "ctrl_c_once", ["INT"])


def ctrl_c_twice(bench: Bench) -> Figures:
    """Ctrl-C, and again at once: it ends without more ado, and is resumed."""
    return stopped(bench, "ctrl_c_twice", ["INT", "INT"])


def stopped(bench: Bench, name: str, signals: list[str]) -> Figures:
    """Send signals to the driver after its fifth epoch, wait for its end, and resume."""
    search = bench.start(name)
    search.wait_rows(5)
    ended = ended_now(search)
    started = time.monotonic()
    for signal in signals:
        search.signal(signal)
        time.sleep(1)
    code = search.wait()
    stopping = round(time.monotonic() - started, 1)
    first = search.said.read_text()[-600:]
    submitted = (search.folder / "submission.csv").exists()
    ended |= ended_now(search)
    before = len(search.rows())
    again = bench.start(name, resume=True)
    started = time.monotonic()
    wait_for(lambda: len(again.rows()) > before or again.process.poll() is not None, PATIENCE, 0.5)
    found = {"recovery seconds": round(time.monotonic() - started, 1)}
    assert again.wait() == 0, again.said.read_text()[-3000:]
    more = {"exit code": code, "seconds to stop": stopping, "submission at the stop": submitted}
    return bench.figures(again, ended=ended, **found, **more) | {"said": first.strip().splitlines()[-4:]}


def half_written(bench: Bench) -> Figures:
    """The driver is killed, a waiting trial's newest checkpoint cut in half, and the run resumed."""
    search = bench.start("half_written")
    search.wait_rows(5)
    search.signal("KILL")
    search.wait()
    ended = ended_now(search)
    cut = 0
    for trial in search.trials:
        path = trial.user_attrs.get("checkpoint")
        if path and trial.number not in ended and not cut:
            file = bench.hosts.shared / Path(path).relative_to(SHARED) / checkpoint.TRAINING
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            cut += 1
    again = bench.start("half_written", resume=True)
    started, before = time.monotonic(), len(search.rows())
    wait_for(lambda: len(again.rows()) > before or again.process.poll() is not None, PATIENCE, 0.5)
    found = {"recovery seconds": round(time.monotonic() - started, 1), "checkpoints cut": cut}
    assert again.wait() == 0, again.said.read_text()[-3000:]
    return bench.figures(again, ended=ended, **found)


def nan(bench: Bench) -> Figures:
    """One trial's loss becomes infinite."""
    search = bench.start("nan", space="diverges")
    assert search.wait() == 0, search.said.read_text()[-3000:]
    return bench.figures(search)


def out_of_memory(bench: Bench) -> Figures:
    """One trial needs more memory than the hosts have together: the kernel kills it."""
    with memory_limit(bench.hosts.processes(), 6 * 2**30) as group:
        search = bench.start("out_of_memory", space="greedy")
        assert search.wait() == 0, search.said.read_text()[-3000:]
        events = (group / ("memory.events" if V2 else "memory.oom_control")).read_text()
        return bench.figures(search, killed_by_the_kernel=int(events.split("oom_kill ")[1].split()[0]))


CGROUPS = Path("/sys/fs/cgroup")
V2 = (CGROUPS / "cgroup.controllers").exists()


@contextlib.contextmanager
def memory_limit(processes: list[int], limit: int) -> Iterator[Path]:
    """Give processes, and what they start, so many bytes of memory together; yield the control group."""
    root = CGROUPS if V2 else CGROUPS / "memory"
    group = root / "saltray-faults"
    group.mkdir()
    try:
        (group / ("memory.max" if V2 else "memory.limit_in_bytes")).write_text(str(limit))
        _move(processes, group)
        yield group
    finally:
        _move([int(p) for p in (group / "cgroup.procs").read_text().split()], root)
        group.rmdir()


def _move(processes: list[int], group: Path) -> None:
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            (group / "cgroup.procs").write_text(str(process))


def slow_node(bench: Bench) -> Figures:
    """A host does a fifth of the work of the others: its processes are stopped four seconds of five."""
    search = bench.start("slow_node")
    search.wait_rows(1, "10.77.0.12")
    started = time.monotonic()
    pids = "$(ps -e -o pid=,args= | awk '/[r]ay::/ {print $1}')"
    while search.process.poll() is None:
        with contextlib.suppress(AssertionError):  # nothing of Ray's runs there just now
            bench.hosts.on("h2", f"kill -STOP {pids}; sleep 2; kill -CONT {pids}; sleep 0.5")
    assert search.wait() == 0, search.said.read_text()[-3000:]
    return bench.figures(search, seconds_with_the_slow_host=round(time.monotonic() - started, 1))


def two_searches(bench: Bench) -> Figures:
    """Two searches share the cluster."""
    first, second = bench.start("first"), bench.start("second")
    assert first.wait() == 0 == second.wait(), (first.said.read_text() + second.said.read_text())[-3000:]
    one, other = bench.figures(first), bench.figures(second)
    assert [t.params for t in first.trials] == [t.params for t in second.trials]
    return one | {"the other": other}


def head_killed(bench: Bench) -> Figures:
    """The head loses its power; it is booted, `ray up` again, and the job resubmitted with --resume."""
    these, name = bench.hosts, "head_killed"
    search = (
        f"--data {SHARED}/demo/data --space {SHARED}/tiny.py --trials {TRIALS} --epochs {EPOCHS} --seed 0"
    )
    these.submit(f"{search} --out {SHARED}/{name}")
    look = Search.__new__(Search)
    look.bench, look.name, look.folder = bench, name, these.shared / name
    assert wait_for(lambda: len(look.rows()) >= 5, PATIENCE, 0.5)
    ended, before = ended_now(look), len(look.rows())
    these.script("off", "h0")
    struck = time.monotonic()
    these.script("boot", "h0")
    these.ray_up()
    job = these.submit(f"--resume {SHARED}/{name}")
    assert wait_for(lambda: len(look.rows()) > before, PATIENCE, 0.5), these.logs(job)
    found = {"recovery seconds": round(time.monotonic() - struck, 1)}
    look.said = these.folder / f"{name}.log"
    look.said.write_text(these.finish(job))
    return bench.figures(look, ended=ended, **found)


def disk_full(bench: Bench) -> Figures:
    """The disk of the run's folder is full after its first checkpoint; it is emptied, and the run resumed."""
    said = bench.hosts.on("lap", DISK.format(root=ROOT, shared=SHARED, trials=TRIALS, epochs=EPOCHS))
    look = Search.__new__(Search)
    look.bench, look.name, look.folder = bench, "disk_full", bench.hosts.shared / "disk_full"
    look.said = bench.hosts.folder / "disk_full.log"
    look.said.write_text(said)
    assert "codes" in said, said[-3000:]
    # It does not run on the cluster, whose placement groups tell nothing of it.
    return bench.figures(look, codes=re.findall(r"codes (.*)", said)) | {"leaked placement groups": ""}


FAULTS: dict[str, Callable[[Bench], Figures]] = {
    "none": none,
    "trial killed ten times": trial_killed,
    "worker cut off": on_worker("worker_cut", "cut h2"),
    "worker killed": on_worker("worker_killed", "off h2"),
    "spot notice": spot_notice,
    "driver killed": driver_killed,
    "head killed": head_killed,
    "Ctrl-C once": ctrl_c_once,
    "Ctrl-C twice": ctrl_c_twice,
    "disk full": disk_full,
    "out of memory": out_of_memory,
    "half-written checkpoint": half_written,
    "NaN": nan,
    "slow node": slow_node,
    "two searches": two_searches,
}
