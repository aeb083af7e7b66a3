import json
from pathlib import Path
from typing import Any

import pytest

from saltray.prediction import members
from saltray.prediction.members import ENSEMBLE, Member
from saltray.training.checkpoint import CheckpointError


def test_a_checkpoint_is_its_own_only_member(tmp_path: Path) -> None:
    assert members.read(tmp_path) == [Member(tmp_path, 1.0)]


def test_members_come_back_with_their_weights(tmp_path: Path) -> None:
    members.write(tmp_path, {"members/00": 0.25, "members/01": 0.75})
    assert members.read(tmp_path) == [
        Member(tmp_path / "members/00", 0.25),
        Member(tmp_path / "members/01", 0.75),
    ]


def row(folder: Any = "members/00", weight: Any = 1.0) -> dict[str, Any]:
    return {"folder": folder, "weight": weight}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"format": 1, "members": [{"folder": "members/00"}]}), "damaged"),
        (json.dumps({"format": 1, "members": [row("../../elsewhere")]}), "not in members/"),
        (json.dumps({"format": 1, "members": [row("/etc")]}), "not in members/"),
        (json.dumps({"format": 1, "members": []}), "1 together"),
        (json.dumps({"format": 1, "members": [row(weight=2), row(weight=-1)]}), "positive"),
        (json.dumps({"format": 9, "members": [row()]}), "newer saltray"),
    ],
)
def test_what_is_damaged_or_leads_elsewhere_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / ENSEMBLE).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        members.read(tmp_path)
