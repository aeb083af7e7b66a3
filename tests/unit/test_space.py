from pathlib import Path

import optuna
import pytest

from saltray.config import TrialConfig, UserError
from saltray.network import pretrained
from saltray.search import space
from saltray.search.space import SpaceError

SPACES = Path(__file__).parents[2] / "search_spaces"
BUNDLED = sorted(path.stem for path in SPACES.glob("*.py"))


def write_space(folder: Path, text: str) -> Path:
    path = folder / "space.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_spaces_are_good_and_begin_with_the_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "load_weights", lambda *_: None)  # their packages are optional
    loaded = space.load(SPACES / f"{name}.py")
    configs = [c for _, c in space.sample(loaded, 20, epochs=3, seed=5, workers=2)]
    assert len({str(c) for c in configs}) > 10
    assert all(c.epochs == 3 and c.seed == 5 for c in configs)


@pytest.mark.parametrize("name", ["unet", "resunet"])
def test_the_first_trial_is_the_seeds_configuration(name: str) -> None:
    loaded = space.load(SPACES / f"{name}.py")
    first = space.sample(loaded, 20, epochs=50, seed=0, workers=1)[0][1].to_dict()
    expected = TrialConfig().to_dict()
    expected["model"]["architecture"] = name
    assert first == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nonsense_module", "does not import: ModuleNotFoundError"),
        ("def space(trial:", "does not import: SyntaxError"),
        ("x = 1", "no function space"),
        ("def space(trial): pass", "returned None"),
        ("def space(trial): return {'modle': {}}", "modle"),
        ("def space(trial): return {'model': {'filters': 0}}", "model/filters"),
        ("def space(trial): return {'model': {'architecture': 'vgg'}}", "'unet' or 'resunet'"),
        ("def space(trial): return {'epochs': 3}", "--epochs"),
        ("def space(trial): return {'batch_size': trial.suggest_int('b', 3, 3)}", "2 workers"),
        ("def space(trial): return 1 / 0", "ZeroDivisionError"),
        ("FIRST = {}\ndef space(trial): trial.suggest_int('n', 1, 2); return {}", "FIRST lacks n"),
        (
            "FIRST = {'n': 1, 'nn': 2}\ndef space(trial): trial.suggest_int('n', 1, 2); return {}",
            "FIRST: nn is not drawn with the rest; drawn are n",
        ),
        ("FIRST = 3\ndef space(trial): return {}", "FIRST"),
        ("FIRST = [{'n': 1}, {'n': 9}]\ndef space(trial): trial.suggest_int('n', 1, 2); return {}", "FIRST"),
        ("FIRST = {'n': 9}\ndef space(trial): trial.suggest_int('n', 1, 2); return {}", "FIRST"),
    ],
)
def test_bad_spaces_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = write_space(tmp_path, text)
    with pytest.raises(SpaceError) as error:
        space.sample(space.load(path), 20, epochs=2, seed=0, workers=2)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_several_first_trials_come_in_their_order(tmp_path: Path) -> None:
    text = (
        "FIRST = [{'n': 7}, {'n': 3}]\ndef space(trial): return {'batch_size': trial.suggest_int('n', 1, 9)}"
    )
    drawn = space.sample(space.load(write_space(tmp_path, text)), 4, epochs=2, seed=0, workers=1)
    assert [config.batch_size for _, config in drawn][:2] == [7, 3]


def test_absent_weights_are_told_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    loaded = space.load(SPACES / "pretrained.py")
    with pytest.raises(UserError, match="pip install"):
        space.sample(loaded, 20, epochs=3, seed=5, workers=1)


def test_a_space_to_compare_with_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"typo\.py: no such file"):
        space.refuse_change("", tmp_path / "typo.py")


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="no such file"):
        space.load(tmp_path / "absent.py")


def test_a_relative_weights_file_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"encoder": "efficientnet_lite0", "encoder_weights": "lite0.pth"}
    monkeypatch.chdir(tmp_path)
    drawn = space.Space(lambda _: {"model": model}, (), Path("space.py"))
    config = drawn.config(optuna.trial.FixedTrial({}), epochs=1, seed=0)
    assert config.model.encoder_weights == str(tmp_path / "lite0.pth")
    model["encoder_weights"] = "imagenet"
    assert drawn.config(optuna.trial.FixedTrial({}), epochs=1, seed=0).model.encoder_weights == "imagenet"
