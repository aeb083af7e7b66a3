import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from saltray.records import environment, run, storage
from saltray.records.run import RunError
from saltray.records.settings import Settings, as_options

SETTINGS = Settings(data="DIR", space="space.py", trials=3, epochs=2, seed=0)


def test_settings_come_back_and_sessions_add_up(tmp_path: Path) -> None:
    run.write_settings(tmp_path, SETTINGS, "abc")
    more = SETTINGS.model_copy(update={"trials": 5})
    run.write_settings(tmp_path, more, "abc")
    assert run.read_settings(tmp_path) == more
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0]["versions"]["torch"]


def test_other_tiles_are_refused(tmp_path: Path) -> None:
    run.write_settings(tmp_path, SETTINGS, "abc")
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunError, match="not the labelled tiles"):
        run.write_settings(tmp_path, SETTINGS, "xyz")
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "settings": {"data": 3}}', "damaged"),
        ('{"format": 99, "settings": {}}', "newer saltray"),
    ],
)
def test_a_bad_run_file_is_refused_and_left(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=words):
        run.read_settings(tmp_path)
    assert (tmp_path / "run.json").read_text() == text


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not the folder of a run"):
        run.read_settings(tmp_path)


def test_one_session_at_a_time(tmp_path: Path) -> None:
    with run.locked(tmp_path), pytest.raises(RunError, match="under way"), run.locked(tmp_path):
        pass
    with run.locked(tmp_path):
        pass


def test_readers_take_what_a_session_here_works_on_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket, uri = tmp_path / "bucket", f"file://{tmp_path}/bucket"
    bucket.mkdir()
    run.write_settings(bucket, SETTINGS, "abc")
    folder = run.fetched(uri)
    run.write_settings(folder, SETTINGS, "abc")
    newest = (folder / "run.json").read_bytes()
    with run.locked(folder):
        with pytest.raises(RunError, match="another process is fetching it; try again"):
            run.fetched(uri)
        (folder / storage.UNSENT).touch()  # as a session does
        assert run.fetched(uri) == folder
        with pytest.raises(run.UnderWay):
            run.fetch(storage.home(uri))  # to go on with it
    assert (folder / "run.json").read_bytes() == newest != (bucket / "run.json").read_bytes()


def test_the_commit_is_saltrays_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    module = tmp_path / "env" / "saltray" / "records" / "environment.py"
    module.parent.mkdir(parents=True)
    module.touch()
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "somebody's work")
    monkeypatch.setattr(environment, "__file__", str(module))
    assert environment.describe()["commit"] is None
    shutil.move(tmp_path / ".git", tmp_path / "env" / ".git")
    assert environment.describe()["commit"]


def test_sessions_of_two_machines_are_never_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = environment.describe()
    monkeypatch.setattr(environment, "describe", lambda: known)
    for name in ("h1", "h2"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        run.write_settings(tmp_path / name, SETTINGS, "abc")
    one, other = (run.read(tmp_path / name)["sessions"] for name in ("h1", "h2"))
    assert one != other and one[0]["host"] == "h1"


def test_a_taken_folder_is_refused(tmp_path: Path) -> None:
    run.refuse_taken(storage.Home(tmp_path / "new"))
    run.refuse_taken(storage.Home(tmp_path))  # empty
    (tmp_path / ".lock").touch()  # of a --resume before there was a run
    run.refuse_taken(storage.Home(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds no run .* remove it, or name another --out"):
        run.refuse_taken(storage.Home(tmp_path))
    (tmp_path / "run.json").touch()
    with pytest.raises(RunError, match="--resume"):
        run.refuse_taken(storage.Home(tmp_path))
    with pytest.raises(RunError, match="already there"):
        run.refuse_taken(storage.Home(tmp_path / "notes.txt"))


def test_a_place_that_cannot_be_written_to_is_told_before_any_work(tmp_path: Path) -> None:
    (file := tmp_path / "notes.txt").touch()
    for place in (file / "run", file / "deep" / "run"):
        with pytest.raises(RunError, match=rf"{place}: cannot be written to: .*Not a directory"):
            run.refuse_taken(storage.Home(place))
    assert list(tmp_path.iterdir()) == [file]


def test_two_sessions_that_start_one_run_are_told_apart(tmp_path: Path) -> None:
    (space := tmp_path / "space.py").touch()
    run.create(tmp_path / "run", space)
    with pytest.raises(RunError, match="another session has just made it; name another --out"):
        run.create(tmp_path / "run", space)


def test_a_run_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # stands for a read-only place, which root can write to all the same
    with pytest.raises(RunError, match=rf"{tmp_path}: cannot be written to"), run.locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cpus_per_trial": 0}, "greater than 0"),
        ({"cpus_per_trial": float("nan")}, "finite"),
        ({"gpus_per_trial": -1}, "greater than or equal to 0"),
        ({"pseudo_labels": True}, "--pseudo-labels needs --folds"),
        ({"folds": 1}, "greater than or equal to 2"),
        ({"folds": 11}, "less than or equal to 10"),
        ({"ensemble": 0}, "greater than or equal to 1"),
        ({"ensemble": 51}, "less than or equal to 50"),
        ({"ensemble": 2, "objective": "map+speed", "scheduler": "none"}, "leave one of them out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Settings(**{"data": "DIR", "space": "space.py", **given})


def test_the_command_of_a_run_has_all_its_options() -> None:
    more = SETTINGS.model_copy(update={"folds": 5, "ensemble": 4, "pseudo_labels": True, "skip_bad": True})
    words = as_options(more, Path("space.py"))
    for option in ("--folds 5", "--ensemble 4", "--pseudo-labels", "--skip-bad"):
        assert option in words
    assert "True" not in words
    assert not SETTINGS.blends and more.blends
