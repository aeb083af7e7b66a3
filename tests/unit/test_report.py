import json
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from saltray import report
from saltray.config import NEIGHBOURS, Split, UserError
from saltray.prediction import validation
from saltray.quiet import quiet
from saltray.records import run, storage
from saltray.records.settings import as_options
from saltray.records.study import load_study, nondominated, score
from saltray.reporting import sections, tile_figures, trial_figures
from tests.runs import START, make_run, make_trial
from tests.unit.contrast import LEAST, contrasts

TITLES = [
    "Result", "Best configuration", "Validation tiles", "Salt, depth and score", "Threshold",
    "Training of the best", "History of the best", "Learning curves", "Parallel coordinates",
    "Importance of the parameters", "Score by parameter", "Timeline", "Trials", "Environment",
]  # fmt: skip


@pytest.fixture
def trials() -> list[FrozenTrial]:
    """A trial in every state, some with a parameter of their own."""
    complete = [
        make_trial(
            TrialState.COMPLETE, [0.4, 0.5 + i / 50, 0.6 + i / 100], rate=10.0 ** (-1 - i), blocks=i or None
        )
        for i in range(5)
    ]
    stopped = [make_trial(TrialState.PRUNED, [0.39, 0.4 + i / 100], host="node-b") for i in range(6)]
    failed = make_trial(TrialState.FAIL, [], reason="OSError: <script>alert(1)</script>")
    return [
        *complete,
        *stopped,
        failed,
        make_trial(TrialState.RUNNING, [0.3]),
        make_trial(TrialState.WAITING, []),
    ]


def told(folder: Path) -> tuple[dict[str, str], str]:
    """Write a report; return what is read in each section, and the whole HTML."""
    with quiet(None):
        html = report.write(folder).read_text()
    parts = re.findall(r'<section id="section-\d+">\s*<h2>(.*?)</h2>(.*?)</section>', html, re.DOTALL)
    without_scripts = {
        title: re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL) for title, text in parts
    }
    return {title: unescape(re.sub(r"<[^>]+>", " ", text)) for title, text in without_scripts.items()}, html


def change_settings(folder: Path, **settings: Any) -> None:
    """Write other settings into a run's folder."""
    content = json.loads((folder / "run.json").read_text())
    content["settings"] |= settings
    (folder / "run.json").write_text(json.dumps(content))


def test_a_run_tells_everything(tmp_path: Path, trials: list[FrozenTrial]) -> None:
    folder = make_run(tmp_path, trials, predicted=True)
    text, html = told(folder)
    assert list(text) == TITLES
    assert not [title for title, words in text.items() if "Nothing yet" in words or "This needs" in words]
    assert html.count('class="plotly-graph-div"') == 10 + len(trial_figures.slices(trials))
    assert html.count("<img") == len(np.load(folder / "gallery.npz")["id"]) > 10
    assert "trial 4, complete after 3 epochs" in text["Result"]
    assert "It is trial 0, the best when it was last predicted" in text["Result"]
    assert "blocks 4" in text["Best configuration"]
    assert "OSError: <script>alert(1)</script>" in text["Trials"]
    assert "<script>alert" not in html
    assert "abc123" in text["Environment"]
    assert "secret" not in html
    assert ":pw@" not in html


def test_the_environment_has_the_whole_command(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [])
    change_settings(
        folder,
        **{
            "searcher": "gp",
            "scheduler": "none",
            "split": "neighbours",
            "workers_per_trial": 2,
            "patience": 4,
        },
        **{"skip_bad": True, "folds": 3, "warm_start": "s3://me@bucket/run"},
    )
    words = " ".join(told(folder)[0]["Environment"].split())
    options = as_options(run.read_settings(folder), folder.resolve() / "space.py")
    assert f"python -m saltray.tune {options.replace(':secret@', ':***@')} tiles 0," in words
    for option in ("--searcher gp", "--skip-bad", "--seed 7", "s3://me@bucket/run"):
        assert option in words


@pytest.mark.parametrize("split", ["coverage", "neighbours"])
def test_neighbours_flatter_only_where_the_split_parts_them(tmp_path: Path, split: Split) -> None:
    folder = make_run(tmp_path, [])
    change_settings(folder, split=split)
    result = told(folder)[0]["Result"]
    assert NEIGHBOURS[split] in result
    assert ("flatters" in result) == (split == "coverage")


