import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks.__main__ as command
from benchmarks import rows, table
from benchmarks.rows import Goal, Row, at_least, at_most
from saltray.config import UserError

ENVIRONMENT: dict[str, Any] = {
    "command": "python -m benchmarks",
    "started": "2026-11-22T10:00:00+00:00",
    "machine": "Linux",
}
ENVIRONMENT |= {"cpu": "a CPU", "gpu": None, "python": "3.11", "versions": {"ray": "2.60.0"}, "commit": "abc"}


def entry(what: str, value: float | None, group: str = "metric", **more: Any) -> dict[str, Any]:
    return Row(what, value, "x", **more).to_dict() | {"group": group}


def test_goals_bound_from_either_side_or_from_the_run_before() -> None:
    assert at_least(1.2).met(1.2) and not at_least(1.2).met(1.1)
    assert at_most(1.0).met(1.0) and not at_most(1.0).met(1.1)
    same = Goal("as before, within", 0.005)
    assert same.met(0.704, 0.7) and not same.met(0.71, 0.7) and same.met(0.7) is None


def test_what_was_not_measured_is_not_missed() -> None:
    found = [entry("a", None, goal=at_most(1.0)), entry("b", 2.0, goal=at_most(1.0)), entry("c", 2.0)]
    table.judge(found, [])
    assert [row["met"] for row in found] == [None, False, None]


def test_two_programs_take_turns() -> None:
    calls: list[str] = []

    def program(name: str) -> Callable[[], float]:
        def run() -> float:
            calls.append(name)
            return float(len(calls))

        return run

    ours, peer = rows.interleaved(program("a"), program("b"), 3)
    assert "".join(calls) == "abbaab"
    assert (ours, peer) == ([1, 4, 5], [2, 3, 6])


def test_the_table_shows_the_figure_before_beside_the_new_one() -> None:
    now = [entry("epoch", 1.25, goal=at_least(1.2), note="a | b"), entry("new", 0.5, goal=at_least(1.0))]
    table.judge(now, [])
    earlier = ENVIRONMENT | {"started": "2026-11-20T10:00:00+00:00", "commit": "old"}
    kept = entry("kept", 3.0, spread=(3.0, 3.0)) | {"environment": earlier, "met": None}
    text = table.markdown([*now, kept], [entry("epoch", 1.1), kept], ENVIRONMENT)
    lines = text.splitlines()
    assert "| epoch | **1.25 x** |  | 1.1 x | at least 1.2 x: met | a / b | abc |" in lines
    assert "| new | **0.5 x** |  |  | at least 1 x: missed |  | abc |" in lines
    assert "| kept | **3 x** |  |  |  |  | old |" in lines
    assert "a CPU; no GPU" in text


def test_groups_that_were_left_out_keep_their_rows_in_order() -> None:
    before = [entry("p", 1, "predict"), entry("m", 1, "metric"), entry("gone", 1, "dropped")]
    merged = table.merge(before, [entry("m2", 2, "metric")], ["metric", "predict"])
    assert [row["what"] for row in merged] == ["m2", "p"]


def test_before_is_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)  # a hook of git's may run these tests
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    file = tmp_path / "speed.json"
    assert table.committed(file) == []
    file.write_text(json.dumps({"rows": [entry("m", 1)]}))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "run"]):
        subprocess.run([*git, *arguments], check=True)
    file.write_text(json.dumps({"rows": [entry("m", 2)]}))
    assert [row["value"] for row in table.committed(file)] == [1]


@pytest.mark.parametrize(
    ("source", "limit", "words"),
    [
        ("def measure(): raise OSError('no such device')", 60.0, "exit status 1: OSError: no such device"),
        ("import time\ndef measure(): time.sleep(60)", 0.5, "not done after 0.5 s"),
    ],
)
def test_a_group_that_fails_or_hangs_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, limit: float, words: str
) -> None:
    # The child is a program of its own: it is told of the group by what it runs.
    (tmp_path / "failing.py").write_text(source + "\nmeasure()\n")
    real = subprocess.Popen

    def start(_: list[str], **options: Any) -> Any:
        return real([sys.executable, str(tmp_path / "failing.py")], **options)

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": start}))
    monkeypatch.setitem(command.GROUPS, "metric", command.Group("scoring", limit))
    (row,) = command.run_group("metric")
    assert row["value"] is None
    assert words in row["note"]


def test_an_unknown_group_is_told_with_those_there_are() -> None:
    with pytest.raises(UserError, match="--only speed: there are metric, start"):
        command.main(only=["speed"])
