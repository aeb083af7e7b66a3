import pytest
import torch
from hypothesis import settings

from saltray import local_ray

# The networks of these tests are tiny: on a busy machine a second thread makes them many times slower.
torch.set_num_threads(1)

# The same examples in every run, and no time limit: a busy machine must not fail a test.
settings.register_profile("saltray", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("saltray")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep command lines that are called here from starting a Ray beside them."""
    monkeypatch.setattr(local_ray, "begin", lambda: None)
