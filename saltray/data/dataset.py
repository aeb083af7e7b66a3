"""The contest's folder -> Ray Datasets of decoded, checked uint8 tiles.

The folder has Kaggle's layout, unpacked or as downloaded: `train.csv`, `depths.csv`,
`sample_submission.csv`, and `train/images`, `train/masks`, `test/images` or `train.zip`, `test.zip`. It may
lie on any file system that pyarrow reads (a local path, `s3://`, `gs://` ...).

What is wrong with a single tile is collected, never raised on the way, so that one run tells all bad tiles.
"""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.fs
import ray.data

from saltray.config import TILE, UserError, counted
from saltray.contest import csvfile, rle
from saltray.data import png
from saltray.data.augment import Batch

TILES_PER_BLOCK = 512
"""10 MiB of image and mask: large enough to outweigh a task's overhead, small enough to stream."""

DEPTHS = "depths.csv"

_LISTED = 50  # bad tiles that a refusal names
_SAFE_ID = re.compile(r"[A-Za-z0-9_-]+")

Problems = dict[str, str]
"""What is wrong, by tile id."""


class DataError(UserError):
    """The data cannot be used as it is; the message names every file or value and what to do."""


@dataclass(frozen=True)
class Folder:
    """The contest's folder on some file system."""

    filesystem: pyarrow.fs.FileSystem
    root: str

    def path(self, *parts: str) -> str:
        """Return the path of something in the folder."""
        return "/".join([self.root.rstrip("/"), *parts])

    def exists(self, *parts: str) -> bool:
        """Tell whether a file or folder is there."""
        return bool(self.filesystem.get_file_info(self.path(*parts)).type != pyarrow.fs.FileType.NotFound)


@dataclass(frozen=True)
class Table:
    """Where the tiles of one part lie, and what the CSVs say of them.

    `rows` has the columns row (int64, position in the CSV), id, z (float), image (path or zip member), and
    for training tiles mask (likewise), rle and coverage (share of salt, in [0, 1]). `ids` are all of the CSV,
    in its order, those with a problem too.
    """

    folder: Folder
    archive: str | None
    rows: pd.DataFrame
    ids: list[str]
    problems: Problems = field(default_factory=dict)

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Table":
        """Return the table of the chosen rows; the problems stay with the whole."""
        return replace(self, rows=self.rows[chosen], problems={})


def open_folder(uri: str) -> Folder:
    """Open the contest's folder.

    Raises:
        DataError: there is no such folder.
    """
    if "://" in uri:
        try:
            filesystem, root = pyarrow.fs.FileSystem.from_uri(uri)
            kind = filesystem.get_file_info(root).type
        except (ValueError, OSError) as error:
            raise DataError(f"{uri}: cannot be read: {error}") from None
    else:
        filesystem, root = pyarrow.fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
        kind = filesystem.get_file_info(root).type
    if kind != pyarrow.fs.FileType.Directory:
        raise DataError(f"{uri}: no such folder; name the one that holds train.csv")
    return Folder(filesystem, root)


def read_train(folder: Folder) -> Table:
    """Read the labelled tiles' table: ids, depths, run-length codes, coverage and where the files lie.

    Raises:
        DataError: a file, folder or column is missing, or an id is unsafe or stands twice.
    """
    rows = _read_csv(folder, "train.csv", ["id", "rle_mask"]).rename(columns={"rle_mask": "rle"})
    archive, files = _list_files(folder, "train", ["images", "masks"])
    problems = _match(rows, files["images"], "train.csv", "train/images")
    for tile in files["images"].keys() - files["masks"].keys() - problems.keys():
        problems[tile] = "in train/images, but without a mask in train/masks"
    areas = np.zeros(len(rows))
    for i, (tile, code) in enumerate(zip(rows["id"], rows["rle"], strict=True)):
        try:
            areas[i] = rle.area(code)
        except ValueError as error:
            problems.setdefault(tile, f"train.csv: {error}")
    rows = rows.assign(
        coverage=areas / TILE**2, image=rows["id"].map(files["images"]), mask=rows["id"].map(files["masks"])
    )
    rows = _add_depths(folder, rows, problems)
    return Table(folder, archive, rows[~rows["id"].isin(list(problems))], rows["id"].tolist(), problems)


