from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saltray import checkpoint, metrics, training
from saltray.config import DEBUG, ModelConfig, OptimConfig, TrialConfig
from saltray.losses import LOSSES
from saltray.model import build_model

CPU = torch.device("cpu")
Tiles = dict[str, torch.Tensor]


def make_tiles(count: int, seed: int = 0) -> Tiles:
    """Make tiles whose salt is where they are bright: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(count, 101, 101, dtype=torch.uint8)
    for i in range(count):
        if i % 3:
            top = int(torch.randint(5, 60, (1,), generator=generator))
            mask[i, top : top + 40, 10:90] = 1
    noise = torch.randint(0, 60, mask.shape, generator=generator, dtype=torch.uint8)
    return {"image": mask * 160 + noise, "mask": mask}


def batches(tiles: Tiles, size: int, seed: int | None = None) -> list[Tiles]:
    order = torch.arange(len(tiles["image"]))
    if seed is not None:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    return [{k: v[part] for k, v in tiles.items()} for part in parts]


class Recorder:
    """Keeps the reports; stops the trial after some epoch as a crash would."""

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.folder, self.stop_after = folder, stop_after
        self.reports: list[dict[str, Any]] = []

    def __call__(self, metrics: dict[str, Any], folder: Path | None) -> None:
        self.reports.append(metrics)
        assert folder is not None
        kept = self.folder / str(metrics["epoch"])
        kept.mkdir(parents=True)
        for file in folder.iterdir():
            (kept / file.name).write_bytes(file.read_bytes())
        if metrics["epoch"] == self.stop_after:
            raise KeyboardInterrupt

    def column(self, name: str) -> list[float]:
        return [r[name] for r in self.reports]


TRAIN, VALIDATION = make_tiles(24, 1), make_tiles(10, 2)
CONFIG = TrialConfig(
    model=ModelConfig(filters=2, levels=2, dropout=0.2),
    optim=OptimConfig(learning_rate=2e-2),
    batch_size=8,
    epochs=4,
)


def fit(config: TrialConfig, recorder: Recorder, resume: Path | None = None) -> None:
    training.fit(
        config,
        lambda epoch: batches(TRAIN, config.batch_size, seed=epoch),
        lambda: batches(VALIDATION, 4),
        recorder,
        device=CPU,
        resume=resume,
    )


CLOCK = ("seconds", "tiles_per_second", "validation_tiles_per_second")


def without_clock(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in reports]


def test_loss_falls_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    fit(CONFIG, recorder)
    assert recorder.column("epoch") == [1, 2, 3, 4]
    assert recorder.column("loss")[-1] < 0.7 * recorder.column("loss")[0]
    assert recorder.column("finished") == [False, False, False, True]
    assert recorder.column("best_map") == list(np.maximum.accumulate(recorder.column("map")))
    model = checkpoint.load_model(tmp_path / "4")
    assert training.evaluate(model, batches(VALIDATION, 3), CPU, None)[0] == max(recorder.column("map"))


def test_same_seed_same_result_and_another_seed_another(tmp_path: Path) -> None:
    first, again, other = (Recorder(tmp_path / n) for n in ("a", "b", "c"))
    fit(CONFIG, first)
    fit(CONFIG, again)
    fit(CONFIG.model_copy(update={"seed": 1}), other)
    assert without_clock(first.reports) == without_clock(again.reports)
    assert first.column("loss") != other.column("loss")


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_trial_goes_on_as_an_uninterrupted_one(tmp_path: Path, stop_after: int) -> None:
    whole, cut, rest = (
        Recorder(tmp_path / "w"),
        Recorder(tmp_path / "c", stop_after),
        Recorder(tmp_path / "r"),
    )
    fit(CONFIG, whole)
    with pytest.raises(KeyboardInterrupt):
        fit(CONFIG, cut)
    fit(CONFIG, rest, resume=tmp_path / "c" / str(stop_after))
    assert without_clock(cut.reports + rest.reports) == without_clock(whole.reports)
    for name, tensor in checkpoint.load_weights(tmp_path / "w" / "4").items():
        assert torch.equal(tensor, checkpoint.load_weights(tmp_path / "r" / "4")[name])


def test_a_finished_checkpoint_is_told_again_and_not_trained_on(tmp_path: Path) -> None:
    whole = Recorder(tmp_path / "w")
    fit(CONFIG, whole)
    assert not (tmp_path / "w" / "4" / checkpoint.TRAINING).exists()
    told: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        assert folder is None
        told.append(metrics)

    training.fit(CONFIG, lambda _: [], lambda: [], report, device=CPU, resume=tmp_path / "w" / "4")
    last = whole.reports[-1]
    assert told == [{k: last[k] for k in ("epoch", "map", "best_map", "finished")}]


def test_stops_early_when_the_score_stays(tmp_path: Path) -> None:
    frozen = CONFIG.model_copy(
        update={"epochs": 50, "patience": 3, "optim": OptimConfig(learning_rate=1e-12, min_learning_rate=0)}
    )
    recorder = Recorder(tmp_path)
    fit(frozen, recorder)
    assert len(recorder.reports) == 4
    assert recorder.reports[-1]["finished"]


def test_learning_rate_falls_on_a_plateau(tmp_path: Path) -> None:
    optim = OptimConfig(learning_rate=1e-9, plateau_patience=2, plateau_factor=0.5, min_learning_rate=0)
    recorder = Recorder(tmp_path)
    fit(CONFIG.model_copy(update={"epochs": 6, "optim": optim}), recorder)
    assert recorder.column("learning_rate") == pytest.approx([1e-9, 1e-9, 1e-9, 5e-10, 5e-10, 2.5e-10])


def test_a_loss_that_is_no_number_ends_the_trial(tmp_path: Path) -> None:
    broken = CONFIG.model_copy(update={"optim": OptimConfig(learning_rate=1.0)})
    nan = [{"image": b["image"], "mask": b["mask"]} for b in batches(TRAIN, 8)]
    loss: Callable[[Any, Any], Any] = lambda logits, masks: logits.mean() * float("nan")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, "bce", loss)
        with pytest.raises(training.Diverged, match="nan in epoch 1"):
            training.fit(broken, lambda _: nan, lambda: [], Recorder(tmp_path), device=CPU)


def test_evaluate_agrees_with_the_metric_whatever_the_batches() -> None:
    torch.manual_seed(3)
    model = build_model(DEBUG.model).eval()
    with torch.inference_mode():
        images = VALIDATION["image"].unsqueeze(1).float() / 255
        salt = (model(images.contiguous(memory_format=torch.channels_last)) > 0).numpy()
    expected = metrics.mean_precision(salt, VALIDATION["mask"].numpy() > 0)
    for size in (1, 4, 10):
        assert training.evaluate(model, batches(VALIDATION, size), CPU, None)[0] == pytest.approx(expected)


def test_precision_is_float32_on_a_cpu_unless_asked() -> None:
    assert training.autocast_dtype("auto", CPU) is None
    assert training.autocast_dtype("float32", CPU) is None
    assert training.autocast_dtype("bfloat16", CPU) is torch.bfloat16


def test_bfloat16_trains(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    fit(CONFIG.model_copy(update={"precision": "bfloat16", "epochs": 2}), recorder)
    assert recorder.column("loss")[1] < recorder.column("loss")[0]
