"""A CSV file of the contest's, as a table of checked text: one row an id."""

import warnings
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
        UserError: of the kind `refusal`: no CSV file, a column missing or there twice, an id there twice.
    """
    try:
        with warnings.catch_warnings():
            # Of rows with more fields than the header, such as a comma at their end. Without `index_col`,
            # pandas would take their first field for an index, and each other one for its neighbour.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                source, dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False
            )
    except pd.errors.ParserWarning:
        raise refusal(f"{name}: its rows have more fields than its header, or end in a comma") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise refusal(f"{name}: not a CSV file: {error}") from None
    table = table.rename(columns=str.strip)
    for column in columns:
        if column not in table.columns:
            raise refusal(f"{name}: no column '{column}'; it has {', '.join(table.columns)}")
        if list(table.columns).count(column) > 1:
            raise refusal(f"{name}: column '{column}' stands twice")
    checked: pd.DataFrame = table[columns].apply(lambda values: values.str.strip(" "))
    twice = checked["id"][checked["id"].duplicated()].unique()
    if len(twice):
        raise refusal(f"{name}: these ids stand twice: {', '.join(twice)}")
    return checked
