"""A cluster of namespace hosts, and the commands that a user would type on them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("hosts.sh")
SHARED = Path("/tmp/shared")
"""The folder that all hosts share, as they see it."""

PATIENCE = 600.0
"""Seconds that a command or a search may take before it is given up: many, for a machine with other loads."""

LAP, HEAD, WORKERS = "10.77.0.9", "10.77.0.10", ["10.77.0.11", "10.77.0.12"]

NEEDED = {
    **{"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client"},
    **{"rsync": "rsync", "curl": "curl"},
}


def missing() -> str | None:
    """Say why there can be no hosts here; None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [package for program, package in NEEDED.items() if not shutil.which(program, path=path)]
    if absent:
        return f"apt-get install {' '.join(absent)}"
    probe = subprocess.run(["unshare", "-n", "-m", "-p", "-f", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


class Hosts:
    """Hosts `lap`, `h0` (the head) and two workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        """The shared folder as this process sees it."""
        self.env = {
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "LAB": str(folder),
            "VENV": str(Path(sys.prefix).resolve()),
            "ROOT": str(ROOT),
        }

    def command(self, *words: str) -> list[str]:
        """Return the command of a script's action, to be run with `env`."""
        return [str(SCRIPT), *words]

    def script(self, *words: str, timeout: float = PATIENCE) -> str:
        done = subprocess.run(
            self.command(*words),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def on(self, host: str, command: str, timeout: float = PATIENCE) -> str:
        """Run a command on a host, over SSH."""
        return self.script("on", host, command, timeout=timeout)

    def up(self, host: str) -> bool:
        """Tell whether a host has power."""
        done = subprocess.run(self.command("power", host), env=self.env, capture_output=True)
        return done.returncode == 0

    def processes(self) -> list[int]:
        """Return every process in the hosts' namespaces that still runs."""
        family = {int((self.folder / "pid").read_text())}
        parents = {int(p.name): _parent(p) for p in Path("/proc").glob("[0-9]*")}
        while more := {p for p, parent in parents.items() if parent in family} - family:
            family |= more
        return sorted(family & parents.keys())

    def ray_up(self) -> None:
        """`ray up` with cluster/on-prem.yaml, its addresses and sizes substituted; wait for all nodes."""
        text = (ROOT / "cluster" / "on-prem.yaml").read_text()
        for old, new in {
            "192.0.2.10": HEAD,
            "[192.0.2.11, 192.0.2.12]": json.dumps(WORKERS),
            "ssh_user: ubuntu": "ssh_user: root",
            "AUTH_MODE=token": "AUTH_MODE=token AUTOSCALER_UPDATE_INTERVAL_S=1",
            "--port=6379": "--port=6379 --num-cpus=1 --object-store-memory=100000000",
            "_IP:6379": "_IP:6379 --num-cpus=1 --object-store-memory=100000000",
        }.items():
            assert old in text
            text = text.replace(old, new)
        (self.folder / "lap" / "tmp" / "cluster.yaml").write_text(text)
        self.on("lap", "test -e ~/.ray/auth_token || ray get-auth-token --generate >/dev/null")
        # Ray gives a node 30 s to start, however loaded the machine; `ray up` again is what a user would do.
        up = "RAY_UP_enable_autoscaler_v2=0 ray up -y /tmp/cluster.yaml"
        self.on("lap", f"cd {ROOT} && {{ {up} || {up} || {up}; }}")
        assert wait_for(lambda: len(self.alive()) == 3, PATIENCE), self.on(
            "h0", "RAY_AUTH_MODE=token ray status -v"
        )

    def ray_down(self) -> None:
        self.on("lap", f"cd {ROOT} && ray down -y /tmp/cluster.yaml")

    def alive(self) -> set[str]:
        """Return the addresses of the nodes that Ray thinks are alive."""
        try:
            rows = json.loads(self.job_api("api/v0/nodes?limit=100"))["data"]["result"]["result"]
        except (AssertionError, ValueError, KeyError):
            return set()
        return {row["node_ip"] for row in rows if row["state"] == "ALIVE"}

    def job_api(self, path: str) -> str:
        """Ask the dashboard, from the head: it listens nowhere else."""
        token = "Authorization: Bearer $(cat ~/.ray/auth_token)"
        return self.on("h0", f'curl -sS -H "{token}" "http://127.0.0.1:8265/{path}"')

    def submit(self, arguments: str, environment: str = "") -> str:
        """Submit `python -m saltray.tune ARGUMENTS` through an SSH tunnel from lap; return the job's id."""
        tunnel = (
            f"ssh -fNL 8265:127.0.0.1:8265 -o ExitOnForwardFailure=yes -o StrictHostKeyChecking=no {HEAD}"
        )
        self.on("lap", f"curl -s 127.0.0.1:8265 >/dev/null || {tunnel}")
        said = self.on(
            "lap",
            "RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --no-wait -- "
            f"env COLUMNS=110 {environment} python -m saltray.tune {arguments}",
        )
        return str(re.findall(r"raysubmit_\w+", said)[0])

    def status(self, job: str) -> str:
        return str(json.loads(self.job_api(f"api/jobs/{job}"))["status"])

    def logs(self, job: str) -> str:
        return str(json.loads(self.job_api(f"api/jobs/{job}/logs"))["logs"])

    def finish(self, job: str, timeout: float = PATIENCE) -> str:
        """Wait for a job to succeed; return what it said."""
        ended = wait_for(lambda: self.status(job) in ("SUCCEEDED", "FAILED", "STOPPED"), timeout, every=1)
        assert ended and self.status(job) == "SUCCEEDED", f"{self.status(job)}: {self.logs(job)[-4000:]}"
        return self.logs(job)


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Start the hosts; end every process on them afterwards, whatever happened."""
    with tempfile.TemporaryDirectory(prefix="saltray-hosts-", ignore_cleanup_errors=True) as folder:
        these = Hosts(Path(folder))
        try:
            these.script("up", "2")
            yield these
        finally:
            if (these.folder / "pid").exists():
                left = these.processes()
                these.script("down")
                wait_for(lambda: not [p for p in left if Path(f"/proc/{p}").exists()], 60)


def wait_for(condition: Callable[[], Any], seconds: float, every: float = 0.5) -> bool:
    """Wait until a condition holds; tell whether it came to."""
    end = time.monotonic() + seconds
    while not (held := bool(condition())) and time.monotonic() < end:
        time.sleep(every)
    return held