def read_test(folder: Folder, depth: bool = True) -> Table:
    """Read the unlabelled tiles' table, in the order of `sample_submission.csv`; raises as `read_train`.

    Where there is no depths.csv, z is NaN: most networks do not take the depth.

    Args:
        folder: the contest's.
        depth: whether it is a problem when a tile has no row in depths.csv.
    """
    rows = _read_csv(folder, "sample_submission.csv", ["id", "rle_mask"]).drop(columns="rle_mask")
    archive, files = _list_files(folder, "test", ["images"])
    problems = _match(rows, files["images"], "sample_submission.csv", "test/images")
    rows = rows.assign(image=rows["id"].map(files["images"]), z=np.float32(np.nan))
    if folder.exists(DEPTHS):
        rows = _add_depths(folder, rows, problems if depth else {})
    return Table(folder, archive, rows[~rows["id"].isin(list(problems))], rows["id"].tolist(), problems)


def fingerprint(table: Table, fold: npt.NDArray[np.int64], left_out: Container[str] = ()) -> str:
    """Return a hash of the labelled tiles' ids, masks and folds, but for those that are left out."""
    rows = zip(table.rows["id"], fold, table.rows["rle"], strict=True)
    lines = (f"{i} {f} {code}\n" for i, f, code in rows if i not in left_out)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def decode(table: Table, skip_bad: bool = True) -> tuple[ray.data.Dataset, Problems]:
    """Decode a table's tiles into a materialized dataset, shared by whoever reads it.

    Columns: row int64, id, image uint8 (101, 101), z float32; for training tiles also mask uint8 (101, 101)
    in {0, 1} and coverage float32. Tiles that cannot be read are named in the problems.

    Args:
        table: what to decode.
        skip_bad: leave these tiles out, which decodes all others once more; else they stay in, as zeros, for
            a caller that refuses them.
    """
    decoded = (
        ray.data.from_pandas(_blocks(table.rows))
        .map_batches(
            partial(_decode_batch, filesystem=table.folder.filesystem, archive=table.archive),
            batch_size=None,
        )
        .materialize()
    )
    problems: Problems = {}
    for batch in decoded.select_columns(["id", "error"]).iter_batches(batch_size=None):
        problems |= {str(i): str(e) for i, e in zip(batch["id"], batch["error"], strict=True) if e}
    if problems and skip_bad:
        good = ~table.rows["id"].isin(list(problems)).to_numpy()
        decoded, more = decode(table.where(good))
        problems |= more
    return decoded, problems


def decode_local(table: Table) -> tuple[Batch, Problems]:
    """Decode a table's tiles as `decode` does, into arrays of this process and without Ray."""
    decode_block = partial(_decode_batch, filesystem=table.folder.filesystem, archive=table.archive)
    with ThreadPoolExecutor() as pool:
        blocks = ({name: block[name].to_numpy() for name in block} for block in _blocks(table.rows))
        decoded = list(pool.map(decode_block, blocks))
    tiles = {name: np.concatenate([block[name] for block in decoded]) for name in decoded[0]}
    errors = tiles.pop("error")
    good = errors == ""
    problems = {str(i): str(e) for i, e in zip(tiles["id"][~good], errors[~good], strict=True)}
    return {name: column[good] for name, column in tiles.items()}, problems


