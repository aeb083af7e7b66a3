"""`python -m saltray.tune`: search, then predict with the best model that was found."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from saltray.cli import bundled_space, located, parse_duration, prepare_ray, run_program
from saltray.config import DISK_FULL, Objective, Scheduler, Searcher, Split, UserError

# Heavy imports wait until they are needed, so that --help answers at once.
if TYPE_CHECKING:
    from saltray.records.settings import Settings

DEMO = {"trials": 6, "epochs": 8}

RUN, ENGINE, AFTER, BUDGET, MACHINES = "The run", "The engine", "After it", "The budget", "The machines"


def main(
    data: Annotated[
        str | None,
        typer.Option(
            help="The contest's folder, a path or URI. Without it: synthetic tiles.", rich_help_panel=RUN
        ),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(
            help="Python file of the search space; it is run. Default: search_spaces/laptop_scratch.py; "
            "demo.py without --data.",
            rich_help_panel=RUN,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="The new run's folder, a path or URI such as s3://. Default: runs/SPACE-TIME.",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with this run. Tiles, split, seed, epochs and objective are its own; searcher, "
            "scheduler, trials, budgets, resources, what follows the search, and where the tiles lie may "
            "change.",
            rich_help_panel=RUN,
        ),
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(help="Start from the results of this run; the spaces may differ.", rich_help_panel=RUN),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Keep the study in a server: postgresql://user@host/database. Default: SQLite in the run.",
            rich_help_panel=RUN,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the space and the plan, and stop.", rich_help_panel=RUN)
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad tiles out.", rich_help_panel=RUN)
    ] = False,
    split: Annotated[
        Split | None,
        typer.Option(
            help="neighbours keeps tiles together that lay side by side. Default: coverage.",
            rich_help_panel=RUN,
        ),
    ] = None,
    searcher: Annotated[
        Searcher | None, typer.Option(help="What proposes trials. Default: tpe.", rich_help_panel=ENGINE)
    ] = None,
    scheduler: Annotated[
        Scheduler | None,
        typer.Option(help="What stops trials early. Default: asha.", rich_help_panel=ENGINE),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="What to maximize; map+speed gives a Pareto front. Default: map.", rich_help_panel=ENGINE
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the split, the sampler and every trial. Default: 0.", rich_help_panel=ENGINE),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Trials to bring to an end. Default: 20; 6 without --data.", rich_help_panel=BUDGET
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of a full trial. Default: 50; 8 without --data.", rich_help_panel=BUDGET),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            help="When all trials are done, train the best configurations again on 2 to 10 folds.",
            rich_help_panel=AFTER,
        ),
    ] = None,
    ensemble: Annotated[
        int | None,
        typer.Option(
            help="Predict with an ensemble, chosen from this many of the best configurations.",
            rich_help_panel=AFTER,
        ),
    ] = None,
    ensemble_with: Annotated[
        list[str] | None,
        typer.Option(
            help="Let the ensemble take models of this run too: same tiles, split, seed and folds. May be "
            "given more than once; a resumed run's are replaced, by none where it is empty.",
            rich_help_panel=AFTER,
        ),
    ] = None,
    pseudo_labels: Annotated[
        bool | None,
        typer.Option(
            "--pseudo-labels/--no-pseudo-labels",
            help="With --folds: train again with the test tiles that the models are sure of.",
            rich_help_panel=AFTER,
        ),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(
            help="Time of this session, refits included: 90s, 30m, 1h30m. A resumed run does not keep it.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    gpu_hours: Annotated[
        float | None,
        typer.Option(help="GPU-hours of all trials and sessions together.", rich_help_panel=BUDGET),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Begin no new trial after this many in a row without a better score.", rich_help_panel=BUDGET
        ),
    ] = None,
    workers_per_trial: Annotated[
        int | None,
        typer.Option(help="Data-parallel workers of a trial. Default: 1.", rich_help_panel=MACHINES),
    ] = None,
    gpus_per_trial: Annotated[
        str | None,
        typer.Option(
            help="GPUs of each of a trial's workers: 0, 0.25, 0.5 or 1; auto measures how many trials "
            "share one best; under 0 CPUs train and predict. Default: 1 where there are any.",
            rich_help_panel=MACHINES,
        ),
    ] = None,
    cpus_per_trial: Annotated[
        float | None,
        typer.Option(help="CPUs of each of a trial's workers. Default: computed.", rich_help_panel=MACHINES),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster to join: auto, or its address.", rich_help_panel=MACHINES),
    ] = None,
) -> None:
    """Search for the best salt-segmentation model, and write the submission with it.

    Without any argument: a demonstration on synthetic tiles, in less than five minutes on two CPU cores.
    """
    prepare_ray(address)
    from saltray.records import run, storage
    from saltray.records.study import without_password
    from saltray.sessions import session

    free = {
        "searcher": searcher,
        "scheduler": scheduler,
        "trials": trials,
        "gpu_hours": gpu_hours,
        "patience": patience,
        "workers_per_trial": workers_per_trial,
        "gpus_per_trial": gpus_per_trial,
        "cpus_per_trial": cpus_per_trial,
        "folds": folds,
        "ensemble": ensemble,
        "ensemble_with": None
        if ensemble_with is None
        else [located(other) for other in ensemble_with if other],
        "pseudo_labels": pseudo_labels,
        "skip_bad": skip_bad or None,
    }
    fixed = {
        "epochs": epochs,
        "seed": seed,
        "objective": objective,
        "split": split,
    }
    space = space.expanduser() if space else None
    for option, given in (("--out", out), ("--resume", resume)):
        if given and given.startswith("file://"):
            raise UserError(f"{option} {given}: a folder on this machine is named by its path alone")
    budget = parse_duration(time_budget)
    server = without_password(study) if study else None
    if resume is not None:
        if dry_run:
            raise UserError("--dry-run: shows the plan of a new run; it does not go with --resume")
        _refuse_given({"out": out, "warm_start": warm_start} | fixed)
        home = storage.home(located(resume))
        run.fetch(home)
        own = run.demo_data(home.folder)  # a run that was moved has taken its synthetic tiles along
        moved = located(data) if data else str(own) if own.is_dir() else None
        settings = _resumed(home.folder, space, server, free | {"time_budget": budget, "data": moved})
        session.resume(home, settings, address=address, url=study)
        return
    if data is None:
        free = {**free, "trials": DEMO["trials"] if trials is None else trials}
        fixed = {**fixed, "epochs": DEMO["epochs"] if epochs is None else epochs}
    space = space or bundled_space("laptop_scratch" if data else "demo")
    home = storage.home(located(out) if out else f"runs/{space.stem}-{datetime.now():%Y%m%d-%H%M%S}")
    if home.uri and data is None:
        raise UserError(f"--out {out}: synthetic tiles are made in a local folder; name --data as well")
    folder = home.folder
    place = {"study": server, "study_name": folder.name if server else None, "time_budget": budget}
    where = {
        "data": located(data) if data else str(run.demo_data(folder)),
        "space": str(space.resolve()),
        "warm_start": located(warm_start) if warm_start else None,
    }
    settings = _settings({**where, **place, **free, **fixed})
    if dry_run:
        from saltray.sessions import preview

        preview.show(settings, address=address, synthetic=data is None)
        return
    session.start(home, settings, address=address, url=study)


def _settings(values: dict[str, Any]) -> Settings:
    """Make settings of the options that were given; raises UserError naming the option."""
    from saltray.records.settings import Settings

    try:
        return Settings.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        lines: dict[str, str] = {}
        for e in error.errors():
            message = e["msg"].removeprefix("Value error, ")
            option = f"--{str(e['loc'][0]).replace('_', '-')} {e['input']}: " if e["loc"] else ""
            # Of a union each member complains.
            known = lines.get(option)
            lines[option] = (
                f"{known}, or {message.removeprefix('Input should be ')}" if known else option + message
            )
        raise UserError("; ".join(lines.values())) from None


def _refuse_given(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')}: a resumed run keeps its own; leave it out")


def _resumed(folder: Path, space: Path | None, server: str | None, changes: dict[str, Any]) -> Settings:
    """Return a run's settings with this session's changes."""
    from saltray.records import run
    from saltray.search import space as spaces

    settings = run.read_settings(folder)
    if server is not None and server != settings.study:
        raise UserError(f"--study {server}: this run's study is in {settings.study or 'its own study.db'}")
    if space is not None:
        spaces.refuse_change((folder / "space.py").read_text(), space)
    changes = {k: v for k, v in changes.items() if v is not None or k == "time_budget"}
    return _settings(settings.model_dump() | changes)


if __name__ == "__main__":
    run_program(main, DISK_FULL)
