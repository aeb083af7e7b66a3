import hashlib
import json
import shutil
from pathlib import Path

import pytest

from saltray.records import storage, trial_files
from saltray.sessions import tracking


def test_a_path_is_its_own_home_and_a_uri_has_a_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    local, remote = storage.home("runs/x"), storage.home("s3://bucket/runs/x/")
    assert (local.folder, local.uri) == (tmp_path / "runs" / "x", None)
    assert local.trials == f"{tmp_path}/runs/x/trials"
    digits = hashlib.sha256(b"s3://bucket/runs/x").hexdigest()[:8]
    assert remote.folder == tmp_path / "saltray" / f"s3-bucket-runs-x-{digits}" / "x"
    assert (str(remote), remote.trials) == ("s3://bucket/runs/x", "s3://bucket/runs/x/trials")
    assert storage.home("s3://bucket/runs-x").folder != remote.folder  # of the same words


def test_paths_that_ray_gives_get_the_scheme_of_their_root() -> None:
    assert trial_files.openable("s3://b/run/trials", "b/run/trials/0") == "s3://b/run/trials/0"
    assert trial_files.openable("s3://b/run/trials", "s3://b/run/trials/0") == "s3://b/run/trials/0"
    assert trial_files.openable("/runs/x/trials", "/runs/x/trials/0") == "/runs/x/trials/0"


def test_names_of_an_absent_folder_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert storage.names(str(tmp_path)) == ["a"]
    assert storage.names(str(tmp_path / "absent")) == []


