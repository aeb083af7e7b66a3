"""The process that has a command's Ray, without a Ray."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import ray

import saltray
from saltray import local_ray, ray_host


def test_its_processes_import_the_saltray_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    first, *others = local_ray.environment()["PYTHONPATH"].split(os.pathsep)
    assert Path(first) == Path(saltray.__file__).parents[1]
    assert others == ["elsewhere"]


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    assert local_ray.environment()["MALLOC_ARENA_MAX"] == "7"
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    assert local_ray.environment()["MALLOC_ARENA_MAX"] == local_ray.SETTINGS["MALLOC_ARENA_MAX"]


def test_a_process_that_ends_at_once_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    started = local_ray.LocalRay(None)
    with pytest.raises(RuntimeError, match="its process ended with code 3: no such module"):
        started.address()
    started.end()


def test_why_ray_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError("/tmp/ray: no room")

    monkeypatch.setattr(ray, "init", refuse)
    for name in ("RAY_GCS_SERVER_PORT", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # to be as it was afterwards
    answer = io.StringIO()
    ray_host.serve(None, answer, io.StringIO())
    assert json.loads(answer.getvalue()) == {"error": "OSError: /tmp/ray: no room"}
