"""What the user sees while a search runs: one live table, and nothing else."""

import os
import sys
import time
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saltray.records.study import count, own_trials, score

_SHOWN = 12  # trials in the table: the running ones, then the best
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "[red]failed[/]",
    TrialState.RUNNING: "[green]running[/]",
    TrialState.WAITING: "waiting",
}


def duration(seconds: float) -> str:
    """Write a duration as 1:02:03 or 2:03."""
    hours, rest = divmod(int(max(seconds, 0)), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def text(parameters: dict[str, Any]) -> str:
    """Write parameters in one line, safe for rich: `filters 16  learning_rate 0.00123`."""
    words = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in parameters.items())
    return escape("  ".join(words))


class Terminal(Console):
    """Where a session's words go: standard output, maybe a pipe whose reader ends before the session."""

    def __init__(self) -> None:
        """Write to what is the standard output now."""
        super().__init__(file=sys.stdout, highlight=False)

    def on_broken_pipe(self) -> None:
        """Go on in silence; rich would end the process, and with it the search."""
        self.quiet = True
        # What Python itself still holds for the pipe goes nowhere, or it would fail when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class LiveView(tune.Callback):
    """Draws the study after every result; where there is no terminal, a line for each ended trial."""

    def __init__(
        self, console: Console, study: optuna.Study, *, trials: int, epochs: int, time_budget: float | None
    ) -> None:
        """Keep what is fixed of the search."""
        self._console, self._study, self._trials, self._epochs = console, study, trials, epochs
        self._budget = time_budget
        self._started = time.monotonic()
        self._already_ended = 0
        self._rates: dict[int, float] = {}
        self._live: Live | None = None
        self._told: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the terminal out of Tune's own snapshot of the search, which is never restored."""
        return {}

    def __enter__(self) -> "LiveView":
        """Start drawing; trials that ended in an earlier session are not told again."""
        self._told = {t.number for t in self._known() if t.state.is_finished()}
        self._already_ended = count(self._study).ended
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._draw,
                refresh_per_second=2,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Draw once more and stop."""
        if self._live:
            self._live.stop()
        else:
            self._tell()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take in an epoch."""
        self._rates[trial.config["number"]] = result.get("tiles_per_second", 0.0)
        if not self._live:
            self._tell()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell of an ended trial where nothing is drawn."""
        if not self._live:
            self._tell()

    def _known(self) -> list[FrozenTrial]:
        return own_trials(self._study)

    def _tell(self) -> None:
        for trial in self._known():
            if trial.state.is_finished() and trial.number not in self._told:
                self._told.add(trial.number)
                self._console.print(
                    f"trial {trial.number:3d}  {_STATES[trial.state]}  best mAP {_score(trial)}  "
                    f"epochs {max(trial.intermediate_values, default=0)}  {text(trial.params)}"
                    f"{_reason(trial)}",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip

    def _draw(self) -> RenderableType:
        known = self._known()
        table = Table(box=None, pad_edge=False, expand=False, header_style="bold")
        for name, justify in (
            ("trial", "right"),
            ("state", "left"),
            ("best mAP", "right"),
            ("epoch", "right"),
        ):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("tiles/s", justify="right", no_wrap=True)
        table.add_column("parameters", overflow="fold")
        best = max((score(t) for t in known), default=-1.0)
        order = sorted(known, key=lambda t: (t.state != TrialState.RUNNING, -score(t)))
        for trial in order[:_SHOWN]:
            leads = score(trial) == best and best >= 0
            table.add_row(
                str(trial.number),
                _STATES[trial.state],
                f"[bold]{_score(trial)}" if leads else _score(trial),
                f"{max(trial.intermediate_values, default=0)}/{self._epochs}",
                f"{self._rates[trial.number]:.0f}" if trial.number in self._rates else "",
                text(trial.params) + _reason(trial),
            )
        ended = count(self._study).ended
        head = Text(f"{ended} of {self._trials} trials", style="bold")
        head.append(f"   best mAP {best:.4f}" if best >= 0 else "   no result yet", style="bold green")
        head.append(f"   {duration(time.monotonic() - self._started)} gone, {self._left(ended)}", style="dim")
        hidden = len(order) - _SHOWN
        foot = Text(f"and {hidden} more" if hidden > 0 else "", style="dim")
        return Group(head, table, foot)

    def _left(self, ended: int) -> str:
        """Estimate the time left, from the trials that ended in this session."""
        gone = time.monotonic() - self._started
        new = ended - self._already_ended
        by_trials = gone / new * (self._trials - ended) if new else None
        bounds = [self._budget - gone] if self._budget else []
        bounds += [by_trials] if by_trials is not None else []
        return f"about {duration(min(bounds))} left" if bounds else "time left not yet known"


def _reason(trial: FrozenTrial) -> str:
    return f"  [red]{escape(trial.user_attrs['reason'])}[/]" if "reason" in trial.user_attrs else ""


def _score(trial: FrozenTrial) -> str:
    value = score(trial)
    return f"{value:.4f}" if value >= 0 else "-"
