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
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from saltray.config import SearchConfig, Split, UserError, counted
from saltray.records import storage
from saltray.records.shared_folder import PROBE
from saltray.records.study import STUDY_NAME

FORMAT = 1
"""Of `run.json`; a newer one is refused."""


_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]*(?=@)|([?&](?:ssl)?password=)[^&\s]+")


class RunError(UserError):
    """The run's folder, or what was asked of the run, cannot be used."""


class UnderWay(RunError):
    """Another process holds the run's folder on this machine."""


class Settings(SearchConfig):
    """What decides a run's results. A resumed run may change its engine, budgets and resources alone."""

    data: str
    space: str
    split: Split = "coverage"
    workers_per_trial: Annotated[int, Field(ge=1)] = 1
    cpus_per_trial: float | None = None
    gpus_per_trial: float | Literal["auto"] | None = None
    skip_bad: bool = False
    folds: Annotated[int, Field(ge=2, le=10)] | None = None
    """On how many folds the best configurations are trained again after the search; None for not at all."""
    ensemble: Annotated[int, Field(ge=1, le=50)] | None = None
    """From how many of the best configurations an ensemble is chosen; None for none, or one with `folds`."""
    ensemble_with: tuple[str, ...] = ()
    """Other runs, paths or URIs, whose models the ensemble may take as well."""
    pseudo_labels: bool = False
    """Whether the refits are done once more, with test tiles that the first ones are sure of."""
    study: str | None = None
    """URL of the study's database server, without a password; None for SQLite in the run's folder."""
    study_name: str = STUDY_NAME
    warm_start: str | None = None
    """The run, a path or URI, from whose results this one started."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.pseudo_labels and self.folds is None:
            raise ValueError("--pseudo-labels needs --folds: the models of a fold label tiles for it")
        if self.ensemble_with and not self.blends:
            raise ValueError("--ensemble-with needs --ensemble, or --folds")
        if self.ensemble_with and self.pseudo_labels:
            raise ValueError(
                "--pseudo-labels trains the ensemble's members again, which it cannot with those of "
                "--ensemble-with; leave one of them out (--no-pseudo-labels, or --ensemble-with '')"
            )
        if self.objective == "map+speed" and (self.folds or self.ensemble):
            raise ValueError(
                "--folds and --ensemble look for the best score at any cost, --objective map+speed does not; "
                "leave one of them out"
            )
        return self

    @property
    def blends(self) -> bool:
        """Whether an ensemble follows the search."""
        return self.folds is not None or self.ensemble is not None

    @property
    def gpus(self) -> bool:
        """Whether training and prediction may use the cluster's GPUs: not under `--gpus-per-trial 0`."""
        return self.gpus_per_trial != 0

    @property
    def extent(self) -> str:
        """How far the search goes at most, in words."""
        return f"{counted(self.trials, 'trial')} of up to {counted(self.epochs, 'epoch')}"


def refuse_taken(home: storage.Home) -> None:
    """Raise a RunError where a new run's folder, or its URI, already holds something."""
    folder = home.folder
    behind_uri = _held(storage.names(home.uri)) if home.uri is not None else set()
    here = _held(storage.names(str(folder))) if folder.is_dir() else {"a file"} if folder.exists() else set()
    if held := behind_uri or here:
        way = f"To go on with that run: --resume {shlex.quote(str(home))}; to start a new one: another --out"
        if "run.json" not in held:
            way = "It holds no run (a start that was cut off?): remove it, or name another --out"
        raise RunError(f"{home if behind_uri else folder}: already there. {way}")


def _held(names: Iterable[str]) -> set[str]:
    # What a look at a run that was not there, or a start that was cut off, leaves.
    return {n for n in names if n not in (".lock", storage.UNSENT) and not n.startswith(PROBE)}


def create(folder: Path, space: Path) -> None:
    """Make a new run's folder."""
    (folder / "logs").mkdir(parents=True)
    (folder / "space.py").write_text(space.read_text())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for one session; the lock goes with its process, however that ends.

    Raises:
        UnderWay: another session is running.
    """
    with (folder / ".lock").open("w") as file:
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
        "sessions": [*sessions, environment() | {"host": socket.gethostname()}],
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


def options(settings: Settings, space: Path) -> str:
    """Return the command-line options that start a run with these settings."""
    switches = ("skip_bad", "pseudo_labels")
    given = settings.model_dump(exclude_defaults=True, exclude={"study_name", "space", *switches})
    given |= {"space": space, "trials": settings.trials, "epochs": settings.epochs, "seed": settings.seed}
    if settings.time_budget:
        given["time_budget"] = f"{settings.time_budget:.12g}s"
    words = []
    for name, value in given.items():
        for each in value if isinstance(value, tuple) else (value,):
            text = f"{each:g}" if isinstance(each, float) else str(each)
            words.append(f"--{name.replace('_', '-')} {shlex.quote(text)}")
    words += [f"--{name.replace('_', '-')}" for name in switches if getattr(settings, name)]
    return " ".join(words)


def environment() -> dict[str, Any]:
    """Describe this session: time, command, versions, machine, commit."""
    packages = ("saltray", "ray", "torch", "optuna", "numpy", "pandas", "pyarrow", "pillow", "scikit-learn")
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # None where it is no `python -m`
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _PASSWORD.sub(r"\1\2***", f"{program} {shlex.join(sys.argv[1:])}".rstrip()),
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "commit": _commit(),
    }


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


def demo_data(folder: Path) -> Path:
    """Return where a run without data of its own keeps its synthetic tiles."""
    return folder / "demo" / "data"
