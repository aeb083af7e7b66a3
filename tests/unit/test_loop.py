import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn
from torch.optim.swa_utils import update_bn

from saltray.config import DEBUG, LossConfig, ModelConfig, OptimConfig, TrialConfig, UserError
from saltray.contest import metrics
from saltray.network.losses import LOSSES
from saltray.network.model import autocast_dtype, build_model, to_input
from saltray.training import checkpoint, loop

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
    loop.fit(
        config,
        lambda epoch: batches(TRAIN, config.batch_size, seed=epoch),
        lambda: batches(VALIDATION, 4),
        recorder,
        steps=3,
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
    assert loop.evaluate(model, batches(VALIDATION, 3), CPU, None)[0] == max(recorder.column("map"))


def test_same_seed_same_result_and_another_seed_another(tmp_path: Path) -> None:
    first, again, other = (Recorder(tmp_path / n) for n in ("a", "b", "c"))
    fit(CONFIG, first)
    fit(CONFIG, again)
    fit(CONFIG.model_copy(update={"seed": 1}), other)
    assert without_clock(first.reports) == without_clock(again.reports)
    assert first.column("loss") != other.column("loss")


TINY = {"filters": 2, "levels": 1, "dropout": 0.2}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "one cycle, sgd, clipped": {"optim": {"schedule": "one_cycle", "optimizer": "sgd", "clip_norm": 0.5}},
    "exponential average, adamw": {
        "model": TINY | {"architecture": "resunet", "residual_blocks": 1},
        "optim": {"average": "ema", "ema_decay": 0.9, "optimizer": "adamw", "weight_decay": 0.1},
    },
    "stochastic average": {
        "model": TINY | {"normalisation": "batch"},
        "optim": {"average": "swa", "swa_from": 0.25},
    },
    "warm restarts and snapshots": {"optim": {"schedule": "cosine", "cycles": 2, "snapshots": True}},
    "bce, then lovasz": {"loss": {"name": "bce", "then": "lovasz", "switch_at": 0.25}},
    "deep supervision, mixup": {"model": TINY | {"deep_supervision": True}, "augment": {"mixup": 0.4}},
}


def using(technique: str) -> TrialConfig:
    return TrialConfig.from_dict({"model": TINY, "batch_size": 8, "epochs": 4} | TECHNIQUES[technique])


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_technique_resumes_exactly(tmp_path: Path, technique: str) -> None:
    config = using(technique)
    whole, cut, rest = (Recorder(tmp_path / n) for n in ("whole", "cut", "rest"))
    fit(config, whole)
    cut.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        fit(config, cut)
    fit(config, rest, resume=tmp_path / "cut" / "2")
    assert without_clock(cut.reports + rest.reports) == without_clock(whole.reports)
    for file in (tmp_path / "whole" / "4").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "rest" / "4" / file.name).read_bytes()


