import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "saltray"
LAYERS = [
    ["config"],
    ["rle", "csvfile", "png"],
    ["metrics"],
    ["cpu"],
    ["ensemble"],
    ["losses"],
    ["layers", "pretrained"],
    ["model"],
    ["optim"],
    ["augment"],
    ["dataset"],
    ["splitting"],
    ["folds"],
    ["stream"],
    ["checkpoint"],
    ["members"],
    ["training"],
    ["samples"],
    ["trial"],
    ["space"],
    ["storage"],
    ["shared_folder"],
    ["trial_files"],
    ["study"],
    ["warmstart"],
    ["engine"],
    ["gpus", "plan"],
    ["packing"],
    ["limits"],
    ["searcher"],
    ["search"],
    ["submission"],
    ["validation"],
    ["inference"],
    ["outoffold", "pseudo"],
    ["refits"],
    ["connection"],
    ["run"],
    ["bundle", "candidates"],
    ["ensemble_bundle"],
    ["outcome"],
    ["view"],
    ["tracking"],
    ["cli"],
    ["page"],
    ["survey"],
    ["data_page"],
    ["demo"],
    ["trial_figures"],
    ["tile_figures"],
    ["findings"],
    ["ensemble_section"],
    ["sections"],
    ["report"],
    ["blend"],
    ["summary"],
    ["session"],
    ["preview"],
    ["tune", "predict", "score", "explore"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
WITHOUT_RAY = [
    *("config", "rle", "csvfile", "png", "metrics", "losses", "layers", "pretrained", "model", "optim"),
    *("augment", "ensemble", "checkpoint", "members", "training", "samples"),
    *("submission", "validation", "study", "cli", "page", "demo", "trial_figures", "tile_figures", "score"),
]


class Import(NamedTuple):
    module: str
    """Dotted, such as saltray.config or ray.data."""
    typing_only: bool


def imports(name: str) -> list[Import]:
    return list(_walk(ast.parse((PACKAGE / f"{name}.py").read_text()), typing_only=False))


def _walk(node: ast.AST, typing_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, typing_only) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        module = node.module or ""
        # `from saltray import rle` imports the module rle, `from saltray.rle import encode` as well.
        names = [f"saltray.{a.name}" for a in node.names] if module == "saltray" else [module]
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
    return {i.module.split(".")[1] for i in imports(name) if i.module.startswith("saltray.")}


def foreign(name: str, package: str, typing_only: bool = True) -> bool:
    found = [i for i in imports(name) if i.module.split(".")[0] == package]
    return any(typing_only or not i.typing_only for i in found)


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) == set(LEVEL)
    assert not [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_modules_above_it(name: str) -> None:
    assert [other for other in sorted(own(name)) if LEVEL[other] >= LEVEL[name]] == []


def test_the_readme_lists_the_modules_in_their_order() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    listed = re.findall(
        r"(\w+)\.py", readme.partition("    saltray/\n")[2].partition("    search_spaces/")[0]
    )
    assert sorted(listed) == MODULES
    assert [LEVEL[name] for name in listed] == sorted(LEVEL[name] for name in listed)


@pytest.mark.parametrize("name", WITHOUT_RAY)
def test_numerics_and_files_need_no_ray(name: str) -> None:
    assert not foreign(name, "ray")
    assert own(name) <= set(WITHOUT_RAY)  # nor through another module


def test_only_the_search_and_its_readers_know_optuna() -> None:
    known = {
        "space",
        "study",
        "warmstart",
        "engine",
        "limits",
        "search",
        "searcher",
        "outcome",
        "view",
        "tracking",
        "refits",
    }
    known |= {"candidates", "blend", "summary", "session", "preview"}
    known |= {"ensemble_section", "trial_figures", "tile_figures", "findings", "sections", "report"}
    assert {name for name in MODULES if foreign(name, "optuna")} <= known


def test_training_and_prediction_meet_through_files_alone() -> None:
    reports = ("ensemble_section", "trial_figures", "tile_figures", "findings", "sections", "report")
    for name in ("inference", "bundle", "predict", *reports):
        assert not own(name) & {"trial", "space", "searcher", "search", "view", "session", "tune"}
    for name in reports:
        assert not own(name) & {"engine", "inference"}


@pytest.mark.parametrize("name", MODULES)
def test_spaces_and_tests_are_never_imported(name: str) -> None:
    assert not foreign(name, "search_spaces")
    assert not foreign(name, "tests")


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_too_long(name: str) -> None:
    assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= 400


def test_decoding_and_augmentation_load_no_torch() -> None:
    # Ray Data's processes import these; PyTorch would cost each a second and 200 MB.
    code = "import saltray.dataset, saltray.augment, sys; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