def refuse_unseen(problems: Problems, where: str, few: int = 1) -> None:
    """Raise a DataError where a machine of the cluster does not see the folder: its tiles are not bad.

    Args:
        problems: of all tiles.
        where: the folder.
        few: tiles that may lack their file without that.
    """
    unseen = {tile: problem for tile, problem in problems.items() if "No such file" in problem}
    if len(unseen) > few and "://" not in where:
        # This machine has listed them: it is another one that decodes.
        raise DataError(
            f"{where}: {counted(len(unseen), 'tile')} that a machine of the cluster cannot open, such as "
            f"{min(unseen)}: {unseen[min(unseen)]}. All machines must see that folder: NFS, or s3://"
        )


def refuse(problems: Problems, where: str) -> None:
    """Raise a DataError that lists the problems, if there is one; of very many the first."""
    refuse_unseen(problems, where)
    size = f"expected {TILE}x{TILE}"
    if len(problems) > _LISTED and all(p.endswith(size) for p in problems.values()):
        raise DataError(
            f"{where}: {counted(len(problems), 'tile')} of another size, such as {min(problems)}: "
            f"{problems[min(problems)]}. Cut or resize all images and masks to {TILE}x{TILE} pixels"
        )
    if problems:
        lines = [f"  {tile}: {problem}\n" for tile, problem in sorted(problems.items())[:_LISTED]]
        if len(problems) > _LISTED:
            lines.append(f"  ... and {len(problems) - _LISTED} more\n")
        raise DataError(
            f"{where}: {counted(len(problems), 'bad tile')}:\n{''.join(lines)}"
            "Mend these files, or pass --skip-bad to leave the tiles out."
        )