def newest(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint, with the weights that it does not hold twice."""
    state, kept = checkpoint.load_training(folder), checkpoint.load_weights(folder)
    return {"model": kept, "average": kept} | state


@pytest.mark.parametrize("technique", ["plain", "exponential average, adamw"])
def test_no_weights_are_written_twice(tmp_path: Path, technique: str) -> None:
    config, recorder = using(technique) if technique != "plain" else CONFIG, Recorder(tmp_path)
    fit(config, recorder)
    judged = "average" if config.optim.average != "none" else "model"
    for epoch in (1, 2, 3):
        is_best = recorder.column("map")[epoch - 1] > max(recorder.column("map")[: epoch - 1], default=-1)
        state = checkpoint.load_training(tmp_path / str(epoch))
        assert (judged in state) == (not is_best)
        assert {"optimizer", "scaler", "history"} <= state.keys()


def test_the_second_loss_trains_from_its_epoch_on(tmp_path: Path) -> None:
    config = using("bce, then lovasz")
    both, first = Recorder(tmp_path / "both"), Recorder(tmp_path / "first")
    fit(config, both)
    fit(config.model_copy(update={"loss": LossConfig()}), first)
    same = [a == b for a, b in zip(both.column("loss"), first.column("loss"), strict=True)]
    assert same == [True, False, False, False]


def test_snapshots_are_the_weights_at_the_ends_of_the_cycles(tmp_path: Path) -> None:
    optim = OptimConfig(schedule="cosine", cycles=2, snapshots=True, learning_rate=2e-2)
    fit(CONFIG.model_copy(update={"optim": optim}), Recorder(tmp_path))
    assert [len(checkpoint.load_snapshots(tmp_path / str(epoch))) for epoch in (1, 2, 3, 4)] == [0, 1, 1, 2]
    first = checkpoint.load_snapshots(tmp_path / "4")[0]
    state = newest(tmp_path / "2")["model"]
    assert all(torch.equal(first[name], state[name]) for name in state)


@pytest.mark.parametrize("technique", ["exponential average, adamw", "stochastic average"])
def test_averaged_weights_are_the_ones_judged_and_kept(tmp_path: Path, technique: str) -> None:
    config, recorder = using(technique), Recorder(tmp_path)
    fit(config, recorder)
    for epoch in (2, 3):
        state = newest(tmp_path / str(epoch))
        first = technique.startswith("stochastic") and epoch == 2  # a mean of one, but for BatchNorm
        assert torch.equal(state["average"]["head.weight"], state["model"]["head.weight"]) == first
        model = build_model(config.model)
        model.load_state_dict(state["average"])
        assert loop.evaluate(model, batches(VALIDATION, 3), CPU, None)[0] == recorder.column("map")[epoch - 1]
    best = int(np.argmax(recorder.column("map"))) + 1
    kept, then = (checkpoint.load_weights(tmp_path / str(epoch)) for epoch in (4, best))
    assert all(torch.equal(kept[name], value) for name, value in then.items())
    assert recorder.column("best_map")[3] == max(recorder.column("map"))


def test_recomputed_batchnorm_agrees_with_torchs() -> None:
    model, peer = (build_model(ModelConfig(architecture="resunet", filters=2, levels=1)) for _ in range(2))
    peer.load_state_dict(model.state_dict())
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout):  # which torch leaves on
            module.p = 0.0
    loop.recompute_batchnorm(model, batches(TRAIN, 8), CPU, None)
    update_bn([to_input(b["image"], CPU) for b in batches(TRAIN, 8)], peer)
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_clipping_bounds_the_step_of_plain_gradient_descent(tmp_path: Path) -> None:
    def moved(clip: float | None, folder: Path) -> float:
        optim = OptimConfig(
            optimizer="sgd", momentum=0, learning_rate=1.0, schedule="plateau", clip_norm=clip
        )
        config = CONFIG.model_copy(update={"optim": optim, "epochs": 1})
        fit(config, Recorder(folder))
        torch.manual_seed(config.seed)
        start = build_model(config.model).state_dict()
        end = checkpoint.load_weights(folder / "1")
        return float(torch.cat([(end[name] - start[name]).flatten() for name in start]).norm())

    assert moved(1e-3, tmp_path / "a") <= 3e-3 * 1.001 < moved(None, tmp_path / "b")  # three steps


def test_depth_reaches_the_network_and_its_absence_is_told(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"model": ModelConfig(filters=2, levels=1, depth=True), "epochs": 1})
    with pytest.raises(UserError, match="depth z"):
        fit(config, Recorder(tmp_path))

    class SaltBelow(torch.nn.Module):
        def forward(self, images: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
            return (depth - 500)[:, None, None].expand(-1, 101, 101)

    z = torch.tensor([100.0, 900.0])
    tiles = {"image": torch.zeros(2, 101, 101, dtype=torch.uint8), "z": z}
    tiles["mask"] = (z > 500).to(torch.uint8)[:, None, None].expand(-1, 101, 101)
    assert loop.evaluate(SaltBelow(), [tiles], CPU, None) == (1, 2)
    assert loop.evaluate(SaltBelow(), [tiles | {"z": z.flip(0)}], CPU, None) == (0, 2)


def test_an_encoders_weights_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setattr(loop, "load_encoder", lambda model, config: loads.append(config))
    cut = Recorder(tmp_path / "cut", 2)
    with pytest.raises(KeyboardInterrupt):
        fit(CONFIG, cut)
    fit(CONFIG, Recorder(tmp_path / "rest"), resume=tmp_path / "cut" / "2")
    assert loads == [CONFIG.model]


def test_an_average_starts_from_the_encoders_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: torch.nn.Module, config: ModelConfig) -> None:
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.125)

    monkeypatch.setattr(loop, "load_encoder", load)
    still = OptimConfig(average="ema", optimizer="sgd", learning_rate=1e-30)
    fit(CONFIG.model_copy(update={"optim": still, "epochs": 1}), Recorder(tmp_path))
    weights = checkpoint.load_weights(tmp_path / "1")
    assert all((w == 0.125).all() for name, w in weights.items() if "weight" in name)


def test_mixup_mixes_the_depths_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    class Watching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
            # Each tile is as bright as it is deep.
            seen.append(images.mean(dim=(1, 2, 3)) * 255 - depth)
            return images[:, 0] * self.weight

    config = TrialConfig.from_dict({"augment": {"mixup": 0.4}})
    network = Watching()
    learner = loop.Learner.new(config, CPU, steps=1)
    bright = torch.tensor([10, 90, 200], dtype=torch.uint8)
    tiles = {"image": bright[:, None, None].expand(-1, 101, 101), "z": bright.float()}
    tiles["mask"] = torch.zeros(3, 101, 101, dtype=torch.uint8)
    loop.train_epoch(learner, network, [tiles], 1, [])
    torch.testing.assert_close(seen[0], torch.zeros(3), atol=1e-3, rtol=0)


def test_mixup_mixes_the_losses_as_it_mixed_the_images() -> None:
    """A tile that is three quarters of an image counts against that image's mask for three quarters."""
    seen: list[torch.Tensor] = []

    class Watching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: torch.Tensor, depth: torch.Tensor | None) -> torch.Tensor:
            seen.append(images.mean(dim=(1, 2, 3)) * 255)
            return images[:, 0] * self.weight

    config = TrialConfig.from_dict({"augment": {"mixup": 0.4}})
    learner = loop.Learner.new(config, CPU, steps=1)
    bright = torch.tensor([10, 250], dtype=torch.uint8)
    masks = torch.stack([torch.zeros(101, 101), torch.ones(101, 101)]).to(torch.uint8)
    tiles = {"image": bright[:, None, None].expand(-1, 101, 101), "mask": masks}
    for seed in range(20):  # until the two are partners, and in unlike shares
        torch.manual_seed(seed)
        loss, _ = loop.train_epoch(learner, Watching(), [tiles], 1, [])
        # A pixel's truth is the share of the salt tile in the image that it lies in.
        truth = (seen[-1] - 10) / 240
        if 0.01 < truth[0] < 0.99 and (truth[0] - 0.5).abs() > 0.1:
            break
    else:
        pytest.fail("no such draw")
    logits = seen[-1] / 255
    expected = -(truth * logits.sigmoid().log() + (1 - truth) * (-logits).sigmoid().log()).mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)


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

    loop.fit(CONFIG, lambda _: [], lambda: [], report, steps=3, device=CPU, resume=tmp_path / "w" / "4")
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
        with pytest.raises(loop.Diverged, match="nan in epoch 1"):
            loop.fit(broken, lambda _: nan, lambda: [], Recorder(tmp_path), steps=3, device=CPU)


