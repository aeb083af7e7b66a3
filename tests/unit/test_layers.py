import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "saltray"
LAYERS = """
config
local_ray ray_host
cli quiet
connection

contest: rle csvfile
contest: metrics
contest: submission

data: png augment
data: dataset
data: splitting neighbours
data: folds stream survey

network: cpu losses optim layers pretrained
network: model

training: checkpoint
training: loop
training: samples
training: trial

records: storage
records: shared_folder trial_files study environment
records: settings
records: run

prediction: members postprocessing
prediction: validation
prediction: inference
prediction: bundle

search: space engine warmstart limits gpus plan processes
search: packing searcher
search: search

ensembles: ensemble
ensembles: outoffold pseudo
ensembles: refits
ensembles: candidates ensemble_bundle

reporting: page
reporting: data_page findings trial_figures
reporting: tile_figures
reporting: ensemble_section environment_section
reporting: sections

demo report predict score explore

sessions: outcome view tracking
sessions: blend
sessions: summary
sessions: session
sessions: preview

tune
"""
"""A line imports only lines above it."""


def _layers() -> Iterator[list[str]]:
    """Give each line's modules, such as data.png."""
    for line in filter(None, LAYERS.splitlines()):
        folder, _, names = line.rpartition(": ")
        yield [f"{folder}.{name}".strip(".") for name in names.split()]


LEVEL = {name: level for level, names in enumerate(_layers()) for name in names}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
MODULES = list(FILES)
FOLDERS = list(dict.fromkeys(name.split(".")[0] for name in LEVEL if "." in name))
WITHOUT_RAY = {
    *("config", "local_ray", "cli", "quiet", "demo", "score"),
    *(name for name in MODULES if name.startswith(("contest.", "network."))),
    *("data.png", "data.augment", "training.checkpoint", "training.loop"),
    *("training.samples", "ensembles.ensemble"),
    *("records.storage", "records.study", "records.environment", "records.settings", "records.run"),
    *("prediction.members", "prediction.postprocessing", "prediction.validation"),
    *(name for name in MODULES if name.startswith("reporting.") and name != "reporting.data_page"),
    "report",
}


class Import(NamedTuple):
    module: str
    """Dotted, such as saltray.config or ray.data."""
    typing_only: bool


def imports(name: str) -> list[Import]:
    return list(_walk(ast.parse(FILES[name].read_text()), typing_only=False))


def _walk(node: ast.AST, typing_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, typing_only) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        module = node.module or ""
        # `from saltray.contest import rle` imports a module, `from saltray.config import TILE` as well.
        whole = module.removeprefix("saltray.") not in ["saltray", *FOLDERS]
        names = [module] if whole else [f"{module}.{a.name}" for a in node.names]
        yield from (Import(name, typing_only) for name in names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for statement in node.body:
            yield from _walk(statement, True)
        for statement in node.orelse:
            yield from _walk(statement, typing_only)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, typing_only)


def own(name: str) -> set[str]:
    return {i.module.removeprefix("saltray.") for i in imports(name) if i.module.startswith("saltray.")}


def foreign(name: str, package: str, typing_only: bool = True) -> bool:
    found = [i for i in imports(name) if i.module.split(".")[0] == package]
    return any(typing_only or not i.typing_only for i in found)


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) == set(LEVEL)
    assert {path.parent.name for path in PACKAGE.rglob("__init__.py")} == {"saltray", *FOLDERS}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_modules_above_it(name: str) -> None:
    assert [other for other in sorted(own(name)) if LEVEL[other] >= LEVEL[name]] == []


def test_the_readme_lists_the_modules_in_their_order() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    folder, listed = "", []
    for line in readme.partition("    saltray/\n")[2].partition("    search_spaces/")[0].splitlines():
        if found := re.match(r"      (\w+)/", line):
            folder = found[1]
        elif re.match(r"      \w", line):
            folder = ""
        listed += [f"{folder}.{name}".strip(".") for name in re.findall(r"(\w+)\.py", line)]
    assert sorted(listed) == sorted(MODULES)
    assert [LEVEL[name] for name in listed] == sorted(LEVEL[name] for name in listed)


@pytest.mark.parametrize("name", sorted(WITHOUT_RAY))
def test_numerics_and_files_need_no_ray(name: str) -> None:
    assert not foreign(name, "ray")
    assert own(name) <= WITHOUT_RAY  # nor through another module


def test_only_the_search_and_its_readers_know_optuna() -> None:
    known = (
        "records.study",
        "search.",
        "ensembles.",
        "reporting.",
        "report",
        "sessions.",
    )
    assert [name for name in MODULES if foreign(name, "optuna") and not name.startswith(known)] == []


def test_training_and_prediction_meet_through_files_alone() -> None:
    readers = [name for name in MODULES if name.startswith(("prediction.", "reporting."))]
    for name in (*readers, "predict", "report"):
        assert not {
            i for i in own(name) if i.startswith(("training.trial", "training.loop", "search.", "sessions."))
        }
    for name in readers:
        assert not name.startswith("reporting.") or "prediction.inference" not in own(name)


@pytest.mark.parametrize("name", MODULES)
def test_spaces_and_tests_are_never_imported(name: str) -> None:
    assert not foreign(name, "search_spaces")
    assert not foreign(name, "tests")


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_too_long(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        # Their --help answers at once.
        *(
            (name, {"ray", "torch", "optuna", "pandas"})
            for name in ("tune", "predict", "report", "explore", "score")
        ),
        # Ray Data's processes import these; PyTorch would cost each a second and 200 MB.
        ("data.dataset", {"torch"}),
        ("data.augment", {"torch"}),
        # The report draws with these, the split needs them: before the first words they would cost a second.
        ("sessions.session", {"plotly", "jinja2", "sklearn", "scipy"}),
        ("training.trial", {"optuna", "plotly", "sklearn", "scipy"}),
        # It reads files alone: half of its start would be Ray's imports.
        ("reporting.sections", {"ray"}),
    ],
)
def test_no_process_loads_what_it_does_not_use(module: str, unwanted: set[str]) -> None:
    code = f"import sys, saltray.{module}; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert unwanted & set(answer.stdout.split()) == set()
