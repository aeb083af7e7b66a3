"""One worker's training loop: an epoch, an evaluation, a report. It knows nothing of Ray.

The same loop serves one worker and, where `torch.distributed` is set up, one of several. Everything that is
random in an epoch is seeded by the epoch, so a resumed trial goes on exactly as an uninterrupted one.
"""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from saltray.config import LossConfig, TrialConfig
from saltray.contest import metrics
from saltray.data.augment import mixup
from saltray.network.losses import Loss, deep_supervision, loss_of_epoch
from saltray.network.model import (
    EncoderDecoder,
    Outputs,
    autocast_dtype,
    build_model,
    count_parameters,
    load_encoder,
    to_input,
)
from saltray.network.optim import (
    averaged_tensors,
    build_optimizer,
    cycle_ends,
    ema_share,
    epochs_since_best,
    learning_rate,
    move_average,
    swa_share,
)
from saltray.training import checkpoint

Batches = Iterable[dict[str, Tensor]]
"""Batches of `image` and `mask`, uint8 (tiles, height, width), and the depth `z`, float32 (tiles,). A mask to
train on may hold IGNORED pixels."""

Weights = dict[str, Tensor]


class Report(Protocol):
    """Receives an epoch's metrics, and on rank 0 the folder of a checkpoint, which goes away afterwards."""

    def __call__(self, metrics: dict[str, Any], folder: Path | None) -> None:
        """Take the report; may stop the trial by raising."""


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""

    def __init__(self, epoch: int, loss: float) -> None:
        """Name the epoch and the loss."""
        super().__init__(f"the loss is {loss} in epoch {epoch}")
        self.epoch = epoch


