"""What decides a run's results, as the command line gives it and `run.json` keeps it."""

import shlex
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from saltray.config import SearchConfig, Split, counted
from saltray.records.study import STUDY_NAME


class Settings(SearchConfig):
    """What decides a run's results. A resumed run may change its engine, budgets and resources alone."""

    data: str
    space: str
    split: Split = "coverage"
    workers_per_trial: Annotated[int, Field(ge=1)] = 1
    cpus_per_trial: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    gpus_per_trial: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] | None = None
    skip_bad: bool = False
    folds: Annotated[int, Field(ge=2, le=10)] | None = None
    """On how many folds the best configurations are trained again after the search; None for not at all."""
    ensemble: Annotated[int, Field(ge=1, le=50)] | None = None
    """From how many of the best configurations an ensemble is chosen; None for none, or one with `folds`."""
    ensemble_with: tuple[str, ...] = ()
    """Other runs, paths or URIs, whose models the ensemble may take as well."""
    pseudo_labels: bool = False
    """Whether the refits are done once more, with test tiles that the first ones are sure of."""
    study: str | None = None
    """URL of the study's database server, without a password; None for SQLite in the run's folder."""
    study_name: str = STUDY_NAME
    warm_start: str | None = None
    """The run, a path or URI, from whose results this one started."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.pseudo_labels and self.folds is None:
            raise ValueError("--pseudo-labels needs --folds: the models of a fold label tiles for it")
        if self.ensemble_with and not self.blends:
            raise ValueError("--ensemble-with needs --ensemble, or --folds")
        if self.ensemble_with and self.pseudo_labels:
            raise ValueError(
                "--pseudo-labels trains the ensemble's members again, which it cannot with those of "
                "--ensemble-with; leave one of them out (--no-pseudo-labels, or --ensemble-with '')"
            )
        if self.objective == "map+speed" and (self.folds or self.ensemble):
            raise ValueError(
                "--folds and --ensemble look for the best score at any cost, --objective map+speed does not; "
                "leave one of them out"
            )
        return self

    @property
    def blends(self) -> bool:
        """Whether an ensemble follows the search."""
        return self.folds is not None or self.ensemble is not None

    @property
    def gpus(self) -> bool:
        """Whether training and prediction may use the cluster's GPUs: not under `--gpus-per-trial 0`."""
        return self.gpus_per_trial != 0

    @property
    def extent(self) -> str:
        """How far the search goes at most, in words."""
        return f"{counted(self.trials, 'trial')} of up to {counted(self.epochs, 'epoch')}"


def as_options(settings: Settings, space: Path) -> str:
    """Return the command-line options that start a run with these settings."""
    switches = ("skip_bad", "pseudo_labels")
    given = settings.model_dump(exclude_defaults=True, exclude={"study_name", "space", *switches})
    given |= {"space": space, "trials": settings.trials, "epochs": settings.epochs, "seed": settings.seed}
    if settings.time_budget:
        given["time_budget"] = f"{settings.time_budget:.12g}s"
    words = []
    for name, value in given.items():
        for each in value if isinstance(value, tuple) else (value,):
            text = f"{each:g}" if isinstance(each, float) else str(each)
            words.append(f"--{name.replace('_', '-')} {shlex.quote(text)}")
    words += [f"--{name.replace('_', '-')}" for name in switches if getattr(settings, name)]
    return " ".join(words)
