"""A CSV file of the contest's, as a table of checked text: one row an id."""

from pathlib import Path
from typing import IO

import pandas as pd

from saltray.config import UserError


def read(source: Path | IO[bytes], name: str, columns: list[str], refusal: type[UserError]) -> pd.DataFrame:
    """Read columns as text, without the spaces around names and values.

    Args:
        source: the file, or its open content.
        name: what messages call it.
        columns: which are wanted, `id` among them; others are left out.
        refusal: what to raise.

    Raises:
        UserError: of the kind `refusal`: it is no CSV file, a column is missing, or an id stands twice.
    """
    try:
        table = pd.read_csv(source, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise refusal(f"{name}: not a CSV file: {error}") from None
    table = table.rename(columns=str.strip)
    for column in columns:
        if column not in table.columns:
            raise refusal(f"{name}: no column '{column}'; it has {', '.join(table.columns)}")
    checked: pd.DataFrame = table[columns].apply(lambda values: values.str.strip(" "))
    twice = checked["id"][checked["id"].duplicated()].unique()
    if len(twice):
        raise refusal(f"{name}: these ids stand twice: {', '.join(twice)}")
    return checked
