import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saltray.config import DEBUG, ModelConfig, TrialConfig, UserError
from saltray.network.model import EncoderDecoder, build_model
from saltray.network.optim import build_optimizer
from saltray.training import checkpoint

CONFIG = DEBUG.model_copy(update={"model": ModelConfig(architecture="resunet", filters=2, levels=2)})
METRICS = {"best_map": 0.75, "best_epoch": 2, "history": [0.5, 0.75]}
LOADERS: dict[str, Callable[[Path], Any]] = {
    checkpoint.WEIGHTS: checkpoint.load_weights,
    checkpoint.CONFIG: checkpoint.load_config,
    checkpoint.METRICS: checkpoint.load_metrics,
    checkpoint.TRAINING: checkpoint.load_training,
}


def trained() -> tuple[EncoderDecoder, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_model(CONFIG.model).train()
    optimizer = build_optimizer(model.parameters(), CONFIG.optim)
    model(torch.rand(2, 1, 21, 21)).mean().backward()  # BatchNorm statistics and Adam's moments to save
    optimizer.step()
    return model, optimizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": [0.5, 0.75]}
    checkpoint.save(tmp_path, model.state_dict(), CONFIG, METRICS, state)
    return tmp_path


def test_the_folder_alone_rebuilds_the_model(folder: Path) -> None:
    model, _ = trained()
    loaded = checkpoint.load_model(folder)
    assert not loaded.training
    images = torch.rand(2, 1, 101, 101)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in checkpoint.load_weights(folder).items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name


def test_config_and_metrics_come_back(folder: Path) -> None:
    assert checkpoint.load_config(folder) == CONFIG
    assert checkpoint.load_metrics(folder) == METRICS


def test_training_state_goes_on_where_it_stopped(folder: Path) -> None:
    model, optimizer = trained()
    state = checkpoint.load_training(folder)
    assert state["history"] == [0.5, 0.75]
    resumed = build_model(CONFIG.model)
    resumed.load_state_dict(state["model"])
    resumed_optimizer = build_optimizer(resumed.parameters(), CONFIG.optim)
    resumed_optimizer.load_state_dict(state["optimizer"])
    images = torch.rand(2, 1, 21, 21)
    for network, adam in ((model, optimizer), (resumed.train(), resumed_optimizer)):
        torch.manual_seed(1)
        adam.zero_grad()
        network(images).square().mean().backward()
        adam.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)


def test_a_finished_trial_leaves_no_training_state(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained()[0].state_dict(), CONFIG, METRICS)
    assert {file.name for file in tmp_path.iterdir()} == {
        "weights.safetensors",
        "config.json",
        "metrics.json",
    }
    checkpoint.load_model(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"training\.pt: no such file"):
        checkpoint.load_training(tmp_path)


def test_saving_again_replaces_the_files(folder: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in trained()[0].state_dict().items()}
    checkpoint.save(folder, zeros, CONFIG, {"best_map": 0.9}, {"history": [0.9]})
    assert not any(tensor.any() for tensor in checkpoint.load_weights(folder).values())
    assert checkpoint.load_metrics(folder) == {"best_map": 0.9}
    assert checkpoint.load_training(folder) == {"history": [0.9]}


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no such file; not a complete checkpoint") as error:
        LOADERS[name](folder)
    assert str(error.value).startswith(str(folder / name))
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    content = (folder / name).read_bytes()
    damaged = {"cut": content[: len(content) // 2], "emptied": b"", "overwritten": b"\xff\x00" * 200}
    (folder / name).write_bytes(damaged[damage])
    with pytest.raises(checkpoint.CheckpointError, match="damaged") as error:
        LOADERS[name](folder)
    assert str(error.value).startswith(str(folder / name))


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.METRICS])
@pytest.mark.parametrize("content", ["[1]", "3", "null", '"text"'])
def test_json_that_is_no_object_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(checkpoint.CheckpointError) as error:
        LOADERS[name](folder)
    assert str(error.value).startswith(str(folder / name))


def test_a_config_with_a_wrong_field_is_named(folder: Path) -> None:
    values = CONFIG.to_dict() | {"epochs": -1}
    (folder / checkpoint.CONFIG).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"epochs: .*got -1"):
        checkpoint.load_config(folder)
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json"):
        checkpoint.load_config(folder)


@pytest.mark.parametrize(
    "other",
    [
        ModelConfig(architecture="resunet", filters=3, levels=2),
        ModelConfig(architecture="resunet", filters=2, levels=3),
        ModelConfig(architecture="unet", filters=2, levels=2),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(folder: Path, other: ModelConfig) -> None:
    values = TrialConfig(model=other).to_dict()
    (folder / checkpoint.CONFIG).write_text(json.dumps(values))
    with pytest.raises(checkpoint.CheckpointError, match=r"weights\.safetensors: does not fit config\.json"):
        checkpoint.load_model(folder)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_the_training_state_is_not_run(folder: Path, archive: bool) -> None:
    marker, file = folder / "executed", folder / checkpoint.TRAINING
    payload = {"history": Malicious(marker)}
    if archive:
        torch.save(payload, file)
        torch.load(file, weights_only=False)
    else:
        file.write_bytes(pickle.dumps(payload))
        pickle.loads(file.read_bytes())
    assert marker.exists()  # the payload works where it is let
    marker.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"training\.pt"):
        checkpoint.load_training(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", [checkpoint.WEIGHTS, checkpoint.CONFIG, checkpoint.METRICS, checkpoint.TRAINING]
)
def test_a_half_written_checkpoint_is_told_as_such(tmp_path: Path, name: str) -> None:
    model = build_model(CONFIG.model)
    checkpoint.save(tmp_path, model.state_dict(), CONFIG, {"history": [0.5]}, {"history": [0.5]})
    checkpoint.check(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(checkpoint.CheckpointError, match=name):
        checkpoint.check(tmp_path)


@pytest.mark.parametrize("lost", [checkpoint.TRAINING, checkpoint.SNAPSHOT.format(2)])
def test_a_checkpoint_that_lost_a_file_is_not_taken_for_a_finished_trial(tmp_path: Path, lost: str) -> None:
    weights = build_model(CONFIG.model).state_dict()
    known = {"history": [0.5], "finished": False, "snapshots": 2}
    checkpoint.save(tmp_path, weights, CONFIG, known, {"history": [0.5]}, [weights, weights])
    checkpoint.check(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="not a complete checkpoint"):
        checkpoint.check(tmp_path)
