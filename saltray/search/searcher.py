"""Optuna behind Ray Tune: what a search asks its study for, and tells it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from saltray.config import SearchConfig, UserError
from saltray.records.study import checkpoints_of, epochs_of
from saltray.records.trial_files import checkpoints_beside, openable
from saltray.search.engine import METRIC, make_sampler
from saltray.search.limits import Limits
from saltray.search.space import Space
from saltray.training.trial import WorkerResources

BAD_DRAWS = 20
"""How many draws in a row a space may fail at."""

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
        """Ask for the next trial's spec (`saltray.training.trial.run_trial`).

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
                "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
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
