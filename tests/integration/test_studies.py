"""Studies as a user keeps them: in a server, started from another run, with another engine."""

import gc
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from saltray.records.study import Place, count, load_study, own_trials
from tests.integration.programs import Program, epochs_in, search_arguments

pytestmark = pytest.mark.timeout(900)

POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), None) or (
    Path(found).parent if (found := shutil.which("pg_ctl")) else None
)
OTHER_SPACE = """
def space(trial):
    return {
        "model": {"filters": trial.suggest_int("filters", 2, 4), "levels": 1, "dropout": 0.0},
        "optim": {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1)},
        "batch_size": 8,
    }
"""


@pytest.fixture
def server() -> Iterator[str]:
    """A PostgreSQL server on the loopback; its URL, password and all."""
    if POSTGRES is None:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    # Not below pytest's own folder, which is closed to the user that the server runs as: root is refused.
    folder = Path(tempfile.mkdtemp(prefix="saltray-postgres-"))
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    password = folder / "password"
    password.write_text("s3cret")
    data = folder / "data"

    def call(program: str, *arguments: str | Path) -> None:
        command = [*user, POSTGRES / program, *arguments]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

    call("initdb", "-D", data, "-U", "saltray", "-A", "scram-sha-256", f"--pwfile={password}", "-N")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    call("pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
    yield f"postgresql://saltray:s3cret@127.0.0.1:{port}/postgres"
    call("pg_ctl", "-D", data, "-m", "fast", "-t", "30", "stop")
    shutil.rmtree(folder)


# What a killed or refused session leaves of its connections is the garbage collector's.
@pytest.mark.filterwarnings("ignore:.*psycopg.Connection:ResourceWarning")
def test_a_study_in_a_server_is_cut_off_resumed_and_never_shows_its_password(
    start: type[Program], files: Path, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "team"
    program = start(*search_arguments(files, run, "--trials", "2", "--epochs", "40", "--study", server))
    there = Place(run, server, "team")
    program.wait_until(lambda: epochs_in(there) >= 3)
    program.end()
    assert not (run / "study.db").exists()
    told = start(
        *search_arguments(files, tmp_path / "again" / "team", "--trials", "1", "--study", server)
    ).finish(1)
    assert "there is such a study already" in told
    # The run's folder has no password; PostgreSQL's own ways give it.
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    start("saltray.tune", "--resume", run, "--time-budget", "5s").finish()
    study = load_study(there)
    assert study.study_name == "team"
    assert len(own_trials(study)) == 2
    assert not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    for file in run.rglob("*"):
        assert not file.is_file() or b"s3cret" not in file.read_bytes(), file
    assert (run / "submission.csv").is_file()
    del study
    gc.collect()


def test_one_run_starts_from_anothers_results(start: type[Program], files: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    start(*search_arguments(files, before, "--trials", "3", "--epochs", "1", "--searcher", "random")).finish()
    kept = (before / "study.db").read_bytes()
    other = tmp_path / "other.py"
    other.write_text(OTHER_SPACE)
    arguments: list[str | Path] = ["saltray.tune", "--data", files / "data", "--space", other, "--out", after]
    engine = ["--objective", "map", "--scheduler", "median", "--trials", "2", "--epochs", "1"]
    joined: list[str | Path] = ["--ensemble", "2", "--ensemble-with", before]
    told = start(*arguments, *engine, *joined, "--warm-start", before).finish()
    taken = sum(t.params["filters"] >= 2 for t in load_study(before).trials)
    assert f"{taken} results of {before} taken over" in told
    assert f"--warm-start {before}" in told.split("repeat")[1]
    assert f"--ensemble-with {before}" in told.split("repeat")[1]
    facts = json.loads((after / "ensemble" / "metrics.json").read_text())
    names = [candidate["name"] for candidate in facts["candidates"]]
    assert len(names) == 4 and sum(name.endswith(" of before") for name in names) == 2
    study = load_study(after)
    assert count(study).complete == 2
    assert len(study.trials) == 2 + taken
    assert (before / "study.db").read_bytes() == kept

    # A run goes on with its own space alone.
    edited = (after / "space.py").read_text().replace("1e-1", "1e-2")
    other.write_text(edited)
    told = start("saltray.tune", "--resume", after, "--space", other, "--trials", "3").finish(1)
    assert '+        "optim": {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},' in told
    (after / "space.py").write_text(edited)
    told = start("saltray.tune", "--resume", after, "--trials", "3").finish(1)
    assert "not the space that this study began with" in told and "--warm-start" in told
    assert count(load_study(after)).complete == 2


def test_a_dry_run_shows_the_space_and_the_plan_and_writes_nothing(
    start: type[Program], files: Path, tmp_path: Path
) -> None:
    more = ("--dry-run", "--trials", "7", "--folds", "3", "--ensemble", "2", "--pseudo-labels")
    told = start(*search_arguments(files, tmp_path / "run", *more)).finish()
    for words in (
        "Then 6 refits: the best 2 configurations on 3 folds, each of 20 training tiles",
        "once more, with pseudo-labelled test tiles",
        "filters    1 to 3",
        "sampled configuration",
        "training tiles of 30",
        "7 trials of up to",
    ):
        assert words in told
    assert not (tmp_path / "run").exists()