def test_weights_that_the_last_step_broke_end_the_trial(tmp_path: Path) -> None:
    # A finite loss with a gradient that is no number: that of a root at 0.
    loss: Callable[[Any, Any], Any] = lambda logits, masks: logits.mean() + (logits * 0).sum().sqrt()  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, "bce", loss)
        with pytest.raises(loop.Diverged, match="nan in epoch 1"):
            loop.fit(
                CONFIG, lambda _: batches(TRAIN, 24), lambda: [], Recorder(tmp_path), steps=1, device=CPU
            )


def test_evaluate_agrees_with_the_metric_whatever_the_batches() -> None:
    torch.manual_seed(3)
    model = build_model(DEBUG.model).eval()
    with torch.inference_mode():
        images = VALIDATION["image"].unsqueeze(1).float() / 255
        salt = (model(images.contiguous(memory_format=torch.channels_last)) > 0).numpy()
    expected = metrics.mean_precision(salt, VALIDATION["mask"].numpy() > 0)
    for size in (1, 4, 10):
        assert loop.evaluate(model, batches(VALIDATION, size), CPU, None)[0] == pytest.approx(expected)


def test_precision_is_float32_on_a_cpu_unless_asked() -> None:
    assert autocast_dtype("auto", CPU) is None
    assert autocast_dtype("float32", CPU) is None
    assert autocast_dtype("bfloat16", CPU) is torch.bfloat16
    assert autocast_dtype("float16", CPU) is None
    assert autocast_dtype("float16", torch.device("cuda")) is torch.float16


