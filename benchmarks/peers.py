"""What a user would otherwise write: a plain PyTorch loop with the whole set in memory. No Ray anywhere."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from saltray import demo
from saltray.config import TrialConfig
from saltray.contest import metrics
from saltray.network.model import build_model


@dataclass(frozen=True)
class Arrays:
    """Decoded tiles in memory: image uint8, mask uint8 in {0, 1}, both (tiles, 101, 101), and depths."""

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    z: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Count the tiles."""
        return len(self.image)

    def part(self, start: int, stop: int) -> "Arrays":
        """Return a range of the tiles."""
        return Arrays(self.image[start:stop], self.mask[start:stop], self.z[start:stop])

    def columns(self, first_row: int = 0) -> dict[str, npt.NDArray[Any]]:
        """Return the columns of `saltray.data.dataset.decode`."""
        rows = np.arange(first_row, first_row + len(self), dtype=np.int64)
        ids = np.array([f"tile{row:07d}" for row in rows], dtype=object)
        coverage = self.mask.mean(axis=(1, 2), dtype=np.float32)
        return {
            "row": rows,
            "id": ids,
            "image": self.image,
            "mask": self.mask,
            "z": self.z,
            "coverage": coverage,
        }


def synthetic(tiles: int, different: int = 400, seed: int = 0) -> Arrays:
    """Return synthetic tiles; beyond so many different ones they repeat."""
    rng = np.random.default_rng(seed)
    made = [demo.tile(rng) for _ in range(min(tiles, different))]
    which = np.arange(tiles) % len(made)
    image, mask = (np.stack([tile[i] for tile in made])[which] for i in (0, 1))
    return Arrays(image, mask.astype(np.uint8), np.array([tile[2] for tile in made], np.float32)[which])


class PlainLoop:
    """U-Net or ResUNet, NCHW, float32, Adam, BCE, flips, evaluation: the set lies in memory as floats."""

    def __init__(self, config: TrialConfig, training: Arrays, validation: Arrays) -> None:
        """Build the model in PyTorch's default memory layout."""
        torch.manual_seed(config.seed)
        self.config = config
        model = build_model(config.model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.model = with_pytorchs_dropout(model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.optim.learning_rate)
        self.training, self.validation = _tensors(training), _tensors(validation)

    def epoch(self) -> float:
        """Train on every tile once, evaluate; return the validation mAP."""
        images, masks = self.training
        order, flipped = torch.randperm(len(images)), torch.rand(len(images)) < self.config.augment.flip
        loss_function = nn.BCEWithLogitsLoss()
        self.model.train()
        for which in torch.split(order, self.config.batch_size):
            x, y, flip = images[which], masks[which], flipped[which]
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
            y = torch.where(flip[:, None, None], y.flip(2), y)
            loss = loss_function(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the validation mAP at probability 0.5."""
        self.model.eval()
        images, masks = self.validation
        predicted = torch.cat([self.model(x) > 0 for x in torch.split(images, 64)])
        return metrics.mean_precision(predicted.numpy(), masks.numpy() > 0)


def with_pytorchs_dropout(model: nn.Module) -> nn.Module:
    """Put PyTorch's own dropout back into a model, as a user's would have it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Dropout(child.p))
    return model


def _tensors(tiles: Arrays) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(tiles.image).float().div(255)[:, None], torch.from_numpy(tiles.mask).float()


def seed_config(architecture: str, **changes: Any) -> TrialConfig:
    """Return the baseline configuration of a U-Net or ResUNet: 16 filters, dropout 0.5, batches of 32."""
    return TrialConfig.from_dict({"model": {"architecture": architecture}} | changes)
