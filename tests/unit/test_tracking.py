"""What other tools are told of a search, by callbacks that are called as Tune calls them."""

import errno
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image
from ray import tune
from ray.tune.logger import TBXLoggerCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboardX import record_writer

from saltray.config import UserError
from saltray.sessions import tracking
from saltray.training.samples import PICTURE

RATE = FloatDistribution(1e-4, 1e-1)


def make_study() -> optuna.Study:
    """Three trials; the second alone has a parameter more."""
    study = optuna.create_study(direction="maximize")
    for params in ({"rate": 0.01}, {"rate": 0.02, "kind": "resunet"}, {"rate": 0.03}):
        kinds: dict[str, Any] = (
            {"kind": CategoricalDistribution(["unet", "resunet"])} if "kind" in params else {}
        )
        study.add_trial(
            create_trial(
                params=params, distributions={"rate": RATE} | kinds, state=TrialState.COMPLETE, value=0.5
            )
        )
    return study


def tune_trial(number: int) -> Any:
    return SimpleNamespace(config={"number": number}, trial_id=f"id-{number}")


def epoch_result(epoch: int, score: float = 0.0) -> dict[str, Any]:
    values = {"loss": 1 / epoch, "map": score or epoch / 10, "best_map": score or epoch / 10}
    return {"epoch": epoch, "learning_rate": 0.01, "tiles_per_second": 30.0, "finished": False, **values}


def report(callback: Any, number: int, *epochs: int, **more: Any) -> None:
    for epoch in epochs:
        callback.on_trial_result(0, [], tune_trial(number), epoch_result(epoch) | more)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def raising(error: Exception) -> Callable[..., None]:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def curve(folder: Path, name: str) -> list[tuple[int, Any]]:
    return [(event.step, pytest.approx(event.value)) for event in read(folder).Scalars(name)]


# TensorBoard


def test_curves_run_over_the_epochs(tmp_path: Path) -> None:
    with tracking.TensorBoard(tmp_path, make_study()) as board:
        report(board, 0, 1, 2, 3)
        report(board, 1, 1)
        board.on_trial_complete(0, [], tune_trial(0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000", "0001"]
    assert set(read(tmp_path / "0000").Tags()["scalars"]) == set(tracking.CURVES)
    assert curve(tmp_path / "0000", "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert curve(tmp_path / "0000", "best_map") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_trial_that_goes_on_goes_on_in_its_folder_without_a_zigzag(tmp_path: Path) -> None:
    study = make_study()
    with tracking.TensorBoard(tmp_path, study) as board:
        report(board, 0, 1, 2, 3)
    with tracking.TensorBoard(tmp_path, study) as board:  # the next session: epoch 3 had no checkpoint
        report(board, 0, 3, best_map=0.7)
        report(board, 0, 4)
        report(board, 0, 4, 5, best_map=0.8)  # its process died after epoch 4
    assert curve(tmp_path / "0000", "best_map") == [(1, 0.1), (2, 0.2), (3, 0.7), (4, 0.8), (5, 0.8)]
    assert [step for step, _ in curve(tmp_path / "0000", "loss")] == [1, 2, 3, 4, 5]


def test_what_is_no_epoch_is_not_drawn(tmp_path: Path) -> None:
    with tracking.TensorBoard(tmp_path, make_study()) as board:
        report(board, 0, 1, 2)
        told = {"epoch": 2, "map": 0.2, "best_map": 0.2, "finished": True}
        board.on_trial_result(0, [], tune_trial(0), told)  # an end that is told again
        board.on_trial_result(0, [], tune_trial(1), told | {"map": 0.0, "failed": "the loss is nan"})
        board.on_trial_complete(0, [], tune_trial(1))
    assert [step for step, _ in curve(tmp_path / "0000", "map")] == [1, 2]
    assert not (tmp_path / "0001").exists()


def test_a_better_models_predictions_are_shown(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    better, worse = tmp_path / "better", tmp_path / "worse"
    for folder in (better, worse):
        folder.mkdir()
    Image.fromarray(picture).save(better / PICTURE)
    with tracking.TensorBoard(tmp_path / "tb", make_study()) as board:
        for epoch, folder in ((1, better), (2, worse), (3, better)):
            report(board, 0, epoch)
            board.on_checkpoint(0, [], tune_trial(0), tune.Checkpoint(str(folder)))
        report(board, 1, 1, checkpoint_path=str(better))  # a trial of several workers
    shown = read(tmp_path / "tb" / "0000").Images("samples")
    assert [image.step for image in shown] == [1, 3]
    pixels = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)).convert("L"))
    assert np.array_equal(pixels, picture)
    assert len(read(tmp_path / "tb" / "0001").Images("samples")) == 1


def test_each_trial_has_its_own_parameters(tmp_path: Path) -> None:
    with tracking.TensorBoard(tmp_path, make_study()) as board:
        for number in (0, 1):
            report(board, number, 1)
            board.on_trial_complete(0, [], tune_trial(number))
    found = []
    for number in (0, 1):
        content = read(tmp_path / f"000{number}").PluginTagToContent("hparams")
        # The list of a whole experiment's parameters would hide those that the first trial does not have.
        assert set(content) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
        start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
        found.append({k: v.string_value or v.number_value for k, v in start.hparams.items()})
    assert found == [{"rate": 0.01}, {"rate": 0.02, "kind": "resunet"}]


def test_an_error_in_writing_ends_the_logging_and_not_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.TensorBoard(tmp_path, make_study()) as board:
        report(board, 0, 1)
        with monkeypatch.context() as patch:
            patch.setattr(record_writer.RecordWriter, "write", raising(OSError(errno.EIO, "gone")))
            report(board, 0, 2)
        assert caplog.text.count("logging to TensorBoard ends here") == 1
        report(board, 0, 3, 4, 5, 6)
        report(board, 1, 1)
        board.on_trial_complete(0, [], tune_trial(0))
    assert caplog.text.count("ends here") == 1
    assert [step for step, _ in curve(tmp_path / "0000", "loss")] == [1]


def test_a_full_disk_ends_the_logging_and_not_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = Path("/dev/full").open("wb")  # noqa: SIM115 (closed with the board)
    monkeypatch.setattr(record_writer, "open_file", lambda _: full)
    with tracking.TensorBoard(tmp_path, make_study()) as board:
        report(board, 0, 1)
        assert "No space left on device" in caplog.text
        report(board, 0, 2, 3)
    assert full.closed


def test_a_picture_that_cannot_be_read_does_not_end_the_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / PICTURE).write_text("half a picture")
    with tracking.TensorBoard(tmp_path / "tb", make_study()) as board:
        report(board, 1, 1, 2, checkpoint_path=str(tmp_path))  # a trial of several workers
        board.on_checkpoint(0, [], tune_trial(1), tune.Checkpoint(str(tmp_path)))
    assert caplog.text.count("logging to TensorBoard ends here") == 1
    assert curve(tmp_path / "tb" / "0001", "loss") == [(1, 1.0)]