@pytest.mark.parametrize(
    ("states", "empty"),
    [
        ([], set(TITLES) - {"Result", "Environment"}),
        ([(TrialState.FAIL, [])], set(TITLES) - {"Result", "Environment", "Trials", "Timeline"}),
        (
            [(TrialState.RUNNING, [0.4])],
            {"Validation tiles", "Salt, depth and score", "Threshold", "Parallel coordinates",
             "Importance of the parameters", "Score by parameter"},
        ),
        (
            [(TrialState.PRUNED, [0.4]), (TrialState.PRUNED, [0.4])],
            {"Validation tiles", "Salt, depth and score", "Threshold", "Importance of the parameters"},
        ),
    ],
)  # fmt: skip
def test_a_section_without_anything_says_why(
    tmp_path: Path,
    states: Sequence[tuple[TrialState, list[float]]],
    empty: set[str],
) -> None:
    text, _ = told(make_run(tmp_path, [make_trial(state, scores) for state, scores in states]))
    assert list(text) == TITLES
    assert {
        title for title, words in text.items() if "Nothing yet" in words or "This needs" in words
    } == empty


def test_scores_are_drawn_before_their_epochs_have_rows(tmp_path: Path) -> None:
    text, _ = told(make_run(tmp_path, [make_trial(TrialState.COMPLETE, [0.4, 0.3, 0.5], epochs=[])] * 2))
    assert "no record of its epochs" in text["Training of the best"]
    assert "Nothing yet" not in text["Learning curves"]


def ensemble_facts(**more: Any) -> dict[str, Any]:
    """The metrics of an ensemble of three models."""
    facts: dict[str, Any] = {"folds": 2, "in_sample": 0.7654, "cross_fitted": 0.7412, "spread": 0.0123}
    facts |= {"by_fold": [0.7325, 0.7499], "models": 6, "threshold": 0.46, "tta": True, "min_area": 20}
    scores = {"trial 3": [0.71, 0.72], "trial 0": [0.6, 0.61]}
    facts["candidates"] = [
        {"name": name, "trial": 0, "weight": weight, "by_fold": by_fold}
        for weight, (name, by_fold) in zip((2 / 3, 1 / 3), scores.items(), strict=True)
    ]
    facts["scores"] = {"0.46": 0.7654, "0.50": 0.76}
    facts["path"] = [{"added": "trial 3", "score": 0.71}, {"added": "trial 0", "score": 0.73}]
    return facts | more


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "2 times each, every time without one fold"),
        ({"lone": {"tiles": 2951, "map": 0.7355}}, "0.7355, likewise, on those 2,951 tiles that have no"),
        ({"folds": None}, "judged on its validation tiles"),
        (
            {
                "pseudo_labels": {
                    "finished": True,
                    "used": True,
                    "tiles": [7, 8],
                    "with": 0.75,
                    "without": 0.74,
                }
            },
            "used: cross-fitted 0.7500 with them, 0.7400 without. Test tiles by fold: 7, 8.",
        ),
        ({"pseudo_labels": {"finished": False, "used": False, "tiles": [7, 8]}}, "not yet"),
        ({"pseudo_labels": {"finished": True, "used": False, "tiles": [0, 0]}}, "not sure of any test tile"),
    ],
)
def test_an_ensemble_has_its_section(
    tmp_path: Path, trials: list[FrozenTrial], more: dict[str, Any], words: str
) -> None:
    folder = make_run(tmp_path, trials)
    (folder / "ensemble").mkdir()
    (folder / "ensemble" / "metrics.json").write_text(json.dumps(ensemble_facts(**more)))
    text, html = told(folder)
    section = " ".join(text["Folds and ensemble"].split())
    assert words in section
    for known in ("0.7412 ± 0.0123", "(0.7325, 0.7499)", "0.7654", "0.46", "0.6667", "0.715", "20 pixels"):
        assert known in section
    assert "chose these configurations on one split" in section
    assert "0.7412" in text["Result"] and "not the best trial's" in text["Result"]
    assert ("never saw them" in text["Result"]) == (more.get("folds", 2) is not None)
    assert html.count('class="plotly-graph-div"') > 0


def test_what_is_not_the_ensembles_says_so(tmp_path: Path, trials: list[FrozenTrial]) -> None:
    folder = make_run(tmp_path, trials, predicted=True)
    titles = ("Validation tiles", "Salt, depth and score", "Threshold")
    assert not any("the submission is" in told(folder)[0][title] for title in titles)
    (folder / "ensemble").mkdir()
    (folder / "ensemble" / "metrics.json").write_text(json.dumps(ensemble_facts()))
    assert all("the submission is the ensemble's" in told(folder)[0][title] for title in titles)