@dataclass(frozen=True)
class Learner:
    """What a trial trains, and with what."""

    config: TrialConfig
    device: torch.device
    steps: int
    """Of an epoch; the schedule of the learning rate is laid over those of all epochs."""
    model: EncoderDecoder
    optimizer: torch.optim.Optimizer
    average: EncoderDecoder | None
    """Holds the averaged weights, where there are any: they are the ones that are judged and kept."""
    scaler: torch.amp.GradScaler
    """Keeps float16's small gradients from vanishing, and leaves out a step whose gradients overflow."""

    @classmethod
    def new(cls, config: TrialConfig, device: torch.device, steps: int) -> Self:
        """Build the model, from the trial's seed, and what trains it."""
        torch.manual_seed(config.seed)
        model = build_model(config.model).to(device)
        average = None if config.optim.average == "none" else copy.deepcopy(model)
        optimizer = build_optimizer(model.parameters(), config.optim)
        scales = autocast_dtype(config.precision, device) is torch.float16
        scaler = torch.amp.GradScaler(device.type, enabled=scales)
        return cls(config, device, steps, model, optimizer, average, scaler)

    @property
    def amp(self) -> torch.dtype | None:
        """The autocast type."""
        return autocast_dtype(self.config.precision, self.device)

    @property
    def networks(self) -> dict[str, EncoderDecoder]:
        """The model, and its average where there is one, by name."""
        return {"model": self.model} | ({"average": self.average} if self.average is not None else {})

    def state(self, kept: EncoderDecoder | None = None) -> dict[str, Any]:
        """Return what a resumed trial needs to go on exactly so, beside the weights of the kept network."""
        parts: dict[str, Any] = {"optimizer": self.optimizer, "scaler": self.scaler, **self.networks}
        return {name: part.state_dict() for name, part in parts.items() if part is not kept}

    def restore(self, state: dict[str, Any], kept: Weights) -> None:
        """Go on from an earlier `state`, with the weights that were kept then."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, network in self.networks.items():
            network.load_state_dict(state.get(name, kept))


def fit(
    config: TrialConfig,
    training_batches: Callable[[int], Batches],
    validation_batches: Callable[[], Batches],
    report: Report,
    *,
    steps: int,
    device: torch.device,
    resume: Path | None = None,
) -> None:
    """Train one trial to its end: the last epoch, or early when the validation mAP stops rising.

    Each epoch is reported with `epoch` (from 1), `loss`, `map` (this epoch's validation mAP), `best_map`
    (the best so far, of the weights in the checkpoint), `learning_rate` (at its end), `seconds`,
    `tiles_per_second` (in training), `validation_tiles_per_second`, `parameters` and `finished`. Where the
    last weights are kept, `best_map` is theirs.

    Args:
        config: the trial.
        training_batches: epoch -> this worker's batches; as many on every worker.
        validation_batches: this worker's share of the validation tiles, each once.
        report: receives each epoch's result.
        steps: batches of an epoch.
        device: where to train.
        resume: a checkpoint with training state, to go on from.

    Raises:
        Diverged: the loss became NaN or infinite.
        UserError: the encoder's weights are absent or do not fit; the tiles lack the depth that is asked for.
    """
    learner = Learner.new(config, device, steps)
    history: list[float] = []
    best_weights: Weights = {}
    snapshots: list[Weights] = []
    if resume is None:
        load_encoder(learner.model, config.model)
        if learner.average is not None:
            learner.average.load_state_dict(learner.model.state_dict())
    elif not (resume / checkpoint.TRAINING).exists():
        # It was cut off between its last report and its end: the report may not have arrived.
        history = checkpoint.load_metrics(resume)["history"]
        best = _kept_score(config, history)
        last = {"epoch": len(history), "map": history[-1], "best_map": best, "finished": True}
        report(last, None)
        return
    else:
        saved, best_weights = checkpoint.load_training(resume), checkpoint.load_weights(resume)
        learner.restore(saved, best_weights)
        history = list(saved["history"])
        snapshots = checkpoint.load_snapshots(resume)
    network: nn.Module = learner.model
    if dist.is_initialized():
        network = nn.parallel.DistributedDataParallel(network)

    for epoch in range(len(history) + 1, config.epochs + 1):
        started = time.perf_counter()
        torch.manual_seed(_epoch_seed(config.seed, epoch))
        loss, tiles = train_epoch(learner, network, training_batches(epoch), epoch, history)
        trained = time.perf_counter()
        if not math.isfinite(loss):
            raise Diverged(epoch, loss)
        judged = averaged_model(learner, epoch, training_batches)
        if not torch.stack([tensor.isfinite().all() for tensor in averaged_tensors(judged)]).all():
            raise Diverged(epoch, math.nan)  # by the last step, whose weights no loss has seen
        _broadcast_buffers(judged)
        judging = time.perf_counter()
        score, validated = evaluate(judged, validation_batches(), device, learner.amp)
        seconds = time.perf_counter() - judging
        history.append(score)
        is_kept = config.keep == "last" or epochs_since_best(history) == 0
        if is_kept:
            best_weights = _copy_weights(judged)
        if epoch in cycle_ends(config.optim, config.epochs):
            snapshots.append(_copy_weights(judged))
        finished = epoch == config.epochs or epochs_since_best(history) >= config.patience
        results: dict[str, Any] = {
            "epoch": epoch,
            "loss": loss,
            "map": score,
            "best_map": _kept_score(config, history),
            "learning_rate": learner.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
            "tiles_per_second": tiles / (trained - started),
            "validation_tiles_per_second": validated / seconds,
            "parameters": count_parameters(learner.model),
            "finished": finished,
        }
        state = None if finished else learner.state(judged if is_kept else None) | {"history": history}
        _report(report, results, best_weights, snapshots, config, history, state)
        if finished:
            return


def train_epoch(
    learner: Learner, network: nn.Module, batches: Batches, epoch: int, history: Sequence[float]
) -> tuple[float, int]:
    """Train on every batch once; return the mean loss a tile and the number of tiles, over all workers.

    Args:
        learner: what is trained.
        network: its model, or that model under DDP.
        batches: of this worker.
        epoch: counted from 1.
        history: validation mAP of the epochs before.
    """
    config, device, amp, optimizer = learner.config, learner.device, learner.amp, learner.optimizer
    loss_function = loss_of_epoch(config.loss, epoch, config.epochs)
    network.train()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tiles = 0
    # Gathered once: on a fast GPU it would take as long as a tenth of a small network's step.
    average = averaged_tensors(learner.average) if learner.average is not None else []
    newest = averaged_tensors(learner.model)
    for step, batch in enumerate(batches, start=(epoch - 1) * learner.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, history, step, config.epochs * learner.steps)
        images, masks, depth = _to_device(batch, device)
        images, partner, share = mixup(images, config.augment.mixup)
        if partner is not None and depth is not None:
            depth = torch.lerp(depth[partner], depth, share)
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            outputs = network(images, depth)
        loss = objective(outputs, masks, loss_function, config.loss)
        if partner is not None:
            other = objective(outputs, masks[partner], loss_function, config.loss)
            loss = share * loss + (1 - share) * other
        optimizer.zero_grad(set_to_none=True)
        learner.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if config.optim.clip_norm is not None:
            learner.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), config.optim.clip_norm)
        learner.scaler.step(optimizer)
        learner.scaler.update()
        if average and (weight := ema_share(config.optim, step)):
            move_average(average, newest, weight)
        total += loss.detach() * len(images)
        tiles += len(images)
    # The one synchronisation of the epoch.
    sums = torch.tensor([float(total), tiles], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[0] / sums[1].clamp(min=1)), int(sums[1])


def objective(outputs: Tensor | Outputs, masks: Tensor, loss: Loss, config: LossConfig) -> Tensor:
    """Return the loss of a network's outputs in training: a scalar in float32, whatever the autocast."""
    if isinstance(outputs, Tensor):
        return loss(outputs.float(), masks)
    heads = tuple(level.float() for level in outputs.auxiliary)
    main = loss(outputs.logits.float(), masks)
    return main + deep_supervision(loss, heads, outputs.empty.float(), masks, config)


def averaged_model(
    learner: Learner, epoch: int, training_batches: Callable[[int], Batches]
) -> EncoderDecoder:
    """Return the model to be judged after an epoch: the average, once there is one, else the last weights."""
    if learner.average is None:
        return learner.model
    if learner.config.optim.average == "swa":
        share = swa_share(learner.config.optim, epoch, learner.config.epochs)
        if not share:
            return learner.model
        move_average(averaged_tensors(learner.average), averaged_tensors(learner.model), share)
        recompute_batchnorm(learner.average, training_batches(epoch), learner.device, learner.amp)
    return learner.average


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module, batches: Batches, device: torch.device, amp: torch.dtype | None
) -> None:
    """Set BatchNorm's statistics anew: averaged weights have other activations than those they come from.

    As PyTorch's `update_bn`, the mean over all batches, but without dropout, as the model will be used.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not layers:
        return
    model.eval()
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    for count, batch in enumerate(batches, start=1):
        for layer in layers:  # the mean so far; None comes to the same, and would wait for the GPU each time
            layer.momentum = 1 / count
        images, _, depth = _to_device(batch, device)
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            model(images, depth)
    for layer, momentum in zip(layers, usual, strict=True):
        layer.momentum = momentum


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Batches, device: torch.device, amp: torch.dtype | None
) -> tuple[float, int]:
    """Return the contest's metric at probability 0.5 and the number of tiles, over all workers."""
    model.eval()
    intersections, unions = [], []
    for batch in batches:
        images, masks, depth = _to_device(batch, device)
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            salt = model(images, depth) > 0
        truth = masks > 0
        intersections.append((salt & truth).sum(dim=(1, 2)))
        unions.append((salt | truth).sum(dim=(1, 2)))
    precisions = np.zeros(0)
    if unions:
        precisions = metrics.precision(
            torch.cat(intersections).cpu().numpy(), torch.cat(unions).cpu().numpy()
        )
    sums = torch.tensor([precisions.sum(), len(precisions)], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[0] / sums[1]), int(sums[1])


