"""One session of a search, from the checks at its start to the submission at its end."""

import contextlib
import time
import traceback
from pathlib import Path

import optuna
import pandas as pd
from rich.console import Console
from rich.markup import escape

from saltray import connection, demo, report
from saltray.data import dataset, neighbours, splitting
from saltray.data.folds import Data
from saltray.ensembles import candidates
from saltray.quiet import quiet
from saltray.records import run, shared_folder, storage
from saltray.records.settings import Settings
from saltray.records.study import (
    NoStudyError,
    Place,
    count,
    create_study,
    load_study,
    refuse_taken_name,
)
from saltray.search import gpus, packing, search
from saltray.search import space as spaces
from saltray.search.plan import Plan, PlanError, plan
from saltray.search.space import Space
from saltray.search.warmstart import adopt, is_adopted
from saltray.sessions import blend, outcome, summary, tracking
from saltray.sessions.view import LiveView, Terminal
from saltray.training.trial import Tiles

CHECKED = 20
"""Configurations drawn from a space, and their networks built, before a search begins."""

DEMO_TILES = 400
"""Synthetic labelled tiles of a run without data of its own."""


def start(
    home: storage.Home,
    settings: Settings,
    *,
    address: str | None,
    url: str | None = None,
) -> None:
    """Start a new run; nothing is written before all is checked.

    Args:
        home: the run's folder, which must not hold anything yet.
        settings: of the run.
        address: a Ray cluster to join; None for this machine.
        url: of the study's database server, password and all.
    """
    folder = home.folder
    space = spaces.load(Path(settings.space))
    _check(space, settings)
    run.refuse_taken(home)
    place = Place(folder, url, settings.study_name)
    refuse_taken_name(place)
    before = run.fetched(settings.warm_start) if settings.warm_start else None
    other = _load_other(before) if before else None
    console = Terminal()
    synthetic: list[tuple[str, bytes]] = []
    if settings.data == str(run.demo_data(folder)):
        console.print("No --data: making synthetic seismic tiles.")
        synthetic = list(demo.files(train=DEMO_TILES, test=200, seed=settings.seed))
    dashboard = _connect(console, address)
    try:
        summary.tell_busy(console)
        chosen = plan_for(console, settings, space)
        _probe(console, home)
        if synthetic:
            demo.write(run.demo_data(folder).parent, synthetic)
        data, left_out = _read(console, home, settings)
        run.create(folder, space.path)
        with run.locked(folder), storage.Mirror(home) as mirror:
            run.write_settings(folder, settings, data.fingerprint)
            mirror.push()  # from now on, another session that still has the run is told
            with quiet(folder / "logs" / "search.log"):
                study = create_study(place, settings.objective, space.path.read_text())
            summary.tell_start(console, data, left_out, settings, chosen, dashboard)
            if before is not None and other is not None:
                _adopt(console, study, other, space, settings, data, before)
            _search_and_predict(console, mirror, settings, space, chosen, data, study)
    finally:
        connection.disconnect()


def resume(home: storage.Home, settings: Settings, *, address: str | None, url: str | None = None) -> None:
    """Go on with a run; see `start`."""
    folder = home.folder
    space = spaces.load(folder / "space.py")
    place = Place(folder, url or settings.study, settings.study_name)
    study: optuna.Study | None = None
    try:
        with quiet(None):
            study = load_study(place)
        spaces.refuse_change(study.user_attrs.get("space", ""), space.path)
    except NoStudyError:
        if storage.names(home.trials):
            raise
        # The run was cut off before it made one.
    _check(space, settings)
    console = Terminal()
    if Path(settings.space).is_file() and Path(settings.space).read_text() != space.path.read_text():
        console.print(
            f"{escape(settings.space)} has changed since; this run keeps its own copy.", style="dim"
        )
    dashboard = _connect(console, address)
    try:
        summary.tell_busy(console)
        left = max(0, settings.trials - count(study).ended) if study else 0
        if settings.objective == "map+speed":
            left = settings.trials  # few that are left would get more CPUs each, and be faster for it
        # It may go on without a GPU, which then adds no GPU-hours.
        chosen = plan_for(console, settings.model_copy(update={"gpu_hours": None}), space, left or None)
        _probe(console, home)
        data, left_out = _read(console, home, settings)
        with run.locked(folder), storage.Mirror(home) as mirror:
            run.write_settings(folder, settings, data.fingerprint)
            mirror.push()  # from now on, another session that still has the run is told
            with quiet(folder / "logs" / "search.log"):
                study = study or create_study(place, settings.objective, space.path.read_text())
            summary.tell_start(console, data, left_out, settings, chosen, dashboard)
            if settings.warm_start and not is_adopted(study):  # the run was cut off before, or within it
                before = run.fetched(settings.warm_start)
                _adopt(console, study, _load_other(before), space, settings, data, before)
            _search_and_predict(console, mirror, settings, space, chosen, data, study)
    finally:
        connection.disconnect()


