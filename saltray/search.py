"""The search: an Optuna study of Ray Tune trials.

The study in the run's folder is the one truth. Every result goes there as it comes, a trial that was cut off
waits there with its parameters and its checkpoint, and a resumed search reads what is left to do from it.
"""

import errno
import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune import TuneError
from ray.tune.search import Searcher

from saltray.checkpoint import TRAINING
from saltray.config import DISK_FULL, SearchConfig, UserError
from saltray.engine import METRIC, make_sampler, make_scheduler
from saltray.limits import Limits
from saltray.plan import Plan
from saltray.space import Space
from saltray.storage import Overtaken, names
from saltray.study import checkpoint_of, checkpoints_of, count, epochs_of, keep_trials_at, requeue
from saltray.trial import Tiles, WorkerResources, run_trial
from saltray.trial_files import checkpoints_beside, openable, trim
from saltray.warmstart import is_adopted

BAD_DRAWS = 20
"""How many draws in a row a space may fail at."""

CRASHES = 5
"""How many trials in a row may crash, without an epoch between, before the search ends."""

RETRIES = 3
"""How often a trial whose process died starts again from its last epoch."""

COLUMNS = (
    *("epoch", "loss", "map", "learning_rate", "seconds", "tiles_per_second", "validation_tiles_per_second"),
    *("workers", "gpus", "host", "ended"),
)
"""Of an epoch's row in a trial's user attribute `epochs`."""


class SearchError(UserError):
    """The search cannot run as asked."""


