"""What a session ran on: for `run.json`, reports and records of benchmarks."""

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]*(?=@)|([?&](?:ssl)?password=)[^&\s]+")


def describe() -> dict[str, Any]:
    """Describe this process: time, command, versions, machine, commit."""
    packages = ("saltray", "ray", "torch", "optuna", "numpy", "pandas", "pyarrow", "pillow", "scikit-learn")
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # None where it is no `python -m`
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_secrets(f"{program} {shlex.join(sys.argv[1:])}".rstrip()),
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "commit": _commit(),
    }


def without_secrets(text: str) -> str:
    """Put *** in place of the passwords of URLs in a text."""
    return _PASSWORD.sub(r"\1\2***", text)


def _commit() -> str | None:
    """Return the commit of saltray's own checkout, with a mark where it was changed."""
    checkout = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # Installed in an environment that lies in somebody's repository, it would tell that one's commit.
        if not Path(git("rev-parse", "--show-toplevel")).samefile(checkout):
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None
