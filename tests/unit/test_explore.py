"""The command line, and what the report says of given tiles."""

import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saltray import demo, explore
from saltray.cli import run_program
from saltray.config import NEIGHBOURS, Split, UserError
from saltray.data import survey
from saltray.reporting import data_page
from tests.unit.contrast import LEAST, contrasts


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write(tmp_path_factory.mktemp("demo"), demo.files(train=20, test=5, seed=1))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    monkeypatch.setattr("sys.argv", ["explore", *arguments])
    monkeypatch.setattr("sys.excepthook", None)  # typer changes it
    with pytest.raises(SystemExit) as ended:
        run_program(explore.main)
    return ended.value.code


def text(file: Path) -> str:
    """Return what stands in the body, in one line, without tags, scripts and pictures."""
    _, _, body = file.read_text(encoding="utf-8").partition("<body>")
    body = re.sub(r"(?s)<script.*?</script>", "", body)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_a_report_is_written_and_never_over_another_file(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "report.html"
    assert call(monkeypatch, str(pristine), "--out", str(out), "--seed", "7") == 0
    assert capsys.readouterr().out == f"20 labelled and 5 test tiles: {out}\n"
    written = text(out)
    assert "Split 16 training and 4 validation tiles (seed 7)" in written
    assert "Bad tiles None: every image and mask can be read" in written
    content = out.read_bytes()
    code = call(monkeypatch, str(pristine), "--out", str(out))
    assert code == f"error: {out}: already there; remove it or choose another --out"
    assert out.read_bytes() == content
    assert call(monkeypatch, str(pristine), "--out", f"file://{tmp_path}/again.html", "--seed", "7") == 0
    assert (tmp_path / "again.html").read_bytes() == content


@pytest.mark.parametrize("split", ["coverage", "neighbours"])
def test_the_split_is_told_as_it_is(pristine: Path, tmp_path: Path, split: Split) -> None:
    data = survey.read(str(pristine), 0, split)._replace(neighbours=np.array([[0, 1]]))
    data_page.build(data, "tiles", 0, split).write(tmp_path / "page.html")
    _, _, section = unescape(text(tmp_path / "page.html")).partition(f"--split {split} trains")
    assert NEIGHBOURS[split] in section
    for words in ("flatters the score", "--split neighbours leaves none"):
        assert (words in section) == (split == "coverage")


def test_what_cannot_be_explored_leaves_no_file(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    code = call(monkeypatch, str(tmp_path / "absent"), "--out", str(out))
    assert code == f"error: {tmp_path}/absent: no such folder; name the one that holds train.csv"
    spoilt = Path(shutil.copytree(pristine, tmp_path / "data"))
    (spoilt / "depths.csv").unlink()
    assert call(monkeypatch, str(spoilt), "--out", str(out)) == f"error: {spoilt}/depths.csv: no such file"
    assert not out.exists()


def test_odd_tiles_are_counted_and_named(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(pristine, tmp_path / "data"))
    tiles = survey.read(str(data), 0).labelled
    empty = tiles["id"][tiles["pixels"] == 0].tolist()
    salt = tiles["id"][tiles["pixels"] > 0].tolist()
    Image.fromarray(np.zeros((101, 101), np.uint8)).save(data / "train" / "images" / f"{empty[0]}.png")
    shutil.copy(data / "train" / "images" / f"{salt[0]}.png", data / "test" / "images" / "test000022.png")
    (data / "train" / "images" / f"{salt[1]}.png").write_bytes(b"<script>")
    (data / "test" / "images" / "stray.png").touch()
    out = tmp_path / "report.html"
    assert call(monkeypatch, str(data), "--out", str(out)) == 0
    assert f"2 bad tiles left out, such as {min('stray', salt[1])}" in capsys.readouterr().err
    written = text(out)
    assert f"Empty masks {len(empty)} ({len(empty) / 19 * 100:.1f} %)" in written
    assert f"an all-empty prediction scores {len(empty) / 19:.3f}" in written
    assert "Black images 1 labelled, 0 test" in written
    assert f"Ids of all 1 black labelled images {empty[0]} " in written
    assert f"labelled test masks agree {salt[0]} test000022 –" in written
    assert "stray in test/images, but without a row in sample_submission.csv" in written
    assert f"{salt[1]} {data}/train/images/{salt[1]}.png: " in written


def test_a_set_without_salt_and_without_test_tiles_is_reported_too(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(pristine, tmp_path / "data"))
    ids = [f"train{i:06d}" for i in range(20)]
    (data / "train.csv").write_text("id,rle_mask\n" + "".join(f"{i},\n" for i in ids))
    for i in ids:
        Image.fromarray(np.zeros((101, 101), np.uint8)).save(data / "train" / "masks" / f"{i}.png")
    (data / "sample_submission.csv").write_text("id,rle_mask\n")
    for file in (data / "test" / "images").iterdir():
        file.unlink()
    out = tmp_path / "report.html"
    assert call(monkeypatch, str(data), "--out", str(out)) == 0
    written = text(out)
    assert "Empty masks 20 (100.0 %), so that an all-empty prediction scores 1.000" in written
    assert "Coverage of the others –" in written
    assert "There are no vertical-stripe masks." in written


def test_pictures_are_spread_over_their_class_and_tiny_masks_framed(pristine: Path) -> None:
    members = np.arange(100, 200)
    assert list(data_page._spread(members, 3)) == [100, 150, 199]
    assert list(data_page._spread(members[:2], 3)) == [100, 101]
    data = survey.read(str(pristine), 0)
    masks = np.zeros_like(data.masks)
    masks[0, 0, 0] = masks[1, 50, 100] = 1
    frame = data.labelled.assign(pixels=masks.sum(axis=(1, 2)), coverage=masks.mean(axis=(1, 2)))
    tiny = data._replace(labelled=frame, masks=masks)
    for i in (0, 1):
        picture = data_page._picture(tiny, i)
        assert picture.text == f"{data.labelled['id'][i]}\n1 px · z {data.labelled['z'][i]:.0f}"
        orange = (np.asarray(picture.image) == (255, 150, 0)).all(axis=2)
        assert orange.any(axis=0).sum() > 10  # a frame inside the tile, at its corner as well
    assert data_page._picture(tiny, 2).text.split("\n")[1].startswith("empty")


def test_figures_are_seen_on_white(pristine: Path) -> None:
    tiles = survey.read(str(pristine), 0).labelled
    figures = [
        data_page.depth_figure({"labelled": tiles["z"], "test": tiles["z"]}),
        data_page.salt_by_depth(tiles),
        data_page.coverage_by_depth(tiles[tiles["pixels"] > 0]),
        data_page.coverage_figure(tiles["coverage"]),
        data_page.balance_figure({"training": tiles, "validation": tiles}),
    ]
    for figure in figures:
        assert min(contrasts(figure)) >= LEAST


def test_refusal_comes_before_the_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "report.html").touch()
    with pytest.raises(UserError, match="already there"):
        explore.main(str(tmp_path / "absent"), out=str(tmp_path / "report.html"))