def _connect(console: Console, address: str | None) -> str:
    if tracking.lacks_mlflow():
        console.print(
            "MLFLOW_TRACKING_URI: nothing is logged there without pip install -e '.[mlflow]'", markup=False
        )
    with console.status("starting Ray"), quiet(None):
        tracking.mlflow_client()  # where it is asked for and cannot be reached, this is told now
        splitting.load()  # while Ray starts
        return connection.connect(address)


def _probe(console: Console, home: storage.Home) -> None:
    with console.status("trying the run's folder from every machine"), quiet(None):
        shared_folder.probe(home)


def _check(space: Space, settings: Settings) -> None:
    with quiet(None):
        spaces.sample(
            space, CHECKED, epochs=settings.epochs, seed=settings.seed, workers=settings.workers_per_trial
        )


def plan_for(console: Console, settings: Settings, space: Space, trials: int | None = None) -> Plan:
    """Plan for the cluster that was joined and so many trials, by default all.

    Raises:
        PlanError: not even one trial fits.
        GpuError: PyTorch cannot use a machine's GPUs.
        RunError: GPU-hours are asked for, and there is no GPU.
    """
    nodes = connection.nodes()
    share = settings.gpus_per_trial
    if share == "auto" and settings.workers_per_trial > 1:
        raise PlanError("--gpus-per-trial auto: only trials of one worker share a GPU; leave it out")
    if share != 0:
        with console.status("trying the GPUs, where there are any"), quiet(None):
            gpus.check()
    if share == "auto":
        with console.status("timing trials that share a GPU"), quiet(None):
            # The space's first configuration; without one, a sampled one.
            _, config = spaces.sample(space, 1, epochs=settings.epochs, seed=settings.seed, workers=1)[0]
            share = packing.gpu_share(config, nodes, settings.cpus_per_trial or 1.0)
    chosen = plan(
        nodes,
        trials=trials or settings.trials,
        workers=settings.workers_per_trial,
        cpus=settings.cpus_per_trial,
        gpus=share,
    )
    if settings.gpu_hours is not None and not chosen.resources.gpus:
        raise run.RunError(f"--gpu-hours {settings.gpu_hours:g}: trials have no GPU here; use --time-budget")
    return chosen


