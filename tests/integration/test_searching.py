"""The search over a local Ray; where training does not matter, a trainable that only reports."""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from optuna.trial import TrialState
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune import TuneError
from ray.tune.schedulers import FIFOScheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from saltray import demo
from saltray.config import SearchConfig, UserError
from saltray.data import dataset, splitting, stream
from saltray.local_ray import SETTINGS
from saltray.prediction import bundle
from saltray.records import storage
from saltray.records.study import Counts, Place, best_trial, count, create_study, epochs_of, load_study, score
from saltray.search import limits, search
from saltray.search.plan import Plan
from saltray.search.searcher import SearchError
from saltray.search.space import Space
from saltray.sessions import tracking
from saltray.training import checkpoint, loop
from saltray.training.trial import Tiles, WorkerResources, run_trial

pytestmark = pytest.mark.usefixtures("local_ray")

ONE = Plan(1, WorkerResources(1, 1, 0))
TWO = Plan(2, WorkerResources(1, 1, 0))
NOTHING: Any = None


def draw(trial: Any) -> dict[str, Any]:
    return {
        "model": {"filters": trial.suggest_int("filters", 1, 3), "levels": 1, "dropout": 0.0},
        "optim": {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
        "batch_size": 8,
    }


SPACE = Space(draw, [{"filters": 2, "learning_rate": 1e-2}], Path("space.py"))


@pytest.fixture(scope="module")
def tiles(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    data = demo.write(tmp_path_factory.mktemp("tiles"), demo.files(train=40, test=4, seed=3))
    table = dataset.read_train(dataset.open_folder(str(data)))
    fold = splitting.stratified_folds(table.rows["coverage"], 4, 0)
    return Tiles.share(
        dataset.decode(table.where(fold != 0))[0], dataset.decode(table.where(fold == 0))[0], 1
    )


def run_search(folder: Path, tiles: Tiles, chosen: Plan = ONE, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    callbacks, trainable = options.pop("callbacks", []), options.pop("trainable", run_trial)
    config = SearchConfig(**{"trials": 3, "epochs": 2} | options)
    there = (folder / "study.db").exists()
    study = load_study(folder) if there else create_study(Place(folder))
    search.run_search(SPACE, tiles, chosen, str(folder / "trials"), study, config, callbacks, trainable)
    return study


class Interrupter(tune.Callback):
    """Ctrl-C when the trial of that number reports the epoch: it is killed in mid-training."""

    def __init__(self, epoch: int, number: int = 0) -> None:
        self.place = number, epoch

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
    ) -> None:
        if (trial.config["number"], result["epoch"]) == self.place:
            signal.raise_signal(signal.SIGINT)


class EndRaiser(tune.Callback):
    """Raises when a trial ends; counts what is reported."""

    def __init__(self, error: Exception) -> None:
        self.error, self.reports = error, 0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
    ) -> None:
        self.reports += 1

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        raise self.error


class Raiser(tune.Callback):
    """Raises when a trial reports its first epoch."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
    ) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (UserError("mend it"), TrialState.WAITING),
        # On a database server it runs elsewhere by now.
        (storage.Overtaken("host-2 has gone on"), TrialState.RUNNING),
    ],
)
def test_what_the_user_can_mend_ends_the_search_as_it_was_raised(
    tiles: Tiles, tmp_path: Path, error: UserError, left: TrialState
) -> None:
    with pytest.raises(UserError) as caught:
        run_search(tmp_path, tiles, trials=1, epochs=2, callbacks=[Raiser(error)])
    assert caught.value is error
    (trial,) = load_study(tmp_path).trials
    assert (trial.state, list(trial.intermediate_values)) == (left, [1])
    with pytest.raises(TuneError, match="ZeroDivisionError"):
        run_search(tmp_path, tiles, trials=1, epochs=2, callbacks=[Raiser(ZeroDivisionError())])
    on_interrupt = signal.getsignal(signal.SIGINT)
    assert count(run_search(tmp_path, tiles, trials=1, epochs=2)).complete == 1
    # Tune takes it for the trial's failure, and would train it once more.
    at_end = EndRaiser(error)
    with pytest.raises(UserError) as caught:
        run_search(tmp_path, tiles, trials=3, epochs=1, callbacks=[at_end])
    assert (caught.value, at_end.reports) == (error, 1)
    assert signal.getsignal(signal.SIGINT) == on_interrupt  # Tune has its own, and leaves it
    assert not leaked_groups()


def test_trials_that_crash_one_after_the_other_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(spec: dict[str, Any], **_: Any) -> None:
        raise ValueError("no such driver")

    monkeypatch.setattr(search, "RETRIES", 0)
    monkeypatch.setattr(search, "CRASHES", 2)
    with pytest.raises(SearchError, match=r"2 trials in a row crashed.*no such driver.*--resume"):
        run_search(tmp_path, NOTHING, trials=9, trainable=fake)
    assert count(load_study(tmp_path)) == Counts(0, 0, 1, 1)


def reported_epochs(study: Any) -> list[list[int]]:
    return [sorted(t.intermediate_values) for t in study.trials]


def leaked_groups() -> list[Any]:
    table = ray.util.placement_group_table()
    return [g for g in table.values() if g["state"] != "REMOVED"]


def wait_for(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return bool(condition())


def test_a_search_is_repeatable_and_its_best_checkpoint_rebuilds_the_model(
    tiles: Tiles, tmp_path: Path
) -> None:
    studies = []
    for name in ("first", "again"):
        studies.append(run_search(tmp_path / name, tiles))
    values = [[(t.params, t.intermediate_values) for t in study.trials] for study in studies]
    assert values[0] == values[1]
    assert studies[0].trials[0].params == SPACE.first[0]
    assert count(studies[0]) == Counts(3, 0, 0, 0)
    best = best_trial(studies[0])
    folder = bundle.stage(tmp_path / "first", best.user_attrs["checkpoint"])
    assert checkpoint.load_metrics(folder)["best_map"] == score(best)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metrics.json", "weights.safetensors"]
    checkpoint.load_model(folder)


def test_a_finished_search_is_extended_and_repeats_nothing(tiles: Tiles, tmp_path: Path) -> None:
    before = run_search(tmp_path, tiles, trials=2, epochs=1).trials
    after = run_search(tmp_path, tiles, trials=4, epochs=1)
    assert [t.datetime_start for t in after.trials[:2]] == [t.datetime_start for t in before]
    assert count(after).complete == 4
    assert len(run_search(tmp_path, tiles, trials=4, epochs=1).trials) == 4


def test_ended_trials_keep_their_weights_alone_and_tensorboard_shows_all(
    tiles: Tiles, tmp_path: Path
) -> None:
    study = create_study(Place(tmp_path))
    with tracking.TensorBoard(tmp_path / "tensorboard", study) as board:
        run_search(tmp_path, tiles, trials=2, epochs=4, callbacks=[board, Interrupter(3, number=1)])
    kept = sorted(p.name for p in (tmp_path / "trials").glob("session-01/0001/checkpoint_*/training.pt"))
    assert kept, "a trial that was cut off must be able to go on"
    with tracking.TensorBoard(tmp_path / "tensorboard", study) as board:
        run_search(tmp_path, tiles, trials=2, epochs=4, callbacks=[board])
    assert count(study) == Counts(2, 0, 0, 0)
    named = {Path(t.user_attrs["checkpoint"]) for t in study.trials}
    assert set((tmp_path / "trials").glob("session-*/*/checkpoint_*")) == named
    assert not list((tmp_path / "trials").rglob("training.pt"))
    assert not list((tmp_path / "trials").rglob("events.*"))  # Tune's own logger stays away
    shown = EventAccumulator(str(tmp_path / "tensorboard" / "0001")).Reload()
    values = {e.step: e.value for e in shown.Scalars("best_map")}
    assert values == pytest.approx(study.trials[1].intermediate_values)
    improved = [e.step for e in shown.Scalars("map") if e.value == values[e.step]]
    assert [image.step for image in shown.Images("samples")] == improved


def test_a_killed_trial_goes_on_from_its_last_epoch(tiles: Tiles, tmp_path: Path) -> None:
    class Killer(tune.Callback):
        killed: list[int] = []  # noqa: RUF012

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
        ) -> None:
            if result["epoch"] == 2 and not self.killed:
                self.killed.append(result["pid"])
                os.kill(result["pid"], signal.SIGKILL)

    killer = Killer()
    study = run_search(tmp_path / "killed", tiles, trials=1, epochs=4, callbacks=[killer])
    assert killer.killed
    whole = run_search(tmp_path / "whole", tiles, trials=1, epochs=4)
    assert study.trials[0].intermediate_values == whole.trials[0].intermediate_values
    assert study.trials[0].state == TrialState.COMPLETE


def test_failures_end_their_trial_and_no_other(tmp_path: Path) -> None:
    def fake(spec: dict[str, Any], **_: Any) -> None:
        if spec["number"] == 1:
            raise OSError("the disk is full")
        if spec["number"] == 2:
            tune.report({"epoch": 1, "best_map": 0.0, "finished": True, "failed": "the loss is nan"})
            return
        for epoch in (1, 2):
            tune.report({"epoch": epoch, "best_map": 0.5, "finished": epoch == 2})

    study = run_search(tmp_path, NOTHING, TWO, trials=5, trainable=fake)
    states = [t.state for t in study.trials]
    assert states.count(TrialState.COMPLETE) == 3
    assert (states[1], states[2]) == (TrialState.FAIL, TrialState.FAIL)
    assert "OSError: the disk is full" in study.trials[1].user_attrs["reason"]
    assert study.trials[2].user_attrs["reason"] == "the loss is nan"


def test_trials_have_no_environment_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray shares processes only between tasks of one environment. The driver of a cluster's job has this set.
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    monkeypatch.setenv(name, SETTINGS[name])

    def fake(spec: dict[str, Any], **_: Any) -> None:
        own = ray.get_runtime_context().runtime_env
        failed = {"failed": f"environment: {dict(own)}"} if own else {}
        tune.report({"epoch": 1, "best_map": 0.0, "finished": True, **failed})

    (trial,) = run_search(tmp_path, NOTHING, trials=1, epochs=1, trainable=fake).trials
    assert trial.state == TrialState.COMPLETE, trial.user_attrs


def test_short_trials_take_turns_in_as_many_processes_as_run_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    add = RayActorManager.add_actor

    def counted(*args: Any, **kwargs: Any) -> Any:
        started.append(args)
        return add(*args, **kwargs)

    monkeypatch.setattr(RayActorManager, "add_actor", counted)
    study = run_search(tmp_path, NOTHING, TWO, trials=12, epochs=1, trainable=one_epoch)
    assert count(study).complete == 12
    assert len(started) == TWO.concurrency


def test_stopped_early_is_pruned_with_its_values(tmp_path: Path) -> None:
    def fake(spec: dict[str, Any], **_: Any) -> None:
        for epoch in range(1, 10):
            tune.report({"epoch": epoch, "best_map": 0.9 - 0.1 * spec["number"], "finished": epoch == 9})

    study = run_search(tmp_path, NOTHING, trials=4, epochs=9, trainable=fake)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] + 3 * [TrialState.PRUNED]
    assert reported_epochs(study) == [list(range(1, 10))] + 3 * [[1, 2, 3]]


def test_time_budget_cuts_trials_off_and_they_go_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pausing(seconds: float) -> Any:
        def fake(spec: dict[str, Any], **_: Any) -> None:
            for epoch in range(1, 5):
                tune.report({"epoch": epoch, "best_map": 0.5, "finished": epoch == 4})
                time.sleep(seconds if epoch == 2 else 0)

        return fake

    class Clock(tune.Callback):
        """Lets the budget's time be over when both trials pause."""

        def __init__(self) -> None:
            self.there: set[int] = set()

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
        ) -> None:
            if result["epoch"] == 2:
                self.there.add(trial.config["number"])

        def monotonic(self) -> float:
            return time.monotonic() + 10_000 * (len(self.there) == 2)

    clock = Clock()
    monkeypatch.setattr(limits, "time", clock)
    study = run_search(
        tmp_path, NOTHING, TWO, trials=2, epochs=4, time_budget=1000, callbacks=[clock], trainable=pausing(8)
    )
    assert count(study).waiting == 2
    assert reported_epochs(study) == 2 * [[1, 2]]
    study = run_search(tmp_path, NOTHING, TWO, trials=2, epochs=4, trainable=pausing(0))
    assert count(study) == Counts(2, 0, 0, 0)
    assert reported_epochs(study) == 2 * [[1, 2, 3, 4]]


