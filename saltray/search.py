"""The search: an Optuna study of Ray Tune trials, stopped early by ASHA.

The study in the run's folder is the one truth. Every result goes there as it comes, a trial that was cut off
waits there with its parameters and its checkpoint, and a resumed search reads what is left to do from it.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy import URL

from saltray.config import UserError
from saltray.space import Space
from saltray.trial import Tiles, WorkerResources, run_trial

METRIC = "best_map"
STUDY_NAME = "saltray"

GRACE_EPOCHS = 3
REDUCTION = 3
"""ASHA (Li et al. 2020, arXiv:1810.05934): at 3, 9, 27 .. epochs the best third goes on."""

BAD_DRAWS = 20
"""How many draws in a row a space may fail at."""

RETRIES = 3
"""How often a trial whose process died starts again from its last epoch."""


class SearchError(UserError):
    """The search cannot run as asked."""


@dataclass(frozen=True)
class Plan:
    """How many trials run side by side, and what each worker gets."""

    concurrency: int
    resources: WorkerResources


def plan(
    nodes: Sequence[Mapping[str, float]],
    *,
    trials: int,
    workers: int = 1,
    cpus: float | None = None,
    gpus: float | None = None,
) -> Plan:
    """Compute the concurrency from the machines, with room for Ray Data.

    A worker of `cpus` CPUs takes nine tenths of them for training; Ray Data's tasks run in the rest.

    Args:
        nodes: `CPU` and `GPU` counts of each live machine.
        trials: number of trials to run.
        workers: workers a trial.
        cpus: CPUs of a worker. By default 1, or more where fewer trials than CPUs are wanted.
        gpus: GPUs of a worker: 0, a fraction 1/n, or a whole number. By default 1 where there are any.

    Raises:
        SearchError: not even one trial fits; the message has the numbers.
    """
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    fraction = 1 / gpus if 0 < gpus < 1 else 1.0
    if trials < 1 or workers < 1 or gpus < 0 or (cpus is not None and cpus <= 0):
        raise SearchError(
            f"trials {trials}, workers per trial {workers}, CPUs {cpus}, GPUs {gpus}: must be positive"
        )
    if abs(fraction - round(fraction)) > 0.02 or (gpus > 1 and gpus != int(gpus)):
        raise SearchError(f"--gpus-per-trial {gpus}: a whole number or one share of n, such as 0.5 or 0.25")
    if cpus is None:
        at_once = min(trials * workers, sum(int(node.get("CPU", 0)) for node in nodes))
        cpus = 1.0 if gpus else float(max(1, _most_threads(nodes, at_once)))
    slots = [_slots(node, cpus, gpus) for node in nodes]
    concurrency = min(sum(slots) // workers, trials)
    if concurrency < 1:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise SearchError(
            f"a trial needs {workers} x ({cpus:g} CPUs and {gpus:g} GPUs); "
            f"the cluster has: {have or 'nothing'}. "
            "Ask for less with --workers-per-trial, --cpus-per-trial or --gpus-per-trial, or add machines."
        )
    return Plan(concurrency, WorkerResources(workers, cpus, gpus))


def _slots(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Count the workers that fit on a machine."""
    by_cpu = math.floor(node.get("CPU", 0) / cpus + 1e-9)
    if not gpus:
        return by_cpu
    per_gpu = round(1 / gpus) if gpus < 1 else 1
    by_gpu = int(node.get("GPU", 0)) * per_gpu if gpus < 1 else int(node.get("GPU", 0) // gpus)
    return min(by_cpu, by_gpu)


def _most_threads(nodes: Sequence[Mapping[str, float]], workers: int) -> int:
    """Return the largest whole number of CPUs a worker with which so many still run at once."""
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    fits = (c for c in range(largest, 0, -1) if sum(_slots(n, c, 0) for n in nodes) >= workers)
    return next(fits, 1)


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


def make_sampler(seed: int, number: int, parallel: bool) -> BaseSampler:
    """Return TPE (Bergstra et al. 2011; multivariate, Falkner et al. 2018) for one suggestion.

    Every option that matters is set: Optuna changes its defaults between major releases.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(
            seed=(seed * 1_000_003 + number) % 2**32,
            n_startup_trials=10,
            multivariate=True,
            group=True,
            constant_liar=parallel,
        )


class StudyASHA(AsyncHyperBandScheduler):
    """ASHA on the epoch, whose rungs begin with what the study already knows."""

    def __init__(self, epochs: int, known: Sequence[FrozenTrial]) -> None:
        """Make the scheduler and replay the known trials' intermediate values."""
        super().__init__(
            time_attr="epoch", metric=METRIC, mode="max", max_t=epochs,
            grace_period=min(GRACE_EPOCHS, epochs), reduction_factor=REDUCTION,
        )  # fmt: skip
        self._known = {t.number: t.intermediate_values for t in known}
        for number in [t.number for t in known if t.state.is_finished()]:
            self._replay(number, f"study-{number}")

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial in; one that goes on brings its earlier epochs along."""
        super().on_trial_add(tune_controller, trial)
        self._replay(trial.config["number"], trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on; one that reports its end is let end by itself."""
        if result.get("finished"):
            return self.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def _replay(self, number: int, trial_id: str) -> None:
        for epoch, value in sorted(self._known.get(number, {}).items()):
            # A bracket knows a trial by its id alone.
            self._brackets[0].on_result(cast(Any, SimpleNamespace(trial_id=trial_id)), epoch, value)


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


@dataclass(frozen=True)
class Counts:
    """A study's trials by what became of them."""

    complete: int
    pruned: int
    failed: int
    waiting: int

    @property
    def ended(self) -> int:
        """Trials that will not run again."""
        return self.complete + self.pruned + self.failed


def open_storage(folder: Path) -> RDBStorage:
    """Open the run's study database; it is created when absent.

    Raises:
        SearchError: the file is no database of Optuna's, or of another version.
    """
    file = folder / "study.db"
    try:
        # Made, not written: a path may hold what means something in a URL.
        url = URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    except Exception as error:
        raise SearchError(f"{file}: not a readable Optuna study: {error}") from error


def create_study(folder: Path) -> optuna.Study:
    """Open the run's study; it is created when absent. Raises SearchError."""
    storage = open_storage(folder)
    return optuna.create_study(
        storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
    )


def load_study(folder: Path) -> optuna.Study:
    """Open the study of a run; raises SearchError."""
    if not (folder / "study.db").is_file():
        raise SearchError(f"{folder}: no study.db in it; not the folder of a run")
    try:
        return optuna.load_study(study_name=STUDY_NAME, storage=open_storage(folder))
    except KeyError:
        raise SearchError(f"{folder / 'study.db'}: holds no study of saltray's") from None


def count(study: optuna.Study) -> Counts:
    """Count the trials by what became of them."""
    states = [t.state for t in study.get_trials(deepcopy=False)]
    return Counts(
        states.count(TrialState.COMPLETE),
        states.count(TrialState.PRUNED),
        states.count(TrialState.FAIL),
        states.count(TrialState.WAITING) + states.count(TrialState.RUNNING),
    )


def score(trial: FrozenTrial) -> float:
    """Return a trial's best validation mAP so far; -1 where none is known."""
    return max(trial.intermediate_values.values(), default=-1.0)


def checkpoint_of(trial: FrozenTrial | optuna.Trial) -> str | None:
    """Return where a trial's newest checkpoint lies; None where there is none, or no longer."""
    path: str | None = trial.user_attrs.get("checkpoint")
    if path is None or "://" in path:
        return path
    return path if Path(path).is_dir() else None


def best_trial(study: optuna.Study) -> FrozenTrial:
    """Return the trial with the best checkpoint, whatever became of it.

    Raises:
        SearchError: no trial has one.
    """
    usable = [t for t in study.trials if t.intermediate_values and checkpoint_of(t)]
    if not usable:
        reasons = {t.user_attrs["reason"] for t in study.trials if "reason" in t.user_attrs}
        raise SearchError(f"no trial reached the end of an epoch. {'; '.join(sorted(reasons))}".rstrip())
    return max(usable, key=score)


def requeue(storage: RDBStorage, study: optuna.Study) -> None:
    """Let trials that were cut off wait for the next session, with their parameters and checkpoint."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


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
