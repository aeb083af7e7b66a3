from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from saltray.config import DEBUG
from saltray.network.model import build_model
from saltray.prediction import bundle
from saltray.records.study import Place, create_study
from saltray.sessions import outcome
from saltray.training import checkpoint
from tests.runs import make_trial

NOTHING: Any = None
SCORES = (0.4, 0.8, 0.6)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """Three trials, of which the second has two checkpoints."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = create_study(Place(tmp_path))
    for number, best in enumerate(SCORES):
        before, newest = (tmp_path / "trials/session-01" / f"{number:04d}" / f"epoch{n}" for n in (1, 2))
        save(newest, {"best_map": best, "epoch": 2})
        more: dict[str, Any] = {"checkpoint": str(newest)}
        if number == 1:
            save(before, {"best_map": best, "epoch": 1})
            more["checkpoint_before"] = str(before)
        made.add_trial(make_trial(TrialState.COMPLETE, [best], **more))
    return made


def save(folder: Path, metrics: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    checkpoint.save(folder, build_model(DEBUG.model).state_dict(), DEBUG, metrics)


def staged(folder: Path, study: optuna.Study) -> tuple[int, int]:
    """Stage the best; return its trial's number and the checkpoint's epoch."""
    trial, fresh = outcome._stage(folder, study)
    assert fresh == folder / "best.new"
    return trial.number, checkpoint.load_metrics(fresh)["epoch"]


def test_of_a_damaged_checkpoint_the_one_before_is_taken_then_the_next_trials(
    tmp_path: Path, study: optuna.Study
) -> None:
    assert staged(tmp_path, study) == (1, 2)
    for epoch, after in ((2, (1, 1)), (1, (2, 2))):
        weights = tmp_path / f"trials/session-01/0001/epoch{epoch}" / checkpoint.WEIGHTS
        weights.write_bytes(weights.read_bytes()[:99])
        assert staged(tmp_path, study) == after


def test_weights_of_less_than_the_best_score_are_told(tmp_path: Path, study: optuna.Study) -> None:
    trial, fresh = outcome._stage(tmp_path, study)
    assert outcome._behind(study, trial, fresh) == ""
    bundle.add_metrics(fresh, {"best_map": 0.75})  # of the epoch before
    assert "trial 1 scored 0.8000, but" in outcome._behind(study, trial, fresh)
    for epoch in (1, 2):
        (tmp_path / f"trials/session-01/0001/epoch{epoch}" / checkpoint.WEIGHTS).write_bytes(b"")
    trial, fresh = outcome._stage(tmp_path, study)
    assert outcome._behind(study, trial, fresh).endswith("trial 2's of 0.6000 is taken")


def test_the_best_model_stays_published_where_its_checkpoint_is_gone(
    tmp_path: Path, study: optuna.Study
) -> None:
    _, fresh = outcome._stage(tmp_path, study)
    bundle.add_metrics(fresh, {"trial": 1, "threshold": 0.4, "validation_map": 0.85})
    bundle.publish(fresh)
    (tmp_path / "trials/session-01/0001").rename(tmp_path / "made room")
    best, facts = outcome.publish_best(tmp_path, study, NOTHING, submit=True, gpus=True)
    assert best.number == 1 and facts["validation_map"] == 0.85
    assert "trial 1 scored 0.8000" in facts["lost"] and "stays in best/" in facts["lost"]
    bundle.add_metrics(tmp_path / "best", {"trial": 0})  # another's, or none, is not
    assert outcome._published(tmp_path, best) is None
    (tmp_path / "best").rename(tmp_path / "elsewhere")
    assert outcome._published(tmp_path, best) is None
