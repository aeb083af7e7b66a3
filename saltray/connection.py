"""Ray, started on this machine or joined on a cluster; what machines it has."""

import logging
import os
from typing import Any

import ray
import ray.data
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.exceptions import RayError

from saltray import local_ray
from saltray.config import UserError


class ConnectionFailed(UserError):
    """There is no Ray to work with."""


_local: list[local_ray.LocalRay] = []


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
        if joins:
            context = _join(address)
        else:
            _local.append(local_ray.take(cpus))
            started = _local[-1].address()
            # This process shows Ray's token, as one does that starts a Ray itself.
            enable_token_auth_by_default()
            # Nor does such a Ray report to its makers how it is used, unless it is told to.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            context = _join(started)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        if not joins:
            disconnect()
            raise ConnectionFailed(f"Ray does not start on this machine: {error}") from None
        where = address or os.environ["RAY_ADDRESS"]
        raise ConnectionFailed(
            f"no Ray cluster at {where}, or it wants another authentication token "
            f"(RAY_AUTH_MODE, ~/.ray/auth_token): {error}"
        ) from None
    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    # The order of the blocks, and so the shuffle, must not depend on which task ends first.
    data.execution_options.preserve_order = True
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def _join(address: str | None) -> Any:
    return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def disconnect() -> None:
    """Leave the cluster; a Ray that was started here ends."""
    ray.shutdown()
    while _local:
        _local.pop().end()


def nodes() -> list[dict[str, float]]:
    """Return the resources of each live machine."""
    return [n["Resources"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]


def cpus() -> tuple[float, float]:
    """Return how many CPUs nobody holds now, and how many there are."""
    free, known = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
    return free.get("CPU", 0.0), known.get("CPU", 0.0)
