"""What `saltray.tune` refuses before any work."""

from pathlib import Path
from typing import Any

import pytest

from saltray import tune
from saltray.config import UserError


@pytest.mark.parametrize(
    "option",
    [
        {"out": "runs/other"},
        {"warm_start": "runs/other"},
        {"seed": 1},
        {"epochs": 9},
        {"objective": "map+speed"},
        {"split": "neighbours"},
    ],
    ids=lambda option: str(*option),
)
def test_a_resumed_run_keeps_what_its_scores_depend_on(option: dict[str, Any], tmp_path: Path) -> None:
    name = str(*option).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name}: a resumed run keeps its own"):
        tune.main(resume=str(tmp_path), **option)
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_is_of_a_new_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dry-run: shows the plan of a new run"):
        tune.main(resume=str(tmp_path), dry_run=True)


@pytest.mark.parametrize("option", ["out", "resume"])
def test_a_path_is_not_named_as_a_uri(option: str) -> None:
    with pytest.raises(UserError, match=rf"--{option} file:///tmp/run: .* by its path alone"):
        tune.main(**{option: "file:///tmp/run"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "words"),
    [("half", "--gpus-per-trial half: .*a valid number.*, or 'auto'"), ("-1", "-1: .*equal to 0, or 'auto'")],
)
def test_a_wrong_value_is_told_with_its_option(value: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tune.main(data="DIR", gpus_per_trial=value)


def test_synthetic_tiles_are_not_made_behind_a_uri() -> None:
    with pytest.raises(UserError, match=r"--out s3://bucket/run: .* name --data"):
        tune.main(out="s3://bucket/run")
