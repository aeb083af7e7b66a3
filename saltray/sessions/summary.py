"""What a session says at its start and at its end."""

import shlex
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.markup import escape

from saltray import connection
from saltray.config import counted
from saltray.contest import submission
from saltray.data.folds import Data
from saltray.prediction.postprocessing import Postprocessing
from saltray.records import run, storage
from saltray.records.settings import Settings, as_options
from saltray.records.study import count, nondominated, objective_of, own_trials, score
from saltray.search.plan import Plan
from saltray.sessions import blend
from saltray.sessions.view import text


def tell_busy(console: Console) -> None:
    """Tell that other work holds CPUs: two searches that plan with all of them starve each other's data."""
    free, all_of_them = connection.cpus()
    if all_of_them - free > 0.5:  # less is a single task, or what is being given back
        console.print(
            f"[yellow]Other work holds {all_of_them - free:g} of this cluster's {all_of_them:g} CPUs[/], all "
            "of which this search plans with. Trials of two searches leave no room for their data to be "
            "streamed: let one end first, or give each a cluster of its own.",
            soft_wrap=True,
        )


def tell_start(
    console: Console,
    data: Data,
    left_out: dict[str, str],
    settings: Settings,
    chosen: Plan,
    dashboard: str,
) -> None:
    """Tell what there is, what the session will do with it, and where that can be watched."""
    if left_out:
        console.print(f"[yellow]{counted(len(left_out), 'bad tile')} left out[/], such as {min(left_out)}")
    console.print(
        f"[bold]{data.training.count()}[/] training, [bold]{data.validation.count()}[/] validation, "
        f"[bold]{data.test.count()}[/] test tiles.  "
        f"[bold]{settings.extent}[/], {chosen}.",
        soft_wrap=True,
    )
    if settings.folds is not None:
        budget = ", within this session's time budget" if settings.time_budget else ""
        console.print(f"Refits on {settings.folds} folds begin when all trials are done{budget}.")
    if dashboard:
        console.print(f"Ray's dashboard: {dashboard}")


def tell_end(
    console: Console,
    home: storage.Home,
    settings: Settings,
    study: optuna.Study,
    best: FrozenTrial,
    facts: dict[str, Any],
    reached: str,
) -> None:
    """Print the end's table.

    Args:
        console: where.
        home: the run's.
        settings: this session's.
        study: the search's.
        best: trial.
        facts: of its model (`outcome.publish_best`), of the `ensemble` (`blend.run_all`), and the `report`.
        reached: the limit that ended the search, in words; may be empty.
    """
    folder = home.folder
    counts = count(study)
    cut_off = sum(not t.state.is_finished() and bool(t.intermediate_values) for t in own_trials(study))
    left = {"cut off": cut_off, "not begun": counts.waiting - cut_off}
    waiting = "".join(f", {number} {what}" for what, number in left.items() if number)
    lines = {"ended because": reached} if reached else {}
    lines |= {
        "best": f"[bold green]trial {best.number}[/]  {text(best.params)}",
        "validation mAP": f"[bold]{score(best):.4f}[/] at probability 0.50, "
        f"[bold]{facts['validation_map']:.4f}[/] {Postprocessing.of(facts)}, chosen on these tiles",
    }
    if lone := facts.get("lone"):
        lines["on lone tiles"] = (
            f"{lone['map']:.4f} on those {lone['tiles']} that lie beside no training tile"
        )
    ended = f"{counts.complete} complete, {counts.pruned} stopped early, {counts.failed} failed"
    lines["trials"] = ended + waiting
    if objective_of(study) == "map+speed":
        front = sorted(nondominated(study), key=lambda t: -t.values[0])
        lines["Pareto front"] = "\n".join(
            f"trial {t.number}: mAP {t.values[0]:.4f} at {t.values[1]:.0f} tiles/s" for t in front
        ).replace("\n", "\n" + " " * 16)
    ensemble = facts.get("ensemble", {})
    lines |= blend.in_words(ensemble)
    truth = run.demo_data(folder).with_name("truth.csv")
    if truth.is_file():
        hidden = submission.score(folder / "submission.csv", truth)
        empty = submission.empty_score(truth)
        lines["hidden test mAP"] = f"[bold]{hidden:.4f}[/]; an all-empty submission {empty:.4f}"
    lines["submission"] = escape(f"{home}/submission.csv")
    lines["model"] = escape(f"{home}/best")
    if "models" in ensemble:
        lines["ensemble's"] = escape(f"{home}/ensemble")
    warnings = {"lost": "lost", "without ONNX": "onnx_problem"}
    lines |= {name: f"[yellow]{escape(facts[key])}[/]" for name, key in warnings.items() if key in facts}
    lines["report"] = escape(facts["report"])
    lines["logs"] = escape(f"{home}/logs")
    unfinished = counts.waiting and counts.ended < settings.trials
    if unfinished or ensemble.get("waiting") or ensemble.get("trials_left"):
        lines["go on"] = escape(f"python -m saltray.tune --resume {shlex.quote(str(home))}")
    lines["repeat"] = f"python -m saltray.tune {escape(as_options(settings, folder / 'space.py'))}"
    for name, value in lines.items():
        # Soft-wrapped: paths and commands stay whole, to be copied.
        console.print(f"[dim]{name:<16}[/]{value}", soft_wrap=True)
