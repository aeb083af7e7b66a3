"""The Ray that a command starts on its own machine."""

import os
from pathlib import Path

import saltray
from saltray import connection


def test_processes_of_a_local_ray_import_the_saltray_of_its_driver() -> None:
    with connection._local_environment():
        first = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    assert Path(first) == Path(saltray.__file__).parents[1]
