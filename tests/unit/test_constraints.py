import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(package: str, extras: frozenset[str]) -> list[Requirement]:
    """What an installed package, or saltray, asks for here with these extras."""
    if package == PROJECT["name"]:
        optional = PROJECT["optional-dependencies"]
        return [Requirement(r) for r in [*PROJECT["dependencies"], *(r for e in extras for r in optional[e])]]
    asked = [Requirement(r) for r in metadata.requires(package) or []]
    return [r for r in asked if not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False  # of an extra that is not installed, or a CUDA library where PyTorch is for the CPU


def test_every_package_that_saltray_brings_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    left = [(str(PROJECT["name"]), frozenset(PROJECT["optional-dependencies"]))]
    seen = set(left)
    while left:
        for asked in requirements(*left.pop()):
            package = (canonicalize_name(asked.name), frozenset(asked.extras))
            if package not in seen and (package[0] == PROJECT["name"] or installed(package[0])):
                seen.add(package)
                left.append(package)
    assert sorted({name for name, _ in seen} - pinned - {PROJECT["name"]}) == []
