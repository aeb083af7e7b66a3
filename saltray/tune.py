"""`python -m saltray.tune`: search, then predict with the best model that was found."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from saltray.cli import bundled_space, located, parse_duration, prepare_to_join, run_program
from saltray.config import UserError

# Heavy imports wait until they are needed, so that --help answers at once.
if TYPE_CHECKING:
    import optuna
    import ray.data
    from rich.console import Console

    from saltray import run
    from saltray import space as spaces
    from saltray.plan import Plan

DEMO = {"trials": 6, "epochs": 8}
DEFAULTS = {"trials": 20, "epochs": 50}
FOLDS = 5  # fold 0 validates: an 80/20 split


def main(
    data: Annotated[
        str | None, typer.Option(help="The contest's folder, a path or URI. Without it: synthetic tiles.")
    ] = None,
    space: Annotated[Path | None, typer.Option(help="Python file of the search space; it is run.")] = None,
    trials: Annotated[int | None, typer.Option(help="Trials to bring to an end. Default: 20.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of a full trial. Default: 50.")] = None,
    time_budget: Annotated[str | None, typer.Option(help="When to stop searching: 90s, 30m, 1h30m.")] = None,
    out: Annotated[Path | None, typer.Option(help="The new run's folder. Default: runs/SPACE-TIME.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run; trials, budget and resources may change.")
    ] = None,
    workers_per_trial: Annotated[
        int | None, typer.Option(help="Data-parallel workers of a trial. Default: 1.")
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(help="GPUs of each worker: 0, 0.25, 0.5, 1 ... Default: 1 where there are any."),
    ] = None,
    cpus_per_trial: Annotated[
        float | None, typer.Option(help="CPUs of each worker. Default: computed.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster to join: auto, or its address.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the split, the sampler and every trial. Default: 0.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad tiles out.")] = False,
) -> None:
    """Search for the best salt-segmentation model, and write the submission with it.

    Without any argument: a demonstration on synthetic tiles, in less than five minutes on two CPU cores.
    """
    prepare_to_join(address)
    from saltray import run

    budget = parse_duration(time_budget)
    if resume is not None:
        fixed = {"data": data, "space": space, "out": out, "epochs": epochs, "seed": seed}
        given = [name for name, value in {**fixed, "skip-bad": skip_bad or None}.items() if value is not None]
        if given:
            raise UserError(f"--{given[0]}: a resumed run keeps its own; leave it out")
        asked: dict[str, Any] = {
            "trials": trials,
            "workers_per_trial": workers_per_trial,
            "cpus_per_trial": cpus_per_trial,
            "gpus_per_trial": gpus_per_trial,
        }
        changes = {k: v for k, v in asked.items() if v is not None} | {"time_budget": budget}
        settings = run.read_settings(resume).model_copy(update=changes)
        run_session(resume.resolve(), settings, address, resumed=True)
        return
    standard = DEFAULTS if data else DEMO
    space = space or bundled_space("unet" if data else "demo")
    folder = (out or Path("runs") / f"{space.stem}-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    settings = run.Settings(
        data=located(data) if data else str(folder / "demo" / "data"),
        space=str(space.resolve()),
        trials=standard["trials"] if trials is None else trials,
        epochs=standard["epochs"] if epochs is None else epochs,
        seed=0 if seed is None else seed,
        time_budget=budget,
        workers_per_trial=1 if workers_per_trial is None else workers_per_trial,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        skip_bad=skip_bad,
    )
    run_session(folder, settings, address, resumed=False)


class Data(NamedTuple):
    """The decoded tiles, the submission's ids in their order, and a hash of the labels and the split."""

    training: ray.data.Dataset
    validation: ray.data.Dataset
    test: ray.data.Dataset
    ids: list[str]
    fingerprint: str


