"""The report's figures of trials: what was tried, how it went, when and where it ran.

A trial's score is its best validation mAP so far, whatever became of it: one that was stopped early counts
with what it had reached. Optuna's own plots know complete trials alone, so they are given `as_complete`.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import optuna
import plotly.colors
import plotly.graph_objects as go
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from plotly.subplots import make_subplots

from saltray.records.study import epochs_of, nondominated, score
from saltray.reporting.page import BLUE, GREEN, INK, ORANGE, SKY, VERMILION

MAP = "validation mAP (0 to 1)"

OUTCOMES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
    TrialState.WAITING: "unfinished",
}


class _Look(NamedTuple):
    """How an outcome is drawn, so that it is known without its colour too."""

    colour: str
    symbol: str
    dash: str
    hatch: str


_LOOKS = {
    "complete": _Look(BLUE, "circle", "solid", ""),
    "stopped early": _Look(SKY, "circle-open", "dot", ""),
    "failed": _Look(VERMILION, "x", "dashdot", "x"),
    "unfinished": _Look(ORANGE, "diamond-open", "dash", "/"),
    "best": _Look(GREEN, "circle", "solid", ""),
}

IMPORTANCE_TRIALS = 10
"""Fewer scored trials say nothing of importance; as many as the sampler draws at random before it learns."""

_DARKER = [[0.0, "#7397bb"], [1.0, "#08306b"]]
"""Colours of scores, low to high; the lowest is still seen on white."""

_ROOM = {"t": 72}
"""Above a plot, for a legend that takes two lines on a phone."""

BUTTONS = {"t": 36}
"""Above a plot without a legend, for plotly's buttons, which would lie on what reaches the top."""

_PAUSE = timedelta(minutes=2)
"""A longer gap between two epochs is a pause: the trial was cut off and went on."""


def outcome(trial: FrozenTrial) -> str:
    """Name what became of a trial."""
    begun = trial.state != TrialState.WAITING or trial.intermediate_values
    return OUTCOMES[trial.state] if begun else "not begun"


