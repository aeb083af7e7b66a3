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
import socket
import subprocess
import sys
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
        self._process = subprocess.Popen(
            [sys.executable, "-m", "saltray.ray_host", *([] if cpus is None else [str(cpus)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | environment(),
            text=True,
            # A group of its own. Ctrl-C is for the command, which still needs its Ray to end well.
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
        said = json.loads(self._process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in said:
            raise RuntimeError(said["error"])
        self._started = True
        return str(said["address"])

    def end(self) -> None:
        """End it, and wait until it has; one that nobody waited for is killed."""
        atexit.unregister(self.end)
        if not self._started:
            self._kill()
        try:
            self._process.communicate(timeout=ENDING_SECONDS)  # the end of its input is what it waits for
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.communicate()

    def _kill(self) -> None:
        # With all that it has started: Ray's agents may miss that it is gone, and stay for ever.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


_begun: list[LocalRay] = []


def begin(cpus: int | None = None) -> None:
    """Let a Ray start on this machine, for `take` to have later; by default with all CPUs."""
    _begun.append(LocalRay(cpus))


def take(cpus: int | None = None) -> LocalRay:
    """Return the Ray that has begun to start, or begin now."""
    if not _begun:
        begin(cpus)
    return _begun.pop()


def environment() -> dict[str, str]:
    """Return what all processes of a Ray on this machine need to know.

    Its address is fixed beforehand and told to all: where two Rays run on one machine, Ray Train's cleaner
    does not know which is its own, and the placement group of a stopped trial is never freed. As a runtime
    environment it would do as well, but each of Ray's processes would wait for an agent to set it up.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    # Trials import the saltray that this process imported.
    source = str(Path(__file__).parents[1])
    return {
        "RAY_GCS_SERVER_PORT": port,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
        **{name: os.environ.get(name, value) for name, value in SETTINGS.items()},
    }
