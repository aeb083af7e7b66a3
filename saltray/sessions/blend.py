"""What follows a search, where it is asked for: refits on K folds, and an ensemble of the best models.

Everything here can be done again: a session that is cut off leaves refits that wait in their study, and the
next one chooses the ensemble anew from all that is known by then.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optuna
import ray.data
from rich.console import Console
from rich.markup import escape

from saltray import connection
from saltray.config import TrialConfig, counted
from saltray.contest import submission
from saltray.data import folds
from saltray.data.folds import Data
from saltray.ensembles import ensemble, ensemble_bundle, outoffold, pseudo, refits
from saltray.ensembles.candidates import kept, of_runs
from saltray.ensembles.ensemble import Selection
from saltray.ensembles.outoffold import Candidate
from saltray.prediction import inference
from saltray.prediction.bundle import publish
from saltray.prediction.postprocessing import Postprocessing
from saltray.quiet import quiet
from saltray.records import storage
from saltray.records.settings import Settings
from saltray.records.study import REFITS, best_trials, count, keep_trials_at
from saltray.search import search
from saltray.search.limits import Limits, ended_without_gain
from saltray.search.plan import Plan, plan
from saltray.sessions import outcome, tracking
from saltray.sessions.view import LiveView
from saltray.training import checkpoint
from saltray.training.trial import Tiles


@dataclass(frozen=True)
class Job:
    """A session's part after its search."""

    console: Console
    mirror: storage.Mirror
    settings: Settings
    study: optuna.Study
    data: Data
    chosen: Plan
    """The search's."""
    started: float
    """When the search began, by `time.monotonic`: the time budget is for all together."""

    @property
    def size(self) -> int:
        """How many configurations an ensemble is chosen from."""
        return self.settings.ensemble or 1


class Chosen(NamedTuple):
    """An ensemble, and what it was chosen from."""

    candidates: list[Candidate]
    selection: Selection
    lone: dict[str, Any]
    """`lone`, as `outcome.lone_score` tells it; the score is cross-fitted."""


def run_all(job: Job) -> dict[str, Any]:
    """Do the refits, choose the ensemble, and write its bundle and the submission.

    Returns:
        The ensemble's metrics, as its `metrics.json` has them; nothing of them where no candidate is there
        yet. Beside them, how many refits are `waiting` for the next session, and how many `failed`; and
        where refits wait for the search's end, how many of its trials are left, `trials_left`.
    """
    settings, folder = job.settings, job.mirror.home.folder
    parts, left = [job.data.validation], {"waiting": 0, "failed": 0}
    if job.data.fold is None:
        candidates = kept(job.study, job.size)
    else:
        with job.console.status("cutting the folds"), quiet(folder / "logs" / "refits.log"):
            every = folds.join([job.data.training, job.data.validation])
            parts = folds.split(every, job.data.fold)
        study = _refit_best(job, parts)
        candidates = refits.candidates(study, job.study, len(parts), job.size)
        wanted = [t.number for t in best_trials(job.study, job.size)]
        left = {"waiting": count(study).waiting, "failed": refits.failed(study, wanted)}
        if not is_over(job):
            left["trials_left"] = settings.trials - count(job.study).ended
    if not candidates:
        return left
    others = of_runs(settings, job.mirror.home, job.data.fingerprint)
    chosen = _choose(job, parts, [*candidates, *others])
    facts: dict[str, Any] = {}
    if settings.pseudo_labels and not left["waiting"] and is_over(job):
        chosen, facts, again = _relabel(job, parts, chosen)
        left = {"waiting": again["waiting"], "failed": left["failed"] + again["failed"]}
    with (
        job.console.status("predicting with the ensemble"),
        quiet(folder / "logs" / "predict.log"),
    ):
        return {**_publish(job, chosen, facts), **left}


def is_over(job: Job) -> bool:
    """Tell whether the search has come to its end: what it chose will not change while refits run."""
    patience, known = job.settings.patience, count(job.study)
    out = patience is not None and ended_without_gain(job.study) >= patience and not known.waiting
    return known.ended >= job.settings.trials or out


def _refit_best(job: Job, parts: Sequence[ray.data.Dataset]) -> optuna.Study:
    """Refit the best configurations; return the study of it."""
    name = f"{REFITS}{len(parts)}"
    study = _beside(job, name)
    if not is_over(job):
        return study
    best = [t.number for t in best_trials(job.study, job.size)]
    refits.enqueue(study, best, len(parts))
    if count(study).waiting:
        job.console.print(f"Refits: {refits.describe(len(best), len(parts))}.")
        with quiet(job.mirror.home.folder / "logs" / "refits.log"):
            training = [folds.others(parts, fold) for fold in range(len(parts))]
        _run(job, study, name, training, parts)
    return study


def _beside(job: Job, name: str) -> optuna.Study:
    with quiet(job.mirror.home.folder / "logs" / "refits.log"):
        study = refits.beside(job.study, name)
        keep_trials_at(study, f"{job.mirror.home.trials}/{name}")
        return study


