"""Small expert files, a disk that misbehaves on purpose, and random layers for the tier tests."""

from __future__ import annotations

import ctypes
import errno
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from offload.quant import get_codec
from offload.store.layout import ExpertLayout
from offload.tiers.aio import KernelReads, Request
from offload.tiers.copies import Posix
from offload.types import ExpertId, Extent

LAYERS, EXPERTS, TOP_K, FIRST = 3, 12, 3, 1


@dataclass
class SmallStore:
    """Random experts in one file per layer, `lead` bytes into it."""

    path: Path
    layout: ExpertLayout
    lead: int
    layers: int = LAYERS
    experts: int = EXPERTS

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(
            moe_layers=range(FIRST, FIRST + self.layers),
            n_routed_experts=self.experts,
            num_experts_per_tok=TOP_K,
            hidden_size=self.layout.hidden_size,
            moe_intermediate_size=self.layout.moe_intermediate_size,
        )

    def locate(self, expert: ExpertId) -> Extent:
        offset = self.lead + expert.expert * self.layout.stride
        return Extent(self.path / f"{expert.layer}.bin", offset, self.layout.stride)

    def bytes_of(self, expert: ExpertId) -> bytes:
        extent = self.locate(expert)
        with extent.path.open("rb") as file:
            file.seek(extent.offset)
            return file.read(extent.nbytes)


def make_store(path: Path, codec: str = "int4-g32", hidden: int = 64, lead: int = 64, **sizes: int) -> SmallStore:
    layout = ExpertLayout(get_codec(codec), hidden, 32)
    store = SmallStore(path, layout, lead, **sizes)
    generator = torch.Generator().manual_seed(1)
    path.mkdir(parents=True, exist_ok=True)
    for layer in store.config.moe_layers:
        with (path / f"{layer}.bin").open("wb") as file:
            file.write(bytes(lead))
            for _ in range(store.experts):
                file.write(_expert(layout, generator))
    return store


