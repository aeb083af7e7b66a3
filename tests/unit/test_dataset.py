"""The contest's folder as tables: what `saltray.data.dataset` does without Ray."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from saltray import demo
from saltray.contest import rle
from saltray.data import dataset
from saltray.data.dataset import (
    DataError,
    Folder,
    Table,
    open_folder,
    read_test,
    read_train,
    refuse,
)

Reader = Callable[[Folder], Table]

TRAIN = [f"train{i:06d}" for i in range(12)]
TEST = [f"test{i:06d}" for i in range(12, 16)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write(tmp_path_factory.mktemp("demo"), demo.files(train=12, test=4, seed=3))


@pytest.fixture
def data(pristine: Path, tmp_path: Path) -> Path:
    """A data set of the test's own, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def edit(file: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(file, dtype=str, keep_default_na=False)).to_csv(file, index=False)


def put(file: Path, tile: str, column: str, value: str) -> None:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[table["id"] == tile, column] = value
        return table

    edit(file, change)


def pack(data: Path, part: str, prefix: str) -> Path:
    """Zip a part as `prefix`images/... and remove its folder."""
    with zipfile.ZipFile(data / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((data / part).rglob("*.png")):
            archive.write(file, prefix + file.relative_to(data / part).as_posix())
    shutil.rmtree(data / part)
    return data / f"{part}.zip"


# The folder


@pytest.mark.parametrize("form", ["path", "trailing slash", "relative", "file URI"])
def test_open_folder_takes_paths_and_uris(data: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    uri = {"path": str(data), "trailing slash": f"{data}/", "relative": "data", "file URI": data.as_uri()}
    folder = open_folder(uri[form])
    assert folder.path("train", "images") == (data / "train" / "images").as_posix()
    assert folder.exists("train.csv") and folder.exists("train", "masks") and not folder.exists("nothing")
    assert read_train(folder).rows["id"].tolist() == TRAIN


@pytest.mark.parametrize("form", ["missing path", "missing URI", "file", "unknown scheme"])
def test_open_folder_names_what_is_not_there(data: Path, form: str) -> None:
    uri = {
        "missing path": str(data / "nowhere"),
        "missing URI": (data / "nowhere").as_uri(),
        "file": str(data / "train.csv"),
        "unknown scheme": "nosuch://bucket/data",
    }[form]
    with pytest.raises(DataError) as caught:
        open_folder(uri)
    assert uri in str(caught.value)


# The tables


def test_read_train_tells_depth_coverage_and_files(data: Path) -> None:
    table = read_train(open_folder(str(data)))
    rows = table.rows
    assert (table.archive, table.problems) == (None, {})
    assert rows["id"].tolist() == TRAIN and rows["row"].tolist() == list(range(12))
    depths = pd.read_csv(data / "depths.csv").set_index("id")["z"]
    assert rows["z"].tolist() == depths[TRAIN].tolist() and rows["z"].dtype == np.float32
    for _, row in rows.iterrows():
        mask = np.asarray(Image.open(row["mask"])) > 0
        assert row["coverage"] == pytest.approx(mask.mean(), abs=1e-12)
        assert np.array_equal(rle.decode(row["rle"]), mask)
        assert Path(row["image"]) == data / "train" / "images" / f"{row['id']}.png"
    assert (rows["coverage"] == 0).any() and (rows["coverage"] > 0).any(), "the sample shows both kinds"


def test_read_test_keeps_the_order_of_the_submission(data: Path) -> None:
    edit(data / "sample_submission.csv", lambda table: table.iloc[::-1])
    table = read_test(open_folder(str(data)))
    assert table.rows["id"].tolist() == table.ids == TEST[::-1]
    assert table.rows["row"].tolist() == [0, 1, 2, 3]
    assert [Path(f).stem for f in table.rows["image"]] == TEST[::-1]
    assert not {"mask", "rle", "coverage"} & set(table.rows.columns)


def test_ids_are_whole_where_tiles_are_bad(data: Path) -> None:
    (data / "test" / "images" / f"{TEST[0]}.png").unlink()
    table = read_test(open_folder(str(data)))
    assert table.ids == TEST and table.rows["id"].tolist() == TEST[1:]


def test_where_chooses_rows_and_drops_the_problems(data: Path) -> None:
    (data / "train" / "images" / f"{TRAIN[0]}.png").unlink()
    table = read_train(open_folder(str(data)))
    chosen = table.where(table.rows["coverage"].to_numpy() > 0)
    assert table.problems.keys() == {TRAIN[0]} and chosen.problems == {}
    assert 0 < len(chosen.rows) < len(table.rows) and (chosen.rows["coverage"] > 0).all()


@pytest.mark.parametrize(
    ("file", "reader"),
    [
        ("train.csv", read_train),
        ("depths.csv", read_train),
        ("sample_submission.csv", read_test),
    ],
)
def test_missing_csv_is_named(data: Path, file: str, reader: Reader) -> None:
    (data / file).unlink()
    with pytest.raises(DataError, match="no such file") as caught:
        reader(open_folder(str(data)))
    assert str(data / file) in str(caught.value)


def test_test_tiles_may_lack_depths_altogether(data: Path) -> None:
    expected = read_test(open_folder(str(data)))
    (data / "depths.csv").unlink()
    table = read_test(open_folder(str(data)))
    assert table.problems == {} and table.ids == TEST
    pd.testing.assert_frame_equal(table.rows, expected.rows.assign(z=np.float32(np.nan)))


@pytest.mark.parametrize(
    ("file", "reader"),
    [
        ("train.csv", read_train),
        ("depths.csv", read_train),
        ("sample_submission.csv", read_test),
        ("depths.csv", read_test),
    ],
)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a CSV"),
        (b"\xff\xfe\x00id", "not a CSV"),
        (b"id,z,rle_mask\na,1,1 1\nb,1,2,3,4\n", "not a CSV"),
        (b"identity,x\na,1\n", "no column 'id'; it has identity, x"),
        (b"id,x\na,1\n", "no column '"),
    ],
)
def test_unusable_csv_is_named(data: Path, file: str, reader: Reader, content: bytes, expected: str) -> None:
    (data / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        reader(open_folder(str(data)))
    assert str(data / file) in str(caught.value) and expected in str(caught.value)


def test_spaces_behind_commas_do_no_harm(data: Path) -> None:
    expected = read_train(open_folder(str(data))).rows
    for name in ("train.csv", "depths.csv"):
        (data / name).write_text((data / name).read_text().replace(",", " , "))
    table = read_train(open_folder(str(data)))
    assert table.problems == {}
    pd.testing.assert_frame_equal(table.rows, expected)


@pytest.mark.parametrize(("part", "reader"), [("train", read_train), ("test", read_test)])
def test_neither_folder_nor_zip(data: Path, part: str, reader: Reader) -> None:
    shutil.rmtree(data / part)
    with pytest.raises(DataError, match="no such folder, nor") as caught:
        reader(open_folder(str(data)))
    assert str(data / part) in str(caught.value) and str(data / f"{part}.zip") in str(caught.value)


@pytest.mark.parametrize(
    ("inner", "reader"),
    [("train/images", read_train), ("train/masks", read_train), ("test/images", read_test)],
)
def test_missing_inner_folder_is_named(data: Path, inner: str, reader: Reader) -> None:
    shutil.rmtree(data / inner)
    with pytest.raises(DataError, match="no such folder") as caught:
        reader(open_folder(str(data)))
    assert str(data / inner) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "reader"),
    [("train.csv", read_train), ("sample_submission.csv", read_test), ("depths.csv", read_train)],
)
@pytest.mark.parametrize("tile", ["../x", "a/b", "a\\b", "/etc/passwd", "..", "", "a b", "a.b", "é", "a\n"])
def test_id_that_is_no_plain_name_is_refused(data: Path, file: str, reader: Reader, tile: str) -> None:
    edit(data / file, lambda table: table.assign(id=[tile, *table["id"].tolist()[1:]]))
    with pytest.raises(DataError) as caught:
        reader(open_folder(str(data)))
    assert str(data / file) in str(caught.value) and repr(tile) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "reader"),
    [("train.csv", read_train), ("sample_submission.csv", read_test), ("depths.csv", read_test)],
)
def test_duplicate_ids_are_all_named(data: Path, file: str, reader: Reader) -> None:
    edit(data / file, lambda table: pd.concat([table, table.iloc[[0, 2]]]))
    twice = pd.read_csv(data / file)["id"].iloc[[0, 2]].tolist()
    with pytest.raises(DataError, match="twice") as caught:
        reader(open_folder(str(data)))
    assert str(data / file) in str(caught.value) and all(i in str(caught.value) for i in twice)


