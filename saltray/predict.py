"""`python -m saltray.predict`: write a submission with the ensemble of a run, or else its best model."""

import sys
from dataclasses import replace
from typing import Annotated

import typer

from saltray.cli import NewFile, located, prepare_ray, run_program
from saltray.config import UserError, counted


def main(
    model: Annotated[
        str, typer.Argument(help="A run's folder or URI, or a local folder such as its best/ or ensemble/.")
    ],
    data: Annotated[str, typer.Option(help="The contest's folder, a path or URI.")],
    out: Annotated[str, typer.Option(help="The submission to write, a path or URI.")],
    threshold: Annotated[
        float | None, typer.Option(help="On the probability of salt. Default: chosen on validation.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster to join.")] = None,
    gpus: Annotated[
        bool,
        typer.Option("--gpus/--no-gpus", help="Whether to use GPUs, where there are any."),
    ] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Give bad tiles empty masks.")] = False,
) -> None:
    """Segment a folder's test tiles with a run's ensemble or best model, and write the submission."""
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"--threshold {threshold}: must lie between 0 and 1")
    file = NewFile(out)
    prepare_ray(address)
    from saltray import connection
    from saltray.contest import submission
    from saltray.data import dataset
    from saltray.prediction import inference, members
    from saltray.quiet import quiet
    from saltray.records import run, storage
    from saltray.training import checkpoint

    place = run.fetched(located(model))
    folder = next((place / name for name in reversed(storage.BUNDLES) if (place / name).is_dir()), place)
    if not folder.is_dir():
        raise UserError(f"{model}: no such folder; a run's, or a bundle such as its best/, is meant")
    if folder == place and (place / "run.json").exists():
        raise UserError(f"{model}: no model in it yet. First: python -m saltray.tune --resume {model}")
    # All of them are loaded: a damaged one is told now.
    takes_depth = [checkpoint.load_model(member.folder).prepare.depth for member in members.read(folder)]
    chosen = inference.stored_postprocessing(folder)
    if threshold is not None:
        chosen = replace(chosen, threshold=threshold)
    contest = dataset.open_folder(located(data))
    if any(takes_depth) and not contest.exists(dataset.DEPTHS):
        missing = contest.path(dataset.DEPTHS)
        raise UserError(f"{missing}: no such file; {model} takes the depth of each tile (columns id, z)")
    table = dataset.read_test(contest, depth=any(takes_depth))
    with quiet(None):
        connection.connect(address)
        try:
            tiles, bad = dataset.decode(table, skip_bad)
            problems = table.problems | bad
            if not skip_bad:
                dataset.refuse(problems, data)
            codes = inference.segment(folder, tiles, chosen, gpus=gpus)
        finally:
            connection.disconnect()
    file.write(lambda path: submission.write(path, table.ids, codes))
    if problems:
        typer.echo(
            f"{counted(len(problems), 'bad tile')} got empty masks, such as {min(problems)}", file=sys.stderr
        )
    typer.echo(f"{len(codes)} tiles segmented at probability {chosen.threshold:.2f}: {file}")


if __name__ == "__main__":
    run_program(main)
