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
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune import TuneError

from saltray.config import DISK_FULL, SearchConfig, UserError
from saltray.records.storage import Overtaken, names
from saltray.records.study import checkpoints_of, count, keep_trials_at, requeue
from saltray.records.trial_files import trim
from saltray.search import processes
from saltray.search.engine import make_scheduler
from saltray.search.limits import Limits
from saltray.search.plan import Plan
from saltray.search.searcher import SearchError, StudySearch
from saltray.search.space import Space
from saltray.search.warmstart import is_adopted
from saltray.training.checkpoint import TRAINING
from saltray.training.trial import Tiles, run_trial

CRASHES = 5
"""How many trials in a row may crash, without an epoch between, before the search ends."""

RETRIES = 3
"""How often a trial whose process died starts again from its last epoch."""


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
        newest = next(iter(checkpoints_of(study, known)), None)
        if known.state.is_finished() and newest is not None:
            trim(newest, TRAINING)

    on_trial_error = on_trial_complete


def run_search(
    space: Space,
    tiles: Tiles | Sequence[Tiles],
    chosen: Plan,
    trials_at: str,
    study: optuna.Study,
    config: SearchConfig,
    callbacks: Sequence[tune.Callback] = (),
    trainable: Callable[..., None] = run_trial,
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
        trainable: what runs a trial, as Tune's function trainable; it gets the tiles as they are given here.

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
    runs = tune.with_parameters(trainable, tiles=tiles, resources=resources, storage=f"{trials_at}/{session}")
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
    with processes.kept():
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
