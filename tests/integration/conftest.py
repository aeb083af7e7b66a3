"""A Ray on this machine, shared by the tests of one file."""

from collections.abc import Iterator

import pytest

from saltray import run


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Start a Ray of two CPUs of the tests' own, set up as a search sets it; never join another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)  # without it, `connect` starts a Ray of its own
        run.connect(None, cpus=2)
        yield
        run.disconnect()