def _run(
    job: Job,
    study: optuna.Study,
    name: str,
    training: Sequence[ray.data.Dataset],
    validation: Sequence[ray.data.Dataset],
) -> None:
    """Run the refits that wait, side by side, within what is left of the budgets."""
    settings, home = job.settings, job.mirror.home
    known = study.get_trials(deepcopy=False)
    left: dict[str, Any] = {"trials": len(known), "patience": None, "scheduler": "none", "searcher": "random"}
    if settings.time_budget is not None:
        left["time_budget"] = settings.time_budget - (time.monotonic() - job.started)
    config = settings.model_copy(update=left)
    if Limits(study, config).stop_all():
        return
    chosen = plan(
        connection.nodes(),
        trials=count(study).waiting,
        workers=settings.workers_per_trial,
        cpus=settings.cpus_per_trial,
        gpus=job.chosen.resources.gpus,
    )
    resources = chosen.resources.for_refits()
    view = LiveView(
        job.console, study, trials=len(known), epochs=settings.epochs, time_budget=left.get("time_budget")
    )
    board = tracking.TensorBoard(home.folder / "tensorboard" / name, study)
    with view, quiet(home.folder / "logs" / "refits.log"), board:
        pairs = zip(training, validation, strict=True)
        tiles = [Tiles.share(t, v, resources.workers, resources.elastic) for t, v in pairs]
        space = refits.space(_configs(job, study))
        callbacks = [view, board, tracking.Mirroring(job.mirror)]
        side_by_side = Plan(chosen.concurrency, resources)
        search.run_search(
            space, tiles, side_by_side, f"{home.trials}/{name}", study, config, callbacks, refits.run_refit
        )


def _configs(job: Job, study: optuna.Study) -> Mapping[int, TrialConfig]:
    """Return the configurations that are refit, by the trial's number."""
    trials = job.study.get_trials(deepcopy=False)
    return {number: refits.config_of(job.study, trials[number]) for number in refits.waiting_trials(study)}


def _choose(job: Job, parts: Sequence[ray.data.Dataset], candidates: list[Candidate]) -> Chosen:
    """Let the candidates predict what they have not seen, and choose of them."""
    log = job.mirror.home.folder / "logs" / "predict.log"
    with job.console.status("choosing the ensemble"), quiet(log):
        known = outoffold.predict(parts, candidates, job.settings.seed, gpus=job.settings.gpus)
        selection = ensemble.choose(known)
        beside = [job.data.training] if len(parts) == 1 else []  # of whom nobody is judged
        return Chosen(candidates, selection, outcome.lone_score([*parts, *beside], selection.by_tile))


def _relabel(
    job: Job, parts: Sequence[ray.data.Dataset], chosen: Chosen
) -> tuple[Chosen, dict[str, Any], dict[str, int]]:
    """Train the members once more, all that any fold's choice has, on pseudo-labelled test tiles too.

    The labels for fold k are those of models that never saw it, weighted as the other folds chose: nothing of
    fold k is in what its models learn.

    Returns:
        The better of both ensembles, what is told of it, and how many refits are `waiting` and how many
        `failed`.
    """
    study, members = _pseudo_refits(job, parts, chosen)
    facts = {"tiles": study.user_attrs["tiles"], "without": chosen.selection.cross_fitted, "used": False}
    left = {"waiting": count(study).waiting, "failed": refits.failed(study, members)}
    candidates = refits.candidates(study, job.study, len(parts), job.size)
    if left["waiting"] or not candidates:
        return chosen, {"pseudo_labels": facts | {"finished": not left["waiting"]}}, left
    again = _choose(job, parts, candidates)
    used = again.selection.cross_fitted > chosen.selection.cross_fitted
    facts |= {"with": again.selection.cross_fitted, "used": used, "finished": True}
    facts["not_taken"] = describe(job, chosen if used else again)["candidates"]
    return again if used else chosen, {"pseudo_labels": facts}, left


def _pseudo_refits(
    job: Job, parts: Sequence[ray.data.Dataset], chosen: Chosen
) -> tuple[optuna.Study, list[int]]:
    """Label the test tiles and do the members' refits with them; return their study, and the members."""
    candidates = chosen.candidates
    # Other labels make another study: those of other tiles, or by other refits, wherever these lie now.
    models = [[c.trial, *("/".join(source.path.split("/")[-3:]) for source in c.sources)] for c in candidates]
    digest = hashlib.sha256(json.dumps([models, list(job.data.ids)]).encode()).hexdigest()[:8]
    name = f"{REFITS}{len(parts)}-pseudo-{digest}"
    study = _beside(job, name)
    if "picks" not in study.user_attrs:
        study.set_user_attr("picks", [chosen.selection.picks, *chosen.selection.picks_by_fold])
    # As they were when it began: chosen anew on another machine, a rounding may tip one.
    chosen_by: list[list[int]] = study.user_attrs["picks"]
    members = [c.trial for c, *times in zip(candidates, *chosen_by, strict=True) if any(times)]
    known = study.user_attrs.get("tiles")
    if known and not count(study).waiting and not (any(known) and refits.missing(study, members, len(parts))):
        return study, members
    log = job.mirror.home.folder / "logs" / "refits.log"
    with job.console.status("labelling the test tiles"), quiet(log):
        others = [folds.others(parts, fold) for fold in range(len(parts))]
        # No more than were labelled by hand: the contest's 18,000 test tiles would outvote those.
        labelled = [
            label_for(fold, job.data.test, candidates, picks, tiles.count(), gpus=job.settings.gpus)
            for fold, (tiles, picks) in enumerate(zip(others, chosen_by[1:], strict=True))
        ]
        training = [folds.join([*pair]) for pair in zip(others, labelled, strict=True)]
        counts = [tiles.count() for tiles in labelled]
    job.console.print(f"Pseudo-labelled test tiles, by fold: {', '.join(map(str, counts))}.")
    if any(counts):
        refits.enqueue(study, members, len(parts))
    study.set_user_attr("tiles", counts)
    if count(study).waiting:
        _run(job, study, name, training, parts)
    return study, members


