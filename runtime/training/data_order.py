"""The order of a loader's batches as a function of (seed, epoch), which a resumed run takes up where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ...passes.errors import DataError
from .history import Position
from .random_state import capture_rng, restore_rng


def count_batches(loader: Iterable[Any]) -> int | None:
    """Batches of an epoch; None where the loader does not know."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set
        return None


def generators_of(loader: Iterable[Any]) -> list[torch.Generator]:
    """The generators of the loader itself and of its samplers, each once."""
    found = [getattr(source, "generator", None) for source in (loader, *_samplers(loader))]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def start_epoch(loader: Iterable[Any], seed: int, position: Position) -> Iterator[Any]:
    """The batches of the epoch that are still to do.

    The data order is seeded. In the middle of an epoch, as after a resume, what was done is skipped, and the random
    generators are then as they were there: the loader's as `position` says, the global ones as this call found them.
    """
    rng = capture_rng() if position.batch else None
    batches = _seeded(loader, seed, position.epoch)
    _skip(loader, batches, position)
    if rng is not None:
        restore_rng(rng)
        for generator, state in zip(generators_of(loader), position.generators, strict=True):
            generator.set_state(state)
    return batches


def _seeded(loader: Iterable[Any], seed: int, epoch: int) -> Iterator[Any]:
    digest = hashlib.sha256(f"onward data order {seed} {epoch}".encode()).digest()
    epoch_seed = int.from_bytes(digest[:7], "little")
    generators = generators_of(loader)
    for generator in generators:
        generator.manual_seed(epoch_seed)
    if not generators:
        torch.manual_seed(epoch_seed)
    for sampler in _samplers(loader):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)
    return iter(loader)


def _skip(loader: Iterable[Any], batches: Iterator[Any], position: Position) -> None:
    """Pass over the batches that are done, without loading them where the loader runs in this process."""
    skip: Callable[[], object] = batches.__next__
    if isinstance(loader, DataLoader) and loader.num_workers == 0 and not isinstance(loader.dataset, IterableDataset):
        skip = getattr(batches, "_next_index", skip)  # draws the next batch's indices, loads nothing
    for done in range(position.batch):
        try:
            skip()
        except StopIteration:
            raise DataError(
                f"the loader gave only {done} batches in epoch {position.epoch + 1}; "
                f"{position.batch} were done before the checkpoint"
            ) from None


def _samplers(loader: Iterable[Any]) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())
