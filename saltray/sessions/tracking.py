"""What a search writes for others while it runs: TensorBoard's files, MLflow's runs, what its URI holds."""

import contextlib
import importlib.util
import io
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import optuna
import pyarrow.fs
from optuna.trial import TrialState
from PIL import Image
from ray import tune
from ray.tune.logger import TBXLoggerCallback
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import hparams, image, scalar

from saltray.config import UserError
from saltray.records import storage
from saltray.training.samples import PICTURE

if TYPE_CHECKING:
    from mlflow import MlflowClient

CURVES = ("loss", "map", "best_map", "learning_rate", "tiles_per_second")
"""What is drawn over the epochs; a report without them (a divergence, an end that is told again) is not."""


PARENT = "mlflow_run"
"""The study's attribute that names the search's run in MLflow, for the next session."""

_logger = logging.getLogger(__name__)


class _Guard:
    """Calls what logs to a tool, up to the first error: the search goes on without, and waits for nothing."""

    def __init__(self, tool: str) -> None:
        self._tool, self._lost = tool, False

    def __call__(self, log: Callable[..., None], *arguments: Any) -> None:
        if self._lost:
            return
        try:
            log(*arguments)
        except Exception:
            self._lost = True
            _logger.warning("logging to %s ends here", self._tool, exc_info=True)


class _EventFile:
    """A TensorBoard event file that is written at once, so that errors are raised: OSError.

    tensorboardX's SummaryWriter writes in a thread, which ends at an error; what it is then given fills its
    queue, and waits for ever.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        """Begin a file that replaces what earlier ones in the folder say of this epoch and later ones."""
        folder.mkdir(parents=True, exist_ok=True)
        self.first = not (earlier := len(list(folder.glob("events*"))))
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{earlier:03d}"
        self._records = RecordWriter(str(folder / name))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=epoch))

    def add(self, *summaries: Any, epoch: int = 0) -> None:
        """Write what tensorboardX's functions make of values."""
        for summary in summaries:
            self._write(Event(summary=summary, step=epoch))
        self._records.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file; all of it was flushed, unless an error was raised before."""
        with contextlib.suppress(OSError):
            self._records.close()


class TensorBoard(TBXLoggerCallback):
    """One TensorBoard run a trial, `NNNN/`, with curves over the epochs, predictions and parameters.

    It stands in for Tune's own logger, which Tune adds where it finds none of its kind: that one counts
    reports instead of epochs, and starts again in another folder when a trial goes on in a later session.
    Should a file not be written, or a picture not be read, the search goes on without.
    """

    def __init__(self, folder: Path, study: optuna.Study) -> None:
        """Keep the folder, which need not exist, and the study, which knows the parameters."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._folder, self._study = folder, study
        self._attempt = _Guard("TensorBoard")
        self._files: dict[int, _EventFile] = {}
        self._epochs: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the files out of Tune's own snapshot of the search, which is never restored."""
        return {}

    def __enter__(self) -> Self:
        """Start with no file open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files of the trials that were cut off."""
        for number in list(self._files):
            self._files.pop(number).close()

    def log_trial_start(self, trial: Any) -> None:
        """Do nothing: the first epoch opens the file."""

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Draw an epoch."""
        if set(CURVES) <= set(result):
            self._attempt(self._draw, trial.config["number"], result)

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """Show what the model makes of a few validation tiles."""
        self._attempt(self._show, trial.config["number"], checkpoint)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Close the trial's file."""
        self._attempt(self._end, trial.config["number"])

    def _draw(self, number: int, result: dict[str, Any]) -> None:
        epoch = result["epoch"]
        if epoch <= self._epochs.get(number, 0) and number in self._files:  # done again after a crash
            self._files.pop(number).close()
        if number not in self._files:
            self._open(number, epoch)
        self._epochs[number] = epoch
        self._files[number].add(*(scalar(name, result[name]) for name in CURVES), epoch=epoch)
        if "checkpoint_path" in result:  # of several workers; of one, `on_checkpoint` is told
            known = self._study.get_trials(deepcopy=False)[number].user_attrs
            place = known.get("checkpoint", result["checkpoint_path"])  # a URI where the run has one
            self._show(number, tune.Checkpoint(place))

    def _open(self, number: int, epoch: int) -> None:
        self._files[number] = file = _EventFile(self._folder / f"{number:04d}", epoch)
        if file.first:
            parameters = self._study.get_trials(deepcopy=False)[number].params
            # Without the list of all parameters, which the first trial's would fix for every other's.
            _, start, _ = hparams(parameters, {})
            file.add(start)

    def _show(self, number: int, checkpoint: tune.Checkpoint) -> None:
        """Add the checkpoint's picture, if it has one: only a better model has."""
        name, files = f"{checkpoint.path}/{PICTURE}", checkpoint.filesystem
        if number not in self._files or files is None:
            return
        if files.get_file_info(name).type != pyarrow.fs.FileType.File:
            return
        with files.open_input_file(name) as stream:
            picture = np.asarray(Image.open(io.BytesIO(stream.read())))
        self._files[number].add(image("samples", picture, dataformats="HW"), epoch=self._epochs[number])

    def _end(self, number: int) -> None:
        if number in self._files:
            _, _, end = hparams({}, {})
            self._files[number].add(end)
            self._files.pop(number).close()