def test_it_stands_in_for_tunes_own_logger(tmp_path: Path) -> None:
    assert isinstance(tracking.TensorBoard(tmp_path, make_study()), TBXLoggerCallback)


# MLflow


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow with a database of this test's own."""
    monkeypatch.chdir(tmp_path)  # artifacts go to the working directory
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    client = tracking.mlflow_client()
    assert client is not None
    yield client
    client._tracking_client.store._dispose_engine()


def logged(client: Any) -> dict[str, Any]:
    """Return the runs by name."""
    experiment = client.get_experiment_by_name("tests").experiment_id
    return {run.info.run_name: run for run in client.search_runs([experiment])}


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def test_mlflow_gets_a_run_for_each_trial_below_the_searchs(server: Any, tmp_path: Path) -> None:
    study = make_study()
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"reason": "the loss is nan"}))
    study.add_trial(create_trial(state=TrialState.WAITING))
    with tracking.MLflow(server, "salt", study) as mlflow:
        report(mlflow, 1, 1, 2)
        mlflow.on_trial_complete(0, [], tune_trial(1))
        report(mlflow, 3, 1)
        mlflow.on_trial_error(0, [], tune_trial(3))
        report(mlflow, 4, 1)  # and is cut off
    runs = logged(server)
    assert set(runs) == {"salt", "0001", "0003", "0004"}
    assert {runs[n].data.tags["mlflow.parentRunId"] for n in ("0001", "0003", "0004")} == {
        runs["salt"].info.run_id
    }
    assert runs["0001"].data.params == {"rate": "0.02", "kind": "resunet"}
    assert history(server, runs["0001"], "best_map") == [(1, 0.1), (2, 0.2)]
    assert {name: run.info.status for name, run in runs.items()} == {
        "salt": "KILLED",
        "0001": "FINISHED",
        "0003": "FAILED",
        "0004": "KILLED",
    }
    assert runs["0003"].data.tags["saltray.reason"] == "the loss is nan"
    bundle = tmp_path / "best"
    bundle.mkdir()
    (bundle / "README.md").write_text("the card")
    tracking.log_best(study, bundle, {"validation_map": 0.7})
    parent = logged(server)["salt"]
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"validation_map": 0.7})
    assert Path(parent.info.artifact_uri, "best", "README.md").read_text() == "the card"


def test_mlflow_a_later_session_goes_on_in_the_same_runs(server: Any) -> None:
    study = make_study()
    with tracking.MLflow(server, "salt", study) as mlflow:
        report(mlflow, 0, 1, 2)
    with tracking.MLflow(server, "salt", study) as mlflow:
        report(mlflow, 0, 2, 3, 3, 4)  # done again, and once more after a crash
        assert logged(server)["0000"].info.status == "RUNNING"
        mlflow.on_trial_complete(0, [], tune_trial(0))
    runs = logged(server)
    assert set(runs) == {"salt", "0000"}
    assert [step for step, _ in history(server, runs["0000"], "loss")] == [1, 2, 3, 4]


def test_mlflow_lost_on_the_way_does_not_end_the_search(
    server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def lost(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError("gone")

    with tracking.MLflow(server, "salt", make_study()) as mlflow:
        monkeypatch.setattr(server, "log_batch", lost)
        report(mlflow, 0, 1, 2, 3)
    assert calls == 1
    assert "gone" in caplog.text


def test_mlflow_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.mlflow_client() is None
    assert [type(t) for t in tracking.trackers(tmp_path, make_study())] == [tracking.TensorBoard]


def test_mlflow_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=http://127\.0\.0\.1:1: cannot log there"):
        tracking.mlflow_client()