def _blocks(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Cut a table's rows into blocks; of none at all, one empty block."""
    return [rows.iloc[i : i + TILES_PER_BLOCK] for i in range(0, max(len(rows), 1), TILES_PER_BLOCK)]


def _read_csv(folder: Folder, name: str, columns: list[str]) -> pd.DataFrame:
    """Read a CSV as text, with the row's position as column `row`."""
    if not folder.exists(name):
        raise DataError(f"{folder.path(name)}: no such file")
    try:
        with folder.filesystem.open_input_stream(folder.path(name)) as file:
            table = csvfile.read(file, folder.path(name), columns, DataError)
    except OSError as error:
        raise DataError(f"{folder.path(name)}: cannot be read: {error}") from None
    unsafe = [i for i in table["id"] if not _SAFE_ID.fullmatch(i)]
    if unsafe:
        raise DataError(
            f"{folder.path(name)}: id {unsafe[0]!r}: only letters, digits, '_' and '-' may stand in one"
        )
    return table.assign(row=np.arange(len(table)))


def _list_files(
    folder: Folder, part: Literal["train", "test"], kinds: list[str]
) -> tuple[str | None, dict[str, dict[str, str]]]:
    """List the PNGs of a part: (the zip they are in or None, kind -> id -> path or zip member)."""
    if folder.exists(part):
        files = {}
        for kind in kinds:
            if not folder.exists(part, kind):
                raise DataError(f"{folder.path(part, kind)}: no such folder")
            selector = pyarrow.fs.FileSelector(folder.path(part, kind))
            infos = folder.filesystem.get_file_info(selector)
            # The name alone: the folder itself may well lie in a hidden one.
            found = ((i.path, PurePosixPath(i.base_name)) for i in infos)
            files[kind] = {name.stem: path for path, name in found if _is_picture(name)}
        return None, files
    archive = folder.path(f"{part}.zip")
    if not folder.exists(f"{part}.zip"):
        raise DataError(f"{folder.path(part)}: no such folder, nor {archive}")
    with _open_zip(folder.filesystem, archive) as opened:
        names = opened.namelist()
    return archive, _sort_members(archive, names, kinds)


def _sort_members(archive: str, names: list[str], kinds: list[str]) -> dict[str, dict[str, str]]:
    """Sort a zip's members by the folder that they are in."""
    files: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise DataError(f"{archive}: member {name!r} leads out of the archive; do not trust this file")
        if _is_picture(path) and path.parent.name in files:
            files[path.parent.name][path.stem] = name
    for kind in kinds:
        if not files[kind]:
            raise DataError(f"{archive}: no folder '{kind}' with PNG files in it")
    return files


def _is_picture(path: PurePosixPath) -> bool:
    """Tell a PNG, and none that is hidden: macOS puts `._ID.png` and `__MACOSX/` beside what it packs."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() == ".png" and not hidden


@contextmanager
def _open_zip(filesystem: pyarrow.fs.FileSystem, archive: str) -> Iterator[zipfile.ZipFile]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(filesystem.open_input_file(archive))
            opened = stack.enter_context(zipfile.ZipFile(file))
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(f"{archive}: not a readable zip file: {error}") from None
        yield opened


def _match(rows: pd.DataFrame, images: dict[str, str], csv: str, where: str) -> Problems:
    """Name the ids that the CSV and the images do not share."""
    ids = set(rows["id"])
    without_image = dict.fromkeys(ids - images.keys(), f"in {csv}, but without an image (.png) in {where}")
    return without_image | dict.fromkeys(images.keys() - ids, f"in {where}, but without a row in {csv}")


def _add_depths(folder: Folder, rows: pd.DataFrame, problems: Problems) -> pd.DataFrame:
    """Add the depth z of each tile."""
    depths = _read_csv(folder, DEPTHS, ["id", "z"]).set_index("id")["z"]
    for tile in set(rows["id"]) - set(depths.index):
        problems.setdefault(tile, f"without a row in {DEPTHS}")
    z = pd.to_numeric(rows["id"].map(depths), errors="coerce").astype(np.float32)
    for tile in set(rows["id"][~np.isfinite(z)]) & set(depths.index):
        problems.setdefault(tile, f"{DEPTHS}: depth {depths[tile]!r} is not a number")
    return rows.assign(z=z)


@contextmanager
def _reader(filesystem: pyarrow.fs.FileSystem, archive: str | None) -> Iterator[Callable[[str], bytes]]:
    """Give a function that reads a file, or a member of the archive, up to just past the size limit."""
    if archive is None:

        def read(path: str) -> bytes:
            with filesystem.open_input_stream(path) as file:
                return bytes(file.read(png.LIMIT + 1))

        yield read
    else:
        with _open_zip(filesystem, archive) as opened:

            def read_member(name: str) -> bytes:
                try:
                    with opened.open(name) as member:
                        return member.read(png.LIMIT + 1)
                except (zlib.error, EOFError, RuntimeError) as error:  # damaged, encrypted, unknown method
                    raise ValueError(f"a damaged or encrypted member of the zip: {error}") from None

            yield read_member


def _decode_batch(batch: Batch, filesystem: pyarrow.fs.FileSystem, archive: str | None) -> Batch:
    """Decode a block's tiles; a tile that fails has its reason in column `error`, and zeros."""
    tiles = len(batch["id"])
    images = np.zeros((tiles, TILE, TILE), np.uint8)
    masks = np.zeros((tiles, TILE, TILE), np.uint8)
    errors = [""] * tiles
    with _reader(filesystem, archive) as read:
        for i in range(tiles):
            path = str(batch["image"][i])
            try:
                images[i] = png.decode_image(read(path))
                if "mask" in batch:
                    path = str(batch["mask"][i])
                    masks[i] = png.decode_mask(read(path))
                    if not np.array_equal(masks[i], rle.decode(str(batch["rle"][i]))):
                        raise ValueError("the mask disagrees with its run-length code in train.csv")
            except (ValueError, OSError, zipfile.BadZipFile) as error:
                errors[i] = f"{path}: {error}"
    result: Batch = {
        "row": batch["row"].astype(np.int64),
        "id": batch["id"],
        "image": images,
        "z": batch["z"].astype(np.float32),
        "error": np.array(errors, dtype=object),
    }
    if "mask" in batch:
        result |= {"mask": masks, "coverage": batch["coverage"].astype(np.float32)}
    return result
