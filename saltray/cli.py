"""What the command lines share."""

import errno
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

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


def prepare_to_join(address: str | None) -> None:
    """Make a cluster's address usable; to be called before Ray is imported.

    Ray starts its clusters with the token in `~/.ray/auth_token`, but shows it to an address only when
    RAY_AUTH_MODE says so, which it reads when it is imported.

    Raises:
        UserError: nothing listens at the address; Ray itself would try for minutes.
    """
    option = f"--address {address}" if address else ""
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
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
