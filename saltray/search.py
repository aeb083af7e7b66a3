"""The search: an Optuna study of Ray Tune trials, stopped early by ASHA.

The study in the run's folder is the one truth. Every result goes there as it comes, a trial that was cut off
waits there with its parameters and its checkpoint, and a resumed search reads what is left to do from it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from saltray.config import UserError
from saltray.engine import METRIC, StudyASHA, make_sampler
from saltray.plan import Plan
from saltray.space import Space
from saltray.study import STUDY_NAME, checkpoint_of, count, open_storage, requeue
from saltray.trial import Tiles, run_trial

BAD_DRAWS = 20
"""How many draws in a row a space may fail at."""

RETRIES = 3
"""How often a trial whose process died starts again from its last epoch."""


class SearchError(UserError):
    """The search cannot run as asked."""


class StudySearch(OptunaSearch):
    """Ray Tune's OptunaSearch, telling the study what really happened.

    OptunaSearch tells COMPLETE with a low-budget value for a trial that the scheduler stopped, leaves NaN
    trials RUNNING and forgets its queue. Here a stopped trial is PRUNED with its intermediate values, a
    diverged or crashed one FAIL, and a waiting one (enqueued, or cut off earlier) is asked first. Each
    suggestion is seeded by its trial's number, so a resumed study proposes what an uninterrupted one would.
    """

    def __init__(
        self, space: Space, storage: RDBStorage, *, epochs: int, seed: int, parallel: bool, workers: int = 1
    ) -> None:
        """Open or create the study.

        Args:
            space: what to draw from.
            storage: where the study lives.
            epochs: of a full trial.
            seed: of the sampler and of every trial.
            parallel: whether trials run side by side.
            workers: of a trial, that share its batch.
        """
        super().__init__(
            space=space.draw, metric=METRIC, mode="max", storage=storage, study_name=STUDY_NAME,
            sampler=make_sampler(seed, 0, parallel),
        )  # fmt: skip
        self._saltray_space, self._epochs, self._base_seed, self._parallel = space, epochs, seed, parallel
        self._workers = workers
        self._reported: dict[str, set[int]] = {}

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        study: optuna.Study = self._ot_study  # type: ignore[assignment]
        return study

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Ask for the next trial's spec (`saltray.trial.run_trial`).

        A draw that the space fails at is told as a failed trial, and the next is asked.

        Raises:
            SearchError: the space failed at `BAD_DRAWS` draws in a row.
        """
        for _ in range(BAD_DRAWS):
            number = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = make_sampler(self._base_seed, number, self._parallel)
            trial = self.study.ask()
            self._ot_trials[trial_id] = trial
            try:
                config = self._saltray_space.config(trial, self._epochs, self._base_seed, self._workers)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                self.record_failure(trial_id, reason)
                continue
            self._reported[trial_id] = set(self.study.trials[trial.number].intermediate_values)
            return {"number": trial.number, "config": config.to_dict(), "resume": checkpoint_of(trial)}
        raise SearchError(f"{BAD_DRAWS} draws in a row failed, the last with {reason}")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record an epoch."""
        if "diverged" in result or trial_id in self._completed_trials:
            return  # a trial may report once more while it is being stopped
        trial, epoch = self._ot_trials[trial_id], int(result["epoch"])
        if epoch not in self._reported[trial_id]:  # an epoch is done twice after a crash
            self._reported[trial_id].add(epoch)
            trial.report(result[METRIC], epoch)
        if "checkpoint_path" in result:
            self.record_checkpoint(trial_id, result["checkpoint_path"])

    def record_checkpoint(self, trial_id: str, path: str) -> None:
        """Record where a trial's newest checkpoint lies."""
        if trial_id in self._completed_trials:
            return
        self._ot_trials[trial_id].set_user_attr("checkpoint", path)

    def record_failure(self, trial_id: str, reason: str) -> None:
        """Record that a trial failed, and why."""
        trial = self._ot_trials[trial_id]
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record a trial's end."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return
        if result and METRIC in result:
            self.on_trial_result(trial_id, result)
        self._completed_trials.add(trial_id)
        trial = self._ot_trials[trial_id]
        if error:
            return  # Recorder knows why, and is asked next
        if not result or METRIC not in result:
            self.record_failure(trial_id, "it ended without a result")
            return
        trial.set_user_attr("seconds", round(result["time_total_s"], 3))
        trial.set_user_attr("host", result["hostname"])
        if "diverged" in result:
            self.record_failure(trial_id, result["diverged"])
        elif result.get("finished"):
            self.study.tell(trial, result[METRIC])
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Leave Tune's snapshot empty: the study holds the search's whole state."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the study."""


class Recorder(tune.Callback):
    """Writes into the study what Tune tells its callbacks alone: checkpoints' places and errors."""

    def __init__(self, search: StudySearch) -> None:
        """Keep the search."""
        self._search = search

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """Record the checkpoint."""
        self._search.record_checkpoint(trial.trial_id, checkpoint.path)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record an error that outlasted the retries: its traceback's last line."""
        lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
        self._search.record_failure(trial.trial_id, lines[-1] if lines else "its process died")


def run_search(
    space: Space,
    tiles: Tiles,
    chosen: Plan,
    folder: Path,
    *,
    trials: int,
    epochs: int,
    seed: int,
    time_budget: float | None = None,
    callbacks: Sequence[tune.Callback] = (),
) -> optuna.Study:
    """Run trials until the study has `trials` ended ones, the time is up, or Ctrl-C.

    Args:
        space: what to search.
        tiles: the decoded tiles, shared for the plan's workers.
        chosen: from `plan`.
        folder: the run's folder; holds or gets `study.db` and `trials/`.
        trials: ended trials wanted in the study as a whole.
        epochs: of a full trial.
        seed: of the sampler and of every trial.
        time_budget: seconds after which running trials are cut off.
        callbacks: further Tune callbacks.

    Returns:
        The study.
    """
    storage = open_storage(folder)
    workers, parallel = chosen.resources.workers, chosen.concurrency > 1
    searcher = StudySearch(space, storage, epochs=epochs, seed=seed, parallel=parallel, workers=workers)
    study = searcher.study
    requeue(storage, study)
    if not study.get_trials(deepcopy=False) and space.first is not None:
        study.enqueue_trial(space.first)
    left = trials - count(study).ended
    if left < 1:
        return study
    storage_path = folder / "trials"
    session = f"session-{len(list(storage_path.glob('session-*'))) + 1:02d}"
    resources = chosen.resources
    # The trial of several workers only drives them; each worker asks for its own.
    asked = resources.training() if resources.workers == 1 else {"CPU": 0.01}
    trainable = tune.with_parameters(
        run_trial, tiles=tiles, resources=resources, storage=str(storage_path / session)
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, asked),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=StudyASHA(epochs, study.get_trials(deepcopy=False)),
            num_samples=left,
            max_concurrent_trials=chosen.concurrency,
            time_budget_s=time_budget,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=str(storage_path),
            verbose=0,
            log_to_file=True,
            callbacks=[Recorder(searcher), *callbacks],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            # Two: the study may still name the one before the newest.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        tuner.fit()
    finally:
        requeue(storage, study)
    return study


def _trial_name(trial: Any) -> str:
    return f"{trial.config['number']:04d}"
