"""Ray, started on this machine or joined on a cluster, and kept quiet; what machines it has."""

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.data
from ray.exceptions import RaySystemError

from saltray.config import UserError


class ConnectionFailed(UserError):
    """There is no Ray to work with."""


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


def connect(address: str | None, cpus: int | None = None) -> str:
    """Join the cluster at `address` or RAY_ADDRESS, or start Ray on this machine.

    Ray Data is set to keep order, and quiet.

    Returns:
        The URL of Ray's dashboard, or an empty string.

    Raises:
        ConnectionFailed: there is no cluster at the address.
    """
    joins = address is not None or "RAY_ADDRESS" in os.environ
    try:
        with contextlib.nullcontext() if joins else _local_environment():
            context = ray.init(
                address=address if joins else "local",
                num_cpus=cpus,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if joins else True,
            )
    except (ConnectionError, RaySystemError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS", "this machine")
        raise ConnectionFailed(
            f"no Ray cluster at {where}, or it wants another authentication token "
            f"(RAY_AUTH_MODE, ~/.ray/auth_token): {error}"
        ) from None
    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    # The order of the blocks, and so the shuffle, must not depend on which task ends first.
    data.execution_options.preserve_order = True
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


@contextlib.contextmanager
def _local_environment() -> Iterator[None]:
    """Set what the processes of a Ray on this machine need to know, while it starts.

    Its address is fixed beforehand and told to all: where two Rays run on one machine, Ray Train's cleaner
    does not know which is its own, and the placement group of a stopped trial is never freed. As a runtime
    environment it would do as well, but each of Ray's processes would wait for an agent to set it up.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    # Trials import the saltray that this process imported.
    source = str(Path(__file__).parents[1])
    values = {
        "RAY_GCS_SERVER_PORT": port,
        "RAY_ADDRESS": f"{address}:{port}",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
        **{name: os.environ.get(name, value) for name, value in SETTINGS.items()},
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def disconnect() -> None:
    """Leave the cluster; a Ray that was started here ends."""
    ray.shutdown()


def nodes() -> list[dict[str, float]]:
    """Return the resources of each live machine."""
    return [n["Resources"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]


def cpus() -> tuple[float, float]:
    """Return how many CPUs nobody holds now, and how many there are."""
    free, known = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
    return free.get("CPU", 0.0), known.get("CPU", 0.0)


@contextlib.contextmanager
def quiet(log: Path | None) -> Iterator[None]:
    """Send what Ray, Optuna and Python's warnings say to a file (or nowhere), instead of the terminal."""
    if log is not None:
        log.parent.mkdir(exist_ok=True)  # of a run behind a URI, a folder that was empty is not there
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((log or Path(os.devnull)).open("a", buffering=1))
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for name in ("saltray", "ray", "ray.data", "ray.tune", "ray.train", "optuna"):
            logger = logging.getLogger(name)
            before = logger.handlers
            # Ray Data's own file handler stays; what prints goes.
            logger.handlers = [h for h in before if not isinstance(h, logging.StreamHandler)] + [handler]
            stack.callback(setattr, logger, "handlers", before)
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        # Ray's C++ core writes to the descriptor itself.
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        stack.callback(os.close, stderr)
        stack.callback(os.dup2, stderr, 2)
        yield
