"""What a benchmark gives: rows, each a figure with its goal; and how two programs are timed side by side."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Goal:
    """A bound on a row's value, in the row's unit."""

    sense: Literal["at most", "at least", "as before, within"]
    bound: float

    def met(self, value: float, before: float | None = None) -> bool | None:
        """Tell whether a value is within the bound; None where it takes an earlier one that is not there.

        Args:
            value: of this run.
            before: of the last committed run.
        """
        if self.sense == "as before, within":
            return None if before is None else abs(value - before) <= self.bound
        return value <= self.bound if self.sense == "at most" else value >= self.bound


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: float | None
    """The figure that is compared; None where there is none, which `note` explains."""
    unit: str = ""
    goal: Goal | None = None
    spread: tuple[float, float] | None = None
    """Least and largest of the runs that `value` is the median of."""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """Everything else that was measured; goes into the JSON alone."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def at_most(bound: float) -> Goal:
    """Return the goal of a value that should be small."""
    return Goal("at most", bound)


def at_least(bound: float) -> Goal:
    """Return the goal of a value that should be large."""
    return Goal("at least", bound)


def median(what: str, runs: list[float], unit: str, goal: Goal | None, note: str = "", **details: Any) -> Row:
    """Return the row of several runs' median."""
    more = {"runs": runs} | details
    return Row(what, statistics.median(runs), unit, goal, (min(runs), max(runs)), note, more)


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def interleaved(
    ours: Callable[[], float], peer: Callable[[], float], runs: int
) -> tuple[list[float], list[float]]:
    """Call both in turn, A B B A A B .., so that a machine whose speed drifts treats them alike."""
    results: tuple[list[float], list[float]] = [], []
    for i in range(runs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        for which in order:
            results[which].append((ours, peer)[which]())
    return results
