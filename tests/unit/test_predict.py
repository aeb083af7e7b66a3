"""What `saltray.predict` does without Ray: what it asks of the tiles, and what its actors make of them."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import ray
import torch

from saltray import connection, demo, predict
from saltray.config import TILE, ModelConfig, TrialConfig, UserError
from saltray.data import dataset
from saltray.network.model import build_model
from saltray.prediction import inference, members
from saltray.training import checkpoint


class RayStarted(Exception):
    """The work begins."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A survey without depths."""
    folder = demo.write(tmp_path, demo.files(train=10, test=4, seed=3))
    (folder / "depths.csv").unlink()
    return folder


def make_model(folder: Path, depth: bool) -> Path:
    torch.manual_seed(4)
    config = TrialConfig(model=ModelConfig(filters=2, levels=1, dropout=0, depth=depth))
    folder.mkdir(parents=True)
    checkpoint.save(folder, build_model(config.model).state_dict(), config, {"threshold": 0.5})
    return folder


def make_ensemble(folder: Path, depth: list[bool]) -> Path:
    for number, takes_depth in enumerate(depth):
        make_model(folder / f"members/{number:02d}", takes_depth)
    members.write(folder, {f"members/{number:02d}": 1 / len(depth) for number in range(len(depth))})
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.mark.parametrize("depth", [[False], [True], [False, False], [False, True]])
def test_a_model_that_takes_the_depth_needs_depths(
    depth: list[bool], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(address: str | None) -> None:
        raise RayStarted

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection, "connect", connect)
    monkeypatch.setattr(connection, "disconnect", lambda: None)
    folder = tmp_path / "model"
    model = make_ensemble(folder, depth) if len(depth) > 1 else make_model(folder, depth[0])
    with pytest.raises(UserError if any(depth) else RayStarted) as caught:
        predict.main(str(model), str(data), str(tmp_path / "out.csv"))
    if any(depth):
        assert f"{data}/depths.csv: no such file; {model} takes the depth" in str(caught.value)
        (data / "depths.csv").write_text("id,z\n" + "".join(f"test{i:06d},9\n" for i in range(10, 14)))
        with pytest.raises(RayStarted):
            predict.main(str(model), str(data), str(tmp_path / "out.csv"))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.5])
def test_a_threshold_is_a_probability(threshold: float, data: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", depth=False)
    with pytest.raises(UserError, match=f"--threshold {threshold}: must lie between 0 and 1"):
        predict.main(str(model), str(data), str(tmp_path / "out.csv"), threshold=threshold)


def test_a_model_that_ignores_the_depth_predicts_tiles_without_one(data: Path, tmp_path: Path) -> None:
    tiles, problems = dataset.decode_local(dataset.read_test(dataset.open_folder(str(data))))
    assert problems == {} and np.isnan(tiles["z"]).all()
    models = inference.load_models(make_model(tmp_path / "model", depth=False))
    predictor = inference.Predictor(models, torch.get_num_threads())
    logits = predictor.logits(tiles, tta=True)
    assert logits.shape == (4, TILE, TILE) and np.isfinite(logits).all()
    np.testing.assert_array_equal(
        logits, predictor.logits(tiles | {"z": np.full(4, 500, np.float32)}, tta=True)
    )


@pytest.mark.parametrize(("gpus", "actors", "asked"), [(True, 2, (None, 1)), (False, 4, (1, None))])
def test_gpus_are_left_alone_where_they_may_not_be_used(
    gpus: bool, actors: int, asked: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr(ray, "put", lambda models: models)
    tiles = Mock(count=lambda: 10_000)
    inference.map_tiles(inference.Calibrator, [], tiles, {}, gpus=gpus)
    given = tiles.map_batches.call_args.kwargs
    assert (given["num_cpus"], given["num_gpus"]) == asked
    assert given["compute"].min_size == actors
    assert given["fn_constructor_kwargs"]["gpu"] is gpus
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = inference.Predictor([], 1, gpu=gpus).device
    assert device.type == ("cuda" if gpus else "cpu")


def test_a_run_without_a_model_is_told_from_no_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").touch()
    for name, words in (
        ("begun", r"no model in it yet\. First: .*--resume .*begun"),
        ("absent", "no such folder"),
    ):
        with pytest.raises(UserError, match=f"{tmp_path / name}: {words}"):
            predict.main(str(tmp_path / name), str(data), str(tmp_path / "out.csv"))
