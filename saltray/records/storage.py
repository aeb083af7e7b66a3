"""Where a run's folder lies: on this machine, on a file system that all machines share, or behind a URI.

Behind a URI (`s3://`, `gs://` ...: what pyarrow writes) Ray puts the trials' files there by itself. The run's
small files are worked on in a local folder, because SQLite needs one, and are mirrored: at the end of every
trial, and every few seconds between. The mirror is the truth: a resumed session fetches it, on any machine;
what could not be copied is copied first.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import sqlite3
import tempfile
import time
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs

from saltray.config import UserError
from saltray.training.checkpoint import METRICS

MIRROR_SECONDS = 10.0
"""How old the mirror of a study may become while trials run; their ends are mirrored at once."""

UNSENT = ".unsent"
"""In a working folder while it may hold what its URI does not."""

PROBE = ".saltray-probe-"
"""How the names of files begin that are there for a moment only, to see who shares a folder."""

BEST, ENSEMBLE = "best", "ensemble"
"""A run's folders of its best model, and of its ensemble."""

BUNDLES = (BEST, ENSEMBLE)
"""A run's folders that are made anew in whole: what an older one had more goes from a copy as well."""

_LAST = [Path(bundle, METRICS) for bundle in BUNDLES]
"""Without it no program takes a bundle for one."""

_LOG = logging.getLogger(__name__)


class StorageError(UserError):
    """The run's folder cannot be used from every machine; the message names machine and path."""


class Overtaken(StorageError):
    """Another session has gone on with the run behind the URI; this one must not write there any more."""


@dataclass(frozen=True)
class Home:
    """A run's folder: where its small files are worked on, and its URI if they are mirrored."""

    folder: Path
    uri: str | None = None

    def __str__(self) -> str:
        """Return the place as a user names it."""
        return self.uri or str(self.folder)

    @property
    def trials(self) -> str:
        """Return the path or URI below which Ray Tune keeps the trials' files."""
        return f"{self}/trials"


