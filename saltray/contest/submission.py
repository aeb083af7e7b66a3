"""The contest's submission file: written, read and scored."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from saltray.config import UserError, counted
from saltray.contest import csvfile, metrics, rle


class SubmissionError(UserError):
    """The file is no submission, or does not fit the truth."""


def write(path: Path, ids: list[str], codes: dict[str, str]) -> None:
    """Write a submission with the given ids in their order; an id without a code gets an empty mask."""
    table = pd.DataFrame({"id": ids, "rle_mask": [codes.get(i, "") for i in ids]})
    temporary = path.with_name(path.name + ".tmp")
    table.to_csv(temporary, index=False, lineterminator="\n")
    temporary.replace(path)


def read(path: Path) -> pd.Series:
    """Read a submission, or the truth in the same form: run-length codes by id.

    Raises:
        SubmissionError: the file or a column is missing, or an id stands twice.
    """
    if not path.is_file():
        raise SubmissionError(f"{path}: no such file")
    table = csvfile.read(path, str(path), ["id", "rle_mask"], SubmissionError)
    return table.set_index("id")["rle_mask"]


def score(submission: Path, truth: Path) -> float:
    """Return the contest's score of a submission, in [0, 1].

    Raises:
        SubmissionError: the ids differ, or a run-length code is malformed.
    """
    predicted, true = read(submission), read(truth)
    for these, others, name in ((true, predicted, submission), (predicted, true, truth)):
        absent = these.index.difference(others.index)
        if len(absent):
            raise SubmissionError(f"{name}: {counted(len(absent), 'id')} absent, such as {absent[0]}")
    if not len(true):
        raise SubmissionError(f"{truth}: holds no tile")
    if len(true) > 1 and len(set(true)) == 1 and true.iloc[0]:
        raise SubmissionError(
            f"{truth}: every mask is {true.iloc[0]!r}: not the truth, but placeholders as in "
            "sample_submission.csv"
        )
    masks = [
        _decode_all(codes.loc[true.index], path) for codes, path in ((predicted, submission), (true, truth))
    ]
    return metrics.mean_precision(*masks)


def empty_score(truth: Path) -> float:
    """Return the score of a submission of empty masks; a model near it has learnt nothing."""
    return float((read(truth) == "").mean())


def _decode_all(codes: pd.Series, path: Path) -> npt.NDArray[np.bool_]:
    masks = []
    for tile, code in codes.items():
        try:
            masks.append(rle.decode(code))
        except ValueError as error:
            raise SubmissionError(f"{path}: id {tile}: {error}") from None
    return np.stack(masks)