def test_an_ensemble_that_is_still_to_come_is_told(tmp_path: Path, trials: list[FrozenTrial]) -> None:
    folder = make_run(tmp_path, trials)
    change_settings(folder, folds=5)
    assert "still to come" in told(folder)[0]["Folds and ensemble"]


def test_two_objectives_have_a_front(tmp_path: Path) -> None:
    several = [make_trial(TrialState.COMPLETE, [v], values=[v, 100 * (1 - v)]) for v in (0.3, 0.5, 0.4)]
    text, _ = told(make_run(tmp_path, several, objective="map+speed"))
    assert "Pareto front" in text["Score and speed"]


def test_the_pareto_front_holds_what_nothing_beats_in_both() -> None:
    rng = np.random.default_rng(0)
    study = optuna.create_study(directions=["maximize", "maximize"])
    study.add_trials(
        [make_trial(TrialState.COMPLETE, [v[0]], values=v) for v in rng.random((20, 2)).tolist()]
    )
    beaten, front = (
        {(x, y) for x, y in zip(trace.x, trace.y, strict=True)}
        for trace in trial_figures.pareto_front(study, study.trials).data
    )
    for point in beaten | front:
        better = [p for p in beaten | front if p != point and p[0] >= point[0] and p[1] >= point[1]]
        assert (point in front) == (not better)


def test_the_front_knows_nothing_of_another_runs_speeds() -> None:
    study = optuna.create_study(directions=["maximize", "maximize"])
    other = make_trial(TrialState.COMPLETE, [0.9], values=[0.9, 900.0])
    other.set_user_attr("adopted", "runs/before")
    study.add_trials([other, make_trial(TrialState.COMPLETE, [0.5], values=[0.5, 50.0])])
    assert [t.number for t in nondominated(study)] == [1]


def test_a_run_without_salt_or_depth_has_a_report(tmp_path: Path, trials: list[FrozenTrial]) -> None:
    folder = make_run(tmp_path, trials, predicted=True)
    table = validation.tabulate(["a", "b"], [0, 0], [0, 0], [0, 0], [np.nan, np.nan])
    validation.write(folder, table, validation.no_gallery())
    text, _ = told(folder)
    assert "No validation tile holds salt" in text["Validation tiles"]
    assert "depth" not in text["Validation tiles"]
    assert "by the depth" not in text["Salt, depth and score"]


def test_results_of_another_run_are_not_this_runs(tmp_path: Path) -> None:
    other = make_trial(TrialState.COMPLETE, [0.9], adopted="runs/other trial 3")
    text, _ = told(make_run(tmp_path, [other, make_trial(TrialState.COMPLETE, [0.5])]))
    assert "0.5000" in text["Result"]
    assert "taken over from another run, and not shown here: 1" in text["Result"]
    assert "0.9" not in text["Trials"]


def test_only_the_runs_own_report_is_replaced(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [])
    assert report.write(folder) == report.write(folder) == folder / "report.html"
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    with pytest.raises(UserError, match=r"taken\.html: already there"):
        report.main(str(folder), str(taken), None)
    assert taken.read_text() == "mine"
    report.main(str(folder), str(tmp_path / "new" / "report.html"), None)
    assert (tmp_path / "new" / "report.html").is_file()


