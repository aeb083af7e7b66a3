"""The checkpoints that Ray writes below a run's `trials/`, in a folder or behind a URI."""

import contextlib
import os
from pathlib import Path

import pyarrow.fs

from saltray.records.storage import StorageError, list_names, open_uri


def openable(root: str, path: str) -> str:
    """Return a path that Ray gives for something below `root` as one that can be opened anywhere."""
    scheme, separator, _ = root.partition("://")
    return f"{scheme}://{path}" if separator and "://" not in path else path


def trim(place: str, state: str) -> None:
    """Drop what only training on needs: a trial's older checkpoints, of all sessions, and the newest's state.

    What cannot be deleted stays: it costs room and nothing else.

    Args:
        place: path or URI of the newest checkpoint of a trial that has ended,
            `session-SS/NNNN/checkpoint_CCCCCC`.
        state: the name of the file in it that holds the state.
    """
    with contextlib.suppress(StorageError, OSError):
        filesystem, path = open_uri(place)
        older = [other for other in _trials_checkpoints(filesystem, path) if other < path]
        if older and isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            _sync(Path(path))
        for other in older:
            filesystem.delete_dir(other)
        filesystem.delete_file(f"{path}/{state}")


def checkpoints_beside(place: str) -> list[str]:
    """List a trial's checkpoints behind a URI, of all sessions, the newest first; the newest may be half.

    Its study's mirror may be older than what Ray has written, and name none that is still there. Of a local
    path, whose study is never older, nothing is listed.

    Args:
        place: URI of a checkpoint of the trial, `session-SS/NNNN/checkpoint_CCCCCC`, there or not.
    """
    if "://" not in place:
        return []
    with contextlib.suppress(StorageError, OSError):
        filesystem, path = open_uri(place)
        found = _trials_checkpoints(filesystem, path)
        return [openable(place, other) for other in sorted(found, reverse=True)]
    return []


def _trials_checkpoints(filesystem: pyarrow.fs.FileSystem, path: str) -> list[str]:
    """Return the paths of all checkpoints of the trial that one belongs to."""
    root, _, trial, _ = path.rsplit("/", 3)
    return [
        f"{root}/{session}/{trial}/{name}"
        for session in list_names(filesystem, root)
        if session.startswith("session-")
        for name in list_names(filesystem, f"{root}/{session}/{trial}")
        if name.startswith("checkpoint_")
    ]


def _sync(folder: Path) -> None:
    """Have a folder's files on the disk, for the time when no other copy is there any more."""
    for place in [*folder.iterdir(), folder]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