def test_tiles_that_do_not_match_are_collected_and_left_out(data: Path) -> None:
    images, masks = data / "train" / "images", data / "train" / "masks"
    (images / f"{TRAIN[0]}.png").unlink()
    shutil.copy(images / f"{TRAIN[1]}.png", images / "stranger.png")
    (masks / f"{TRAIN[2]}.png").unlink()
    put(data / "train.csv", TRAIN[3], "rle_mask", "7")
    put(data / "depths.csv", TRAIN[4], "z", "deep")
    edit(data / "depths.csv", lambda table: table[table["id"] != TRAIN[5]])
    table = read_train(open_folder(str(data)))
    expected = {
        TRAIN[0]: "in train.csv, but without an image (.png) in train/images",
        "stranger": "in train/images, but without a row in train.csv",
        TRAIN[2]: "without a mask in train/masks",
        TRAIN[3]: "train.csv: malformed run-length code '7'",
        TRAIN[4]: "depths.csv: depth 'deep' is not a number",
        TRAIN[5]: "without a row in depths.csv",
    }
    assert table.problems.keys() == expected.keys()
    for tile, problem in expected.items():
        assert problem in table.problems[tile]
    assert table.rows["id"].tolist() == [TRAIN[1], *TRAIN[6:]]
    assert table.rows["row"].tolist() == [1, *range(6, 12)], "a row's number is its place in the CSV"
    with pytest.raises(DataError, match="6 bad tiles") as caught:
        refuse(table.problems, "train")
    assert all(f"{tile}: {problem}" in str(caught.value) for tile, problem in table.problems.items())


