"""A device whose streams only keep books: who read and wrote which memory when, and what was known to be done by then.

Every operation runs at once, on the CPU. What is kept is what a GPU would need to run it later and at the same time as
those of other streams: a vector clock a stream, moved by events as a GPU would wait for them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class FakeStream:
    """Counts its operations, and knows how many of the other streams' are done before its next."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.done: Counter[FakeStream] = Counter()

    def record_event(self) -> Counter[FakeStream]:
        self.device.log.append((self, "record"))
        return self.done.copy()

    def wait_event(self, event: Counter[FakeStream]) -> None:
        self.device.log.append((self, "wait"))
        self.done |= event

    def knows(self, access: tuple[FakeStream, int]) -> bool:
        stream, number = access
        return stream is self or self.done[stream] >= number


@dataclass
class Memory:
    """A storage: who asked for it, the last write, and since then the last read of each stream."""

    home: FakeStream
    written: tuple[FakeStream, int]
    read: dict[FakeStream, int] = field(default_factory=dict)
    used: dict[FakeStream, int] = field(default_factory=dict)
    """The last operation of each stream that read or wrote it."""
    lent: set[FakeStream] = field(default_factory=set)


class FakeDevice:
    """What `runtime.execution.streams` needs of a device's module, and the books.

    Attributes:
        faults: accesses that a GPU could have made too early, and memory that it could have given away too early.
        crossings: reads of what another stream wrote.
        log: events recorded and awaited.
        waits: the streams that the host has waited for, to read a number.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.crossings = 0
        self.log: list[tuple[FakeStream, str]] = []
        self.waits: list[FakeStream] = []
        self.caller = self.current = FakeStream(self)
        self.memory: dict[int, Memory] = {}

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        return FakeStream(self)

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def lend(self, tensor: Tensor, stream: FakeStream) -> None:
        """`streams.lend`: as record_stream, it covers what the stream was given until the memory is freed."""
        memory = self.memory.get(tensor.untyped_storage()._cdata)
        if memory is not None:
            memory.lent.add(stream)

    def access(self, name: str, tensor: Tensor, *, writes: bool) -> None:
        """An operation of the current stream on a tensor's memory."""
        stream = self.current
        now = (stream, stream.done[stream])
        memory = self.memory.get(tensor.untyped_storage()._cdata)
        if memory is None and tensor.dim() == 0 and not writes:
            return  # a number of the host's
        if memory is None:
            storage = tensor.untyped_storage()
            self.memory[storage._cdata] = memory = Memory(stream if writes else self.caller, now)
            weakref.finalize(storage, self._freed, storage._cdata)
            if not writes:
                memory.written = (self.caller, 0)  # from before the step
        if not stream.knows(memory.written):
            self.faults.append(f"{name} reads or writes what may not be written yet")
        if writes:
            if not all(stream.knows(access) for access in memory.read.items()):
                self.faults.append(f"{name} writes what may still be read")
            memory.written, memory.read = now, {}
        else:
            self.crossings += memory.written[0] is not stream
            memory.read[stream] = now[1]
        memory.used[stream] = now[1]

    def _freed(self, key: int) -> None:
        memory = self.memory.pop(key)
        late = [access for access in memory.used.items() if not memory.home.knows(access)]
        if any(stream not in memory.lent for stream, _ in late):
            self.faults.append("memory is freed that another stream may still use")


class Recording(TorchDispatchMode):
    """Tells a `FakeDevice` of every operation; views read nothing."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.is_view or func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return found
        stream = self.device.current
        if func is torch.ops.aten._local_scalar_dense.default:
            self.device.waits.append(stream)
        stream.done[stream] += 1
        written = [
            value
            for described, value in zip(func._schema.arguments, args, strict=False)
            if described.alias_info is not None and described.alias_info.is_write
        ]
        inputs = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        own = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [
            value
            for value in pytree.tree_leaves(found)
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in own
        ]
        for tensor in inputs:
            self.device.access(str(func), tensor, writes=any(tensor is one for one in written))
        for tensor in made:
            self.device.access(str(func), tensor, writes=True)
        return found