def one_epoch(spec: dict[str, Any], **_: Any) -> None:
    tune.report({"epoch": 1, "best_map": 0.5, "finished": True})


def test_all_first_trials_are_tried_though_a_session_was_cut_off_among_them(tmp_path: Path) -> None:
    first = [{"filters": n, "learning_rate": 1e-2} for n in (1, 2, 3)]
    study = create_study(Place(tmp_path))
    study.enqueue_trial(first[0])
    space, config = Space(draw, first, Path("space.py")), SearchConfig(trials=3, epochs=1)
    for _ in range(2):  # the second time all is done
        search.run_search(space, NOTHING, ONE, str(tmp_path / "trials"), study, config, [], one_epoch)
        assert [t.params for t in study.trials] == first


def test_patience_begins_no_more_trials_and_says_so(tmp_path: Path) -> None:
    study, config = create_study(Place(tmp_path)), SearchConfig(trials=20, epochs=1, patience=2)
    reached = search.run_search(SPACE, NOTHING, ONE, str(tmp_path / "trials"), study, config, [], one_epoch)
    assert reached == "no better score in the last 2 trials"
    assert count(study) == Counts(3, 0, 0, 0)


def test_a_full_disk_ends_the_search_and_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(spec: dict[str, Any], **_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.safetensors")

    monkeypatch.setattr(search, "RETRIES", 0)
    with pytest.raises(SearchError, match=r"No space left on device.*weights.*--resume"):
        run_search(tmp_path, NOTHING, trials=9, trainable=fake)
    assert count(load_study(tmp_path)) == Counts(0, 0, 0, 1)


def test_a_damaged_checkpoint_costs_one_epoch(tiles: Tiles, tmp_path: Path) -> None:
    study = run_search(tmp_path, tiles, trials=1, epochs=1000, callbacks=[Interrupter(4)])
    trial = study.trials[0]
    newest = Path(trial.user_attrs["checkpoint"])
    assert newest != Path(trial.user_attrs["checkpoint_before"])
    last = len(checkpoint.load_metrics(newest)["history"])
    file = newest / checkpoint.TRAINING
    file.write_bytes(file.read_bytes()[:1000])
    study = run_search(tmp_path, tiles, trials=1, epochs=1000, callbacks=[Interrupter(last + 1)])
    epochs = [row["epoch"] for row in epochs_of(study.trials[0])]
    again = epochs.index(last, epochs.index(last) + 1)
    assert epochs[again:][:2] == [last, last + 1]
    assert epochs[:again] == list(range(1, again + 1))


def test_two_workers_agree_with_one_and_leave_nothing_behind(tiles: Tiles, tmp_path: Path) -> None:
    two = Tiles.share(*tiles.shares[1][0], 2)
    whole = tiles.shares[1][0].validation
    assert sum(share.validation.count() for share in two.shares[2]) == whole.count()
    study = run_search(tmp_path, two, Plan(1, WorkerResources(2, 1, 0)), trials=1, epochs=2)
    best = best_trial(study)
    assert count(study).complete == 1
    folder = bundle.stage(tmp_path, best.user_attrs["checkpoint"])
    import torch

    alone = loop.evaluate(
        checkpoint.load_model(folder),
        stream.plain_stream(whole, batch_size=4),
        torch.device("cpu"),
        None,
    )
    assert alone[0] == pytest.approx(score(best), abs=1e-9)
    assert wait_for(lambda: not leaked_groups(), 30)


def test_elastic_workers_are_as_many_as_there_is_room_for(tiles: Tiles, tmp_path: Path) -> None:
    resources = WorkerResources(4, 1, 0).for_refits()
    four = Tiles.share(*tiles.shares[1][0], 4, elastic=True)
    study = run_search(tmp_path, four, Plan(1, resources), trials=1, epochs=2)
    assert count(study).complete == 1
    assert [row["workers"] for row in epochs_of(study.trials[0])] == [2, 2]
    assert wait_for(lambda: not leaked_groups(), 30)


class StopsAll(FIFOScheduler):
    """Stops every trial early, at its second epoch."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.STOP if result["epoch"] == 2 else self.CONTINUE


def test_two_workers_stopped_early_make_room_for_the_next(
    tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Tiles.share(*tiles.shares[1][0], 2)
    chosen = Plan(1, WorkerResources(2, 1, 0))
    monkeypatch.setattr(search, "make_scheduler", lambda *_: StopsAll())  # type: ignore[no-untyped-call]
    # The budget only ends a search that hangs.
    study = run_search(tmp_path, two, chosen, trials=2, epochs=1000, time_budget=240)
    assert count(study) == Counts(0, 2, 0, 0)
    assert wait_for(lambda: not leaked_groups(), 60)


def test_two_workers_cut_off_leak_no_placement_group(tiles: Tiles, tmp_path: Path) -> None:
    two = Tiles.share(*tiles.shares[1][0], 2)
    chosen = Plan(1, WorkerResources(2, 1, 0))
    study = run_search(tmp_path, two, chosen, trials=1, epochs=1000, callbacks=[Interrupter(2)])
    assert count(study).waiting == 1
    assert 2 <= len(study.trials[0].intermediate_values) < 1000
    assert wait_for(lambda: not leaked_groups(), 60)


def test_configs_reach_the_trials_whole(tmp_path: Path) -> None:
    def fake(spec: dict[str, Any], **_: Any) -> None:
        tune.report({"epoch": 1, "best_map": spec["config"]["optim"]["learning_rate"], "finished": True})

    study = run_search(tmp_path, NOTHING, TWO, trials=4, epochs=1, trainable=fake)
    assert [t.value for t in study.trials] == [t.params["learning_rate"] for t in study.trials]
