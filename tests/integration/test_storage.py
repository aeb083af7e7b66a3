"""Runs behind a URI, against a real S3 server process on loopback."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.fs
import pytest

from saltray import demo
from saltray.prediction import bundle
from saltray.records import storage, study
from saltray.training import checkpoint
from tests.integration.programs import SPACE, Program

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start moto's S3 server, with keys in the environment as anywhere; give the URI of an empty bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_REGION", "us-east-1")
            patch.setenv("AWS_ACCESS_KEY_ID", "AKIA-of-a-test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            make_bucket(f"{url}/salt", server)
            yield "s3://salt"
    finally:
        server.kill()
        server.wait()


def make_bucket(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Make a bucket, when the server has started."""
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=60).close()
            return
        except OSError as error:
            assert server.poll() is None and time.monotonic() < end, f"moto does not start: {error}"
            time.sleep(0.2)


def test_a_run_on_s3_is_read_written_and_resumed(start: type[Program], s3: str, tmp_path: Path) -> None:
    data = demo.write(tmp_path, demo.files(train=40, test=6, seed=0))
    pyarrow.fs.copy_files(str(data), f"{s3}/tgs")
    space = tmp_path / "tiny.py"
    space.write_text(SPACE)
    out = f"{s3}/runs/first"

    new: list[str | Path] = ["saltray.tune", "--data", f"{s3}/tgs", "--space", space, "--out", out]
    assert f"submission      {out}/submission.csv" in start(*new, "--trials", "1", "--epochs", "3").finish()
    assert {"run.json", "space.py", "study.db", "best", "logs", "trials", "submission.csv"} <= set(
        storage.names(out)
    )

    # Another machine has nothing but the URI.
    place = storage.home(out)
    forget(place.folder)
    assert "2 complete" in start("saltray.tune", "--resume", out, "--trials", "2").finish()
    trials = study.load_study(place.folder).trials
    named = [t.user_attrs["checkpoint"] for t in trials]
    assert [path.startswith(f"{out}/trials/session-0{n}/") for n, path in enumerate(named, start=1)] == [
        True
    ] * 2
    filesystem, root = storage.open_uri(f"{out}/trials")
    written = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    weights = [f"s3://{info.path}" for info in written if info.base_name == checkpoint.WEIGHTS]
    assert sorted(weights) == sorted(f"{path}/{checkpoint.WEIGHTS}" for path in named)
    assert not [info.path for info in written if info.base_name == checkpoint.TRAINING]
    submission, sample = (
        pd.read_csv(f.open_input_stream(path))
        for f, path in map(storage.open_uri, (f"{out}/submission.csv", f"{s3}/tgs/sample_submission.csv"))
    )
    assert submission["id"].tolist() == sample["id"].tolist()
    for name in ("run.json", "logs/search.log"):  # no secret goes into a run
        filesystem, path = storage.open_uri(f"{out}/{name}")
        assert b"secret-of-a-test" not in filesystem.open_input_stream(path).read()

    shutil.rmtree(place.folder)
    start("saltray.report", out, "--out", tmp_path / "report.html").finish()
    assert "trial 1" in (tmp_path / "report.html").read_text()
    assert "<title>Search first</title>" in (tmp_path / "report.html").read_text()
    again = f"{s3}/predicted/again.csv"
    start("saltray.predict", out, "--data", f"{s3}/tgs", "--out", again).finish()
    filesystem, path = storage.open_uri(again)
    pd.testing.assert_frame_equal(pd.read_csv(filesystem.open_input_stream(path)), submission)
    assert storage.names(f"{s3}/predicted") == ["again.csv"]  # and nothing of the trial before

    assert "already there" in start(*new).finish(1)
    assert "not the folder of a run" in start("saltray.tune", "--resume", f"{s3}/runs/none").finish(1)


def forget(folder: Path) -> None:
    folder.rename(folder.with_name("forgotten"))


def test_the_mirror_copies_what_changed_and_a_fetch_brings_it_back(s3: str, tmp_path: Path) -> None:
    place = storage.Home(tmp_path / "here", f"{s3}/mirror")
    place.folder.mkdir()
    study.create_study(study.Place(place.folder)).ask().report(0.5, 1)
    (place.folder / "run.json").write_text('{"sessions": []}')
    (place.folder / ".lock").touch()
    best = place.folder / "best"
    best.mkdir()
    for name in ("model.onnx", "weights"):
        (best / name).write_text("old")
    with storage.Mirror(place) as mirror:
        mirror.push()
        (best / "model.onnx").unlink()
        (place.folder / "logs").mkdir()
        (place.folder / "logs" / "search.log").write_text("said")
    elsewhere = storage.Home(tmp_path / "there", place.uri)
    storage.fetch(elsewhere)
    assert (elsewhere.folder / "logs" / "search.log").read_text() == "said"
    assert study.load_study(elsewhere.folder).trials[0].intermediate_values == {1: 0.5}
    assert not (elsewhere.folder / ".lock").exists()
    assert [file.name for file in (elsewhere.folder / "best").iterdir()] == ["weights"]


def test_a_bucket_that_lets_nobody_in_is_told_with_its_uri(s3: str, tmp_path: Path) -> None:
    place = storage.Home(tmp_path, "s3://another-bucket/run")
    (tmp_path / "run.json").write_text('{"sessions": []}')
    with pytest.raises(storage.StorageError, match=r"s3://another-bucket/run/run\.json: cannot be written"):
        storage.Mirror(place).push()


def test_a_checkpoint_that_is_gone_is_one_that_cannot_be_read(s3: str, tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="s3://salt/gone: no such folder"):
        bundle.stage(tmp_path, f"{s3}/gone")