def home(where: str) -> Home:
    """Return the home of a run at a path or URI.

    A URI's working folder has the run's name, its last part. It lies in one named after the URI, in
    `~/.cache/saltray/`, with eight digits of its SHA-256: other URIs may have the same words.
    """
    if "://" not in where:
        return Home(Path(where).expanduser().resolve())
    uri = where.rstrip("/")
    words, digits = re.sub(r"[^\w.-]+", "-", uri), hashlib.sha256(uri.encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Home(cache / "saltray" / f"{words}-{digits}" / Path(uri).name, uri)


def open_uri(where: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Open a path or URI; return the file system and the path there.

    Raises:
        StorageError: there is no such file system, or it lets nobody in.
    """
    if "://" not in where:
        return pyarrow.fs.LocalFileSystem(), where
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(where)
    except (ValueError, OSError) as error:
        raise StorageError(f"{where}: cannot be reached: {error}") from None
    return filesystem, path


def names(where: str) -> list[str]:
    """List what lies at a path or URI, by name; none where there is no folder. Raises StorageError."""
    filesystem, path = open_uri(where)
    try:
        return list_names(filesystem, path)
    except OSError as error:
        raise StorageError(f"{where}: cannot be read: {error}") from None


def list_names(filesystem: pyarrow.fs.FileSystem, path: str) -> list[str]:
    """List what lies in a folder, by name; none where there is none. Raises OSError."""
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return [info.base_name for info in infos]


def read_text(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    """Read a file; an empty text where there is none. Raises OSError."""
    try:
        with filesystem.open_input_stream(path) as file:
            return bytes(file.read()).decode()
    except FileNotFoundError:
        return ""


def fetch(place: Home) -> None:
    """Copy a mirrored run's small files to its working folder, over what an earlier session left there.

    What that session could not copy to the URI is copied now, before anything is overwritten. What a bundle
    has here and not at the URI is deleted, once all that the URI has is here.

    Raises:
        StorageError: the URI cannot be read or written, or holds no run; or it is `Overtaken`, so that
            neither side is the newer one.
    """
    if place.uri is None:
        return
    if (place.folder / UNSENT).exists() and (place.folder / "run.json").exists():
        with Mirror(place):
            pass  # its end copies
    found = names(place.uri)
    if "run.json" not in found:
        raise StorageError(f"{place}: no run.json in it; not the folder of a run")
    filesystem, root = open_uri(place.uri)
    for stale in place.folder.glob("*.db-*"):  # a killed session's, which would be played into the new file
        stale.unlink()
    fetched = set()
    try:
        for path in [
            path for name in found if name != "trials" for path in _files(filesystem, f"{root}/{name}")
        ]:
            target = place.folder / path[len(root) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            with filesystem.open_input_stream(path) as file:
                target.write_bytes(file.read())
            fetched.add(target)
    except OSError as error:
        raise StorageError(f"{place}: cannot be read: {error}") from None
    if not (place.folder / UNSENT).exists():  # it is, where there was no run.json to send the rest with
        for name in BUNDLES:
            _keep(fetched, place.folder / name)


def _keep(kept: Container[Path], folder: Path) -> None:
    """Delete all other files below a folder, and the folders that this leaves empty."""
    for path in sorted([folder, *folder.rglob("*")], reverse=True):  # what lies in a folder before the folder
        if not path.is_dir():
            if path not in kept:
                path.unlink(missing_ok=True)
        elif not any(path.iterdir()):
            path.rmdir()


def _refuse_overtaken(place: Home, filesystem: pyarrow.fs.FileSystem, root: str) -> None:
    """Raise Overtaken unless a working folder has all sessions that its URI has, in its `run.json`."""
    try:
        there = _sessions(read_text(filesystem, f"{root}/run.json"))
    except OSError as error:
        raise StorageError(f"{place}: cannot be read: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{place}/run.json: damaged: {error}") from None
    file = place.folder / "run.json"
    if _sessions(file.read_text() if file.exists() else "")[: len(there)] != there:
        raise Overtaken(
            f"{place}: another session, on {there[-1].get('host', 'another machine')}, has gone on with this "
            f"run. What could not be copied since is in {place.folder} on {socket.gethostname()} alone; "
            "move that folder away to take what the URI holds"
        )


def _sessions(text: str) -> list[dict[str, Any]]:
    """Return the sessions that a `run.json` tells of; none where it is empty."""
    return list(json.loads(text)["sessions"]) if text else []


def _files(filesystem: pyarrow.fs.FileSystem, path: str) -> list[str]:
    """Return the path of a file, or those of all in a folder."""
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
        return [path]
    inner = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
    return [info.path for info in inner if info.type == pyarrow.fs.FileType.File]


@dataclass
class Mirror:
    """Copies a working folder's files to the run's URI when they have changed; does nothing without one.

    Of sessions on two machines, the one that has copied its `run.json` has the run; one that does not know of
    it is refused at its next copy. A small window remains: both may look before either has written. Then the
    later to write has the run, and copies anew what the other wrote in that moment as soon as it changes.
    """

    home: Home
    _sent: dict[Path, tuple[int, int]] = field(default_factory=dict)
    _pruned: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _last: float = 0.0

    def __enter__(self) -> "Mirror":
        """Begin; until the end is copied, the working folder may be ahead."""
        if self.home.uri is not None:
            (self.home.folder / UNSENT).touch()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Copy what the end has left; a failure to copy hides no other."""
        if kind is not None and issubclass(kind, Overtaken):
            return
        try:
            self.push()
        except StorageError as error:
            if kind is None:
                raise
            _LOG.warning("%s", error)
            return
        (self.home.folder / UNSENT).unlink(missing_ok=True)

    def push(self) -> None:
        """Copy what has changed; then delete at the URI what its bundles have more than those here.

        Raises:
            StorageError: the URI cannot be written.
            Overtaken: another session has gone on with the run; nothing is written.
        """
        if self.home.uri is None:
            return
        filesystem, root = open_uri(self.home.uri)
        self._last = time.monotonic()
        _refuse_overtaken(self.home, filesystem, root)
        broken_up = set[str]()
        for name in sorted((f.relative_to(self.home.folder) for f in self.home.folder.rglob("*")), key=_turn):
            file = self.home.folder / name
            if (
                not file.is_file()
                or name.parts[0] == "trials"
                or name.parts[0].endswith((".new", ".old"))  # bundles that are being made
                or re.search(r"\.lock$|\.tmp$|\.db-", file.name)
                or file.name == UNSENT
            ):
                continue
            stat = file.stat()
            state = (stat.st_mtime_ns, stat.st_size)
            if self._sent.get(name) == state:
                continue
            bundle = name.parts[0]
            if bundle in BUNDLES and name not in self._sent and self._holds(name, filesystem, root):
                self._sent[name] = state  # an earlier session has sent it: a whole bundle stays whole
                continue
            if bundle in BUNDLES and name not in _LAST and bundle not in broken_up:
                self._break_up(bundle, filesystem, root)
                broken_up.add(bundle)
            _send(self.home, name.as_posix(), filesystem, root)
            self._sent[name] = state
        for bundle in BUNDLES:
            self._prune(bundle, filesystem, root)

    def _holds(self, name: Path, filesystem: pyarrow.fs.FileSystem, root: str) -> bool:
        """Tell whether the URI has a file as it is here."""
        path, data = f"{root}/{name.as_posix()}", (self.home.folder / name).read_bytes()
        try:
            info = filesystem.get_file_info(path)
            if info.type != pyarrow.fs.FileType.File or info.size != len(data):
                return False
            with filesystem.open_input_stream(path) as file:
                return bytes(file.read()) == data
        except OSError as error:
            raise StorageError(f"{self.home.uri}/{name}: cannot be read: {error}") from None

    def _break_up(self, bundle: str, filesystem: pyarrow.fs.FileSystem, root: str) -> None:
        """Delete what makes a bundle at the URI whole: half of a new one must not be taken for a model."""
        whole = Path(bundle, METRICS)
        self._sent.pop(whole, None)
        try:
            if filesystem.get_file_info(f"{root}/{whole}").type == pyarrow.fs.FileType.File:
                filesystem.delete_file(f"{root}/{whole}")
        except OSError as error:
            raise StorageError(f"{self.home.uri}/{whole}: cannot be deleted: {error}") from None

    def _prune(self, bundle: str, filesystem: pyarrow.fs.FileSystem, root: str) -> None:
        """Delete what an older bundle has left at the URI, where there is one here, all of it copied."""
        folder = self.home.folder
        files = (file for file in sorted((folder / bundle).rglob("*")) if file.is_file())
        # By the paths' ends: a file system may give their beginning in other words than it was asked.
        here = tuple(f"/{file.relative_to(folder).as_posix()}" for file in files)
        if not here or here == self._pruned.get(bundle):
            return
        try:
            for path in _files(filesystem, f"{root}/{bundle}"):
                if not path.endswith(here):
                    filesystem.delete_file(path)
        except OSError as error:
            raise StorageError(
                f"{self.home.uri}/{bundle}: what an older one has left there cannot be deleted: {error}. "
                f"The run's files are in {folder} on {socket.gethostname()}"
            ) from None
        self._pruned[bundle] = here

    def push_soon(self) -> None:
        """Do as `push_now` does if that was not done a moment ago."""
        if time.monotonic() - self._last > MIRROR_SECONDS:
            self.push_now()

    def push_now(self) -> None:
        """Copy what has changed; a failure is logged, and tried again. Raises Overtaken."""
        try:
            self.push()
        except Overtaken:
            raise
        except StorageError as error:
            _LOG.warning("%s", error)


def _turn(name: Path) -> tuple[int, Path]:
    """Return when a file's turn is among those that are copied."""
    # run.json tells another session, which wants the space beside it; what makes a bundle whole comes last.
    first = {Path("space.py"): 0, Path("run.json"): 1}
    return (3 if name in _LAST else first.get(name, 2)), name


def send(place: Home, name: str) -> None:
    """Copy one file of a working folder to the run's URI, if it has one; raises StorageError."""
    if place.uri is not None:
        _send(place, name, *open_uri(place.uri))


def _send(place: Home, name: str, filesystem: pyarrow.fs.FileSystem, root: str) -> None:
    file = place.folder / name
    data = _database(file) if file.suffix == ".db" else file.read_bytes()
    try:
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            stream.write(data)
    except OSError as error:
        raise StorageError(
            f"{place.uri}/{name}: cannot be written: {error}. "
            f"The run's files are in {place.folder} on {socket.gethostname()}"
        ) from None


def _database(file: Path) -> bytes:
    """Return a consistent copy of a SQLite database that is in use."""
    with (
        tempfile.NamedTemporaryFile(suffix=".db") as copy,
        contextlib.closing(sqlite3.connect(file, timeout=60)) as source,
        contextlib.closing(sqlite3.connect(copy.name)) as target,
    ):
        source.backup(target)
        return Path(copy.name).read_bytes()