def run_session(folder: Path, settings: run.Settings, address: str | None, *, resumed: bool) -> None:
    """Check everything, search, predict, tell. Nothing is written before all is checked."""
    from rich.console import Console

    from saltray import run
    from saltray import space as spaces
    from saltray.plan import plan
    from saltray.study import best_trial

    console = Console(file=sys.stdout, highlight=False)
    if settings.trials < 1 or settings.epochs < 1:
        raise UserError(f"--trials {settings.trials} --epochs {settings.epochs}: at least 1 of each")
    space = spaces.load(folder / "space.py" if resumed else Path(settings.space))
    with run.quiet(None):
        spaces.check(space, epochs=settings.epochs, seed=settings.seed, workers=settings.workers_per_trial)
    if not resumed:
        run.refuse_taken(folder)
    with console.status("starting Ray"), run.quiet(None):
        dashboard = run.connect(address)
    try:
        chosen = plan(
            run.nodes(),
            trials=settings.trials,
            workers=settings.workers_per_trial,
            cpus=settings.cpus_per_trial,
            gpus=settings.gpus_per_trial,
        )
        if not resumed and settings.data == str(folder / "demo" / "data"):
            _make_demo(folder / "demo", settings.seed, console)
        with console.status("reading and checking the tiles"), run.quiet(None):
            data, left_out = _read(settings)
        if not resumed:
            run.create(folder, Path(settings.space))
        with run.locked(folder):
            run.write_settings(folder, settings, data.fingerprint)
            _tell_start(console, data, left_out, settings, chosen, dashboard)
            study = _search(folder, settings, space, chosen, data, console)
            with console.status("predicting"), run.quiet(folder / "logs" / "predict.log"):
                best = best_trial(study)
                facts = _predict(folder, best, data)
        _tell_end(console, folder, settings, study, best, facts)
    finally:
        run.disconnect()


def _make_demo(folder: Path, seed: int, console: Console) -> None:
    from saltray import demo

    console.print("No --data: making synthetic seismic tiles.")
    demo.write(folder, train=400, test=200, seed=seed)


def _read(settings: run.Settings) -> tuple[Data, dict[str, str]]:
    """Read, decode and check all tiles; return them and what was left out."""
    from saltray import dataset

    folder = dataset.open_folder(settings.data)
    train, test = dataset.read_train(folder), dataset.read_test(folder)
    fold = dataset.stratified_folds(train.rows["coverage"], FOLDS, settings.seed)
    parts, problems = [], train.problems | test.problems
    for table in (train.where(fold != 0), train.where(fold == 0), test):
        tiles, bad = dataset.decode(table)
        parts.append(tiles)
        problems |= bad
    if not settings.skip_bad:
        dataset.refuse(problems, settings.data)
    fingerprint = dataset.fingerprint(train, fold)
    return Data(parts[0], parts[1], parts[2], test.ids, fingerprint), problems


def _search(
    folder: Path,
    settings: run.Settings,
    space: spaces.Space,
    chosen: Plan,
    data: Data,
    console: Console,
) -> optuna.Study:
    from saltray import run, search
    from saltray.study import create_study
    from saltray.trial import Tiles
    from saltray.view import LiveView

    log = folder / "logs" / "search.log"
    with run.quiet(log):
        study = create_study(folder)
    view = LiveView(
        console, study, trials=settings.trials, epochs=settings.epochs, time_budget=settings.time_budget
    )
    with view, run.quiet(log):
        return search.run_search(
            space,
            Tiles.share(data.training, data.validation, chosen.resources.workers),
            chosen,
            folder,
            trials=settings.trials,
            epochs=settings.epochs,
            seed=settings.seed,
            time_budget=settings.time_budget,
            callbacks=[view],
        )


