"""A run's folder.

runs/NAME/
  run.json          settings, command, versions, hardware
  space.py          the search space as it was
  study.db          the Optuna study
  trials/           each trial's log, results and newest checkpoint, by session; those of refits in folds-K/
  logs/             what Ray and Optuna had to say
  best/             the best model's bundle (`saltray.prediction.bundle`)
  ensemble/         the ensemble's, where one was asked for; submission.csv is then its own
  tensorboard/      event files, a folder a trial
  submission.csv
  validation.csv    what the best model does on each validation tile; gallery.npz: a few of them to look at
  report.html
"""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saltray.config import UserError
from saltray.records import environment, storage
from saltray.records.settings import Settings

FORMAT = 1
"""Of `run.json`; a newer one is refused."""


class RunError(UserError):
    """The run's folder, or what was asked of the run, cannot be used."""


class UnderWay(RunError):
    """Another process holds the run's folder on this machine."""


def refuse_taken(home: storage.Home) -> None:
    """Raise a RunError where a new run's folder, or its URI, holds something, or cannot be written to."""
    folder = home.folder
    behind_uri = _held(storage.names(home.uri)) if home.uri is not None else set()
    here = _held(storage.names(str(folder))) if folder.is_dir() else {"a file"} if folder.exists() else set()
    if held := behind_uri or here:
        way = f"To go on with that run: --resume {shlex.quote(str(home))}; to start a new one: another --out"
        if "run.json" not in held:
            way = "It holds no run (a start that was cut off?): remove it, or name another --out"
        raise RunError(f"{home if behind_uri else folder}: already there. {way}")
    with (
        _writing(folder),
        tempfile.TemporaryFile(dir=next(p for p in (folder, *folder.parents) if p.exists())),
    ):
        pass


def _held(names: Iterable[str]) -> set[str]:
    # What a look at a run that was not there, or a start that was cut off, leaves.
    return {n for n in names if n not in (".lock", storage.UNSENT) and not n.startswith(storage.PROBE)}


def create(folder: Path, space: Path) -> None:
    """Make a new run's folder; raises a RunError where that cannot be done, or another has just done so."""
    with _writing(folder):
        (folder / "logs").mkdir(parents=True)
        (folder / "space.py").write_text(space.read_text())


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Name the folder where it cannot be written to."""
    try:
        yield
    except FileExistsError:
        raise RunError(f"{folder}: another session has just made it; name another --out") from None
    except OSError as error:
        raise RunError(f"{folder}: cannot be written to: {error.strerror or error}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for one session; the lock goes with its process, however that ends.

    Raises:
        UnderWay: another session is running.
        RunError: the folder cannot be written to.
    """
    with _writing(folder):
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnderWay(f"{folder}: another session of this run is under way") from None
        yield


def fetch(home: storage.Home) -> None:
    """Fetch a mirrored run's files to its working folder.

    Raises:
        StorageError: the URI cannot be read or holds no run.
        UnderWay: a session on this machine works there.
    """
    if home.uri:
        home.folder.mkdir(parents=True, exist_ok=True)
        with locked(home.folder):
            storage.fetch(home)


def fetched(where: str) -> Path:
    """Return the folder of a run at a path or URI, to be read; what lies behind a URI is fetched first.

    Where a session on this machine works with it, its working folder has the newest already.

    Raises:
        UserError: the URI cannot be read or holds no run, or another process is fetching it.
    """
    home = storage.home(where)
    try:
        fetch(home)
    except UnderWay:
        if not (home.folder / storage.UNSENT).exists():  # no session's: half of it may be there
            raise RunError(f"{home}: another process is fetching it; try again") from None
    return home.folder


def write_settings(folder: Path, settings: Settings, tiles: str) -> None:
    """Write `run.json`, adding this session to those before it.

    Args:
        folder: the run's.
        settings: of this session.
        tiles: fingerprint of the labelled tiles and their split.

    Raises:
        RunError: an earlier session had other tiles, or another split of them.
    """
    file = folder / "run.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("tiles", tiles) != tiles:
        raise RunError(
            f"{settings.data}: these are not the labelled tiles, or not the split, that {folder} began with; "
            "scores would not compare. Start a new run with another --out"
        )
    sessions = known.get("sessions", [])
    content = {
        "format": FORMAT,
        "tiles": tiles,
        "settings": settings.model_dump(),
        # With the host, no two machines' sessions are alike, though they begin in the same second.
        "sessions": [*sessions, environment.describe() | {"host": socket.gethostname()}],
    }
    temporary = file.with_suffix(".tmp")
    with temporary.open("w") as opened:
        opened.write(json.dumps(content, indent=2) + "\n")
        opened.flush()
        os.fsync(opened.fileno())  # a power cut must not leave an empty one in its place
    temporary.replace(file)


def read(folder: Path) -> dict[str, Any]:
    """Read `run.json`: `format`, `tiles` (fingerprint), `settings`, and `sessions` (their environments).

    Raises:
        RunError: the folder holds no run, a damaged one, or one of a newer version.
    """
    file = folder / "run.json"
    if not file.is_file():
        lack = "no run.json in it" if folder.is_dir() else "no such folder"
        raise RunError(f"{folder}: {lack}; not the folder of a run")
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        if content["format"] > FORMAT:
            raise RunError(f"{file}: written by a newer saltray (format {content['format']}); update saltray")
        Settings.model_validate(content["settings"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise RunError(f"{file}: damaged: {error}") from None
    return content


def read_settings(folder: Path) -> Settings:
    """Read a run's settings; raises RunError as `read` does."""
    return Settings.model_validate(read(folder)["settings"])


def demo_data(folder: Path) -> Path:
    """Return where a run without data of its own keeps its synthetic tiles."""
    return folder / "demo" / "data"
