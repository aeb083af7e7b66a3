import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from saltray.config import DEBUG, TILE, LossConfig, ModelConfig, TrialConfig, UserError

rates = st.floats(1e-9, 1)
valid = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries(
            {},
            optional={
                "architecture": st.sampled_from(["unet", "resunet"]),
                "filters": st.integers(1, 256),
                "levels": st.integers(1, 5),
                "dropout": st.floats(0, 1, exclude_max=True),
                "residual_blocks": st.integers(1, 8),
                "normalisation": st.sampled_from(["auto", "none", "batch", "group"]),
                "deep_supervision": st.booleans(),
                "padded_size": st.sampled_from([101, 112, 128]),
            },
        ),
        "optim": st.fixed_dictionaries({}, optional={"learning_rate": rates, "min_learning_rate": rates}),
        "augment": st.fixed_dictionaries({}, optional={"flip": st.floats(0, 1)}),
        "loss": st.fixed_dictionaries({}, optional={"then": st.sampled_from([None, "lovasz"])}),
        "precision": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
        "batch_size": st.integers(1, 4096),
        "seed": st.integers(0, 2**32 - 1),
    },
)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {k: merged(base[k], v) if isinstance(v, dict) else v for k, v in changes.items()}


@given(valid)
def test_fields_left_out_keep_their_defaults_and_json_brings_it_back(values: dict[str, Any]) -> None:
    config = TrialConfig.from_dict(values)
    assert config.to_dict() == merged(TrialConfig().to_dict(), values)
    assert TrialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_defaults_are_the_seeds() -> None:
    config = TrialConfig.from_dict({})
    assert config == TrialConfig()
    assert (config.model.architecture, config.model.filters, config.model.levels) == ("unet", 16, 4)
    assert (config.loss, config.augment.flip, config.model.residual_blocks) == (
        LossConfig(name="bce"),
        0.5,
        2,
    )
    assert TILE == 101


@pytest.mark.parametrize(
    ("values", "field", "told"),
    [
        ({"model": {"architecture": "vgg"}}, "model/architecture", "'unet' or 'resunet', got 'vgg'"),
        ({"model": {"filters": 0}}, "model/filters", "greater than or equal to 1, got 0"),
        ({"model": {"filters": 2.5}}, "model/filters", "got 2.5"),
        ({"model": {"levels": 6}}, "model/levels", "less than or equal to 5, got 6"),
        ({"model": {"dropout": 1.0}}, "model/dropout", "less than 1, got 1.0"),
        ({"model": {"dropout": -0.1}}, "model/dropout", "got -0.1"),
        ({"model": {"dropout": float("nan")}}, "model/dropout", "got nan"),
        ({"model": {"depth": 3}}, "model/depth", "got 3"),
        ({"model": None}, "model", "got None"),
        ({"optim": {"learning_rate": 0}}, "optim/learning_rate", "greater than 0, got 0"),
        ({"optim": {"learning_rate": float("inf")}}, "optim/learning_rate", "got inf"),
        ({"optim": {"plateau_factor": 1}}, "optim/plateau_factor", "less than 1, got 1"),
        ({"optim": {"plateau_patience": 0}}, "optim/plateau_patience", "got 0"),
        ({"augment": {"flip": 1.5}}, "augment/flip", "less than or equal to 1, got 1.5"),
        ({"loss": "mse"}, "loss/name", "'lovasz_elu_symmetric', got 'mse'"),
        ({"loss": {"then": "mse"}}, "loss/then", "got 'mse'"),
        ({"loss": {"switch_at": 1.0}}, "loss/switch_at", "less than 1, got 1.0"),
        ({"model": {"padded_size": 120}}, "model/padded_size", "101, 112 or 128, got 120"),
        ({"model": {"encoder_weights": "imagenet"}}, "model", "needs an encoder that is not 'own'"),
        ({"optim": {"clip_norm": 0}}, "optim/clip_norm", "greater than 0, got 0"),
        ({"optim": {"snapshots": True}}, "optim", "need the schedule 'cosine', not 'plateau'"),
        ({"augment": {"shift": 0.6}}, "augment/shift", "less than or equal to 0.5, got 0.6"),
        ({"batch_size": "many"}, "batch_size", "got 'many'"),
        ({"precision": "half"}, "precision", "'bfloat16' or 'float16', got 'half'"),
        ({"epochs": 0}, "epochs", "got 0"),
        ({"patience": 0}, "patience", "got 0"),
        ({"seed": -1}, "seed", "got -1"),
        ({"seed": 2**32}, "seed", f"got {2**32}"),
        ({"sede": 1}, "sede", "no such field; did you mean seed?"),
        ([], "the configuration", "got []"),
        (None, "the configuration", "got None"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(values: Any, field: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        TrialConfig.from_dict(values)
    assert str(error.value).startswith(f"{field}: ")
    assert told in str(error.value)


def test_all_wrong_fields_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        TrialConfig.from_dict({"epochs": -3, "model": {"filters": 999}, "colour": "red"})
    for part in (
        "epochs: ",
        "got -3",
        "model/filters: ",
        "got 999",
        "colour: no such field; there are model, optim,",
    ):
        assert part in str(error.value)


def test_a_misspelt_field_is_told_with_the_one_beside_it() -> None:
    with pytest.raises(UserError, match=r"optim/learnig_rate: no such field; did you mean learning_rate\?"):
        TrialConfig.from_dict({"optim": {"learnig_rate": 1e-3}})
    with pytest.raises(UserError, match=r"augment/colour: no such field; there are .*flip"):
        TrialConfig.from_dict({"augment": {"colour": 1}})


def test_it_is_frozen_and_validated_when_built() -> None:
    config = TrialConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.model.filters = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="less than or equal to 256"):
        ModelConfig(filters=257)


def test_a_loss_is_read_from_its_name_alone_as_earlier_checkpoints_have_it() -> None:
    assert TrialConfig.from_dict({"loss": "bce"}) == TrialConfig()
    assert TrialConfig.from_dict({"loss": "lovasz"}).loss == LossConfig(name="lovasz")


def test_the_debug_preset_is_far_smaller() -> None:
    assert DEBUG.model.filters <= 4
    assert DEBUG.epochs <= 3
    assert TrialConfig.from_dict(DEBUG.to_dict()) == DEBUG
