"""Folds, refits, ensembles and pseudo-labels: on a Ray of the tests' own, and as a whole program."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray.data
import torch
from PIL import Image

from saltray import demo
from saltray.config import IGNORED, ModelConfig, TrialConfig
from saltray.contest import rle
from saltray.data import dataset, folds, splitting
from saltray.ensembles import ensemble_bundle, outoffold, pseudo
from saltray.ensembles.outoffold import Candidate, Source
from saltray.network.model import build_model
from saltray.prediction import inference
from saltray.prediction.inference import Model
from saltray.prediction.postprocessing import Postprocessing
from saltray.records.study import Place, count, load_study
from saltray.sessions import blend
from saltray.training import checkpoint
from tests.integration.programs import Program, check_submission, close, epochs_in, search_arguments

pytestmark = pytest.mark.timeout(900)

CONFIG = TrialConfig(model=ModelConfig(filters=2, levels=1, dropout=0))


def read(tiles: ray.data.Dataset) -> dict[str, Any]:
    batches: list[Any] = list(tiles.iter_batches(batch_size=None))
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


@pytest.fixture(scope="module")
def labelled(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> ray.data.Dataset:
    data = demo.write(tmp_path_factory.mktemp("demo"), demo.files(train=30, test=6, seed=3))
    table = dataset.read_train(dataset.open_folder(str(data)))
    fold = splitting.stratified_folds(table.rows["coverage"], 5, 1)
    parts = [dataset.decode(table.where(where))[0] for where in (fold != 0, fold == 0)]
    return folds.join(parts)


def cut(labelled: ray.data.Dataset, number: int) -> list[ray.data.Dataset]:
    """Cut tiles into folds as a search with seed 1 would."""
    known = pd.DataFrame({name: read(labelled)[name] for name in ("row", "coverage")}).sort_values("row")
    fold = splitting.stratified_folds(known["coverage"], number, 1)
    return folds.split(labelled, pd.Series(fold, index=known["row"]))


def save(folder: Path, bias: float | None, seed: int = 0) -> Source:
    """Save a model of random weights, or one that has this logit everywhere."""
    torch.manual_seed(seed)
    weights = build_model(CONFIG.model).state_dict()
    if bias is not None:
        weights["head.weight"] *= 0
        weights["head.bias"][:] = bias
    folder.mkdir()
    checkpoint.save(folder, weights, CONFIG, {})
    return Source(str(folder))


@pytest.mark.parametrize("number", [2, 5])
def test_folds_hold_every_tile_once_and_share_their_blocks(labelled: ray.data.Dataset, number: int) -> None:
    every, parts = read(labelled), cut(labelled, number)
    known = [read(part) for part in parts]
    assert [tuple(part) for part in known] == [folds.COLUMNS] * number
    rows = np.concatenate([part["row"] for part in known])
    assert sorted(rows.tolist()) == list(range(30))
    place = {row: i for i, row in enumerate(every["row"].tolist())}
    for part in known:
        for name in folds.COLUMNS:
            np.testing.assert_array_equal(part[name], every[name][[place[r] for r in part["row"].tolist()]])
    if number == 5:  # the search's own split
        assert known[0]["row"].tolist() == every["row"][-6:].tolist()
    blocks = [set(part.to_arrow_refs()) for part in parts]
    for fold in range(number):
        rest = folds.others(parts, fold)
        assert not set(read(rest)["row"].tolist()) & set(known[fold]["row"].tolist())
        assert rest.count() + parts[fold].count() == 30
        # The object store holds each tile once, however many folds train on it.
        assert set(rest.to_arrow_refs()) == set().union(*(b for k, b in enumerate(blocks) if k != fold))


def test_each_tile_is_predicted_by_the_model_that_never_saw_it(
    labelled: ray.data.Dataset, tmp_path: Path
) -> None:
    parts = cut(labelled, 3)
    biases = [[-1.0, 0.5, 2.0], [3.0, -3.0, 1.0]]
    candidates = [
        Candidate(c, f"trial {c}", tuple(save(tmp_path / f"{c}-{k}", b) for k, b in enumerate(row)))
        for c, row in enumerate(biases)
    ]
    known = outoffold.predict(parts, candidates, seed=0, gpus=False)
    assert known.probability.shape == (2, 2, 30, 101, 101) and known.probability.dtype == np.uint8
    tiles = [read(part) for part in parts]
    assert known.fold.tolist() == [k for k, part in enumerate(tiles) for _ in part["row"]]
    np.testing.assert_array_equal(known.truth, np.concatenate([part["mask"] for part in tiles]) > 0)
    for c, row in enumerate(biases):
        for fold, bias in enumerate(row):
            expected = round(255 / (1 + np.exp(-bias)))
            assert (known.probability[c][:, known.fold == fold] == expected).all()


def test_without_folds_one_part_is_cross_fitted_in_five(labelled: ray.data.Dataset, tmp_path: Path) -> None:
    source = save(tmp_path / "model", None)
    network, tiles = checkpoint.load_model(Path(source.path)), read(labelled)
    known = outoffold.predict([labelled], [Candidate(0, "trial 0", (source,))], seed=0, gpus=False)
    pixels = torch.from_numpy(tiles["image"].astype(np.float32))[:, None] / 255
    with torch.inference_mode():
        views = [network(pixels).sigmoid(), network(pixels.flip(3)).flip(2).sigmoid()]
    for view, salt in enumerate((views[0], (views[0] + views[1]) / 2)):
        np.testing.assert_allclose(known.probability[0, view] / 255, salt.numpy(), atol=0.51 / 255)
    assert np.bincount(known.fold).tolist() == [6] * 5


def test_an_ensemble_is_the_weighted_mean_and_one_member_is_that_model(
    labelled: ray.data.Dataset, tmp_path: Path
) -> None:
    sources = [save(tmp_path / name, None, seed) for name, seed in (("a", 1), ("b", 2))]
    chosen = Postprocessing(0.5, True, 3)
    alone = inference.segment(Path(sources[0].path), labelled, chosen, gpus=False)
    folder = ensemble_bundle.stage(tmp_path, [(outoffold.load(sources[0]), 4)], chosen, {})
    assert inference.stored_postprocessing(folder) == chosen
    assert inference.segment(folder, labelled, chosen, gpus=False) == alone
    assert inference.segment(folder, labelled, Postprocessing(0.44), gpus=False) == inference.segment(
        Path(sources[0].path), labelled, Postprocessing(0.44), gpus=False
    )
    pair = [(outoffold.load(source, share), 0) for source, share in zip(sources, (0.25, 0.75), strict=True)]
    folder = ensemble_bundle.stage(tmp_path, pair, chosen, {})
    predictor = inference.Predictor(inference.load_models(folder), 1)
    batch = {name: column[:4] for name, column in read(labelled).items()}
    singles = [inference.Predictor([outoffold.load(source)], 1) for source in sources]
    for tta in (False, True):
        salt = [1 / (1 + np.exp(-single.logits(batch, tta).astype(float))) for single in singles]
        mean = 0.25 * salt[0] + 0.75 * salt[1]
        logits = predictor.logits(batch, tta).astype(float)
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), mean, atol=1e-6)


def test_a_folds_pseudo_labels_come_of_models_that_never_saw_it(
    labelled: ray.data.Dataset, tmp_path: Path
) -> None:
    # Fold 0's model says no salt everywhere, fold 1's says salt, a third candidate would spoil both.
    both = Candidate(0, "trial 0", (save(tmp_path / "a", -9), save(tmp_path / "b", 9)))
    other = Candidate(1, "trial 1", (save(tmp_path / "c", 9), save(tmp_path / "d", -9)))
    candidates, picks = [both, other], [(1, 0), (2, 0)]
    test = labelled.drop_columns(["mask", "coverage"]).materialize()
    label = partial(blend.label_for, test=test, candidates=candidates, most=10**6, gpus=False)
    labels = [read(label(fold, picks=picks[fold])) for fold in (0, 1)]
    assert [np.unique(tiles["mask"]).tolist() for tiles in labels] == [[0], [1]]
    assert (labels[1]["row"] >= pseudo.FIRST_ROW).all() and len(labels[1]["row"]) == 30
    # They are trained on, beside the other folds, and never judged.
    parts = cut(labelled, 2)
    training = folds.join([folds.others(parts, 0), label(0, picks=picks[0])])
    rows = set(read(training)["row"].tolist())
    assert len(rows) == training.count() == parts[1].count() + 30
    assert not rows & set(read(parts[0])["row"].tolist())


def test_where_the_models_are_unsure_no_tile_is_labelled(labelled: ray.data.Dataset, tmp_path: Path) -> None:
    source = save(tmp_path / "unsure", 0.5)
    model = outoffold.load(source)
    none = pseudo.label_tiles(labelled, [Model(model.config, model.weights, 1.0)], 10**6, gpus=False)
    assert none.count() == 0
    parts = cut(labelled, 2)
    training = folds.join([folds.others(parts, 0), none])
    assert training.count() == parts[1].count()
    assert IGNORED not in read(training)["mask"]


def refits_of(run: Path) -> Place:
    """Return where the refits on two folds are."""
    return Place(run, name="saltray folds-2")


SURE_SPACE = """
def space(trial):
    return {
        "model": {"filters": trial.suggest_int("filters", 1, 3) + 2, "levels": 1, "dropout": 0.0},
        "optim": {"learning_rate": 5e-2},
        "batch_size": 4,
    }