def test_the_report_of_a_run_behind_a_uri_goes_there_alone_also_while_a_session_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bucket").mkdir()
    bucket = make_run(tmp_path / "bucket", [make_trial(TrialState.COMPLETE, [0.25])])
    uri = f"file://{bucket}"
    report.main(uri, None, None)
    assert capsys.readouterr().out == f"report: {uri}/report.html\n"
    first = (bucket / "report.html").read_text()
    assert "<title>Search run</title>" in first and "0.2500" in first
    folder, known = storage.home(uri).folder, (bucket / "study.db").read_bytes()
    load_study(folder).add_trial(make_trial(TrialState.COMPLETE, [0.75]))
    with run.locked(folder):  # as a session has it, which has not copied its last trial yet
        (folder / storage.UNSENT).touch()
        report.main(uri, None, None)
    assert "0.7500" in (bucket / "report.html").read_text()
    assert (bucket / "study.db").read_bytes() == known


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", json.dumps({"format": 99}), "newer saltray"),
        ("run.json", "{", r"run\.json: damaged"),
        ("study.db", "no database", r"study\.db: damaged"),
        ("validation.csv", "no table", r"validation\.csv: damaged"),
        ("best/metrics.json", "{", r"metrics\.json: damaged"),
    ],
)
def test_what_is_damaged_is_named_and_an_old_report_stays(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    folder = make_run(tmp_path, [], predicted=True)
    before = report.write(folder).read_text()
    (folder / file).write_text(content)
    with quiet(None), pytest.raises(UserError, match=message):
        report.write(folder)
    assert (folder / "report.html").read_text() == before


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        report.write(tmp_path)


def test_a_history_of_one_trial_is_drawn_around_it() -> None:
    layout = trial_figures.history([_numbered(make_trial(TrialState.COMPLETE, [0.82]), 3)]).layout
    assert layout.xaxis.range == (2.5, 3.5)
    assert layout.yaxis.range == pytest.approx((0.815, 0.825))


def test_a_leap_of_the_loss_is_explained(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [make_trial(TrialState.COMPLETE, [0.4, 0.5])], predicted=True)
    assert "leaps" not in told(folder)[0]["Training of the best"]
    file = folder / "best" / "config.json"
    loss = {"name": "bce", "then": "lovasz_elu", "switch_at": 0.4}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"loss": loss}))
    words = "The loss leaps where lovasz_elu takes the place of bce, after 40% of the epochs."
    assert words in told(folder)[0]["Training of the best"]


def test_the_history_counts_every_score(trials: list[FrozenTrial]) -> None:
    numbered = [_numbered(t, i) for i, t in enumerate(trials)]
    best, *points = trial_figures.history(numbered).data
    expected, top = [], -1.0
    for trial in numbered:
        if trial.intermediate_values:
            top = max(top, score(trial))
            expected.append(top)
    assert list(best.y) == expected
    assert sum(len(p.x) for p in points) == len(expected)


def test_a_line_of_the_parallel_coordinates_has_the_colour_of_its_score() -> None:
    rng = np.random.default_rng(0)
    some = [
        make_trial(TrialState.COMPLETE, [float(rng.random())], blocks=int(rng.integers(1, 5)))
        for _ in range(20)
    ]
    lines = [line for line in trial_figures.parallel_coordinates(some).data if line.mode == "lines"]
    scores = [float(line.customdata[0][1]) for line in lines]
    red = [int(line.line.color.strip("rgb()").split(",")[0]) for line in lines]
    assert sorted(scores) == pytest.approx(sorted(score(t) for t in some), abs=1e-3)
    assert np.argsort(scores).tolist() == np.argsort(red)[::-1].tolist()


def test_the_parameter_that_decides_is_the_most_important() -> None:
    rng = np.random.default_rng(0)
    some = []
    for _ in range(40):
        rate, blocks = 10 ** rng.uniform(-5, -1), int(rng.integers(1, 5))
        near = 1 - abs(np.log10(rate) + 3) / 3
        some.append(make_trial(TrialState.PRUNED, [0.9 * near], rate=rate, blocks=blocks))
    bars = trial_figures.importance(some).data[0]
    shares = dict(zip(bars.y, bars.x, strict=True))
    assert max(shares, key=lambda name: shares[name]) == "rate"
    assert shares["rate"] > 60
    assert sum(shares.values()) == pytest.approx(100)
    assert list(trial_figures.importance(some).data[0].x) == list(bars.x)


def test_importance_stands_a_parameter_that_one_trial_has() -> None:
    some = [make_trial(TrialState.COMPLETE, [i / 20], blocks=1 if i == 3 else None) for i in range(12)]
    assert set(trial_figures.importance(some).data[0].y) == {"architecture", "blocks"}


def test_a_parameter_that_never_varied_has_no_importance(tmp_path: Path) -> None:
    assert trial_figures.varied([make_trial(TrialState.COMPLETE, [0.1])] * 10) == []
    text, _ = told(make_run(tmp_path, [make_trial(TrialState.COMPLETE, [0.1])] * 10))
    assert "No parameter was varied" in text["Importance of the parameters"]


def test_a_redone_epoch_counts_once_as_it_was_done_last() -> None:
    trial = make_trial(TrialState.COMPLETE, [0.1, 0.2])
    rows = trial.user_attrs["epochs"]
    trial.user_attrs["epochs"] = [*rows, rows[1] | {"map": 0.3}]
    assert [row["map"] for row in trial_figures.epochs(trial)] == [0.1, 0.3]