def _expert(layout: ExpertLayout, generator: torch.Generator) -> bytes:
    encoded = {
        projection: layout.codec.encode(0.2 * torch.randn(layout.shape(projection), generator=generator))
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    raw = bytearray(layout.stride)
    for field in layout.fields:
        tensor = encoded[field.projection][field.suffix].contiguous()
        raw[field.offset : field.offset + field.nbytes] = tensor.view(torch.uint8).numpy().tobytes()
    return bytes(raw)


def random_steps(store: SmallStore, lengths: list[int], seed: int = 0) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """[steps][layers] of x [T, H], ids [T, K], weights [T, K], with skewed experts."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    heat = [[rng.paretovariate(1.0) for _ in range(store.experts)] for _ in range(store.layers)]

    def choose(layer: int) -> list[int]:
        chosen: dict[int, None] = {}
        while len(chosen) < TOP_K:
            chosen[rng.choices(range(store.experts), heat[layer])[0]] = None
        return list(chosen)

    return [
        [
            (
                torch.randn(tokens, store.layout.hidden_size, generator=generator),
                torch.tensor([choose(layer) for _ in range(tokens)]),
                torch.rand(tokens, TOP_K, generator=generator),
            )
            for layer in range(store.layers)
        ]
        for tokens in lengths
    ]


class Unruly(Posix):
    """Real reads, but late, cut short, or refused; the dice are seeded. With `kernel` the kernel's reads are as unruly,
    otherwise there are none."""

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        short: float = 0.0,
        fail: float = 0.0,
        seed: int = 0,
        refuse: str = "",
        kernel: bool = False,
    ) -> None:
        self.kernel = kernel
        self.kernel_calls: list[tuple[int, int]] = []
        self.delay_s, self.short, self.fail, self.refuse = delay_s, short, fail, refuse
        self.broken: set[str] = set()
        self.calls: list[tuple[int, int]] = []
        self.names: dict[int, str] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.seed = seed
        self._random = random.Random(seed)
        self.lock = threading.Lock()
        self._direct: set[int] = set()
        self._faults: dict[tuple[int, str, int], int] = {}

    def open(self, path: Path, direct: bool) -> int:
        if direct and self.refuse == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = super().open(path, direct and self.refuse != "read")
        (self._direct.add if direct else self._direct.discard)(fd)
        self.names[fd] = str(path)
        return fd

    def read(self, fd: int, buffer: memoryview, offset: int) -> int:
        self.gate.wait()
        with self.lock:
            self.calls.append((offset, len(buffer)))
            wait = self.delay_s * self._random.random()
            short = self._random.random() < self.short
            fail = self._random.random() < self.fail
            # Misfortune strikes a reader at one place no more than twice in a row. Small experts share
            # pages, so the place alone would mix up the readers of two experts.
            attempt = (threading.get_ident(), self.names[fd], offset)
            if short or fail:
                self._faults[attempt] = self._faults.get(attempt, 0) + 1
                if self._faults[attempt] > 2:
                    short = fail = False
            if not (short or fail):
                self._faults.pop(attempt, None)
            cut = self._random.randrange(0, len(buffer))
        if wait:
            time.sleep(wait)
        if fd in self._direct:
            assert offset % 4096 == 0
            assert len(buffer) % 4096 == 0
            if self.refuse == "read":
                raise OSError(errno.EINVAL, "Invalid argument")
        if fail or self.names[fd] in self.broken:
            raise OSError(errno.EIO, "Input/output error")
        count = super().read(fd, buffer, offset)
        if short and cut < count:
            buffer[cut:count] = bytes(count - cut)  # what did not arrive must not be used
            return cut
        return count

    def kernel_reads(self, depth: int) -> KernelReads | None:
        return UnrulyKernelReads(depth, self) if self.kernel else None

    def suits_kernel_reads(self, fd: int) -> bool:
        return True  # where submitting one waits for its end, it is slow but right


class UnrulyKernelReads(KernelReads):
    """Real reads of the kernel whose ends are told late, in another order, and not always truly."""

    def __init__(self, depth: int, system: Unruly) -> None:
        super().__init__(depth)
        self._system = system
        self._requests: dict[int, Request] = {}
        self._held: list[tuple[int, int]] = []
        self._dice = random.Random(system.seed)

    def submit(self, request: Request) -> bool:
        assert request.offset % 4096 == request.nbytes % 4096 == request.address % 4096 == 0
        assert request.tag not in self._requests, "a tag of a read that has not ended"
        with self._system.lock:  # before it can end
            if self._system.refuse == "submit" and self._dice.random() < 0.5:
                return False
            taken = super().submit(request)
            if taken:
                self._requests[request.tag] = request
                self._system.kernel_calls.append((request.offset, request.nbytes))
            return taken

    def restart(self) -> None:
        super().restart()
        self._requests.clear()
        self._held.clear()

    def reap(self) -> list[tuple[int, int]]:
        if not self._system.gate.is_set():
            time.sleep(0.001)
            return []
        dice, system = self._dice, self._system
        with system.lock:
            ended = self._held + [(tag, self._twist(tag, result)) for tag, result in super().reap()]
            dice.shuffle(ended)
            keep = len(ended) // 2 if system.delay_s and dice.random() < 0.5 else 0
            self._held = ended[:keep]
            for tag, _ in ended[keep:]:
                del self._requests[tag]
        if keep:
            time.sleep(system.delay_s * dice.random())
            self.wake()
        return ended[keep:]

    def _twist(self, tag: int, result: int) -> int:
        request, dice, system = self._requests[tag], self._dice, self._system
        if system.refuse == "read":
            return -errno.EINVAL
        if system.names[request.fd] in system.broken or dice.random() < system.fail:
            return -errno.EIO
        if dice.random() < system.short:
            cut = dice.randrange(0, request.nbytes)
            ctypes.memset(request.address + cut, 0, request.nbytes - cut)
            return min(result, cut)
        return result
