from pathlib import Path

import numpy as np
import pytest

from saltray.config import TILE, UserError
from saltray.contest import metrics, rle, submission
from saltray.contest.submission import SubmissionError

TGS = Path(__file__).parents[3] / "shared" / "tgs"
HEADER = "id,rle_mask\n"


def file_of(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_written_in_the_given_order_with_empty_masks_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    submission.write(path, ["c", "a", "b"], {"a": "1 2 5 1", "c": "7 1"})
    assert path.read_bytes() == b"id,rle_mask\nc,7 1\na,1 2 5 1\nb,\n"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    # Ids that pandas would take for numbers or missing values.
    ids = ["0012", "1e5", "NA", "null", "True", "a1b2c3d4e5", "x"]
    codes = {name: f"{i + 1} 1" for i, name in enumerate(ids[:-1])}
    submission.write(tmp_path / "submission.csv", ids, codes)
    table = submission.read(tmp_path / "submission.csv")
    assert table.to_dict() == codes | {"x": ""}
    assert list(table.index) == ids


def test_ids_that_are_all_numbers_keep_their_zeros(tmp_path: Path) -> None:
    submission.write(tmp_path / "submission.csv", ["0012", "0100"], {})
    assert submission.read(tmp_path / "submission.csv").to_dict() == {"0012": "", "0100": ""}


def test_score_agrees_with_the_metric_whatever_the_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [f"t{i}" for i in range(12)]
    truth = np.zeros((12, TILE, TILE), bool)
    predicted = truth.copy()
    for i in range(2, 12):  # each tile's mask lies elsewhere
        truth[i, 30:, 8 * i : 8 * i + 8] = True
        predicted[i, 30 + rng.integers(0, 40) :, 8 * i : 8 * i + 8] = True
    submission.write(tmp_path / "truth.csv", ids, dict(zip(ids, map(rle.encode, truth), strict=True)))
    codes = dict(zip(ids, map(rle.encode, predicted), strict=True))
    submission.write(tmp_path / "submission.csv", ids[::-1], codes)
    score = submission.score(tmp_path / "submission.csv", tmp_path / "truth.csv")
    assert 0.3 < score < 0.9
    assert score == pytest.approx(metrics.mean_precision(predicted, truth))


def test_score_by_hand(tmp_path: Path) -> None:
    truth = file_of(tmp_path, "truth.csv", HEADER + "a,1 10\nb,\nc,\nd,5 5\n")
    # IoU 0.6 exactly passes 0.50 and 0.55 alone; both empty 1; one alone empty 0; equal 1.
    predicted = file_of(tmp_path, "submission.csv", HEADER + "a,1 6\nb,\nc,9 1\nd,5 5\n")
    assert submission.score(predicted, truth) == pytest.approx((0.2 + 1 + 0 + 1) / 4)
    assert submission.score(truth, truth) == 1


def test_extra_columns_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = file_of(tmp_path, "truth.csv", "\ufeffz,rle_mask,id\n7,1 1,a\n")
    assert submission.read(path).to_dict() == {"a": "1 1"}


def test_spaces_around_names_and_values_do_no_harm(tmp_path: Path) -> None:
    path = file_of(tmp_path, "truth.csv", 'id , rle_mask\n a, 1 5 8 2 \nb ,\nc, "9  1"\n')
    assert submission.read(path).to_dict() == {"a": "1 5 8 2", "b": "", "c": "9  1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a CSV file"),
        ("\n\n", "not a CSV file"),
        (HEADER + "a,1 1\nb,1 1,2 1\n", "not a CSV file"),
        (HEADER + 'a,"1 1\n', "not a CSV file"),
        (HEADER + "a,1 1,\nb,1 1,\n", "its rows have more fields than its header, or end in a comma"),
        ("id,rle_mask,id \na,1 1,b\n", "column 'id' stands twice"),
        ("id,mask\na,1 1\n", "no column 'rle_mask'; it has id, mask"),
        ("name,rle_mask\na,1 1\n", "no column 'id'; it has name, rle_mask"),
        (HEADER + "a,1 1\nb,\na,\n", "these ids stand twice: a"),
    ],
)
def test_a_file_that_is_no_submission_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = file_of(tmp_path, "submission.csv", text)
    with pytest.raises(SubmissionError) as error:
        submission.read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert isinstance(error.value, UserError)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match=r"submission\.csv: no such file"):
        submission.read(tmp_path / "submission.csv")
    with pytest.raises(SubmissionError, match="no such file"):
        submission.read(tmp_path)
    (tmp_path / "submission.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(SubmissionError, match="not a CSV file"):
        submission.read(tmp_path / "submission.csv")


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ("a,\n", "a,\nb,\nc,\n", "submission.csv: 2 ids absent, such as b"),
        ("a,\nb,\n", "a,\n", "truth.csv: 1 id absent, such as b"),
        ("", "", "truth.csv: holds no tile"),
        ("a,\nb,\n", "a,1 1\nb,1 1\n", "truth.csv: every mask is '1 1': not the truth, but placeholders"),
        ("a,1 2 3\n", "a,\n", "submission.csv: id a: malformed run-length code '1 2 3'"),
        ("a,\nb,10201 2\n", "a,\nb,\n", "submission.csv: id b: run '10201 2' lies outside"),
        ("a,\n", "a,5 1 1 1\n", "truth.csv: id a: run '1 1' overlaps"),
    ],
)
def test_what_cannot_be_scored_is_refused(tmp_path: Path, predicted: str, true: str, message: str) -> None:
    files = (
        file_of(tmp_path, "submission.csv", HEADER + predicted),
        file_of(tmp_path, "truth.csv", HEADER + true),
    )
    with pytest.raises(SubmissionError) as error:
        submission.score(*files)
    assert message in str(error.value)


def test_score_of_empty_masks(tmp_path: Path) -> None:
    truth = file_of(tmp_path, "truth.csv", HEADER + "a,1 1\nb,\nc,3 3\nd,4 4\n")
    empty = file_of(tmp_path, "submission.csv", HEADER + "a,\nb,\nc,\nd,\n")
    assert submission.empty_score(truth) == 0.25 == submission.score(empty, truth)


def test_score_of_empty_masks_on_the_real_set(tmp_path: Path) -> None:
    truth = TGS / "train.csv"
    if not truth.is_file():
        pytest.skip("the contest's tiles are not here")
    share = submission.empty_score(truth)
    assert share == pytest.approx(1562 / 4000, abs=0.005)
    submission.write(tmp_path / "empty.csv", list(submission.read(truth).index), {})
    assert submission.score(tmp_path / "empty.csv", truth) == pytest.approx(share)
