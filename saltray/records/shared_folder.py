"""Whether all machines share a run's folder: each reads what the driver wrote there, and vice versa."""

import contextlib
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saltray.records.storage import PROBE, Home, StorageError, open_uri, read_text

PROBE_SECONDS = 60.0
"""How long a machine may take to show that it sees the run's folder."""


def probe(place: Home) -> None:
    """Make sure that every live machine reads what this one writes at the run's place, and vice versa.

    A new run's folder is not made for it: its nearest parent is tried.

    Raises:
        StorageError: naming the machine and the path.
    """
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    if place.uri is None and len(nodes) < 2:
        return
    root = str(place) if place.uri else str(_existing(place.folder))
    mark = f"{root}/{PROBE}{uuid.uuid4().hex}"
    filesystem, path = open_uri(mark)
    advice = "A run's folder must be shared by all machines: choose an --out on NFS, or s3://"
    here = socket.gethostname()
    try:
        with _removed(filesystem, path):
            _write(filesystem, path, here)
            for node in nodes:
                with _removed(filesystem, f"{path}-{node['NodeID']}"):
                    name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                    problem = _ask(node["NodeID"], name, mark, here)
                    if problem:
                        raise StorageError(
                            f"{place}: {name} does not share it with {here}: {problem}. {advice}"
                        )
                    if read_text(filesystem, f"{path}-{node['NodeID']}") != node["NodeID"]:
                        raise StorageError(f"{place}: {here} does not see what {name} wrote there. {advice}")
    except OSError as error:
        raise StorageError(f"{place}: {here} cannot write there: {error}") from None


def _ask(node: str, name: str, mark: str, expected: str) -> str:
    """Let a machine read the mark and write its own; return what went wrong with the files.

    Raises:
        StorageError: saltray does not run there.
    """
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    task = ray.remote(_answer).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)
    try:
        return str(ray.get(task.remote(node, mark, expected), timeout=PROBE_SECONDS))
    except ray.exceptions.GetTimeoutError:
        return f"no answer within {PROBE_SECONDS:g} s"
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise StorageError(f"{name}: saltray does not run there: {last}. Is it installed?") from None


def _answer(node: str, mark: str, expected: str) -> str:
    """Read the mark, and write this machine's; return what went wrong."""
    try:
        filesystem, path = open_uri(mark)
        found = read_text(filesystem, path)
        if found != expected:
            return f"it reads {found!r} there"
        _write(filesystem, f"{path}-{node}", node)
    except (OSError, StorageError) as error:
        return str(error)
    return ""


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.is_dir())


def _write(filesystem: pyarrow.fs.FileSystem, path: str, text: str) -> None:
    with filesystem.open_output_stream(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def _removed(filesystem: pyarrow.fs.FileSystem, path: str) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            filesystem.delete_file(path)
