"""`python -m benchmarks.plain_predict MODEL DATA OUT`: what a user would write to segment the test tiles."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from saltray.training import checkpoint

BATCH = 128


def encode(mask: npt.NDArray[np.bool_]) -> str:
    """Return a mask's run-length code, as the contest's kernels compute it."""
    pixels = np.concatenate([[0], mask.flatten(order="F"), [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + 1
    runs[1::2] -= runs[::2]
    return " ".join(map(str, runs))


def main(model: Path, data: Path, out: Path) -> None:
    """Decode with PIL, infer in batches with as many threads as there are CPUs, encode, write."""
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = checkpoint.load_model(model).to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    known = checkpoint.load_metrics(model)
    cut = float(np.log(known["threshold"] / (1 - known["threshold"])))
    with (data / "sample_submission.csv").open(newline="") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    with out.open("w", newline="") as file, torch.inference_mode():
        writer = csv.writer(file)
        writer.writerow(["id", "rle_mask"])
        for start in range(0, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            images = [
                np.asarray(Image.open(data / "test" / "images" / f"{i}.png").convert("L")) for i in batch
            ]
            x = torch.from_numpy(np.stack(images)).to(device).float().div(255)[:, None]
            masks = (network(x) > cut).cpu().numpy()
            writer.writerows((i, encode(mask)) for i, mask in zip(batch, masks, strict=True))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