def test_bfloat16_trains(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    fit(CONFIG.model_copy(update={"precision": "bfloat16", "epochs": 2}), recorder)
    assert recorder.column("loss")[1] < recorder.column("loss")[0]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_float16_trains_as_float32_does_with_its_loss_scaled_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_norm: float | None
) -> None:
    monkeypatch.setattr(loop, "autocast_dtype", lambda *_: torch.float16)  # as on a GPU
    whole, cut, rest, plain = (Recorder(tmp_path / n) for n in ("whole", "cut", "rest", "plain"))
    optim = OptimConfig(learning_rate=2e-2, clip_norm=clip_norm)
    config = CONFIG.model_copy(update={"precision": "float16", "optim": optim})
    fit(config, whole)
    cut.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        fit(config, cut)
    assert checkpoint.load_training(tmp_path / "cut" / "2")["scaler"]["scale"] > 1
    fit(config, rest, resume=tmp_path / "cut" / "2")
    assert without_clock(cut.reports + rest.reports) == without_clock(whole.reports)
    monkeypatch.undo()
    fit(config, plain)
    assert whole.column("loss")[-1] == pytest.approx(plain.column("loss")[-1], rel=0.2)


def _one_of_two(rank: int, folder: str, config: TrialConfig) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    reports: list[dict[str, Any]] = []
    share = {k: v[rank::2] for k, v in TRAIN.items()}
    if rank:  # without salt, its auxiliary heads must still meet the other's
        share["mask"] = torch.zeros_like(share["mask"])
    loop.fit(
        config,
        lambda epoch: batches(share, 4, seed=epoch),
        lambda: batches({k: v[rank::2] for k, v in VALIDATION.items()}, 4),
        lambda metrics, folder: reports.append(metrics),
        steps=3,
        device=CPU,
    )
    (Path(folder) / f"{rank}.json").write_text(json.dumps([[r["loss"], r["map"]] for r in reports]))
    # DDP holds the process group in a cycle: left to the interpreter's end, gloo's threads may abort it.
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_two_workers_judge_one_model_whatever_the_technique(tmp_path: Path, average: str) -> None:
    config = TrialConfig.from_dict(
        {
            "model": TINY | {"levels": 2, "normalisation": "batch", "deep_supervision": True},
            "optim": {"average": average, "swa_from": 0.5, "clip_norm": 1.0},
            "batch_size": 8,
            "epochs": 3,
        }
    )
    spawn(_one_of_two, (str(tmp_path), config), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 3


def test_the_last_weights_are_kept_where_nothing_is_to_be_chosen(tmp_path: Path) -> None:
    best, last = Recorder(tmp_path / "best"), Recorder(tmp_path / "last")
    config = CONFIG.model_copy(update={"epochs": 6, "patience": 6})
    fit(config, best)
    fit(config.model_copy(update={"keep": "last"}), last)
    assert last.column("map") == best.column("map")
    top = int(np.argmax(last.column("map"))) + 1
    assert top < 6, "of no use if the last epoch is the best"
    assert last.column("best_map") == last.column("map")
    kept = checkpoint.load_metrics(tmp_path / "last" / "6")
    assert (kept["best_epoch"], kept["best_map"]) == (6, last.column("map")[-1])
    weights = [checkpoint.load_weights(tmp_path / name) for name in ("last/6", "best/6", f"last/{top}")]
    assert all(torch.equal(weights[1][n], weights[2][n]) for n in weights[0])
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    resumed = Recorder(tmp_path / "resumed")
    fit(config.model_copy(update={"keep": "last"}), resumed, resume=tmp_path / "last" / "4")
    assert resumed.column("best_map") == last.column("best_map")[4:]
    again = checkpoint.load_weights(tmp_path / "resumed" / "6")
    assert all(torch.equal(weights[0][n], again[n]) for n in again)
