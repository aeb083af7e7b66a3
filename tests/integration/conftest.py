"""A Ray on this machine, shared by the tests of one file; programs that end with their test."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from saltray import connection, demo
from tests.integration.programs import SPACE, Program


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Start a Ray of two CPUs of the tests' own, set up as a search sets it; never join another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)  # without it, `connect` starts a Ray of its own
        connection.connect(None, cpus=2)
        yield
        connection.disconnect()


@pytest.fixture
def start() -> Iterator[type[Program]]:
    with ExitStack() as programs:

        class Started(Program):
            def __init__(self, *arguments: str | Path) -> None:
                super().__init__(*arguments)
                programs.callback(self.end)

        yield Started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    demo.write(folder, demo.files(train=30, test=6, seed=1))
    (folder / "space.py").write_text(SPACE)
    return folder