def test_test_tiles_that_do_not_match_are_collected(data: Path) -> None:
    images = data / "test" / "images"
    (images / f"{TEST[0]}.png").rename(images / "stranger.png")
    put(data / "depths.csv", TEST[3], "z", "")
    table = read_test(open_folder(str(data)))
    assert table.problems.keys() == {TEST[0], "stranger", TEST[3]}
    assert table.rows["id"].tolist() == TEST[1:3]


def test_depths_that_no_model_takes_are_no_problem(data: Path) -> None:
    edit(data / "depths.csv", lambda table: table[table["id"] != TEST[1]])
    put(data / "depths.csv", TEST[3], "z", "deep")
    table = read_test(open_folder(str(data)), depth=False)
    assert table.problems == {} and table.rows["id"].tolist() == TEST
    assert np.isnan(table.rows["z"]).tolist() == [False, True, False, True]


def test_tiles_of_another_size_are_told_once() -> None:
    wrong = {f"t{i:03d}": f"images/t{i:03d}.png: 128x128 pixels: expected 101x101" for i in range(60)}
    with pytest.raises(DataError, match=r"60 tiles of another size, such as t000: .* to 101x101 pixels$"):
        refuse(wrong, "train")
    with pytest.raises(DataError, match="60 bad tiles"):
        refuse(wrong | {"t000": "broken"}, "train")