def label_for(
    fold: int,
    test: ray.data.Dataset,
    candidates: Sequence[Candidate],
    picks: Sequence[int],
    most: int,
    *,
    gpus: bool,
) -> ray.data.Dataset:
    """Label test tiles for a fold's training, by models that never saw it.

    Args:
        fold: whose training it is.
        test: decoded tiles.
        candidates: with a model for each fold.
        picks: how often each was taken by a choice that knows nothing of the fold.
        most: tiles to return.
        gpus: as for `inference.map_tiles`.
    """
    models = [
        outoffold.load(candidate.sources[fold], times / sum(picks))
        for candidate, times in zip(candidates, picks, strict=True)
        if times
    ]
    return pseudo.label_tiles(test, models, most, gpus=gpus)


def describe(job: Job, chosen: Chosen) -> dict[str, Any]:
    """Return what is told of an ensemble: its members, and their way into it."""
    candidates, selection, lone = chosen
    total = sum(selection.picks)
    return {
        "folds": job.settings.folds,
        "in_sample": selection.in_sample,
        "cross_fitted": selection.cross_fitted,
        "spread": selection.spread,
        "by_fold": selection.by_fold,
        **lone,
        "scores": selection.scores,
        "candidates": [
            {"name": c.name, "trial": c.trial, "weight": times / total, "by_fold": by_fold}
            for c, times, by_fold in zip(candidates, selection.picks, selection.candidates, strict=True)
        ],
        "path": [{"added": candidates[step.added].name, "score": step.score} for step in selection.path],
    }


def _publish(job: Job, chosen: Chosen, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the ensemble's bundle, and the submission with it."""
    folder, selection = job.mirror.home.folder, chosen.selection
    total = sum(selection.picks)
    models = [
        (outoffold.load(source, times / total / len(candidate.sources)), candidate.trial)
        for candidate, times in zip(chosen.candidates, selection.picks, strict=True)
        for source in candidate.sources * bool(times)
    ]
    known = {**describe(job, chosen), **facts, "models": len(models)}
    fresh = ensemble_bundle.stage(folder, models, selection.chosen, known)
    codes = inference.segment(fresh, job.data.test, selection.chosen, gpus=job.settings.gpus)
    ensemble_bundle.write_card(fresh)
    # The folder first: a submission is never of an ensemble that is not there.
    publish(fresh)
    submission.write(folder / "submission.csv", job.data.ids, codes)
    return checkpoint.load_metrics(folder / storage.ENSEMBLE)


def in_words(facts: dict[str, Any]) -> dict[str, str]:
    """Write what is known of an ensemble in words, by the names of the end table's lines."""
    lines = {}
    if "models" in facts:
        used = [f"{escape(c['name'])} ({c['weight']:.2f})" for c in facts["candidates"] if c["weight"]]
        lines["ensemble"] = f"{counted(facts['models'], 'model')}, by weight of {', '.join(used)}"
        where = f"{facts['folds']} folds, out of fold" if facts["folds"] else "the validation tiles"
        folds = ", ".join(f"{value:.4f}" for value in facts["by_fold"])
        lines["its mAP"] = (
            f"[bold]{facts['cross_fitted']:.4f}[/] ± {facts['spread']:.4f} cross-fitted on {where} "
            f"({folds}); {facts['in_sample']:.4f} {Postprocessing.of(facts)}, where that was chosen"
        )
        if lone := facts.get("lone"):
            lines["on lone tiles"] = (
                f"{lone['map']:.4f} likewise, on those {lone['tiles']:,} without a neighbour in training"
            )
        if "pseudo_labels" in facts:
            lines["pseudo-labels"] = ensemble.pseudo_labels_in_words(facts["pseudo_labels"])
    left = [f"{facts[name]} {name}" for name in ("waiting", "failed") if facts.get(name)]
    if more := facts.get("trials_left"):
        left.append(f"not before the search's end: {counted(more, 'more trial')}, or a lower --trials")
    if left:
        lines["refits"] = f"[yellow]{', '.join(left)}[/]"
    return lines
