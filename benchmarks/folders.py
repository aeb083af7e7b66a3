"""The contest's folder of any size: a few hundred synthetic tiles, and hard links to them."""

import csv
import os
from pathlib import Path

from saltray import demo

DIFFERENT = 300


def write(folder: Path, train: int, test: int) -> Path:
    """Write a data set in the contest's layout, whose tiles repeat; return its folder."""
    few_train, few_test = max(10, min(DIFFERENT, train)), max(1, min(DIFFERENT, test))
    data = demo.write(folder, demo.files(train=few_train, test=few_test, seed=0))
    depths = _read(data / "depths.csv")
    codes = _read(data / "train.csv")
    ids: dict[str, list[str]] = {"train": sorted(codes), "test": sorted(set(depths) - set(codes))}
    for part, kinds, count in (("train", ("images", "masks"), train), ("test", ("images",), test)):
        originals = list(ids[part])
        for number in range(len(originals), count):
            source, name = originals[number % len(originals)], f"{part}{number:07d}x"
            for kind in kinds:
                place = data / part / kind
                os.link(place / f"{source}.png", place / f"{name}.png")
            ids[part].append(name)
            depths[name] = depths[source]
            codes[name] = codes.get(source, "")
    _write(data / "train.csv", "id,rle_mask", {i: codes[i] for i in ids["train"]})
    _write(data / "sample_submission.csv", "id,rle_mask", dict.fromkeys(ids["test"], "1 1"))
    _write(data / "depths.csv", "id,z", depths)
    return data


def _read(file: Path) -> dict[str, str]:
    with file.open(newline="") as opened:
        return dict(list(csv.reader(opened))[1:])


def _write(file: Path, head: str, rows: dict[str, str]) -> None:
    file.write_text("\n".join([head, *(f"{key},{value}" for key, value in rows.items())]) + "\n")