def _read(console: Console, home: storage.Home, settings: Settings) -> tuple[Data, dict[str, str]]:
    """Read, decode and check all tiles; return them and what was left out.

    What an ensemble with other runs on them cannot have is told here, before the search.
    """
    with console.status("reading and checking the tiles"), quiet(None):
        folder = dataset.open_folder(settings.data)
        train, test = dataset.read_train(folder), dataset.read_test(folder)
        coverage, groups = train.rows["coverage"], neighbours.read_groups(train, settings.split)
        fold = splitting.stratified_folds(coverage, splitting.FOLDS, settings.seed, groups)
        refold = None
        if settings.folds is not None:  # too few tiles for them are told before the search, not after it
            assigned = splitting.stratified_folds(coverage, settings.folds, settings.seed, groups)
            refold = pd.Series(assigned, index=train.rows["row"])
        parts, problems = [], train.problems | test.problems
        for table in (train.where(fold != 0), train.where(fold == 0), test):
            tiles, bad = dataset.decode(table, settings.skip_bad)
            parts.append(tiles)
            problems |= bad
        if not settings.skip_bad:
            dataset.refuse(problems, settings.data)
        # Such a machine has decoded blocks of tiles; single ones may well be links to nothing.
        dataset.refuse_unseen(problems, settings.data, few=dataset.TILES_PER_BLOCK // 2)
        if settings.blends and refold is None and parts[1].count() < 2:
            raise dataset.DataError(f"{settings.data}: too few tiles for an ensemble: one validation tile")
        fingerprint = dataset.fingerprint(train, fold, problems)
        candidates.of_runs(settings, home, fingerprint)
        return Data(parts[0], parts[1], parts[2], test.ids, fingerprint, refold), problems


def _load_other(folder: Path) -> optuna.Study:
    """Open the study of the run that a new one starts from."""
    settings = run.read_settings(folder)
    with quiet(None):
        return load_study(Place(folder, settings.study, settings.study_name))


def _adopt(
    console: Console,
    study: optuna.Study,
    other: optuna.Study,
    space: Space,
    settings: Settings,
    data: Data,
    folder: Path,
) -> None:
    """Take over another run's results, or its best parameters where the scores do not compare."""
    known, origin = run.read(folder), str(settings.warm_start)  # a URI's folder is a copy
    before = Settings.model_validate(known["settings"])
    differs = [
        name
        for name, same in {
            "tiles or split": known["tiles"] == data.fingerprint,
            "epochs": before.epochs == settings.epochs,
            "objective": before.objective == settings.objective,
        }.items()
        if not same
    ]
    with quiet(None):
        taken = adopt(study, other, space.draw, origin, compares=not differs)
    if not any(taken):
        told = f"nothing of {origin} can be used: no trial of it has a parameter of this space"
    elif differs:
        told = (
            f"{origin} had other {' and '.join(differs)}, so that its scores do not compare; "
            f"its {taken.proposed} best parameters are tried first"
        )
    else:
        told = f"{taken.results} results of {origin} taken over"
        if taken.proposed:
            told += f", and {taken.proposed} that were cut off are tried first"
    console.print(f"Warm start: {told}.", soft_wrap=True, markup=False)


def _search_and_predict(
    console: Console,
    mirror: storage.Mirror,
    settings: Settings,
    space: Space,
    chosen: Plan,
    data: Data,
    study: optuna.Study,
) -> None:
    mirror.push()  # the study, before Ray writes below trials/: with those and without it a run is refused
    folder, started = mirror.home.folder, time.monotonic()
    view = LiveView(
        console, study, trials=settings.trials, epochs=settings.epochs, time_budget=settings.time_budget
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(view)
        stack.enter_context(quiet(folder / "logs" / "search.log"))
        trackers = [stack.enter_context(tracker) for tracker in tracking.trackers(folder, study)]
        tiles = Tiles.share(data.training, data.validation, chosen.resources.workers)
        callbacks = [view, *trackers, tracking.Mirroring(mirror)]
        reached = search.run_search(space, tiles, chosen, mirror.home.trials, study, settings, callbacks)
    with console.status("predicting"), quiet(folder / "logs" / "predict.log"):
        # A submission that an ensemble has written stays until the next ensemble is there.
        submit = not (folder / storage.ENSEMBLE).exists()
        best, facts = outcome.publish_best(folder, study, data, submit=submit, gpus=settings.gpus)
        tracking.log_best(
            study, folder / storage.BEST, {k: facts[k] for k in ("threshold", "validation_map")}
        )
    problem: Exception | None = None
    if settings.blends:
        # The best model is on the disk by now; its report follows, whatever becomes of this.
        job = blend.Job(console, mirror, settings, study, data, chosen, started)
        try:
            facts["ensemble"] = blend.run_all(job)
        except Exception as error:
            problem = error
    with console.status("writing the report"), quiet(folder / "logs" / "report.log"):
        facts["report"] = _report(mirror.home, study)
    summary.tell_end(console, mirror.home, settings, study, best, facts, reached)
    if problem is not None:
        raise problem


def _report(home: storage.Home, study: optuna.Study) -> str:
    """Write the report and name its file, or tell what it failed at: the results stand without it."""
    try:
        return f"{home}/{report.write(home.folder, study).name}"
    except Exception as error:
        traceback.print_exc()
        return f"not written: {type(error).__name__}: {error}"
