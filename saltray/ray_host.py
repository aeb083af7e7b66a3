"""The process that has a command's Ray on this machine; started by `saltray.local_ray`, not by people."""

import contextlib
import json
import logging
import os
import socket
import sys
from typing import IO

import ray


def serve(cpus: int | None, answer: IO[str], until: IO[str]) -> None:
    """Start Ray, say its address or why there is none as a line of JSON, and end it when the input ends.

    Args:
        cpus: that it has; None for all.
        answer: gets the line: `{"address": ..}` or `{"error": ..}`.
        until: ends when the command does.
    """
    # Its address is fixed beforehand and told to all its processes: where two Rays run on one machine, Ray
    # Train's cleaner does not know which is its own, and the placement group of a stopped trial stays.
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    os.environ |= {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"{address}:{port}"}
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=True,
        )
        said = {"address": os.environ["RAY_ADDRESS"]}
    except Exception as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(BrokenPipeError):  # the command has ended
        print(json.dumps(said), file=answer, flush=True)
        until.read()
    ray.shutdown()


if __name__ == "__main__":
    # What Ray itself prints must not be taken for the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else None, answer, sys.stdin)
