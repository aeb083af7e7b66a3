"""What Ray Tune does with the processes of trials, mended (ray 2.60): none is started or ended for nothing.

A process that can train costs seconds of imports. Tune keeps one for the next trial, but gives too many up.
"""

import importlib
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any
from unittest import mock

from ray.air._internal import usage
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.utils.object_cache import _ObjectCache

from saltray.local_ray import SETTINGS

IDLE_SECONDS = 30.0
"""How long an ended trial's process waits for the next trial, before its CPUs and GPUs are given back."""


class KeepingCache(_ObjectCache):
    """Ended trials' processes: each stays for the next trials, for `IDLE_SECONDS`.

    Tune's own keeps as many as trials wait at that moment, or one: of two trials that end together, one's
    process ends, and the next trial waits for a new one. No more are kept than trials run side by side.
    """

    def __init__(self) -> None:
        """Begin empty."""
        super().__init__(may_keep_one=True)
        self._since: dict[Any, float] = {}

    def cache_object(self, key: Any, obj: Any) -> bool:
        """Keep it; always True."""
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        self._since[obj] = monotonic()
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Generator[Any, None, None]:
        """Give up all, or those that no trial came for."""
        latest = monotonic() - IDLE_SECONDS
        for key, kept in self._cached_objects.items():  # the oldest first
            while kept and (force_all or self._since[kept[0]] <= latest):
                del self._since[kept[0]]
                yield self.pop_cached_object(key)


class KeepingController(TuneController):
    """Tune's controller, which starts no process to end it before it was of use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin as Tune's does."""
        super().__init__(*args, **kwargs)
        self._actor_cache = KeepingCache()

    def _maybe_reuse_cached_actor(self, trial: Any) -> bool:
        """Let a trial whose own process is starting wait for it.

        Tune's own gives it the process that another trial left, and ends the one that starts; the trial
        after the next needs it again. Short trials then have half of their processes starting all the time.
        """
        own = self._trial_to_actor.get(trial)
        if own is not None and own not in self._started_actors and self._actor_manager.is_actor_started(own):
            return False
        return bool(super()._maybe_reuse_cached_actor(trial))


@contextmanager
def kept() -> Iterator[None]:
    """Let `tune.Tuner.fit` keep and share processes, within the context."""
    _share_environment()
    with (
        mock.patch.object(importlib.import_module("ray.tune.tune"), "TuneController", KeepingController),
        # For Ray's usage statistics, Tune compares callbacks with all that it knows, and so imports MLflow
        # where that is installed: most of a second before the first trial.
        mock.patch.object(usage, "tag_callbacks"),
    ):
        yield


def _share_environment() -> None:
    """Let trials run in processes that are there already, and their tasks as well.

    Ray shares no process between environments, and Tune gives trials one of their own: on every machine a
    second set of processes would start, each with seconds of imports, beside those that read the tiles.
    PyTorch Lightning alone needs `PL_DISABLE_FORK`; the settings that saltray gives a Ray, all processes
    have, and the driver of a cluster's job has them as well.
    """
    getattr(class_cache, "DEFAULT_ENV_VARS", {}).pop("PL_DISABLE_FORK", None)
    ours = {name for name, value in SETTINGS.items() if os.environ.get(name) == value}
    getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set()).difference_update(ours)
