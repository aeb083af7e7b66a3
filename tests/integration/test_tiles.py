"""Tiles through Ray Data: decoded from folder and zip, the bad ones named, streamed for an epoch."""

import io
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import ray.data
import torch
from PIL import Image

from saltray import demo
from saltray.config import TILE, AugmentConfig
from saltray.contest import rle
from saltray.data import dataset
from saltray.data.augment import Batch, generator
from saltray.data.dataset import (
    DataError,
    Table,
    decode,
    decode_local,
    open_folder,
    read_test,
    read_train,
    refuse,
)
from saltray.data.stream import EpochStreams, epoch_stream, plain_stream

pytestmark = pytest.mark.usefixtures("local_ray")

TGS = Path(__file__).parents[3] / "shared" / "tgs"
TRAIN = 50
IDS = [f"train{i:06d}" for i in range(TRAIN)]


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Cut even these few tiles into several blocks, and shuffle them in a buffer that they do not all fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "TILES_PER_BLOCK", 12)
        patch.setattr("saltray.data.stream.SHUFFLE_BUFFER", 20)
        yield


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write(tmp_path_factory.mktemp("demo"), demo.files(train=TRAIN, test=5, seed=1))


@pytest.fixture
def data(pristine: Path, tmp_path: Path) -> Path:
    """A data set of the test's own, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "data"))


class Tiles(NamedTuple):
    """The labelled tiles, as table and as dataset."""

    table: Table
    decoded: ray.data.Dataset


@pytest.fixture(scope="module")
def tiles(pristine: Path, local_ray: None) -> Tiles:
    table = read_train(open_folder(str(pristine)))
    decoded, problems = decode(table)
    assert problems == {}
    return Tiles(table, decoded)


def columns(decoded: ray.data.Dataset) -> dict[str, npt.NDArray[Any]]:
    batches: list[dict[str, Any]] = [dict(b) for b in decoded.iter_batches(batch_size=None)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def pack(data: Path, part: str, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(data / f"{part}.zip", "w", method) as archive:
        for file in sorted((data / part).rglob("*.png"), reverse=True):
            archive.write(file, file.relative_to(data / part).as_posix())
    shutil.rmtree(data / part)
    return data / f"{part}.zip"


# Decoding


def test_folder_and_zip_decode_to_the_files_rows(tiles: Tiles, data: Path) -> None:
    unpacked = columns(tiles.decoded)
    originals = [np.asarray(Image.open(data / "train" / "images" / f"{i}.png"))[:, :, 0] for i in IDS]
    table = tiles.table.rows
    pack(data, "train")
    decoded, problems = decode(read_train(open_folder(str(data))))
    assert problems == {} and decoded.num_blocks() > 1
    zipped = columns(decoded)
    local, problems = decode_local(read_train(open_folder(str(data))))
    assert problems == {} and local.keys() == unpacked.keys() - {"error"}
    for rows in (unpacked, zipped, local):
        assert {name: rows[name].dtype for name in ("row", "image", "mask", "z", "coverage")} == {
            "row": np.int64,
            "image": np.uint8,
            "mask": np.uint8,
            "z": np.float32,
            "coverage": np.float32,
        }
        assert rows["id"].tolist() == IDS and rows["row"].tolist() == list(range(TRAIN))
        assert rows["image"].shape == rows["mask"].shape == (TRAIN, TILE, TILE)
        assert np.array_equal(rows["image"], originals)
        assert np.array_equal(rows["mask"], [rle.decode(code) for code in table["rle"]])
        assert np.array_equal(rows["z"], table["z"])
        assert np.array_equal(rows["coverage"], table["coverage"].astype(np.float32))


def test_test_tiles_keep_the_order_of_the_submission(data: Path) -> None:
    file = data / "sample_submission.csv"
    pd.read_csv(file).iloc[::-1].to_csv(file, index=False)
    ids = pd.read_csv(file)["id"].tolist()
    results = []
    for _ in ("folder", "zip"):
        decoded, problems = decode(read_test(open_folder(str(data))))
        rows = columns(decoded)
        assert problems == {} and rows["id"].tolist() == ids
        assert "mask" not in rows and "coverage" not in rows
        results.append(rows["image"])
        if (data / "test").exists():
            pack(data, "test")
    assert np.array_equal(results[0], results[1])


def png(pixels: npt.NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_all_bad_tiles_are_named_at_once_and_the_good_remain(data: Path) -> None:
    images, masks = data / "train" / "images", data / "train" / "masks"
    salt = read_train(open_folder(str(data))).rows.query("coverage > 0")["id"].tolist()
    good = np.zeros((TILE, TILE), np.uint8)
    spoilt: dict[str, tuple[Path, bytes | None, str]] = {
        IDS[0]: (images, b"", "0 bytes"),
        IDS[3]: (images, b"\x89PNG\r\n\x1a\n" + b"x" * 50, "expected 101x101"),
        IDS[11]: (images, b"plain text that is longer than a PNG's header", "not a PNG"),
        IDS[12]: (images, png(np.zeros((128, 128), np.uint8)), "128x128 pixels"),
        IDS[13]: (images, png(good.astype(np.uint16)), "8-bit"),
        IDS[14]: (images, None, "No such file"),
        salt[-1]: (masks, png(good), "disagrees with its run-length code"),
        salt[-2]: (masks, (masks / f"{salt[-2]}.png").read_bytes()[:90], "damaged PNG"),
    }
    assert len(spoilt) == 8, "eight different tiles"
    table = read_train(open_folder(str(data)))
    for tile, (folder, content, _) in spoilt.items():
        file = folder / f"{tile}.png"
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
    decoded, problems = decode(table)
    assert problems.keys() == spoilt.keys()
    with pytest.raises(DataError) as caught:
        refuse(problems, "train")
    message = str(caught.value)
    assert "train: 8 bad tiles" in message and "--skip-bad" in message
    for tile, (folder, _, reason) in spoilt.items():
        assert reason in problems[tile] and problems[tile] in message
        assert str(folder / f"{tile}.png") in problems[tile]
    rows = columns(decoded)
    remaining = [i for i in IDS if i not in spoilt]
    assert rows["id"].tolist() == remaining and rows["image"].any(axis=(1, 2)).all()
    assert rows["row"].tolist() == [IDS.index(i) for i in remaining]
    everything, same = decode(table, skip_bad=False)
    assert same == problems and everything.count() == TRAIN, "nothing is decoded twice to be refused"


def test_a_folder_that_another_machine_does_not_see_is_told_as_that(data: Path) -> None:
    table = read_test(open_folder(str(data)))
    for file in (data / "test" / "images").iterdir():  # this machine has listed them
        file.unlink()
    _, problems = decode(table)
    with pytest.raises(DataError, match=r"cannot open, such as .*All machines must see that folder: NFS"):
        refuse(problems, str(data))


def test_tiles_that_are_all_bad_are_all_named(data: Path) -> None:
    for file in (data / "test" / "images").iterdir():
        file.write_bytes(png(np.zeros((128, 128), np.uint8)))
    decoded, problems = decode(read_test(open_folder(str(data))))
    assert len(problems) == 5 and all("128x128 pixels" in problem for problem in problems.values())
    assert decoded.count() == 0


def test_no_tiles_decode_to_no_rows(tiles: Tiles) -> None:
    decoded, problems = decode(tiles.table.where(np.zeros(TRAIN, bool)))
    assert problems == {} and decoded.count() == 0


def spoil_content(raw: bytearray, info: zipfile.ZipInfo) -> None:
    start = info.header_offset + 30 + len(info.filename)
    raw[start] = 0xFF  # no block of a deflated stream starts so


def set_local_and_central(
    raw: bytearray, info: zipfile.ZipInfo, local: int, central: int, value: int
) -> None:
    raw[info.header_offset + local] = value
    name = info.filename.encode()
    place = raw.rindex(name) - 46  # the central directory comes after all members
    assert raw[place : place + 4] == b"PK\x01\x02"
    raw[place + central] = value


def encrypt(raw: bytearray, info: zipfile.ZipInfo) -> None:
    set_local_and_central(raw, info, 6, 8, 1)


def unknown_method(raw: bytearray, info: zipfile.ZipInfo) -> None:
    set_local_and_central(raw, info, 8, 10, 97)


@pytest.mark.parametrize(
    ("spoil", "method"),
    [
        (spoil_content, zipfile.ZIP_STORED),
        (spoil_content, zipfile.ZIP_DEFLATED),
        (encrypt, zipfile.ZIP_DEFLATED),
        (unknown_method, zipfile.ZIP_DEFLATED),
    ],
)
def test_damaged_member_of_a_zip_is_a_problem_of_its_tile(
    data: Path, spoil: Callable[[bytearray, zipfile.ZipInfo], None], method: int
) -> None:
    archive = pack(data, "test", method)
    table = read_test(open_folder(str(data)))
    tile, member = table.rows["id"].iloc[2], table.rows["image"].iloc[2]
    raw = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        spoil(raw, opened.getinfo(member))
    archive.write_bytes(raw)
    decoded, problems = decode(table)
    assert problems.keys() == {tile} and member in problems[tile]
    assert columns(decoded)["id"].tolist() == [i for i in table.rows["id"] if i != tile]


# Streams

Pairs = list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]
Flips = dict[str, bool]


def stream(
    tiles: Tiles, *, seed: int = 5, epoch: int = 1, batch_size: int = 8, flip: float = 0.5
) -> list[dict[str, torch.Tensor]]:
    batches = epoch_stream(
        tiles.decoded,
        AugmentConfig(flip=flip),
        seed=seed,
        epoch=epoch,
        batch_size=batch_size,
        cpus_per_task=0.1,
    )
    return list(batches)


def recognise(tiles: Tiles, batches: list[dict[str, torch.Tensor]]) -> Flips:
    """Tell which tile each image is, and if it was flipped; check that mask and depth are its own."""
    rows = columns(tiles.decoded)
    known = {}
    for tile, image, mask, z in zip(rows["id"], rows["image"], rows["mask"], rows["z"], strict=True):
        known[image.tobytes()] = (str(tile), False, mask, z)
        known[image[:, ::-1].tobytes()] = (str(tile), True, mask[:, ::-1], z)
    assert len(known) == 2 * TRAIN, "no image is another's, nor its own mirror image"
    found: Flips = {}
    for batch in batches:
        assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
        assert batch["image"].shape == batch["mask"].shape == (len(batch["image"]), TILE, TILE)
        for image, mask, z in zip(*(batch[name].numpy() for name in ("image", "mask", "z")), strict=True):
            tile, flipped, expected, depth = known[image.tobytes()]
            assert tile not in found, "each tile once an epoch"
            assert np.array_equal(mask, expected) and z == depth
            found[tile] = flipped
    return found


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a, b, strict=True)
    )


def test_an_epoch_holds_every_tile_once_shuffled_and_flipped_with_its_mask(tiles: Tiles) -> None:
    batches = stream(tiles)
    assert [len(batch["image"]) for batch in batches] == [8] * 6 + [2]
    flips = recognise(tiles, batches)
    assert sorted(flips) == IDS and list(flips) != IDS
    # Not the blocks alone change places: neighbours in the file are seldom neighbours in the epoch.
    steps = np.diff([IDS.index(tile) for tile in flips])
    assert (steps == 1).mean() < 0.3
    expected = {tile: bool(generator(5, 1, row).random() < 0.5) for row, tile in enumerate(IDS)}
    assert flips == expected and 10 < sum(flips.values()) < 40


def test_epoch_follows_seed_and_epoch_alone(tiles: Tiles) -> None:
    first = stream(tiles)
    assert same(first, stream(tiles))
    reference = recognise(tiles, first)
    for other in ({"epoch": 2}, {"seed": 6}):
        flips = recognise(tiles, stream(tiles, **other))
        assert sorted(flips) == IDS and list(flips) != list(reference), "another order"
        assert flips != reference, "other flips"
    assert recognise(tiles, stream(tiles, batch_size=50)) == reference, "flips do not depend on the batch"
    assert same(first, stream(tiles)), "nothing that came between has left a trace"


def test_epochs_that_start_ahead_are_the_same_and_end_with_the_trial(tiles: Tiles) -> None:
    def start(epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        return epoch_stream(
            tiles.decoded, AugmentConfig(), seed=7, epoch=epoch, batch_size=8, cpus_per_task=0.1
        )

    before = executors()
    with EpochStreams(start, epochs=9, tiles=TRAIN) as streams:
        assert same(list(streams(1)), list(start(1)))
        assert same(list(streams(2)), list(start(2)))
    deadline = time.monotonic() + 30
    while executors() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not executors() - before, "an early stop leaves no stream running"


def executors() -> set[threading.Thread]:
    """Return the threads that Ray Data runs streams in."""
    return {thread for thread in threading.enumerate() if "StreamingExecutor" in thread.name}


def test_no_more_tasks_augment_at_once_than_there_are_cores(
    tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set larger than the object store would be written to the disk and read again without end."""

    def slow(batch: Batch, config: AugmentConfig, seed: int, epoch: int) -> Batch:
        began = time.time()
        time.sleep(0.8)  # long enough for further processes to start, were they asked for
        (tmp_path / f"{began}").write_text(f"{time.time()}")
        return batch

    monkeypatch.setattr("saltray.data.stream.augment_for_training", slow)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.5})
    assert sum(len(batch["image"]) for batch in stream(tiles)) == TRAIN
    spans = sorted((float(file.name), float(file.read_text())) for file in tmp_path.iterdir())
    assert len(spans) == -(-TRAIN // dataset.TILES_PER_BLOCK)
    assert all(ended <= began for (_, ended), (began, _) in pairwise(spans))


@pytest.mark.parametrize(("flip", "expected"), [(0.0, False), (1.0, True)])
def test_flips_can_be_none_or_all(tiles: Tiles, flip: float, expected: bool) -> None:
    assert recognise(tiles, stream(tiles, flip=flip)) == dict.fromkeys(IDS, expected)


def test_batch_may_be_larger_than_the_data(tiles: Tiles) -> None:
    batches = stream(tiles, batch_size=64)
    assert [len(batch["image"]) for batch in batches] == [TRAIN]
    assert sorted(recognise(tiles, batches)) == IDS


def test_batches_are_the_receivers_own(tiles: Tiles) -> None:
    for batch in stream(tiles) + list(plain_stream(tiles.decoded, batch_size=8)):
        batch["image"].fill_(0)
        batch["mask"].fill_(1)
    assert list(recognise(tiles, list(plain_stream(tiles.decoded, batch_size=8)))) == IDS


@pytest.mark.parametrize(("batch_size", "sizes"), [(16, [16, 16, 16, 2]), (50, [50]), (64, [50])])
def test_plain_stream_gives_every_tile_once_in_order(tiles: Tiles, batch_size: int, sizes: list[int]) -> None:
    for _ in range(2):
        batches = list(plain_stream(tiles.decoded, batch_size=batch_size))
        assert [len(batch["image"]) for batch in batches] == sizes
        flips = recognise(tiles, batches)
        assert list(flips) == IDS and not any(flips.values())


# The contest's own tiles, where this machine has them


@pytest.mark.skipif(not TGS.exists(), reason="the contest's data is not here")
def test_the_contests_data_has_no_problems() -> None:
    folder = open_folder(str(TGS))
    train, test = read_train(folder), read_test(folder)
    assert train.problems == test.problems == {}
    assert (len(train.rows), len(test.rows)) == (3219, 781)
    assert train.rows["z"].between(50, 959).all() and test.rows["z"].between(50, 959).all()
    assert train.rows["coverage"].between(0, 1, inclusive="left").all()
    decoded, problems = decode(test)
    assert problems == {} and decoded.count() == 781
    rows = columns(decoded)
    assert rows["id"].tolist() == test.rows["id"].tolist()
    for i in range(0, 781, 100):
        assert np.array_equal(rows["image"][i], np.asarray(Image.open(test.rows["image"].iloc[i]))[:, :, 0])