"""


@pytest.fixture
def easy(files: Path, tmp_path: Path) -> Path:
    """A folder of tiles that are white where there is salt and black elsewhere: models are soon sure."""
    folder = Path(shutil.copytree(files, tmp_path / "easy"))
    (folder / "space.py").write_text(SURE_SPACE)
    for part, table in (("train", folder / "data" / "train.csv"), ("test", folder / "truth.csv")):
        for row in pd.read_csv(table, keep_default_na=False).itertuples():
            pixels = 255 * rle.decode(str(row.rle_mask)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / part / "images" / f"{row.id}.png")
    return folder


def test_ctrl_c_among_the_refits_still_ends_with_the_best_models_submission(
    start: type[Program], files: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    program = start(*search_arguments(files, run, "--trials", "1", "--epochs", "30", "--folds", "2"))
    program.wait_until(lambda: epochs_in(refits_of(run)) >= 2)
    program.process.send_signal(signal.SIGINT)
    told = program.finish()
    assert f"--resume {run}" in told and "Traceback" not in told
    check_submission(run, files)
    assert not (run / "ensemble").exists()
    study = load_study(refits_of(run))
    assert count(study).waiting > 0 and count(study).failed == 0
    close(study)


def test_folds_ensemble_and_pseudo_labels_killed_and_resumed(
    start: type[Program], easy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ("--trials", "2", "--epochs", "6", "--folds", "2", "--ensemble", "2")
    program = start(*search_arguments(easy, run, *more))
    program.wait_until(lambda: epochs_in(refits_of(run)) >= 4)
    program.process.send_signal(signal.SIGKILL)
    program.end()
    check_submission(run, easy)  # the best model's, from before the refits
    before = {t.number: t.datetime_complete for t in load_study(run).trials}
    study = load_study(refits_of(run))
    done = {t.number: dict(t.intermediate_values) for t in study.trials}
    close(study)

    told = start("saltray.tune", "--resume", run, "--pseudo-labels").finish()
    assert "cross-fitted on 2 folds" in told and "pseudo-labels" in told
    check_submission(run, easy)
    assert {t.number: t.datetime_complete for t in load_study(run).trials} == before
    study = load_study(refits_of(run))
    assert count(study).complete == 4 == len(study.trials)
    for trial in study.trials:
        assert sorted(trial.intermediate_values) == [1, 2, 3, 4, 5, 6]
        assert done[trial.number].items() <= trial.intermediate_values.items()
    facts = json.loads((run / "ensemble" / "metrics.json").read_text())
    assert facts["folds"] == 2 and len(facts["by_fold"]) == 2
    assert facts["cross_fitted"] == pytest.approx(np.mean(facts["by_fold"]))
    assert facts["pseudo_labels"]["finished"] and min(facts["pseudo_labels"]["tiles"]) > 0
    assert facts["pseudo_labels"]["without"] <= facts["cross_fitted"]
    assert f"{facts['cross_fitted']:.4f}" in (run / "report.html").read_text()
    assert f"{facts['cross_fitted']:.4f}" in (run / "ensemble" / "README.md").read_text()

    # The ensemble's folder alone gives the run's submission.
    alone, copy = tmp_path / "alone.csv", Path(shutil.copytree(run / "ensemble", tmp_path / "copy"))
    start("saltray.predict", copy, "--data", easy / "data", "--out", alone).finish()
    assert alone.read_bytes() == (run / "submission.csv").read_bytes()