def make_session(folder: Path, numbers: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sessions = [{"host": f"host-{number}"} for number in numbers]
    (folder / "run.json").write_text(json.dumps({"sessions": sessions}))


@pytest.fixture
def place(tmp_path: Path) -> storage.Home:
    return storage.Home(tmp_path / "work", f"file://{tmp_path}/bucket/run")


def test_what_a_session_could_not_copy_is_copied_before_a_fetch(place: storage.Home, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket" / "run"
    bucket.mkdir(parents=True)
    make_session(place.folder, [1])
    with storage.Mirror(place):
        pass
    assert not (place.folder / storage.UNSENT).exists() and (bucket / "run.json").exists()
    with pytest.raises(KeyboardInterrupt), storage.Mirror(place) as mirror:
        mirror.push()
        (place.folder / "submission.csv").write_text("newer")
        (bucket / "submission.csv").mkdir()  # where no file can be written
        raise KeyboardInterrupt
    assert (place.folder / storage.UNSENT).exists()
    (bucket / "submission.csv").rmdir()
    storage.fetch(place)
    assert (place.folder / "submission.csv").read_text() == "newer"
    assert (bucket / "submission.csv").read_text() == "newer"
    assert not (place.folder / storage.UNSENT).exists()


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


OLD = ("best/model.onnx", "best/weights", "ensemble/ensemble.json", "ensemble/members/00/weights")
OLDER = ("ensemble/members/01/weights", "ensemble/members/01/snapshots-1")
OTHERS = (
    "run.json",
    "logs/search.log",
    "best-of-mine/notes",
    "trials/session-01/best/weights",
    "submission.csv",
)


@pytest.fixture
def copied(place: storage.Home, tmp_path: Path) -> Path:
    """Where the URI's files lie, with all of a run; its working folder has the same."""
    bucket = tmp_path / "bucket" / "run"
    for folder in (bucket, place.folder):
        write(folder, *OLD, *OLDER, *OTHERS)
        make_session(folder, [1])
    return bucket


def renew(place: storage.Home) -> None:
    """Make other bundles: `best/` without model.onnx, and an ensemble of one member."""
    for name in storage.BUNDLES:
        shutil.rmtree(place.folder / name)
    write(place.folder, *OLD[1:], "best/metrics.json")


def test_of_an_older_bundle_nothing_stays_at_the_uri_or_in_another_working_folder(
    place: storage.Home, copied: Path, tmp_path: Path
) -> None:
    elsewhere = storage.Home(tmp_path / "elsewhere", place.uri)
    storage.fetch(elsewhere)
    write(elsewhere.folder, "best.old/weights", "notes")  # no copy of the URI's
    with storage.Mirror(place) as mirror:
        mirror.push()
        assert {*OLD, *OLDER, *OTHERS} == files(copied)
        renew(place)
        for name in ("submission.csv", "logs/search.log"):
            (place.folder / name).unlink()
        write(place.folder, "best.new/weights")
        mirror.push()
    assert files(copied) == {*OLD[1:], "best/metrics.json", *OTHERS}
    storage.fetch(elsewhere)
    here = {name for name in OTHERS if not name.startswith("trials/")} | {"best.old/weights", "notes"}
    assert files(elsewhere.folder) == {*OLD[1:], "best/metrics.json"} | here
    assert not (elsewhere.folder / "ensemble" / "members" / "01").exists()


def test_a_whole_bundle_at_the_uri_stays_whole_while_a_run_goes_on(
    place: storage.Home, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place.folder, *(f"{bundle}/metrics.json" for bundle in storage.BUNDLES))
    storage.Mirror(place).push()
    sent: list[str] = []
    monkeypatch.setattr(storage, "_send", lambda home, name, *_: sent.append(name))
    storage.Mirror(place).push()  # of the next session
    assert "submission.csv" in sent
    assert not [name for name in sent if name.startswith(("best/", "ensemble/"))]
    assert "best/metrics.json" in files(copied)
    monkeypatch.undo()
    (place.folder / "best" / "weights").write_text("st-we/tsebigh")  # as long as before
    storage.Mirror(place).push()
    assert (copied / "best" / "weights").read_text() == "st-we/tsebigh"
    assert "best/metrics.json" in files(copied)


def test_a_session_without_bundles_deletes_none_at_the_uri(place: storage.Home, copied: Path) -> None:
    for name in storage.BUNDLES:
        shutil.rmtree(place.folder / name)
    (place.folder / "best" / "empty").mkdir(parents=True)
    with storage.Mirror(place):
        pass
    assert {*OLD, *OLDER} <= files(copied)


def test_the_old_bundle_is_whole_until_the_new_one_is_there(
    place: storage.Home, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = storage.Mirror(place)
    mirror.push()
    renew(place)
    (copied / "best" / "metrics.json").mkdir()  # where no file can be written
    with pytest.raises(storage.StorageError, match=r"best/metrics\.json: cannot be written"):
        mirror.push()
    assert {*OLD, *OLDER} <= files(copied)
    (copied / "best" / "metrics.json").rmdir()
    monkeypatch.setattr(storage, "_files", lambda *_: [str(copied / "best" / "gone")])
    with pytest.raises(storage.StorageError, match="an older one has left there cannot be deleted"):
        mirror.push()
    monkeypatch.undo()
    mirror.push()  # what failed is tried again, though all is copied
    assert files(copied) == {*OLD[1:], "best/metrics.json", *OTHERS}


def test_half_a_bundle_at_the_uri_is_not_taken_for_one(place: storage.Home, copied: Path) -> None:
    write(place.folder, "best/metrics.json")
    mirror = storage.Mirror(place)
    mirror.push()
    assert "best/metrics.json" in files(copied)
    (place.folder / "best" / "weights").write_text("newer")
    (copied / "best" / "weights").unlink()
    (copied / "best" / "weights").mkdir()  # where no file can be written
    with pytest.raises(storage.StorageError, match="best/weights: cannot be written"):
        mirror.push()
    assert "best/metrics.json" not in files(copied)
    (copied / "best" / "weights").rmdir()
    mirror.push()
    assert {"best/metrics.json", "best/weights"} <= files(copied)


def test_bundles_that_were_not_sent_are_not_deleted_by_a_fetch(place: storage.Home, copied: Path) -> None:
    write(place.folder, storage.UNSENT, "ensemble/members/00/a")
    storage.fetch(place)
    assert "ensemble/members/00/a" in files(place.folder) & files(copied)
    write(place.folder, storage.UNSENT, "ensemble/members/00/b")
    (place.folder / "run.json").unlink()  # so that it cannot be told whether it is the newer
    storage.fetch(place)
    assert "ensemble/members/00/b" in files(place.folder)
    shutil.rmtree(copied / "ensemble")
    (place.folder / storage.UNSENT).unlink()
    storage.fetch(place)
    assert not (place.folder / "ensemble").exists()  # it would be taken for one


def sessions(bucket: Path) -> list[str]:
    return [session["host"] for session in json.loads((bucket / "run.json").read_text())["sessions"]]


OVERTAKEN = r"another session, on host-2, has gone on .* is in .*/work on .* alone; move that folder away"


def test_a_run_with_which_two_machines_went_on_is_refused(place: storage.Home, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket" / "run"
    make_session(bucket, [1, 2])
    make_session(place.folder, [1, 3])
    (place.folder / storage.UNSENT).touch()
    with pytest.raises(storage.Overtaken, match=OVERTAKEN):
        storage.fetch(place)
    assert (sessions(place.folder), sessions(bucket)) == (["host-1", "host-3"], ["host-1", "host-2"])


def test_a_session_with_whose_run_another_has_gone_on_copies_nothing_more(
    place: storage.Home, tmp_path: Path
) -> None:
    bucket = tmp_path / "bucket" / "run"
    bucket.mkdir(parents=True)
    make_session(place.folder, [1])
    elsewhere = storage.Home(tmp_path / "elsewhere", place.uri)
    with pytest.raises(storage.Overtaken, match=OVERTAKEN), storage.Mirror(place) as cut_off:
        cut_off.push()
        elsewhere.folder.mkdir()
        storage.fetch(elsewhere)
        make_session(elsewhere.folder, [1, 2])
        with storage.Mirror(elsewhere):
            pass
        write(place.folder, "submission.csv")
        for mirror in (
            tracking.Mirroring(cut_off).on_trial_complete,
            tracking.Mirroring(cut_off).on_trial_error,
        ):
            with pytest.raises(storage.Overtaken):
                mirror(0, [], None)
    assert files(bucket) == {"run.json"} and sessions(bucket) == ["host-1", "host-2"]
    assert (place.folder / storage.UNSENT).exists()
    assert not (elsewhere.folder / storage.UNSENT).exists()


def test_of_two_sessions_that_resume_at_once_the_first_to_copy_has_the_run(
    place: storage.Home, tmp_path: Path
) -> None:
    bucket = tmp_path / "bucket" / "run"
    make_session(bucket, [1])
    elsewhere = storage.Home(tmp_path / "elsewhere", place.uri)
    for home, number in ((elsewhere, 2), (place, 3)):
        home.folder.mkdir()
        storage.fetch(home)
        make_session(home.folder, [1, number])
    storage.Mirror(elsewhere).push()
    with pytest.raises(storage.Overtaken, match=OVERTAKEN):
        storage.Mirror(place).push()
    assert sessions(bucket) == ["host-1", "host-2"]


def test_being_overtaken_hides_no_other_error(place: storage.Home, tmp_path: Path) -> None:
    make_session(tmp_path / "bucket" / "run", [1, 2])
    make_session(place.folder, [1])
    with pytest.raises(ZeroDivisionError), storage.Mirror(place):
        raise ZeroDivisionError


def test_a_run_file_at_the_uri_that_is_damaged_is_told(place: storage.Home, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket" / "run"
    make_session(bucket, [1])
    (bucket / "run.json").write_text("{")
    make_session(place.folder, [1])
    with pytest.raises(storage.StorageError, match=r"bucket/run/run\.json: damaged"):
        storage.Mirror(place).push()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_ended_trial_keeps_its_newest_checkpoint_without_the_training_state(
    scheme: str, tmp_path: Path
) -> None:
    stays = {"session-01/0001/checkpoint_000001/training.pt", "session-02/0000/result.json", "space.py"}
    stays |= {f"session-02/0000/checkpoint_00000{n}/{name}" for n in (4, 5) for name in ("weights", "config")}
    stays |= {"session-03/0000/checkpoint_000000/training.pt"}  # of a session that overtook this one
    goes = {f"session-{s}/0000/checkpoint_00000{n}/training.pt" for s, n in (("01", 9), ("02", 3), ("02", 4))}
    goes |= {"session-01/0000/checkpoint_000008/snapshots/weights"}
    write(tmp_path, *stays, *goes)
    newest = f"{scheme}{tmp_path}/session-02/0000/checkpoint_000004"
    for _ in range(2):  # the second time there is nothing left to do
        trial_files.trim(newest, "training.pt")
        assert files(tmp_path) == stays
    assert not (tmp_path / "session-01/0000/checkpoint_000009").exists()
    shutil.rmtree(tmp_path / "session-02")
    trial_files.trim(newest, "training.pt")
    trial_files.trim("what://bucket/session-01/0000/checkpoint_000000", "training.pt")


def test_checkpoints_that_no_study_names_are_found_behind_a_uri(tmp_path: Path) -> None:
    write(tmp_path, *(f"session-0{s}/0003/checkpoint_00000{n}/weights" for s, n in ((1, 5), (2, 6), (2, 7))))
    write(tmp_path, "session-02/0004/checkpoint_000009/weights", "session-02/0003/result.json")
    gone = f"{tmp_path}/session-02/0003/checkpoint_000004"
    found = [f"session-0{s}/0003/checkpoint_00000{n}" for s, n in ((2, 7), (2, 6), (1, 5))]
    assert trial_files.checkpoints_beside(f"file://{gone}") == [f"file://{tmp_path}/{name}" for name in found]
    assert trial_files.checkpoints_beside(gone) == []
    assert trial_files.checkpoints_beside("what://b/session-01/0003/checkpoint_000001") == []


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
