import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saltray import cli, demo, local_ray, score
from saltray.config import UserError
from saltray.contest.submission import SubmissionError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("90s", 90),
        ("30m", 1800),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1.5h", 5400),
        ("2h", 7200),
        ("1d", 86400),
    ],
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert cli.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", " 90", "+5", "1.5", "0s", "-5m", "nan", "inf", "soon", "1x", "1e3", "٣"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--time-budget .*: not a duration such as 90s, 30m or 1h30m"):
        cli.parse_duration(text)


def test_paths_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for uri in ("s3://bucket/a/../b", "gs://bucket/x", "file:///x"):
        assert cli.located(uri) == uri
    assert cli.located("data/../tiles") == str(tmp_path.resolve() / "tiles")
    assert cli.located("~/tiles") == str((tmp_path / "home").resolve() / "tiles")
    assert cli.located(str(tmp_path)) == str(tmp_path.resolve())


def test_bundled_spaces_are_found_and_define_a_space() -> None:
    for name in ("demo", "unet", "resunet"):
        path = cli.bundled_space(name)
        assert path.is_file()
        assert "def space(" in path.read_text()
    with pytest.raises(UserError, match=r"search_spaces/nowhere\.py: not found .* --space"):
        cli.bundled_space("nowhere")


def test_bundled_spaces_of_an_installed_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "saltray" / "search_spaces" / "demo.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "saltray" / "cli.py"))
    assert cli.bundled_space("demo") == installed


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[..., Any], *arguments: str) -> str | int | None:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer changes it
    with pytest.raises(SystemExit) as ended:
        cli.run_program(main)
    return ended.value.code


def test_what_the_user_can_mend_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(file: str) -> None:
        raise SubmissionError(f"{file}: no such file")

    # A text as exit code goes to stderr, and the status is 1.
    assert run(monkeypatch, main, "a.csv") == "error: a.csv: no such file"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.run_program(main)


def test_success_and_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(tiles: int) -> None:
        print(tiles + 1)

    assert run(monkeypatch, main, "41") == 0
    assert capsys.readouterr().out == "42\n"
    assert run(monkeypatch, main, "many") == 2
    assert "Usage" in capsys.readouterr().err


def test_a_key_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="keys do not belong in a URI") as caught:
        cli.located("s3://AKIAKEY:hidden@bucket/tgs")
    assert "hidden" not in str(caught.value) and "AKIAKEY" not in str(caught.value)


def test_an_address_in_the_environment_where_nothing_listens_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("HOME", str(tmp_path))  # with a token in it, RAY_AUTH_MODE would be set for all tests
    with pytest.raises(UserError, match=r"RAY_ADDRESS=127\.0\.0\.1:1 in the environment \(unset it"):
        cli.prepare_ray(None)


def test_a_ray_begins_where_none_is_to_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bool] = []
    monkeypatch.setattr(local_ray, "begin", lambda: begun.append(True))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cli.prepare_ray("auto")
    assert not begun
    cli.prepare_ray(None)
    assert begun
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    cli.prepare_ray(None)
    assert len(begun) == 1


def test_joining_a_cluster_sets_no_keepalive_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cluster has another, it ends every call that says nothing for a minute."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_grpc_client_keepalive_time_ms", raising=False)
    cli.prepare_ray("auto")
    assert "RAY_grpc_client_keepalive_time_ms" not in os.environ


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "runs/x/study.db"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_a_full_disk_is_told_in_one_message(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        try:
            raise error
        except Exception:
            raise RuntimeError("the search has failed") from error

    told = str(run(monkeypatch, main))
    assert re.fullmatch(r"error: .*(left on device|disk is full).*\. Make room, then run it again", told)


@pytest.mark.parametrize("name", ["tune", "predict", "explore", "demo", "score", "report"])
def test_the_search_alone_is_told_to_go_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "run_program", lambda *arguments: started.append(arguments))
    runpy.run_path(str(Path(cli.__file__).with_name(f"{name}.py")), run_name="__main__")
    ((_, *advice),) = started
    assert advice == (["Make room, then go on with the run: --resume"] if name == "tune" else [])


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_new_file_is_tried_before_and_written_at_the_end(scheme: str, tmp_path: Path) -> None:
    out = f"{scheme}{tmp_path}/" + ("new/folder/a.csv" if not scheme else "a.csv")
    file = cli.NewFile(out)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    file.write(lambda path: path.write_text("result"))
    (written,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert f"{scheme}{written}" == out == str(file)
    assert written.read_text() == "result"
    with pytest.raises(UserError, match=r"a\.csv: already there; remove it or choose another --out"):
        cli.NewFile(out)
    with pytest.raises(UserError, match=r"a\.csv/b\.csv: cannot be written: "):
        cli.NewFile(f"{out}/b.csv")


def test_a_file_system_that_nobody_knows_is_told_before_any_work() -> None:
    with pytest.raises(UserError, match=r"what://x\.csv: cannot be written: .*what"):
        cli.NewFile("what://x.csv")


def test_a_result_that_cannot_be_copied_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "bucket").mkdir()
    file = cli.NewFile(f"file://{tmp_path}/bucket/a.csv")
    (tmp_path / "bucket").rmdir()
    with pytest.raises(UserError, match=r"cannot be written: .* It is in ") as caught:
        file.write(lambda path: path.write_text("result"))
    (kept,) = tmp_path.glob("saltray-*/a.csv")
    assert str(kept) in str(caught.value) and kept.read_text() == "result"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [(demo.main, ["s3://bucket/demo"]), (score.main, ["s3://bucket/a.csv", "truth.csv"])],
)
def test_a_uri_is_refused_where_a_path_is_wanted(
    main: Callable[..., Any], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = run(monkeypatch, main, *arguments)
    assert told == f"error: {arguments[0]}: a path on this machine is wanted here, not a URI"
    assert list(tmp_path.iterdir()) == []
