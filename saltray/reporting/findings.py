"""All that a run's folder tells of its search, read for the report."""

from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pandas as pd
from optuna.trial import FrozenTrial

from saltray.prediction import validation
from saltray.records import run, storage
from saltray.records.settings import Settings
from saltray.records.study import Place, load_study, own_trials, score
from saltray.training import checkpoint


class Findings(NamedTuple):
    """All that a run's folder tells."""

    folder: Path
    settings: Settings
    tiles: str
    """Fingerprint of the labelled tiles and their split."""
    sessions: list[dict[str, Any]]
    """What `run.environment` said of each."""
    study: optuna.Study
    trials: list[FrozenTrial]
    """Of this run alone, in the order of their start, as they were when they were read."""
    adopted: int
    """Trials taken over from another run."""
    best: FrozenTrial | None
    """The trial with the best score."""
    model: dict[str, Any]
    """The metrics of `best/`; empty before the first prediction."""
    config: dict[str, Any]
    """The configuration of `best/`, likewise."""
    ensemble: dict[str, Any]
    """The metrics of `ensemble/`; empty where there is none."""
    table: pd.DataFrame | None
    gallery: validation.Gallery | None


def read(folder: Path, *, url: str | None = None, study: optuna.Study | None = None) -> Findings:
    """Read a run's folder.

    Args:
        folder: the run's.
        url: of the study's database server with its password, if it lies in one that wants it.
        study: the study, where it is open already.

    Raises:
        UserError: it holds no run, one of a newer version, or a damaged file.
    """
    content = run.read(folder)
    settings = Settings.model_validate(content["settings"])
    study = study or load_study(Place(folder, url or settings.study, settings.study_name))
    trials, best, ensemble = own_trials(study), folder / storage.BEST, folder / storage.ENSEMBLE
    return Findings(
        folder=folder.resolve(),
        settings=settings,
        tiles=content["tiles"],
        sessions=content["sessions"],
        study=study,
        trials=trials,
        adopted=len(study.get_trials(deepcopy=False)) - len(trials),
        best=max((t for t in trials if score(t) >= 0), key=score, default=None),
        model=checkpoint.load_metrics(best) if best.is_dir() else {},
        ensemble=checkpoint.load_metrics(ensemble) if ensemble.is_dir() else {},
        config=checkpoint.load_config(best).to_dict() if best.is_dir() else {},
        table=validation.read_table(folder),
        gallery=validation.read_gallery(folder),
    )
