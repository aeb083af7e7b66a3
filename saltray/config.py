"""The configuration of one trial: frozen, nested, validated when it is built.

The defaults are the seed's own configuration: a 16-filter U-Net, BCE, Adam, reduce-on-plateau, left-right
flips. A search space returns the fields that it changes, as a nested dict.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

TILE = 101
"""Height and width of a tile, in pixels."""


class UserError(ValueError):
    """Something that the user can mend; the message names the file or value, and what to do."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Build a configuration from a nested dict; fields left out keep their defaults.

        Raises:
            UserError: one line per wrong field, with the value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            lines = [
                f"{'/'.join(map(str, e['loc'])) or 'the configuration'}: {e['msg']}, got {e['input']!r}"
                for e in error.errors()
            ]
            raise UserError("; ".join(lines) + f" (top-level fields: {known})") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the whole configuration as a nested dict of plain values; `from_dict` reads it back."""
        return self.model_dump()


class ModelConfig(_Frozen):
    """The network: one encoder-decoder, built of plain or of residual convolutions (`saltray.model`)."""

    architecture: Literal["unet", "resunet"] = "unet"
    filters: Annotated[int, Field(ge=1, le=256)] = 16
    """Channels of the first level; doubled at each level below."""
    levels: Annotated[int, Field(ge=1, le=5)] = 4
    """How often the tile is halved: 101 -> 50 -> 25 -> 12 -> 6 at four levels."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of activations dropped after each pool (half of it after the first) and each concatenation."""
    residual_blocks: Annotated[int, Field(ge=1, le=8)] = 2
    """Residual blocks a level; the ResUNet alone uses it."""


class OptimConfig(_Frozen):
    """Adam with reduce-on-plateau (`saltray.optim`)."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    plateau_patience: Annotated[int, Field(ge=1)] = 5
    """Epochs without a better validation mAP before the learning rate falls."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-5


class AugmentConfig(_Frozen):
    """Random changes of the training tiles (`saltray.augment`)."""

    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a left-right flip. Never up-down: depth has a direction."""


class TrialConfig(_Frozen):
    """Everything that decides one trial's outcome, with the data and the split."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: Literal["bce"] = "bce"
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Tiles a step, over all workers of the trial together."""
    epochs: Annotated[int, Field(ge=1)] = 50
    patience: Annotated[int, Field(ge=1)] = 10
    """Epochs without a better validation mAP before the trial stops early."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` takes bfloat16 autocast on GPUs that have it, float32 elsewhere."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


Objective = Literal["map", "map+speed"]
"""What a search maximizes: the validation mAP, or that and the tiles per second in validation."""

Searcher = Literal["tpe", "random", "gp", "cmaes"]
"""What proposes the next trial (`saltray.engine`)."""

Scheduler = Literal["asha", "hyperband", "median", "none"]
"""What stops a trial early (`saltray.engine`)."""


class SearchConfig(_Frozen):
    """How to search: the engine and the budgets."""

    trials: Annotated[int, Field(ge=1)] = 20
    """Trials to bring to an end."""
    epochs: Annotated[int, Field(ge=1)] = 50
    """Of a full trial."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the split, of every suggestion and every trial."""
    searcher: Searcher = "tpe"
    scheduler: Scheduler = "asha"
    objective: Objective = "map"
    time_budget: Annotated[float, Field(gt=0)] | None = None
    """Seconds of searching in this session."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """GPU-hours of all trials in all sessions."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Ended trials in a row without a better score, after which no new one is begun."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.objective == "map+speed":
            if self.scheduler != "none":
                raise ValueError("two objectives leave no trial to be stopped early; choose scheduler 'none'")
            if self.searcher == "cmaes":
                raise ValueError("CMA-ES knows one objective; choose searcher tpe, gp or random")
        return self


DEBUG = TrialConfig(model=ModelConfig(filters=2, levels=2, dropout=0.0), batch_size=16, epochs=2)
"""The smallest useful network and schedule, for tests and for trying a cluster."""