def _predict(folder: Path, best: optuna.trial.FrozenTrial, data: Data) -> dict[str, Any]:
    """Choose the threshold, write the best model and the submission; return what is known of it."""
    from saltray import inference, run, submission

    model = run.stage_best(folder, best.user_attrs["checkpoint"])
    threshold, scores = inference.calibrate(model, data.validation)
    facts = {"threshold": threshold, "validation_map": scores[f"{threshold:.2f}"], "scores": scores}
    run.add_metrics(model, {"trial": best.number} | facts)
    codes = inference.segment(model, data.test, threshold)
    run.publish_best(model)
    submission.write(folder / "submission.csv", data.ids, codes)
    return facts


def _tell_start(
    console: Console,
    data: Data,
    left_out: dict[str, str],
    settings: run.Settings,
    chosen: Plan,
    dashboard: str,
) -> None:
    if left_out:
        console.print(f"[yellow]{len(left_out)} bad tiles left out[/], such as {min(left_out)}")
    resources = chosen.resources
    gpus = f" and {resources.gpus:g} GPUs" if resources.gpus else ""
    console.print(
        f"[bold]{data.training.count()}[/] training, [bold]{data.validation.count()}[/] validation, "
        f"[bold]{data.test.count()}[/] test tiles.  [bold]{settings.trials}[/] trials of up to "
        f"[bold]{settings.epochs}[/] epochs, [bold]{chosen.concurrency}[/] side by side, "
        f"{resources.workers} x {resources.cpus:g} CPUs{gpus} each.",
        soft_wrap=True,
    )
    if dashboard:
        console.print(f"Ray's dashboard: {dashboard}")


def _tell_end(
    console: Console,
    folder: Path,
    settings: run.Settings,
    study: optuna.Study,
    best: optuna.trial.FrozenTrial,
    facts: dict[str, Any],
) -> None:
    from rich.markup import escape

    from saltray import submission
    from saltray.study import count, score
    from saltray.view import text

    counts = count(study)
    waiting = f", {counts.waiting} cut off" if counts.waiting else ""
    lines = {
        "best": f"[bold green]trial {best.number}[/]  {text(best.params)}",
        "validation mAP": f"[bold]{score(best):.4f}[/] at probability 0.50, "
        f"[bold]{facts['validation_map']:.4f}[/] at {facts['threshold']:.2f}, chosen on these tiles",
        "trials": f"{counts.complete} complete, {counts.pruned} stopped early, {counts.failed} failed"
        + waiting,
    }
    truth = folder / "demo" / "truth.csv"
    if truth.is_file():
        hidden = submission.score(folder / "submission.csv", truth)
        empty = submission.empty_score(truth)
        lines["hidden test mAP"] = f"[bold]{hidden:.4f}[/]; an all-empty submission {empty:.4f}"
    lines["submission"] = escape(str(folder / "submission.csv"))
    lines["model"] = escape(str(folder / "best"))
    lines["logs"] = escape(str(folder / "logs"))
    if counts.waiting:
        lines["go on"] = f"python -m saltray.tune --resume {shlex.quote(str(folder))}"
    lines["repeat"] = f"python -m saltray.tune {escape(_options(settings, folder / 'space.py'))}"
    for name, value in lines.items():
        # Soft-wrapped: paths and commands stay whole, to be copied.
        console.print(f"[dim]{name:<16}[/]{value}", soft_wrap=True)


def _options(settings: run.Settings, space: Path) -> str:
    """Return the options that start a run with these settings."""
    options = {"data": settings.data, "space": space, "trials": settings.trials, "epochs": settings.epochs}
    options |= {"seed": settings.seed}
    if settings.time_budget:
        options |= {"time-budget": f"{settings.time_budget:g}s"}
    if settings.workers_per_trial != 1:
        options |= {"workers-per-trial": settings.workers_per_trial}
    if settings.gpus_per_trial is not None:
        options |= {"gpus-per-trial": f"{settings.gpus_per_trial:g}"}
    if settings.cpus_per_trial:
        options |= {"cpus-per-trial": f"{settings.cpus_per_trial:g}"}
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items()]
    return " ".join(words + ["--skip-bad"] * settings.skip_bad)


if __name__ == "__main__":
    run_program(main)
