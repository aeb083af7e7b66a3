"""A Ray of this machine's own, which a process beside the command starts and ends: `saltray.ray_host`.

Ray takes seconds to start, most of them waiting for one of its processes after the other; a command takes
seconds to import PyTorch, Ray Data and Optuna. Side by side they take half. Threads of one process would not
do: Ray forks, which is not safe beside a thread that loads libraries.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = {
    # While trials hold all CPUs, Ray ends idle processes after a second, and each epoch waits for new ones.
    "RAY_idle_worker_killing_time_threshold_ms": "300000",
    # Each trial is a thread, to which glibc gives a heap of its own: a process keeps what ended trials left,
    # and such a heap gives freed memory back at once, which makes training slower (`saltray.network.cpu`).
    "MALLOC_ARENA_MAX": "1",
    # A stopped trial ends its data streams before its process takes the next trial. Where that takes longer,
    # Ray Tune fails the next one and tells nobody: a slot is lost, and the search waits for it for ever.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    # Ray Train fetches the results of several workers every two seconds: shorter epochs would wait for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
"""Environment of Ray's processes, where the user has set no other; the cluster files set the same."""

ENDING_SECONDS = 30.0
"""How long Ray's processes may take to end before they are killed."""


class LocalRay:
    """The process that has the Ray; it ends with this one, however this one ends."""

    def __init__(self, cpus: int | None) -> None:
        """Let it start; `address` waits for it."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            # -P: of the folder that the command is started in, nothing is imported.
            [sys.executable, "-P", "-m", "saltray.ray_host", *([] if cpus is None else [str(cpus)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | environment(),
            text=True,
            # A session of its own. Ctrl-C is for the command, which still needs its Ray to end well.
            start_new_session=True,
        )
        self._started = False
        atexit.register(self.end)

    def address(self) -> str:
        """Return Ray's address, once it is there.

        Raises:
            RuntimeError: it could not start.
        """
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        said = json.loads(answer) if answer else {"error": self._last_words()}
        if "error" in said:
            raise RuntimeError(said["error"])
        self._started = True
        return str(said["address"])

    def end(self) -> None:
        """End it, and wait until it has; one that nobody waited for is killed."""
        atexit.unregister(self.end)
        if not self._started or self._is_dead():
            self._kill()
        try:
            self._process.communicate(timeout=ENDING_SECONDS)  # the end of its input is what it waits for
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"its process ended with code {self._process.returncode}: {last}"

    def _is_dead(self) -> bool:
        """Tell whether it has ended by itself; its number stays its own until it is waited for."""
        return self._process.returncode is not None or bool(
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        )

    def _kill(self) -> None:
        """Kill all of its session: Ray's workers and agents may miss that it is gone, and stay."""
        until = time.monotonic() + ENDING_SECONDS  # one that waits for a disk ends when that answers
        while (members := _living(self._process.pid)) and time.monotonic() < until:
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def _living(session: int) -> list[int]:
    """Return the processes of a session that have not ended, by Linux's table of all."""
    living = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, OSError):
            # Behind the name, which may hold anything: state, parent, group, session.
            state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state not in "ZX":
                living.append(int(entry.name))
    return living


_begun: list[LocalRay] = []


def begin() -> None:
    """Let a Ray with all CPUs start on this machine, for `take` to have later."""
    _begun.append(LocalRay(None))


def take(cpus: int | None = None) -> LocalRay:
    """Return the Ray that has begun to start; begin now where there is none, or so many CPUs are wanted."""
    return _begun.pop() if _begun and cpus is None else LocalRay(cpus)


def environment() -> dict[str, str]:
    """Return what all processes of a Ray on this machine need to know.

    As a runtime environment it would do as well, but each of Ray's processes would wait for an agent to set
    it up.
    """
    # Trials import the saltray that this process imported.
    source = str(Path(__file__).parents[1])
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
        **{name: os.environ.get(name, value) for name, value in SETTINGS.items()},
    }
