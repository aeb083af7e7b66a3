"""What the command lines share."""

import contextlib
import errno
import os
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

from saltray import local_ray
from saltray.config import UserError


def run_program(main: Callable[..., Any], when_full: str = "Make room, then run it again") -> None:
    """Run a command line; what the user can mend is told in one message, without a traceback.

    Args:
        main: the function that typer makes a command line of.
        when_full: what to do when a disk is full.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        full = _disk_full(error)
        if full is None:
            raise
        sys.exit(f"error: {full}. {when_full}")


def _disk_full(error: BaseException | None) -> BaseException | None:
    """Return the error, or what it came from, that says that a disk is full; SQLite has words of its own."""
    words = (os.strerror(errno.ENOSPC), "database or disk is full")
    while error is not None:
        if any(word in str(error) for word in words):
            return error
        error = error.__cause__ or error.__context__
    return None


def prepare_ray(address: str | None) -> None:
    """Make a cluster's address usable, or let a Ray start on this machine.

    To be called before Ray is imported. Ray starts its clusters with the token in `~/.ray/auth_token`, but
    shows it to an address only when RAY_AUTH_MODE says so, which it reads when it is imported.

    Raises:
        UserError: nothing listens at the address; Ray itself would try for minutes.
    """
    option = f"--address {address}" if address else ""
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        local_ray.begin()
        return
    if (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            where = option or f"RAY_ADDRESS={address} in the environment (unset it for a Ray of your own)"
            raise UserError(f"{where}: no Ray cluster there: {error}") from None


def bundled_space(name: str) -> Path:
    """Return the path of a search space that comes with saltray, from a checkout or an installed wheel."""
    package = Path(__file__).parent
    for folder in (package.parent / "search_spaces", package / "search_spaces"):
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise UserError(f"search_spaces/{name}.py: not found beside saltray; name a space with --space")


def located(data: str) -> str:
    """Return a URI as it is, and a path as an absolute one.

    Raises:
        UserError: the URI holds a password or key, which the run's files would keep.
    """
    if "://" in data and urlsplit(data).password:
        scheme, bucket = urlsplit(data).scheme, urlsplit(data).hostname
        raise UserError(
            f"{scheme}://...@{bucket}: keys do not belong in a URI; give the machine a role, "
            "or set the environment's AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return data if "://" in data else str(Path(data).expanduser().resolve())


class NewFile:
    """The file that a command writes its result to: a path, or a URI that pyarrow writes (`s3://` ...)."""

    def __init__(self, out: str) -> None:
        """Make its folder and try that a file can be written there, before any work is done for it.

        Raises:
            UserError: it is there already, or cannot be written.
        """
        from pyarrow import fs

        self._out, self._path, self._files = out, located(out), fs.LocalFileSystem()
        self._is_local = "://" not in self._path
        try:
            if not self._is_local:
                self._files, self._path = fs.FileSystem.from_uri(self._path)
            taken = self._files.get_file_info(self._path).type != fs.FileType.NotFound
            if not taken:
                self._try()
        except (ValueError, OSError) as error:
            raise UserError(f"{out}: cannot be written: {error}") from None
        if taken:
            raise UserError(f"{out}: already there; remove it or choose another --out")

    def __str__(self) -> str:
        """Return the place as the user named it."""
        return self._out

    def _try(self) -> None:
        if self._is_local:
            self._files.create_dir(str(Path(self._path).parent))
        trial = f"{self._path}.{uuid.uuid4().hex}"
        self._files.open_output_stream(trial).close()
        with contextlib.suppress(OSError):  # who may write there need not be allowed to delete
            self._files.delete_file(trial)

    def write(self, write: Callable[[Path], object]) -> None:
        """Let a function write the file at the path that it is given; for a URI it is copied there.

        Raises:
            UserError: it cannot be copied; the message says where it is.
        """
        if self._is_local:
            write(Path(self._path))
            return
        folder = Path(tempfile.mkdtemp(prefix="saltray-"))
        file = folder / Path(self._path).name
        write(file)
        try:
            with self._files.open_output_stream(self._path) as stream:
                stream.write(file.read_bytes())
        except OSError as error:
            host = socket.gethostname()
            raise UserError(f"{self}: cannot be written: {error}. It is in {file} on {host}") from None
        shutil.rmtree(folder)


def local(path: str) -> Path:
    """Return a path of this machine's; raises a UserError for a URI."""
    if "://" in path:
        raise UserError(f"{path}: a path on this machine is wanted here, not a URI")
    return Path(path)


def parse_duration(text: str | None) -> float | None:
    """Read a duration such as 90s, 30m or 1h30m, in seconds.

    Raises:
        UserError: it is none, or not positive.
    """
    if text is None:
        return None
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}d)? ?(?:{number}h)? ?(?:{number}m)? ?(?:{number}s)?", text, re.ASCII)
    counts = match.groups(default="0") if match else ()
    seconds = sum(float(n) * unit for n, unit in zip(counts, (86400, 3600, 60, 1), strict=False))
    if not seconds:
        raise UserError(f"--time-budget {text}: not a duration such as 90s, 30m or 1h30m")
    return seconds