class MLflow(tune.Callback):
    """Logs to MLflow: a run for the search, which gets the best bundle, and below it one for each trial.

    What goes on in a later session goes on in its run. Should the server be lost, the search goes on without.
    """

    def __init__(self, client: "MlflowClient", name: str, study: optuna.Study) -> None:
        """Keep what is needed.

        Args:
            client: from `mlflow_client`.
            name: of the search's run.
            study: of the search.
        """
        self._client, self._name, self._study = client, name, study
        self._attempt = _Guard("MLflow")
        self._experiment = self._parent = ""
        self._runs: dict[int, str] = {}
        self._epochs: dict[int, int] = {}
        self._running: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the client out of Tune's own snapshot of the search, which is never restored."""
        return {}

    def __enter__(self) -> Self:
        """Start the search's run, or go on with it."""
        self._attempt(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        """End the runs of the trials that were cut off, and, until `log_best`, the search's."""
        self._attempt(self._cut_off)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log an epoch."""
        number, epoch = trial.config["number"], int(result["epoch"])
        if set(CURVES) <= set(result) and epoch > self._epochs.get(number, 0):
            self._attempt(self._log_epoch, number, epoch, {name: float(result[name]) for name in CURVES})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log a trial's end."""
        self._attempt(self._end, trial.config["number"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log a trial's end by an error."""
        self._attempt(self._end, trial.config["number"])

    def _start(self) -> None:
        """Find what earlier sessions logged; begin anew where this server has nothing of them."""
        self._experiment = _experiment(self._client)
        known = self._study.user_attrs.get(PARENT)
        if known and self._client.search_runs([self._experiment], f"attributes.run_id = '{known}'"):
            self._parent = known
            self._client.update_run(known, "RUNNING")
        else:
            self._parent = self._client.create_run(self._experiment, run_name=self._name).info.run_id
            self._study.set_user_attr(PARENT, self._parent)
        below = f"tags.mlflow.parentRunId = '{self._parent}'"
        for run in self._client.search_runs([self._experiment], below, max_results=50_000):
            number = int(run.data.tags["saltray.trial"])
            self._runs[number] = run.info.run_id
            self._epochs[number] = int(run.data.metrics.get("epoch", 0))
            if run.info.status == "RUNNING":  # of a session that was killed
                self._running.add(number)

    def _log_epoch(self, number: int, epoch: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric, Param

        parameters = []
        if number not in self._runs:
            tags = {"mlflow.parentRunId": self._parent, "saltray.trial": str(number)}
            run = self._client.create_run(self._experiment, run_name=f"{number:04d}", tags=tags)
            self._runs[number] = run.info.run_id
            drawn = self._study.get_trials(deepcopy=False)[number].params
            parameters = [Param(name, str(value)) for name, value in drawn.items()]
        elif number not in self._running:
            self._client.update_run(self._runs[number], "RUNNING")
        self._running.add(number)
        now = int(time.time() * 1000)
        points = [Metric(name, value, now, epoch) for name, value in {**values, "epoch": epoch}.items()]
        self._client.log_batch(self._runs[number], metrics=points, params=parameters)
        self._epochs[number] = epoch

    def _cut_off(self) -> None:
        for number in sorted(self._running):
            self._end(number)
        self._client.set_terminated(self._parent, "KILLED")

    def _end(self, number: int) -> None:
        """Log a trial's final state; one that was cut off is RUNNING or WAITING in the study."""
        if number not in self._running:
            return
        self._running.discard(number)
        trial, run = self._study.get_trials(deepcopy=False)[number], self._runs[number]
        self._client.set_tag(run, "saltray.state", trial.state.name)
        if "reason" in trial.user_attrs:
            self._client.set_tag(run, "saltray.reason", trial.user_attrs["reason"])
        ended = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "FINISHED", TrialState.FAIL: "FAILED"}
        self._client.set_terminated(run, ended.get(trial.state, "KILLED"))


class Mirroring(tune.Callback):
    """Mirrors the run while its trials go on. It is called after the study knows of an event.

    What it raises, Overtaken, ends the search: at a trial's end too, by `saltray.search.search.Ends`.
    """

    def __init__(self, mirror: storage.Mirror) -> None:
        """Keep the mirror."""
        self._mirror = mirror

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
    ) -> None:
        """Mirror now and then."""
        self._mirror.push_soon()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Mirror an end at once."""
        self._mirror.push_now()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Mirror an end at once."""
        self._mirror.push_now()


def trackers(folder: Path, study: optuna.Study) -> list[TensorBoard | MLflow]:
    """Return the callbacks, and contexts, that log a run's search."""
    client = mlflow_client()
    board = TensorBoard(folder / "tensorboard", study)
    return [board, MLflow(client, folder.name, study)] if client else [board]


def lacks_mlflow() -> bool:
    """Tell whether MLFLOW_TRACKING_URI is set, but MLflow is not installed."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) and importlib.util.find_spec("mlflow") is None


def mlflow_client() -> "MlflowClient | None":
    """Return a client where MLFLOW_TRACKING_URI is set and MLflow is installed.

    Raises:
        UserError: nothing answers there.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or lacks_mlflow():
        return None
    # The search waits for each call: by default MLflow would try for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient

    try:
        client = MlflowClient()
        _experiment(client)
    except Exception as error:
        raise UserError(
            f"MLFLOW_TRACKING_URI={uri}: cannot log there; mend it or unset it: {error}"
        ) from None
    return client


def log_best(study: optuna.Study, bundle: Path, scores: dict[str, float]) -> None:
    """Log the best bundle and its scores to the search's MLflow run, if there is one."""
    try:
        client, run = mlflow_client(), study.user_attrs.get(PARENT)
        if client is None or run is None:
            return
        for name, value in scores.items():
            client.log_metric(run, name, value)
        client.log_artifacts(run, str(bundle), bundle.name)
        client.set_terminated(run)
    except Exception:
        _logger.warning("the best bundle is not logged to MLflow", exc_info=True)


def _experiment(client: "MlflowClient") -> str:
    """Return the id of the experiment, which MLFLOW_EXPERIMENT_NAME may name."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "saltray")
    known = client.get_experiment_by_name(name)
    return str(known.experiment_id if known else client.create_experiment(name))