class StudySearch(Searcher):
    """Optuna behind Ray Tune, telling the study what really happened.

    Ray's own OptunaSearch tells COMPLETE with a low-budget value for a trial that the scheduler stopped,
    leaves NaN trials RUNNING and forgets its queue. Here a stopped trial is PRUNED with its intermediate
    values, a diverged or crashed one FAIL, and a waiting one (enqueued, or cut off earlier) is asked first.
    """

    def __init__(
        self,
        space: Space,
        study: optuna.Study,
        config: SearchConfig,
        *,
        parallel: bool,
        resources: WorkerResources,
        limits: Limits | None = None,
        trials_at: str = "",
    ) -> None:
        """Keep what the search is made of.

        Args:
            space: what to draw from.
            study: is asked and told.
            config: epochs, seed and sampler.
            parallel: whether trials run side by side.
            resources: of a trial's workers.
            limits: may end the search.
            trials_at: path or URI below which the trials' checkpoints lie.
        """
        super().__init__(metric=METRIC, mode="max")
        self._space, self.study, self._config = space, study, config
        self._parallel, self._resources, self._limits = parallel, resources, limits
        self._trials_at = trials_at
        self._trials: dict[str, optuna.Trial] = {}
        self._epochs: dict[str, list[dict[str, Any]]] = {}
        self._completed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave all out of Tune's own snapshot: it is never restored, and the study may hold a password."""
        return {}

    def __deepcopy__(self, memo: Any) -> "StudySearch":
        """Stay one: Tune copies what it is configured with."""
        return self

    def suggest(self, trial_id: str) -> Any:
        """Ask for the next trial's spec (`saltray.trial.run_trial`).

        Where patience is at its end: None while others run, then Ray's own word for the end.

        A draw that the space fails at is told as a failed trial, and the next is asked.

        Raises:
            SearchError: the space failed at `BAD_DRAWS` draws in a row.
        """
        if self._limits is not None and self._limits.no_more():
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            # FINISHED is final: a trial that runs may still set a new best, and the search goes on.
            return None if running else Searcher.FINISHED
        config = self._config
        for _ in range(BAD_DRAWS):
            number = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = make_sampler(config.searcher, config.seed, number, self._parallel)
            trial = self.study.ask()
            self._trials[trial_id] = trial
            try:
                drawn = self._space.config(trial, config.epochs, config.seed, self._resources.workers)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                trial.set_user_attr("undrawn", True)
                self.record_failure(trial_id, reason)
                continue
            self._epochs[trial_id] = epochs_of(trial)
            spec = {"number": trial.number, "config": drawn.to_dict(), "parameters": trial.params}
            named = checkpoints_of(self.study, trial)
            others = [c for c in checkpoints_beside(named[0]) if c not in named] if named else []
            return {**spec, "resume": named + others}
        raise SearchError(f"{BAD_DRAWS} draws in a row failed, the last with {reason}")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record an epoch."""
        if self._limits is not None:
            self._limits.hear()
        if "failed" in result or trial_id in self._completed:
            return  # a trial may report once more while it is being stopped
        trial, rows = self._trials[trial_id], self._epochs[trial_id]
        epoch = int(result["epoch"])
        if epoch not in {row["epoch"] for row in rows}:  # an epoch is done twice after a crash
            # Not `trial.report`, which a study of two objectives refuses.
            self.study._storage.set_trial_intermediate_value(trial._trial_id, epoch, result[METRIC])
        # Tune hands a trial's last result over twice; an epoch that is done again takes another time.
        last = rows[-1] if rows else {}
        again = last.get("epoch") == epoch and last.get("seconds") == result.get("seconds")
        if "loss" in result and not again:
            more = {
                "gpus": self._resources.gpus * result["workers"],  # of elastic workers there may be fewer
                "host": result["node_ip"],
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            rows.append({name: (result | more)[name] for name in COLUMNS})
            trial.set_user_attr("epochs", rows)
        if len(rows) == 1 and "parameters" in result:
            trial.set_user_attr("parameters", result["parameters"])
            workers, share = self._resources.workers, self._resources
            trial.set_user_attr(
                "hardware",
                {
                    "device": result["device"],
                    "workers": workers,
                    "cpus": share.cpus * workers,
                    "gpus": share.gpus * workers,
                },
            )
        if "checkpoint_path" in result:
            self.record_checkpoint(trial_id, result["checkpoint_path"])

    def record_checkpoint(self, trial_id: str, path: str) -> None:
        """Record where a trial's newest checkpoint lies, and the one before it, which is kept as well."""
        if trial_id in self._completed:
            return
        trial, place = self._trials[trial_id], openable(self._trials_at, path)
        before = trial.user_attrs.get("checkpoint")
        if before == place:
            return  # Tune tells of it twice
        if before is not None:
            trial.set_user_attr("checkpoint_before", before)
        trial.set_user_attr("checkpoint", place)

    def record_failure(self, trial_id: str, reason: str, crashed: bool = False) -> None:
        """Record that a trial failed, and why; one that `crashed` might do better elsewhere."""
        trial = self._trials[trial_id]
        trial.set_user_attr("reason", reason)
        if crashed:
            trial.set_user_attr("crashed", True)
        trial.set_user_attr("outcome", "failed")
        self.study.tell(trial, state=TrialState.FAIL)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record a trial's end."""
        if trial_id in self._completed or trial_id not in self._trials:
            return
        if result and METRIC in result:
            self.on_trial_result(trial_id, result)
        self._completed.add(trial_id)
        trial, rows = self._trials[trial_id], self._epochs[trial_id]
        if error:
            return  # Recorder knows why, and is asked next
        if not result or METRIC not in result:
            self.record_failure(trial_id, "it ended without a result")
            return
        trial.set_user_attr("seconds", round(sum(row["seconds"] for row in rows), 3))
        trial.set_user_attr("host", result["hostname"])
        if "failed" in result:
            self.record_failure(trial_id, result["failed"], result.get("crashed", False))
        elif result.get("finished"):
            trial.set_user_attr("outcome", f"ran to its end, epoch {result['epoch']}")
            fastest = max((row["validation_tiles_per_second"] for row in rows), default=0.0)
            values = [result[METRIC], fastest]
            self.study.tell(trial, values[: len(self.study.directions)])
        else:
            trial.set_user_attr("outcome", f"stopped early after epoch {result['epoch']}")
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
        self._crashes = 0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take note that trials get on; raises SearchError where each fails before its first epoch."""
        if result.get("crashed"):
            self._count_crash(result["failed"])
        else:
            self._crashes = 0

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """Record the checkpoint."""
        self._search.record_checkpoint(trial.trial_id, checkpoint.path)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record an error that outlasted the retries: its traceback's last line.

        Raises:
            SearchError: the disk is full, or one trial after the other crashes. The trial waits for the next
                session, and no other has to fail.
        """
        lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
        reason = lines[-1] if lines else "its process died"
        if any(os.strerror(errno.ENOSPC) in line for line in lines):
            raise SearchError(f"{lines[-1]}. {DISK_FULL}")
        self._count_crash(reason)
        self._search.record_failure(trial.trial_id, reason, crashed=True)

    def _count_crash(self, reason: str) -> None:
        self._crashes += 1
        if self._crashes >= CRASHES:
            raise SearchError(
                f"{self._crashes} trials in a row crashed without an epoch, the last of: {reason}. "
                "Mend it, then go on with the run: --resume"
            )


