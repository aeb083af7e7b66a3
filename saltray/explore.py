"""`python -m saltray.explore`: a report of the data, before any model is trained on it."""

from typing import Annotated

import typer

from saltray.cli import NewFile, located, run_program
from saltray.config import Split, counted


def main(
    data: Annotated[str, typer.Argument(metavar="DIR", help="The contest's folder, a path or URI.")],
    out: Annotated[str, typer.Option(help="The HTML file to write, a path or URI.")] = "explore.html",
    seed: Annotated[int, typer.Option(min=0, help="Of the split, as in the search.")] = 0,
    split: Annotated[Split, typer.Option(help="Kind of split, as in the search.")] = "coverage",
) -> None:
    """Write a report of the data: its salt, depths, odd tiles and split, as one HTML file."""
    file = NewFile(out)
    # Heavy imports wait until they are needed, so that --help answers at once.
    from saltray.data import survey
    from saltray.reporting import data_page

    uri = located(data)
    tiles = survey.read(uri, seed, split)
    page = data_page.build(tiles, uri, seed, split)
    file.write(page.write)
    if tiles.problems:
        number = counted(len(tiles.problems), "bad tile")
        typer.echo(f"{number} left out, such as {min(tiles.problems)}", err=True)
    typer.echo(f"{len(tiles.labelled)} labelled and {len(tiles.test)} test tiles: {file}")


if __name__ == "__main__":
    run_program(main)
