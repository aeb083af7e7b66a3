"""The faults: each starts a search, does its harm, lets the search end, and returns the figures."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from optuna.trial import TrialState

from saltray.records import study
from saltray.training import checkpoint
from tests.cluster.hosts import HEAD, PATIENCE, ROOT, SHARED, wait_for
from tests.faults.bench import EPOCHS, TRIALS, Bench, Figures, Refits, Search, ended_now, recovery

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
    found: Figures = {"recovery seconds": round(time.monotonic() - started, 1)}
    assert again.wait() == 0, again.said.read_text()[-3000:]
    more: Figures = {"exit code": code, "seconds to stop": stopping, "submission at the stop": submitted}
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
    found: Figures = {"recovery seconds": round(time.monotonic() - started, 1), "checkpoints cut": cut}
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


def refit_killed(bench: Bench) -> Figures:
    """A host loses its power while a refit trains on all three; the refits go on with two workers."""
    search = bench.start("refit", space="six", trials=1, more="--folds 2 --workers-per-trial 3")
    refits = Refits(search)
    refits.wait_rows(1)
    struck, before = time.monotonic(), len(refits.rows())
    bench.hosts.script("off", "h2")
    refits.wait_rows(before + 1)
    found: Figures = {"recovery seconds": round(time.monotonic() - struck, 1)}
    assert search.wait() == 0, search.said.read_text()[-3000:]
    workers = [[row["workers"] for row in study.epochs_of(t)] for t in refits.trials]
    assert workers[0][0] == 3 and workers[-1][-1] == 2, workers
    # Its mAP is another search's, and depends on the number of workers.
    return bench.figures(refits, wanted=2, **found) | {"best mAP": "", "workers by epoch": workers}


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
    found: Figures = {"recovery seconds": round(time.monotonic() - struck, 1)}
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
    "worker killed in a refit": refit_killed,
}