def _to_device(batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the network's input, masks float32 (n, h, w) in {0, 1}, and where there are any the depths."""
    depth = batch["z"].to(device) if "z" in batch else None
    return to_input(batch["image"], device), batch["mask"].to(device).float(), depth


def _broadcast_buffers(model: nn.Module) -> None:
    """Give every worker rank 0's BatchNorm statistics, so that all evaluate the model that is saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _copy_weights(model: nn.Module) -> Weights:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _kept_score(config: TrialConfig, history: Sequence[float]) -> float:
    """Return the validation mAP of the weights that are kept."""
    return history[-1] if config.keep == "last" else max(history)


def _epoch_seed(seed: int, epoch: int) -> int:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _report(
    report: Report,
    results: dict[str, Any],
    best_weights: Weights,
    snapshots: list[Weights],
    config: TrialConfig,
    history: list[float],
    state: dict[str, Any] | None,
) -> None:
    if dist.is_initialized() and dist.get_rank() > 0:
        report(results, None)
        return
    with tempfile.TemporaryDirectory(prefix="saltray-") as name:
        folder = Path(name)
        waited = 0 if config.keep == "last" else epochs_since_best(history)
        known = {
            "best_map": _kept_score(config, history),
            "best_epoch": len(history) - waited,
            "history": history,
            "finished": state is None,
            "snapshots": len(snapshots),
        }
        checkpoint.save(folder, best_weights, config, known, state, snapshots)
        report(results, folder)
