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
    assert remote.folder == tmp_path / "saltray" / "s3-bucket-runs-x"
    assert (str(remote), remote.trials) == ("s3://bucket/runs/x", "s3://bucket/runs/x/trials")
    assert storage.home("s3://bucket/runs/y").folder != remote.folder


def test_paths_that_ray_gives_get_the_scheme_of_their_root() -> None:
    assert storage.openable("s3://b/run/trials", "b/run/trials/0") == "s3://b/run/trials/0"
    assert storage.openable("s3://b/run/trials", "s3://b/run/trials/0") == "s3://b/run/trials/0"
    assert storage.openable("/runs/x/trials", "/runs/x/trials/0") == "/runs/x/trials/0"


def test_names_of_an_absent_folder_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert storage.names(str(tmp_path)) == ["a"]
    assert storage.names(str(tmp_path / "absent")) == []


def test_a_file_system_that_nobody_knows_is_told(tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match="what://x: cannot be reached"):
        storage.names("what://x")
