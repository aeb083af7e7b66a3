"""The probing without a Ray: this process answers for each machine; `tests/cluster` asks real ones."""

from pathlib import Path

import pytest
import ray

from saltray.records import shared_folder, storage


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the root under which each machine sees the folder, by its name; empty as this one does."""
    roots = {"h1": "", "h2": ""}
    nodes = [
        {
            "Alive": name != "dead",
            "NodeID": name,
            "NodeManagerHostname": name,
            "NodeManagerAddress": "10.0.0.1",
        }
        for name in (*roots, "dead")
    ]

    def ask(node: str, name: str, mark: str, expected: str) -> str:
        return shared_folder._answer(node, f"{roots[node]}{mark}", expected)

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(shared_folder, "_ask", ask)
    return roots


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_that_all_share_is_left_as_it_was(
    machines: dict[str, str], tmp_path: Path, scheme: str
) -> None:
    uri = f"{scheme}{tmp_path}" if scheme else None
    shared_folder.probe(storage.Home(tmp_path / "work" if uri else tmp_path / "new" / "run", uri))
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_sees_another_folder_is_named(machines: dict[str, str], tmp_path: Path) -> None:
    machines["h2"] = str(tmp_path / "elsewhere")
    with pytest.raises(
        storage.StorageError, match=r"h2 \(10\.0\.0\.1\) does not share it with .*: it reads '' there"
    ):
        shared_folder.probe(storage.Home(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_a_machine_writes_must_be_seen_here(
    machines: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_folder, "_ask", lambda *_: "")  # it says that it has written
    with pytest.raises(storage.StorageError, match=r"does not see what h1 \(10\.0\.0\.1\) wrote there"):
        shared_folder.probe(storage.Home(tmp_path))


def test_a_folder_of_one_machine_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    shared_folder.probe(storage.Home(tmp_path / "run"))
    with pytest.raises(storage.StorageError, match="cannot write there"):
        shared_folder.probe(storage.Home(tmp_path, f"file://{tmp_path}/absent/run"))
