"""`python -m saltray.score`: the contest's score of a submission."""

from pathlib import Path
from typing import Annotated

import typer

from saltray.cli import local, run_program
from saltray.config import UserError


def main(
    submission: Annotated[str, typer.Argument(help="CSV with the columns id and rle_mask.")],
    truth: Annotated[str, typer.Argument(help="The true masks, in the same form.")],
) -> None:
    """Print the contest's score: mean precision over the IoU thresholds 0.50 to 0.95."""
    from saltray.contest import submission as files

    for place in (submission, truth):
        if Path(place).is_dir():
            raise UserError(
                f"{place}: a folder; a CSV is meant, such as a run's {place.rstrip('/')}/submission.csv"
            )
    typer.echo(f"{files.score(local(submission), local(truth)):.6f}")


if __name__ == "__main__":
    run_program(main)
