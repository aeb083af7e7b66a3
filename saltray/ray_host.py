"""The process that has a command's Ray on this machine; started by `saltray.local_ray`, not by people."""

import contextlib
import json
import logging
import os
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
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    os.environ["RAY_ADDRESS"] = f"{address}:{os.environ['RAY_GCS_SERVER_PORT']}"
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
