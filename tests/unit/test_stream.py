import threading
from collections.abc import Iterator

import pytest
import torch

from saltray.data import stream
from saltray.data.stream import EpochStreams, Tensors

TILES, BATCH = 12, 4


class Source:
    """Streams of numbers; remembers what was started and what was closed."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.closed: list[int] = []

    def start(self, epoch: int) -> Iterator[Tensors]:
        rng = torch.Generator().manual_seed(epoch)
        self.started.append(epoch)
        try:
            for _ in range(TILES // BATCH):
                yield {"image": torch.rand(BATCH, 2, 2, generator=rng)}
        finally:
            self.closed.append(epoch)


def images(batches: Iterator[Tensors]) -> list[float]:
    return torch.cat([batch["image"] for batch in batches]).flatten().tolist()


def test_epochs_started_ahead_are_the_same() -> None:
    ahead, plain = Source(), Source()
    with EpochStreams(ahead.start, epochs=3, tiles=TILES) as streams:
        for epoch in (1, 2, 3):
            assert images(streams(epoch)) == images(plain.start(epoch))
    assert ahead.started == [1, 2, 3]  # none after the last
    assert ahead.closed == [1, 2, 3]


def test_the_next_epoch_starts_when_the_rest_of_this_one_is_in_the_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", BATCH)
    source = Source()
    second = threading.Event()

    def start(epoch: int) -> Iterator[Tensors]:
        if epoch == 2:
            second.set()
        return source.start(epoch)

    with EpochStreams(start, epochs=2, tiles=TILES) as streams:
        batches = streams(1)
        next(batches)
        assert not second.is_set()
        next(batches)
        assert second.wait(120)


def test_an_epoch_that_does_not_come_leaves_no_stream() -> None:
    source = Source()
    with EpochStreams(source.start, epochs=9, tiles=TILES) as streams:
        images(streams(1))
    assert source.started == [1, 2]
    assert source.closed == [1, 2]


def test_an_epoch_may_be_asked_for_twice() -> None:
    source, plain = Source(), Source()
    with EpochStreams(source.start, epochs=2, tiles=TILES) as streams:
        first = images(streams(1))
        assert images(streams(1)) == first  # stochastic weight averaging's pass for its statistics
        assert images(streams(2)) == images(plain.start(2))
    assert sorted(source.started) == [1, 1, 2]


def test_what_fails_ahead_fails_where_it_is_used() -> None:
    def start(epoch: int) -> Iterator[Tensors]:
        if epoch == 2:
            raise OSError("a machine is lost")
        return Source().start(epoch)

    def stream_of(epoch: int) -> Iterator[Tensors]:
        yield from start(epoch)

    with EpochStreams(stream_of, epochs=2, tiles=TILES) as streams:
        images(streams(1))
        with pytest.raises(OSError, match="a machine is lost"):
            images(streams(2))
