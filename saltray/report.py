"""`python -m saltray.report`: write the report of a search, one HTML file that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saltray.cli import NewFile, located, run_program
from saltray.config import UserError

if TYPE_CHECKING:
    import optuna

REPORT = "report.html"


def main(
    place: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI.")],
    out: Annotated[
        str | None,
        typer.Option(help="The file to write, a path or URI. Default: report.html in the run's folder."),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="The study's server, where it wants a password: postgresql://...")
    ] = None,
) -> None:
    """Write the report of a search: one HTML file that opens offline."""
    file = NewFile(out) if out else None
    from saltray.quiet import quiet
    from saltray.records import run, storage
    from saltray.reporting import findings, sections

    home = storage.home(located(place))
    folder = run.fetched(str(home))
    with quiet(None):
        page = sections.build(findings.read(folder, url=study))
    if file:
        file.write(page.write)
    else:
        try:
            page.write(folder / REPORT)
        except OSError as error:
            raise UserError(
                f"{folder / REPORT}: cannot be written: {error}. Name another place: --out"
            ) from None
        storage.send(home, REPORT)
    typer.echo(f"report: {file or f'{home}/{REPORT}'}")


def write(folder: Path, study: optuna.Study | None = None) -> Path:
    """Write a run's own `report.html`, in place of an earlier one, and return the file.

    Raises:
        UserError: the folder holds no run, one of a newer version, or a damaged file.
    """
    from saltray.reporting import findings, sections

    file = folder / REPORT
    sections.build(findings.read(folder, study=study)).write(file)
    return file


if __name__ == "__main__":
    run_program(main)