def test_tiles_that_a_machine_does_not_see_are_not_bad_tiles() -> None:
    unseen = {f"{i:03d}": f"[Errno 2] No such file or directory: '/nfs/{i:03d}.png'" for i in range(9)}
    with pytest.raises(DataError, match="train: 9 tiles that a machine of the cluster cannot open"):
        dataset.refuse_unseen(unseen | {"a": "broken"}, "train", few=8)
    dataset.refuse_unseen(unseen, "train", few=9)
    dataset.refuse_unseen(unseen, "s3://bucket/train")


def test_tiles_that_are_left_out_make_other_tiles(data: Path) -> None:
    table = read_train(dataset.open_folder(str(data)))
    fold = np.zeros(len(table.rows), np.int64)
    whole, first = dataset.fingerprint(table, fold), table.rows["id"].iloc[0]
    assert dataset.fingerprint(table, fold, ["of the test tiles"]) == whole
    assert dataset.fingerprint(table, fold, [first]) not in (whole, dataset.fingerprint(table, fold + 1))


def test_refuse_accepts_good_tiles_and_counts_one() -> None:
    refuse({}, "train")
    with pytest.raises(DataError, match=r"train: 1 bad tile:\n  a: broken\n.*--skip-bad"):
        refuse({"a": "broken"}, "train")


@pytest.mark.parametrize(
    ("bad", "more"), [(50, ""), (51, "  ... and 1 more\n"), (4000, "  ... and 3950 more\n")]
)
def test_refuse_names_fifty_tiles_at_most(bad: int, more: str) -> None:
    with pytest.raises(DataError) as caught:
        refuse({f"tile{i:04d}": "broken" for i in reversed(range(bad))}, "train")
    lines = "".join(f"  tile{i:04d}: broken\n" for i in range(50))
    assert str(caught.value).startswith(f"train: {bad} bad tiles:\n{lines}{more}Mend")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1", "not in pairs"),
        ("1 2 3", "not in pairs"),
        ("one 2", "pairs of whole numbers"),
        ("1 -2", "pairs of whole numbers"),
        ("1.0 2", "pairs of whole numbers"),
        ("1 99999999999999999999", "pairs of whole numbers"),
        ("0 5", "'0 5' lies outside"),
        ("5 0", "'5 0' lies outside"),
        ("10201 2", "'10201 2' lies outside"),
        ("1 10202", "'1 10202' lies outside"),
        ("1 5 5 2", "'5 2' overlaps"),
        ("10 2 1 2", "'1 2' overlaps"),
    ],
)
def test_wrong_run_length_code_is_a_problem_of_its_tile(data: Path, code: str, expected: str) -> None:
    put(data / "train.csv", TRAIN[6], "rle_mask", code)
    table = read_train(open_folder(str(data)))
    assert table.problems.keys() == {TRAIN[6]}
    assert table.problems[TRAIN[6]].startswith("train.csv: ") and expected in table.problems[TRAIN[6]]
    assert table.rows["id"].tolist() == TRAIN[:6] + TRAIN[7:]


@pytest.mark.parametrize(
    ("code", "coverage"), [("", 0.0), ("1 10201", 1.0), ("10201 1", 1 / 10201), ("1 5 6 2", 7 / 10201)]
)
def test_extreme_run_length_codes_are_counted(data: Path, code: str, coverage: float) -> None:
    put(data / "train.csv", TRAIN[6], "rle_mask", code)
    table = read_train(open_folder(str(data)))
    assert table.problems == {} and table.rows["coverage"].iloc[6] == pytest.approx(coverage, abs=1e-12)


@pytest.mark.parametrize("depth", ["deep", "", "nan", "12,5", "0x1z"])
def test_depth_that_is_no_number_is_a_problem_of_its_tile(data: Path, depth: str) -> None:
    put(data / "depths.csv", TRAIN[2], "z", depth)
    table = read_train(open_folder(str(data)))
    assert table.problems.keys() == {TRAIN[2]} and repr(depth) in table.problems[TRAIN[2]]


