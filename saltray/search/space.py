"""Search spaces: Python files with a function `space(trial)`, loaded by path, checked before the search."""

import difflib
import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial

from saltray.config import TrialConfig, UserError
from saltray.network import pretrained
from saltray.network.model import build_model


class SpaceError(UserError):
    """The space cannot be searched; the message names its file."""


@dataclass(frozen=True)
class Space:
    """A search space: draws one trial's configuration; `first` are the parameters of the first trials."""

    draw: Callable[[optuna.trial.BaseTrial], Any]
    first: Sequence[dict[str, Any]]
    path: Path

    def config(self, trial: optuna.trial.BaseTrial, epochs: int, seed: int, workers: int = 1) -> TrialConfig:
        """Draw and validate one trial's configuration, whose batch so many workers share.

        Raises:
            SpaceError: the space's answer is no valid configuration.
        """
        values = self.draw(trial)
        if not isinstance(values, dict):
            raise SpaceError(f"{self.path}: space(trial) returned {values!r}; it must return a nested dict")
        for name in ("epochs", "seed"):
            if name in values:
                raise SpaceError(f"{self.path}: '{name}' belongs to the command line (--{name})")
        try:
            config = TrialConfig.from_dict({**values, "epochs": epochs, "seed": seed})
        except UserError as error:
            raise SpaceError(f"{self.path}: {error}") from None
        file = config.model.encoder_weights
        if file not in (None, "imagenet"):
            # Trials run in folders of their own, where a relative path would lead elsewhere.
            model = config.model.to_dict() | {"encoder_weights": str(Path(file).resolve())}
            config = TrialConfig.from_dict(config.to_dict() | {"model": model})
        if config.batch_size % workers:
            raise SpaceError(
                f"{self.path}: batch_size {config.batch_size} cannot be shared by {workers} workers; "
                "draw multiples of --workers-per-trial"
            )
        return config


def load(path: Path) -> Space:
    """Load a search space from a Python file with `space(trial)` and, if wanted, `FIRST`: a dict, or several.

    A space file is code: it runs with the rights of whoever starts the search.

    Raises:
        SpaceError: the file is absent, does not import, or has no function `space`.
    """
    if not path.is_file():
        raise SpaceError(f"{path}: no such file; --space names a Python file with a function space(trial)")
    spec = importlib.util.spec_from_file_location("saltray_space", path)
    if spec is None or spec.loader is None:
        raise SpaceError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SpaceError(f"{path}: does not import: {type(error).__name__}: {error}") from error
    draw = getattr(module, "space", None)
    if not callable(draw):
        raise SpaceError(f"{path}: no function space(trial)")
    first = getattr(module, "FIRST", ())
    first = (first,) if isinstance(first, dict) else first
    if not isinstance(first, list | tuple) or not all(isinstance(each, dict) for each in first):
        raise SpaceError(f"{path}: FIRST: a dict of parameters is meant, or a list of them; got {first!r}")
    return Space(draw, first, path)


def refuse_change(before: str, path: Path) -> None:
    """Refuse a space that is no longer what its study began with.

    Args:
        before: its source as the study keeps it; empty where it keeps none.
        path: of the file now.

    Raises:
        SpaceError: with the difference.
    """
    if not path.is_file():
        raise SpaceError(f"{path}: no such file")
    now = path.read_text()
    if before and now != before:
        lines = difflib.unified_diff(
            before.splitlines(), now.splitlines(), "the study's", str(path), lineterm=""
        )
        raise SpaceError(
            f"{path}: not the space that this study began with:\n" + "\n".join(lines) + "\n"
            "Undo the change to go on with the run; or start a new one from its results: "
            "--space FILE --warm-start RUN"
        )


def _check_first(space: Space) -> None:
    """Refuse first trials that lack a parameter, have one that is not drawn, or one outside what is."""
    for first in space.first:
        trial = optuna.trial.FixedTrial(first)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                space.draw(trial)
        except Exception as error:
            if absent := re.search(r"parameter '(.+)' is not found", str(error)):  # Optuna's words
                raise SpaceError(
                    f"{space.path}: FIRST lacks {absent[1]}, which space(trial) draws: add its value"
                ) from None
            raise SpaceError(f"{space.path}: FIRST: {type(error).__name__}: {error}") from error
        if unknown := [name for name in first if name not in trial.params]:
            drawn = ", ".join(trial.params)
            raise SpaceError(
                f"{space.path}: FIRST: {unknown[0]} is not drawn with the rest; drawn are {drawn}"
            )


def sample(
    space: Space, samples: int, *, epochs: int, seed: int, workers: int
) -> list[tuple[FrozenTrial, TrialConfig]]:
    """Draw samples, the first trials' in front of them, and build each network (without memory for it).

    Raises:
        SpaceError: a draw fails, is no valid configuration, or does not fit the number of workers.
        UserError: weights of a pretrained encoder are absent or do not fit; the message names them.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    _check_first(space)
    for first in space.first:
        study.enqueue_trial(first)
    drawn = []
    for number in range(samples):
        trial = study.ask()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a first value outside its range is only warned of
                config = space.config(trial, epochs, seed, workers)
                with torch.device("meta"):
                    build_model(config.model)
        except SpaceError:
            raise
        except Exception as error:
            raise SpaceError(f"{space.path}: space(trial): {type(error).__name__}: {error}") from error
        drawn.append((study.trials[number], config))
    for name, weights in {(config.model.encoder, config.model.encoder_weights) for _, config in drawn}:
        if weights is not None:
            pretrained.load_weights(pretrained.build_stages(name, 1), name, weights)
    return drawn