def scored(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that have a score."""
    return [t for t in trials if score(t) >= 0]


def describe(parameters: Mapping[str, Any]) -> str:
    """Write parameters in one line: `filters 16, learning_rate 0.001234`."""
    words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in parameters.items())
    return ", ".join(words)


def epochs(trial: FrozenTrial) -> list[dict[str, Any]]:
    """Return a trial's epochs in their order; one done twice, after a crash, as it was done last."""
    rows = {row["epoch"]: row for row in epochs_of(trial)}
    return [rows[epoch] for epoch in sorted(rows)]


def history(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Draw each trial's score in the order of the trials, and the best so far."""
    known = sorted(scored(trials), key=lambda t: t.number)
    figure = go.Figure(
        go.Scatter(
            x=[t.number for t in known],
            y=np.maximum.accumulate([score(t) for t in known]),
            mode="lines",
            name="best so far",
            line={"color": _LOOKS["best"].colour, "shape": "hv", "width": 2},
            hoverinfo="skip",
        )
    )
    _add_points(figure, known, [t.number for t in known])
    ends = [known[0].number - 0.5, known[-1].number + 0.5]
    figure.update_xaxes(title="trial, in the order of their start", range=ends, **_whole(known[-1].number))
    return figure.update_yaxes(title=MAP, range=_scale(known)).update_layout(margin=_ROOM)


def learning_curves(trials: Sequence[FrozenTrial], best: int) -> go.Figure:
    """Draw every trial's validation mAP by epoch."""
    figure, named = go.Figure(), set()
    for trial in sorted(scored(trials), key=lambda t: (t.number == best, t.number)):
        name, width = ("best", 3) if trial.number == best else (outcome(trial), 1.2)
        look = _LOOKS[name]
        # A score is in the study a moment before its epoch's row.
        curve = {row["epoch"]: row["map"] for row in epochs(trial)} or trial.intermediate_values
        x = sorted(curve)
        figure.add_scatter(
            x=x, y=[curve[e] for e in x], mode="lines+markers", name=name, legendgroup=name,
            showlegend=name not in named, line={"color": look.colour, "dash": look.dash, "width": width},
            marker={"size": 5, "symbol": look.symbol},
            hovertemplate=f"trial {trial.number}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        named.add(name)
    longest = max(max(trace.x) for trace in figure.data)
    figure.update_xaxes(title="epoch", rangemode="tozero", **_whole(longest))
    return figure.update_yaxes(title=MAP).update_layout(margin=_ROOM)


def training_curves(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw one trial's loss, validation mAP and learning rate by epoch."""
    columns = {"loss": "training loss", "map": "validation mAP", "learning_rate": "learning rate"}
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[3, 3, 2])
    for i, (column, label) in enumerate(columns.items(), start=1):
        figure.add_scatter(
            x=[r["epoch"] for r in rows], y=[r[column] for r in rows], mode="lines+markers", row=i, col=1,
            line={"color": (VERMILION, BLUE, ORANGE)[i - 1]}, showlegend=False,
            hovertemplate=f"epoch %{{x}}: {label} %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
        figure.update_yaxes(title=label, row=i, col=1)
    figure.update_yaxes(type="log", **_log_ticks([r["learning_rate"] for r in rows]), row=3, col=1)
    figure.update_xaxes(**_whole(rows[-1]["epoch"]))
    figure.update_xaxes(title="epoch", row=3, col=1)
    return figure.update_layout(height=620, margin=BUTTONS)


def as_complete(trials: Sequence[FrozenTrial]) -> optuna.Study:
    """Return a study in memory in which every scored trial is complete, with its score as the value."""
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(value=score(t), params=t.params, distributions=t.distributions)
            for t in scored(trials)
        ]
    )
    return study


def parallel_coordinates(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Draw each trial as a line through its score and its parameters; at `None` where it lacks one."""
    figure = optuna.visualization.plot_parallel_coordinate(as_complete(trials), target_name="mAP")
    # Optuna's own are too light. A line begins at its score, as a share of the axis.
    for line in (trace for trace in figure.data if trace.mode == "lines"):
        (colour,) = plotly.colors.sample_colorscale(_DARKER, [line.y[0]])
        line.update(line={"color": colour, "width": 1.5}, opacity=1)
    figure.update_traces(
        marker={"colorscale": _DARKER, "colorbar": {"thickness": 12}}, selector={"mode": "markers"}
    )
    figure.update_annotations(bgcolor="rgba(255, 255, 255, 0.7)")  # the ticks, over the lines
    return figure.update_layout(title=None, margin={"t": 40, "b": 48, "l": 40, "r": 12})


def target_share(trials: int) -> float:
    """Return the share of the trials that importance compares with all: a tenth, but at least five trials."""
    return min(0.5, max(0.1, 5 / trials))


def varied(trials: Sequence[FrozenTrial]) -> list[str]:
    """Return the parameters that were not the same in all scored trials; one that some lack is among them."""
    known = scored(trials)
    names = sorted({name for t in known for name in t.params})
    return [name for name in names if len({t.params.get(name) for t in known}) > 1]


def importance(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Draw the parameters' importance by PED-ANOVA, which knows conditional parameters and has no randomness.

    Watanabe, Bansal and Hutter, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary
    Subspaces", IJCAI 2023: how much a parameter's values in the best trials differ from those in all.
    """
    study = as_complete(trials)
    evaluator = PedAnovaImportanceEvaluator(
        target_quantile=target_share(len(study.trials)), region_quantile=1.0, evaluate_on_local=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that hardly any trial has
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied(trials))
    figure = go.Figure(
        go.Bar(
            x=[100 * v for v in shares.values()][::-1],
            y=list(shares)[::-1],
            orientation="h",
            texttemplate="%{x:.0f} %",
            textposition="outside",
            cliponaxis=False,
            hoverinfo="skip",
            marker={"color": BLUE},
        )
    )
    figure.update_xaxes(title="share of the importance (%)", range=[0, 112 * max(shares.values(), default=1)])
    return figure.update_yaxes(title="parameter").update_layout(height=140 + 34 * len(shares), margin=BUTTONS)


def slices(trials: Sequence[FrozenTrial]) -> dict[str, go.Figure]:
    """Draw the score against each parameter's domain, by the parameter's name; all on one scale."""
    known = scored(trials)
    names = sorted({name for t in known for name in t.params})
    figures = {name: _slice([t for t in known if name in t.params], name) for name in names}
    for figure in figures.values():
        figure.update_yaxes(title=MAP, range=_scale(known))
        figure.update_layout(height=300, margin=BUTTONS)
    return figures


def _slice(trials: Sequence[FrozenTrial], name: str) -> go.Figure:
    figure = go.Figure().update_xaxes(title=name)
    domains = [t.distributions[name] for t in trials]
    if isinstance(domains[0], CategoricalDistribution):
        choices = [str(c) for c in domains[0].choices]
        _add_points(figure, trials, [str(t.params[name]) for t in trials], showlegend=False)
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=choices)
        return figure.update_xaxes(range=[-0.5, len(choices) - 0.5])
    _add_points(figure, trials, [t.params[name] for t in trials], showlegend=False)
    numbers = [d for d in domains if isinstance(d, FloatDistribution | IntDistribution)]
    low, high = min(d.low for d in numbers), max(d.high for d in numbers)
    if numbers[0].log:
        figure.update_xaxes(type="log", **_log_ticks([low, high]))
        low, high = math.log10(low), math.log10(high)
    room = 0.05 * (high - low) or 0.5
    return figure.update_xaxes(range=[low - room, high + room])


def pareto_front(study: optuna.Study, trials: Sequence[FrozenTrial]) -> go.Figure:
    """Draw the complete trials of a study of two objectives; a line joins what nothing beats in both."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    numbers = {t.number for t in nondominated(study)}
    front = sorted((t for t in complete if t.number in numbers), key=lambda t: t.values)
    others = [t for t in complete if t.number not in numbers]
    figure = go.Figure()
    kinds = ((others, "dominated", SKY, "circle-open"), (front, "Pareto front", GREEN, "circle"))
    for some, name, colour, symbol in kinds:
        figure.add_scatter(
            x=[t.values[0] for t in some], y=[t.values[1] for t in some], name=name,
            mode="lines+markers" if some is front else "markers", text=[_hover(t) for t in some],
            marker=_point(colour, symbol), line={"color": colour, "dash": "dot"},
            hovertemplate="%{text}<br>%{y:.0f} tiles/s<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=MAP)
    return figure.update_yaxes(title="speed (tiles segmented a second)").update_layout(margin=_ROOM)


class Stretch(NamedTuple):
    """A trial's uninterrupted stretch of epochs on one machine, in UTC."""

    trial: FrozenTrial
    host: str
    start: datetime
    end: datetime


def stretches(trials: Sequence[FrozenTrial]) -> list[Stretch]:
    """Return when each trial ran where; of those without an epoch, from their start to their end."""
    return sorted((s for t in trials for s in _stretches(t)), key=lambda s: (s.host, s.start, s.trial.number))


def _stretches(trial: FrozenTrial) -> Iterator[Stretch]:
    rows = epochs_of(trial)
    if not rows and trial.datetime_start and trial.datetime_complete:
        # Optuna notes local times.
        start, end = (t.astimezone(UTC) for t in (trial.datetime_start, trial.datetime_complete))
        yield Stretch(trial, str(trial.user_attrs.get("host", "unknown machine")), start, end)
    current: Stretch | None = None
    for row in sorted(rows, key=lambda row: str(row["ended"])):
        end = datetime.fromisoformat(row["ended"])
        start = end - timedelta(seconds=row["seconds"])
        if current and current.host == row["host"] and start - current.end < _PAUSE:
            current = current._replace(end=end)
            continue
        if current:
            yield current
        current = Stretch(trial, str(row["host"]), start, end)
    if current:
        yield current


_HEARD = timedelta(seconds=1)
"""By how much the ends of epochs may be off: they are noted when the driver hears of them."""


def timeline(stretches: Sequence[Stretch]) -> go.Figure:
    """Draw when each trial ran on which machine; trials side by side get lanes of their own."""
    lanes: dict[str, list[datetime]] = {}
    bars: dict[str, list[tuple[str, Stretch]]] = {}
    for stretch in stretches:
        ends = lanes.setdefault(stretch.host, [])
        lane = next((i for i, end in enumerate(ends) if end <= stretch.start + _HEARD), len(ends))
        ends[lane : lane + 1] = [stretch.end]
        bars.setdefault(outcome(stretch.trial), []).append((f"{stretch.host} · {lane + 1}", stretch))
    figure = go.Figure()
    for name, some in bars.items():
        figure.add_bar(
            base=[s.start for _, s in some], y=[lane for lane, _ in some], orientation="h", name=name,
            x=[(s.end - s.start).total_seconds() * 1000 for _, s in some],
            text=[s.trial.number for _, s in some], textposition="inside",
            insidetextanchor="middle", textangle=0, showlegend=True, **_bar(name),
            customdata=[_hover(s.trial) for _, s in some], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    order = [f"{host} · {i + 1}" for host, ends in lanes.items() for i in range(len(ends))]
    figure.update_xaxes(title="time (UTC)", type="date")
    figure.update_yaxes(title="machine", categoryorder="array", categoryarray=order[::-1])
    return figure.update_layout(barmode="overlay", height=200 + 34 * len(order), margin=_ROOM)


def _point(colour: str, symbol: str) -> dict[str, Any]:
    return {"color": colour, "symbol": symbol, "size": 9, "line": {"color": colour, "width": 1.5}}


def _bar(name: str) -> dict[str, Any]:
    """Fill the bars of complete trials; the others are open, as their symbols are, and hatched."""
    look = _LOOKS[name]
    if name == "complete":
        return {
            "textfont_color": "white",
            "marker": {"color": look.colour, "line": {"color": "white", "width": 1}},
        }
    hatch = {"shape": look.hatch, "fgcolor": look.colour, "fgopacity": 1, "solidity": 0.1}
    edge = {"color": look.colour, "width": 1.5}
    return {"textfont_color": INK, "marker": {"color": "white", "line": edge, "pattern": hatch}}


def _add_points(figure: go.Figure, trials: Sequence[FrozenTrial], x: Sequence[Any], **more: Any) -> None:
    """Add a point for each trial's score, by what became of it."""
    for name in dict.fromkeys(OUTCOMES.values()):
        some = [(value, t) for value, t in zip(x, trials, strict=True) if outcome(t) == name]
        if some:
            figure.add_scatter(
                x=[value for value, _ in some], y=[score(t) for _, t in some], mode="markers", name=name,
                text=[_hover(t) for _, t in some], hovertemplate="%{text}<extra></extra>",
                marker=_point(_LOOKS[name].colour, _LOOKS[name].symbol),
                cliponaxis=False, **more,
            )  # fmt: skip


def _scale(trials: Sequence[FrozenTrial]) -> list[float]:
    """Return the ends of an axis that all scores fit on, also where they are one."""
    scores = [score(t) for t in trials]
    room = max(0.05 * (max(scores) - min(scores)), 0.005)
    return [min(scores) - room, max(scores) + room]


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Put few ticks on a logarithmic axis, in plain figures."""
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high < 10 * low else (1, 3) if high < 1000 * low else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    if sum(low <= tick <= high for tick in ticks) < 2:
        ticks = sorted({low, high})
    return {"tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}


def _hover(trial: FrozenTrial) -> str:
    value = f"mAP {score(trial):.4f}" if score(trial) >= 0 else "no result"
    lines = [f"trial {trial.number}, {outcome(trial)}: {value}", *describe(trial.params).split(", ")]
    return "<br>".join(lines)


def _whole(most: int) -> dict[str, Any]:
    """Keep an axis of whole numbers from ticks between them."""
    return {"dtick": 1} if most <= 15 else {"tickformat": "d"}