def test_a_trial_that_was_cut_off_or_moved_has_several_stretches() -> None:
    trial = make_trial(TrialState.COMPLETE, [0.1] * 6)
    rows = trial.user_attrs["epochs"]
    for row in rows[2:]:
        row["ended"] = (datetime.fromisoformat(row["ended"]) + timedelta(hours=1)).isoformat()
    for row in rows[4:]:
        row["host"] = "node-b"
    known = [
        (s.host, (s.start - START).total_seconds(), (s.end - START).total_seconds())
        for s in trial_figures.stretches([trial])
    ]
    assert known == [("node-a", 0, 60), ("node-a", 3660, 3720), ("node-b", 3720, 3780)]


def test_no_two_bars_of_the_timeline_lie_on_each_other() -> None:
    rng = np.random.default_rng(0)
    some = [
        make_trial(TrialState.COMPLETE, [0.1] * int(rng.integers(1, 9)), host=f"node-{i % 2}",
                   start=START + timedelta(seconds=int(rng.integers(0, 600))))
        for i in range(30)
    ]  # fmt: skip
    lanes: dict[str, list[tuple[datetime, datetime]]] = {}
    for bar in trial_figures.timeline(trial_figures.stretches(some)).data:
        for lane, start, milliseconds in zip(bar.y, bar.base, bar.x, strict=True):
            lanes.setdefault(lane, []).append((start, start + timedelta(milliseconds=milliseconds)))
    assert sum(map(len, lanes.values())) == 30
    for times in lanes.values():
        ordered = sorted(times)
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))


def test_a_classs_score_agrees_with_an_obvious_loop() -> None:
    values, precision = [0.0, 0.0, 0.1, 10.0, 10.1, 100.0], [1.0, 0.0, 0.5, 0.7, 0.2, 0.9]
    bars = tile_figures.score_by(values, precision, sections.COVERAGES, "salt (%)").data[0]
    known = {name: (mean, int(n)) for name, mean, n in zip(bars.x, bars.y, bars.text, strict=True) if int(n)}
    assert known == {
        "none": (0.5, 2), "0–10": (pytest.approx(0.6), 2), "10–20": (0.2, 1), "90–100": (0.9, 1),
    }  # fmt: skip


def test_figures_of_trials_are_seen_without_their_colours(trials: list[FrozenTrial]) -> None:
    every = [_numbered(t, i) for i, t in enumerate([*trials, make_trial(TrialState.FAIL, [0.3])])]
    curves = trial_figures.learning_curves(every, 4).data
    looks = {(c.name, c.line.dash, c.marker.symbol, c.line.width) for c in curves}
    bars = {
        (b.name, b.marker.color == "white", b.marker.pattern.shape)
        for b in trial_figures.timeline(trial_figures.stretches(every)).data
    }
    for known, outcomes in ((looks, 5), (bars, 4)):
        assert len(known) == len({row[0] for row in known}) == outcomes  # one an outcome
        assert len({row[1:] for row in known}) == outcomes  # and no two alike


def test_figures_are_seen_on_white(trials: list[FrozenTrial]) -> None:
    numbered = [_numbered(t, i) for i, t in enumerate(trials)]
    study = optuna.create_study(directions=["maximize", "maximize"])
    study.add_trials([make_trial(TrialState.COMPLETE, [v], values=[v, v]) for v in (0.3, 0.5)])
    table = validation.tabulate(["a", "b"], [0, 50], [0, 40], [9, 60], [1, 2])
    figures = [
        trial_figures.history(numbered),
        trial_figures.learning_curves(numbered, 4),
        trial_figures.training_curves(trial_figures.epochs(numbered[4])),
        trial_figures.parallel_coordinates(numbered),
        trial_figures.importance(numbered),
        *trial_figures.slices(numbered).values(),
        trial_figures.pareto_front(study, study.trials),
        trial_figures.timeline(trial_figures.stretches(numbered)),
        tile_figures.threshold_curve({"0.40": 0.6, "0.50": 0.7}, 0.5),
        tile_figures.score_by([1.0], [0.5], [0, 2], "salt"),
        tile_figures.coverages(table),
    ]
    for figure in figures:
        assert min(contrasts(figure)) >= LEAST


def _numbered(trial: FrozenTrial, number: int) -> FrozenTrial:
    trial.number = number
    return trial
