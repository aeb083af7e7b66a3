import hashlib
import json
from pathlib import Path

import pytest

from saltray import storage


def test_a_path_is_its_own_home_and_a_uri_has_a_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    local, remote = storage.home("runs/x"), storage.home("s3://bucket/runs/x/")
    assert (local.folder, local.uri) == (tmp_path / "runs" / "x", None)
    assert local.trials == f"{tmp_path}/runs/x/trials"
    digits = hashlib.sha256(b"s3://bucket/runs/x").hexdigest()[:8]
    assert remote.folder == tmp_path / "saltray" / f"s3-bucket-runs-x-{digits}"
    assert (str(remote), remote.trials) == ("s3://bucket/runs/x", "s3://bucket/runs/x/trials")
    assert storage.home("s3://bucket/runs-x").folder != remote.folder  # of the same words


def test_paths_that_ray_gives_get_the_scheme_of_their_root() -> None:
    assert storage.openable("s3://b/run/trials", "b/run/trials/0") == "s3://b/run/trials/0"
    assert storage.openable("s3://b/run/trials", "s3://b/run/trials/0") == "s3://b/run/trials/0"
    assert storage.openable("/runs/x/trials", "/runs/x/trials/0") == "/runs/x/trials/0"


def test_names_of_an_absent_folder_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert storage.names(str(tmp_path)) == ["a"]
    assert storage.names(str(tmp_path / "absent")) == []


def make_session(place: storage.Home, sessions: list[int]) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "run.json").write_text(json.dumps({"sessions": sessions}))


@pytest.fixture
def place(tmp_path: Path) -> storage.Home:
    return storage.Home(tmp_path / "work", f"file://{tmp_path}/bucket/run")


def test_what_a_session_could_not_copy_is_copied_before_a_fetch(place: storage.Home, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket" / "run"
    bucket.mkdir(parents=True)
    make_session(place, [1])
    with storage.Mirror(place):
        pass
    assert not (place.folder / storage.UNSENT).exists() and (bucket / "run.json").exists()
    with pytest.raises(KeyboardInterrupt), storage.Mirror(place) as mirror:
        mirror.push()
        (place.folder / "submission.csv").write_text("newer")
        mirror.push_now = lambda: False  # type: ignore[method-assign]
        raise KeyboardInterrupt
    storage.fetch(place)
    assert (place.folder / "submission.csv").read_text() == "newer"
    assert (bucket / "submission.csv").read_text() == "newer"
    assert not (place.folder / storage.UNSENT).exists()


def test_a_run_with_which_two_machines_went_on_is_refused(place: storage.Home, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket" / "run"
    bucket.mkdir(parents=True)
    (bucket / "run.json").write_text(json.dumps({"sessions": [1, 2]}))
    make_session(place, [1, 3])
    (place.folder / storage.UNSENT).touch()
    with pytest.raises(storage.StorageError, match="another machine has gone on"):
        storage.fetch(place)
    assert json.loads((place.folder / "run.json").read_text())["sessions"] == [1, 3]


def test_a_killed_sessions_journal_is_not_played_into_the_fetched_study(
    place: storage.Home, tmp_path: Path
) -> None:
    bucket = tmp_path / "bucket" / "run"
    bucket.mkdir(parents=True)
    for name in ("run.json", "study.db"):
        (bucket / name).write_text("{}")
    place.folder.mkdir()
    (place.folder / "study.db-journal").write_text("old")
    storage.fetch(place)
    assert {file.name for file in place.folder.iterdir()} == {"run.json", "study.db"}


def test_a_file_system_that_nobody_knows_is_told(tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match="what://x: cannot be reached"):
        storage.names("what://x")