class Ends(tune.Callback):
    """Raises what is raised where a trial ends, or has a checkpoint, when Tune's step ends.

    By Tune itself it would be taken for a failure of the trial, which is then started again, or be logged and
    forgotten, whatever it says of the study or the run.
    """

    def __init__(self, *listeners: Any) -> None:
        """Stand between Tune and those that hear of trials.

        Args:
            listeners: a searcher, or callbacks.
        """
        self._problem: Exception | None = None
        for listener in listeners:
            for name in {"on_trial_complete", "on_checkpoint"} & set(dir(listener)):
                setattr(listener, name, self._keeping(getattr(listener, name)))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """End the search by it; raises what was raised first."""
        if self._problem is not None:
            raise self._problem

    def _keeping(self, hear: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(hear)
        def heard(*args: Any, **kwargs: Any) -> None:
            try:
                hear(*args, **kwargs)
            except Exception as error:
                self._problem = self._problem or error

        return heard


class Trimmer(tune.Callback):
    """Keeps of an ended trial's files what the study names, without the state to train on from.

    It is called last: a mirrored study names what is dropped until its mirror knows of the trial's end.
    """

    def __init__(self, search: StudySearch) -> None:
        """Keep the search, which leaves the study out of Tune's own snapshot."""
        self._search = search

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Make room."""
        study = self._search.study
        known = study.get_trials(deepcopy=False)[trial.config["number"]]
        place = checkpoint_of(study, known)
        if known.state.is_finished() and place is not None:
            trim(place, TRAINING)

    on_trial_error = on_trial_complete


def run_search(
    space: Space,
    tiles: Tiles | Sequence[Tiles],
    chosen: Plan,
    trials_at: str,
    study: optuna.Study,
    config: SearchConfig,
    callbacks: Sequence[tune.Callback] = (),
    trainable: Callable[..., None] | None = None,
) -> str:
    """Run trials until the study has enough ended ones, a budget is used up, or Ctrl-C.

    Args:
        space: what to search.
        tiles: the decoded tiles, shared for the plan's workers.
        chosen: from `plan`.
        trials_at: path or URI that gets the trials' files.
        study: is asked and told; `config.trials` counts all its own ended trials.
        config: the engine and the budgets.
        callbacks: further Tune callbacks.
        trainable: what runs a trial, if not `run_trial`; it gets the tiles as they are given here.

    Returns:
        Which limit ended the search; empty where all trials came to an end.

    Raises:
        SearchError: the space fails at draw after draw, the disk is full, or trial after trial crashes.
        UserError: of a callback.
    """
    keep_trials_at(study, trials_at)
    requeue(study)
    known = study.get_trials(deepcopy=False)
    if not known or not is_adopted(study):
        for first in space.first[len(known) :]:  # a session may have been cut off among them
            study.enqueue_trial(first)
    left = config.trials - count(study).ended
    if left < 1:
        return ""
    limits = Limits(study, config)
    if limits.no_more():
        return limits.reached
    resources = chosen.resources
    searcher = StudySearch(
        space, study, config, parallel=chosen.concurrency > 1, resources=resources, limits=limits,
        trials_at=trials_at,
    )  # fmt: skip
    listeners = [Recorder(searcher), *callbacks, Trimmer(searcher)]
    # The highest and one more: old sessions may have been deleted to make room.
    earlier = [int(name[8:]) for name in names(trials_at) if re.fullmatch(r"session-\d+", name)]
    session = f"session-{max(earlier, default=0) + 1:02d}"
    # The trial of several workers only drives them; each worker asks for its own.
    asked = resources.training() if resources.workers == 1 else {"CPU": 0.01}
    runs = tune.with_parameters(
        trainable or run_trial, tiles=tiles, resources=resources, storage=f"{trials_at}/{session}"
    )
    tuner = tune.Tuner(
        tune.with_resources(runs, asked),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=make_scheduler(config.scheduler, config.epochs, study.get_trials(deepcopy=False)),
            num_samples=left,
            max_concurrent_trials=chosen.concurrency,
            # The thread of several workers' trial waits for them, and cannot be ended for the next trial.
            reuse_actors=resources.workers == 1,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=trials_at,
            stop=limits,
            verbose=0,
            log_to_file=True,
            callbacks=[*listeners, Ends(searcher, *listeners)],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            # Two: the study may still name the one before the newest, and the newest may be damaged.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    )
    _fit(tuner, study)
    return limits.reached


def _fit(tuner: tune.Tuner, study: optuna.Study) -> None:
    """Run the trials; those that are cut off wait then. What the user can mend is raised as it was."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        tuner.fit()
    except BaseException as error:
        cause: BaseException | None = error
        while isinstance(cause, TuneError):  # Tune makes a text of what a callback raises, at each level anew
            cause = cause.__context__
        if not isinstance(cause, Overtaken):  # a server's study has them as the other session's by now
            requeue(study)
        if isinstance(cause, UserError):
            raise cause from None
        raise
    finally:
        # Tune leaves its own, and what follows the search could not be interrupted.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
    requeue(study)


def _trial_name(trial: Any) -> str:
    return f"{trial.config['number']:04d}"
