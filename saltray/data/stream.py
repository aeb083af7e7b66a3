"""An epoch's stream of tiles: shuffled and augmented by Ray Data, taken in batches by torch."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Self

import numpy as np
import ray.data
import torch

from saltray.config import AugmentConfig
from saltray.data.augment import COLUMNS, Batch, augment_for_training

SHUFFLE_BUFFER = 2000
"""Tiles in the local shuffle buffer, on top of the shuffled order of the blocks."""

CLOSING_SECONDS = 10.0
"""How long the end of a trial waits for a stream that is just being started."""

Tensors = dict[str, torch.Tensor]
"""A batch: `image` and `mask` uint8 (batch, 101, 101), and the depth `z` float32 (batch,)."""


class EpochStreams:
    """The streams of a trial's epochs, each started before the one before it has ended.

    A stream needs a moment before its first batch: tasks start, the shuffle buffer fills. The next one starts
    when what is left of this one is in its buffer: its tasks take the place of those that are done, and the
    two never hold more than one buffer each. What an epoch yields does not depend on when it started.
    """

    def __init__(self, start: Callable[[int], Iterator[Tensors]], *, epochs: int, tiles: int) -> None:
        """Start nothing yet.

        Args:
            start: epoch, counted from 1 -> its stream.
            epochs: of the trial; none is started after the last.
            tiles: of an epoch.
        """
        self._start, self._epochs, self._tiles = start, epochs, tiles
        self._next: tuple[int, _Begun] | None = None

    def __call__(self, epoch: int) -> Iterator[Tensors]:
        """Yield an epoch's batches; one that is asked for twice is streamed anew."""
        begun = self._next[1] if self._next is not None and self._next[0] == epoch else None
        if begun is not None:
            self._next = None
        batches = begun.batches() if begun is not None else self._start(epoch)
        left = self._tiles
        for batch in batches:
            left -= len(batch["image"])
            if left <= SHUFFLE_BUFFER and self._next is None and epoch < self._epochs:
                self._next = epoch + 1, _Begun(self._start(epoch + 1))
            yield batch

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the stream that was started for an epoch that does not come."""
        if self._next is not None:
            self._next[1].close()
            self._next = None


class _Begun:
    """A stream whose first batch is fetched by a thread: Ray Data starts nothing before it is asked."""

    def __init__(self, stream: Iterator[Tensors]) -> None:
        self._stream = stream
        self._first: list[Tensors] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fetch, daemon=True)
        self._thread.start()

    def _fetch(self) -> None:
        try:
            self._first = [next(self._stream)]
        except StopIteration:
            pass
        except BaseException as error:
            self._error = error  # raised where the epoch is used

    def batches(self) -> Iterator[Tensors]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        yield from self._first
        yield from self._stream

    def close(self) -> None:
        self._thread.join(CLOSING_SECONDS)
        close = getattr(self._stream, "close", None)
        if close is not None and not self._thread.is_alive():
            close()


def epoch_stream(
    tiles: ray.data.Dataset,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    cpus_per_task: float,
    device: str = "cpu",
) -> Iterator[Tensors]:
    """Stream one epoch of training tiles: newly shuffled and augmented, the same for the same seed.

    The last batch may be smaller. Batches lie on the device: left to itself, Ray Data would take any GPU
    that it sees.
    """
    cores = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    order = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    stream = tiles.randomize_block_order(seed=order).map_batches(
        partial(augment_for_training, config=config, seed=seed, epoch=epoch),
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=cpus_per_task,
        # With small shares of CPUs that nobody holds, dozens of tasks would run at once. More than there are
        # cores gain nothing, and each holds two blocks: sets larger than the store would be spilled anew.
        compute=ray.data.TaskPoolStrategy(size=max(1, int(cores))),
    )
    batches = stream.iter_torch_batches(
        batch_size=batch_size,
        collate_fn=_collate,
        local_shuffle_buffer_size=SHUFFLE_BUFFER,
        local_shuffle_seed=order,
        prefetch_batches=2,
        device=device,
    )
    return iter(batches)


def plain_stream(tiles: ray.data.Dataset, *, batch_size: int, device: str = "cpu") -> Iterator[Tensors]:
    """Stream tiles as they are, each once, in their order: for validation."""
    batches = tiles.iter_torch_batches(
        batch_size=batch_size, collate_fn=_collate, prefetch_batches=2, device=device
    )
    return iter(batches)


# Columns are chosen in these two functions: `Dataset.select_columns` would be a task of its own, and ask for
# a whole CPU that the trials do not leave.


def _collate(batch: Batch) -> Tensors:
    """Make tensors of what training needs; a copy, because blocks of the object store are read-only."""
    return {name: torch.from_numpy(batch[name].copy()) for name in COLUMNS}
