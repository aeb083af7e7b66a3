import subprocess
import sys
from pathlib import Path

import pytest

from saltray import score
from saltray.config import UserError

ROOT = Path(__file__).parents[2]


def test_the_command_prints_the_score_alone(tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_text("id,rle_mask\na,1 10\nb,\nc,\n")
    (tmp_path / "submission.csv").write_text("id,rle_mask\nc,5 1\nb,\na,1 6\n")
    command = [
        sys.executable,
        "-m",
        "saltray.score",
        str(tmp_path / "submission.csv"),
        str(tmp_path / "truth.csv"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.400000\n", "")


def test_a_runs_folder_is_not_its_submission(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: a folder; .*submission.csv"):
        score.main(str(tmp_path), str(tmp_path / "truth.csv"))