# The zips


@pytest.mark.parametrize("prefix", ["", "part/", "./", "deep/er/"])
def test_zip_gives_the_table_of_its_folder(data: Path, prefix: str) -> None:
    folder = open_folder(str(data))
    for part, reader in (("train", read_train), ("test", read_test)):
        unpacked = reader(folder)
        archive = pack(data, part, prefix)
        table = reader(folder)
        assert table.archive == str(archive) and table.problems == {}
        files = ["image", "mask"] if part == "train" else ["image"]
        pd.testing.assert_frame_equal(table.rows.drop(columns=files), unpacked.rows.drop(columns=files))
        with zipfile.ZipFile(archive) as opened:
            for kind in files:
                for member, file in zip(table.rows[kind], unpacked.rows[kind], strict=True):
                    assert Path(member).name == Path(file).name and f"{kind}s/" in member
                    assert opened.getinfo(member).file_size > 0


def test_folder_goes_before_zip(data: Path) -> None:
    (data / "train.zip").write_bytes(b"not looked at")
    assert read_train(open_folder(str(data))).archive is None


@pytest.mark.parametrize(
    "name",
    ["../images/evil.png", "images/../../evil.png", "/images/evil.png", "images\\evil.png", "../note.txt"],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_zip_with_a_member_outside_is_refused(data: Path, part: str, name: str) -> None:
    archive = pack(data, part, "")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(zipfile.ZipInfo(name), b"junk")
    with pytest.raises(DataError, match="leads out of the archive") as caught:
        (read_train if part == "train" else read_test)(open_folder(str(data)))
    assert str(archive) in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.parametrize("spoil", ["text", "empty", "cut", "folder"])
def test_not_a_zip_is_named(data: Path, spoil: str) -> None:
    archive = pack(data, "train", "")
    content = archive.read_bytes()
    if spoil == "folder":
        archive.unlink()
        archive.mkdir()
    else:
        archive.write_bytes(
            {"text": b"hello" * 100, "empty": b"", "cut": content[: len(content) // 2]}[spoil]
        )
    with pytest.raises(DataError) as caught:
        read_train(open_folder(str(data)))
    assert str(archive) in str(caught.value)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_zip_without_a_folder_is_named(data: Path, kind: str) -> None:
    shutil.rmtree(data / "train" / kind)
    archive = pack(data, "train", "train/")
    with pytest.raises(DataError, match=f"no folder '{kind}'") as caught:
        read_train(open_folder(str(data)))
    assert str(archive) in str(caught.value)


def test_what_macos_adds_to_a_zip_is_ignored(data: Path) -> None:
    archive = pack(data, "train", "train/")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.mkdir("train/images/")
        for name in (
            f"__MACOSX/train/images/._{TRAIN[0]}.png",
            f"__MACOSX/train/images/{TRAIN[0]}.png",
            "__MACOSX/images/stranger.png",
            "train/images/.stranger.png",
            ".cache/images/stranger.png",
            "train/images/.DS_Store",
            "train/images/notes.txt",
            "train/thumbnails/stranger.png",
        ):
            opened.writestr(name, b"junk")
    table = read_train(open_folder(str(data)))
    assert table.problems == {} and table.rows["id"].tolist() == TRAIN
    assert table.rows["image"].iloc[0] == f"train/images/{TRAIN[0]}.png"


def test_what_macos_leaves_in_a_folder_is_ignored(pristine: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(pristine, tmp_path / ".hidden" / "data"))
    for kind in ("images", "masks"):
        for name in (f"._{TRAIN[0]}.png", ".stranger.PNG", ".DS_Store", "notes.txt"):
            (data / "train" / kind / name).write_bytes(b"junk")
    table = read_train(open_folder(str(data)))
    assert table.problems == {} and table.rows["id"].tolist() == TRAIN
    assert Path(table.rows["image"].iloc[0]).name == f"{TRAIN[0]}.png"
