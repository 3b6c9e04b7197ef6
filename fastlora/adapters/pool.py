"""``AdapterPool``: hundreds of adapters beside one base model, and which of them is where.

    disk            a folder, read again when it is needed again
    host memory     packed in the model's dtype, pinned where there is a GPU
    the arena       on the model's device: what the kernels read; least recently used leaves first

An adapter that a request uses is never freed, moved or overwritten, whatever is loaded or unloaded
meanwhile: every load makes a new *version*, requests have a lease of the version that they began
with, and the last lease of a version that has lost its name frees it. A lease keeps a version from
being forgotten; from the device it may be taken until the lease *holds* it there, which it does
once the request runs. So those that wait for room never keep it from one another.

Weights lie in the arena as they are in the file (the scaling is not multiplied in), rank by rank
and without padding: an adapter of rank 8 takes and moves a quarter of what one of rank 32 does. See
S-LoRA (https://arxiv.org/abs/2311.03285) for the idea of paging rank rows.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import plans
from fastlora.adapters.groups import Reach, alike_of, dtype_of, groups_of, linears_of
from fastlora.adapters.pages import PageAllocator, Placement
from fastlora.adapters.reading import Reader
from fastlora.adapters.table import AdapterInfo, bytes_of, size_of, table_of
from fastlora.adapters.versions import Lease, Version
from fastlora.segmented import Adapters, Factors
from fastlora.segments import PAGE

_LEAST_RANK = 16
_WHERE = ("device", "host", "disk")


class AdapterPool:
    """Many LoRA adapters next to one base model.

    It is also ``engine.adapters``; printed, it is a table. All methods may be called from any
    thread, while requests run. ``close`` gives its memory back, as closing an engine does.

    Args:
        model: the base model, without peft layers. Its linears are what adapters may target.
        memory: of the device for adapters: bytes, or a size such as ``"2GB"`` or ``"512MiB"``.
        host_memory: likewise of the host, for copies of adapters that spare reading them again; by
            default as much as ``memory`` where the model is on a GPU, else none. What has to leave
            the device and cannot be read again (it was loaded from a live peft model, or a request
            waits for it) is kept beyond it.
        slots: adapters on the device at once, at most ``slots - 1``.

    Raises:
        ValueError: the model has peft layers or no linears, or a size is none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: int | str = "2GB",
        host_memory: int | str | None = None,
        slots: int = 1024,
    ) -> None:
        linears = linears_of(model)
        weight = next(iter(linears.values())).weight
        self.device, self.dtype = weight.device, dtype_of(model, weight)
        self.groups = groups_of(model, linears)
        self.names = tuple(name for group in self.groups for name in group.names)
        self.shapes = {
            name: (linears[name].out_features, linears[name].in_features) for name in self.names
        }
        self._reader = Reader(model, self.shapes, self.dtype, pinned=self.device.type == "cuda")
        self._alike = alike_of(self.groups)
        pages = bytes_of(memory) // (PAGE * self.dtype.itemsize)
        if pages < 1 or slots < 2:
            raise ValueError(
                f"there is no room for an adapter: memory is {memory!r}, slots is {slots}"
            )
        plans.check_serving(self.device, self.dtype)
        self.slots = slots
        # What is made in inference mode may be written in that alone; other threads write these.
        with torch.inference_mode(False):
            self.arena = torch.empty(pages * PAGE, dtype=self.dtype, device=self.device)
            # [linears, slots, 4]: page of A, page of B, rank, bits of the fp32 scaling.
            self.descriptors = torch.zeros(
                (len(self.names), slots, 4), dtype=torch.int32, device=self.device
            )
        self.reach = Reach(_LEAST_RANK, frozenset())
        self.grace = 0  # steps for which a batch may still be read after its requests are done
        self._allocator = PageAllocator(pages)
        self._free_slots = list(range(slots - 1, 0, -1))
        self._factors: list[dict[int, Factors]] = [{} for _ in self.names]
        # By linear, what the last batch used: in the next one of a batch that generates it is the
        # same. Forgotten whenever a slot gets another adapter.
        self._in_slots: dict[int, tuple[tuple[int, ...], Adapters]] = {}
        on_gpu = self.device.type != "cpu"
        self._host_room = (
            bytes_of(memory if on_gpu else 0) if host_memory is None else bytes_of(host_memory)
        )
        self._versions: dict[str, Version] = {}
        self._by_uid: dict[int, Version] = {}
        self._active: str | None = None
        self._clock = 0
        self._step = 0
        self._leaving: set[Version] = set()  # without name or lease, and perhaps still read
        self._closed = False
        self._lock = threading.RLock()

    # What users do.

    def load(self, name: str, source: Any) -> AdapterInfo:
        """Read an adapter, check all of it, and make it usable under a name.

        A name that is taken gets the new version for requests that come from now on; those under
        way finish with the one that they began with. It goes to the device, in the place of the
        least recently used ones that no request uses; where these are not enough, it goes there
        when a request needs it (and if the name is pinned, stays there from then on).

        Args:
            name: letters, digits and ``. _ - : + @``.
            source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, a hub
                id (``"owner/name"`` or ``"owner/name@revision"``), or a live peft model.

        Returns:
            What is known of it.

        Raises:
            AdapterError: (a ``ValueError``) it cannot be used with this model, or is too large for
                the pool; the message says why. Whatever is raised, every name stands for what it
                did before.
            RuntimeError: the pool is closed.
        """
        self._check_open()
        version = self._reader.read(name, source, self._allocator.pages)
        with self._lock:
            self._check_open()
            old = self._versions.get(name)
            self._place_instead(version, old)
            # Only now: until here anything may be raised, of a device that is full for example.
            self._versions[name] = version
            self._by_uid[version.uid] = version
            if old is not None:
                self._retire(old)
            self._trim_host()
            return self._info(version)

    def unload(self, name: str) -> None:
        """Forget a name, at once; its memory is free when the last request that uses it is done.

        Raises:
            KeyError: there is no such adapter.
            ValueError: it is active: requests that name none would get the base model's answers.
        """
        with self._lock:
            version = self._named(name)
            if self._active == name:
                raise ValueError(f"{name} is active: deactivate it first, or activate another")
            del self._versions[name]
            self._retire(version)

    def list(self) -> list[AdapterInfo]:
        """Return what is known of each adapter, in the order of their loading."""
        with self._lock:
            return [self._info(version) for version in self._versions.values()]

    def pin(self, name: str) -> None:
        """Keep an adapter on the device, and bring it there.

        Raises:
            KeyError: there is no such adapter.
            RuntimeError: there is no room for it while others are pinned or in use, which it says;
                or the pool is closed.
        """
        while not self._pin(self.lease(name)):
            pass  # another version has come in between

    def _pin(self, lease: Lease) -> bool:
        """Pin a lease's version and end the lease; ``False``: it has lost its name meanwhile."""
        try:
            if not self.make_ready(lease):
                raise RuntimeError(
                    self._no_room_for(lease, "the rest is pinned, or in use by requests")
                )
            with self._lock:
                version = lease._version
                assert version is not None
                version.pinned = version.named
                return version.named
        finally:
            self.give_back(lease)

    def unpin(self, name: str) -> None:
        """Let an adapter leave the device again when others need its room.

        Raises:
            KeyError: there is no such adapter.
        """
        with self._lock:
            self._named(name).pinned = False

    def activate(self, name: str) -> None:
        """Make an adapter the one of requests that name none.

        Raises:
            KeyError: there is no such adapter.
        """
        with self._lock:
            self._active = self._named(name).name

    def deactivate(self) -> None:
        """Let requests that name no adapter use the base model, as at first."""
        self._active = None

    @property
    def active(self) -> str | None:
        """The adapter of requests that name none."""
        return self._active

    @property
    def memory_total(self) -> int:
        """Bytes of the device that are kept for adapters."""
        return self.arena.numel() * self.dtype.itemsize

    @property
    def memory_used(self) -> int:
        """Bytes of them that adapters take now, also those that only requests under way know."""
        return (self._allocator.pages - self._allocator.free) * PAGE * self.dtype.itemsize

    @property
    def host_memory_used(self) -> int:
        """Bytes of the host that copies of adapters take now."""
        with self._lock:
            return sum(self._bytes_of(v) for v in self._by_uid.values() if v.host is not None)

    def __contains__(self, name: object) -> bool:
        return name in self._versions

    def __len__(self) -> int:
        return len(self._versions)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._versions))

    def __repr__(self) -> str:
        lines = table_of(self.list())
        if self._closed:
            return "\n".join([*lines, "closed"])
        used, total = size_of(self.memory_used), size_of(self.memory_total)
        dtype = str(self.dtype).removeprefix("torch.")
        lines.append(f"{used} of {total} on {self.device}, {dtype}")
        if on_host := self.host_memory_used:
            lines[-1] += f"; {size_of(on_host)} of copies in host memory"
        return "\n".join(lines)

    def close(self) -> None:
        """Give back all memory, of the device and of the host; again, it changes nothing.

        An engine's pool is closed with it. Names can still be listed.

        Raises:
            RuntimeError: requests that run use adapters.
        """
        with self._lock:
            if not self._closed and any(version.held for version in self._by_uid.values()):
                raise RuntimeError("requests use adapters of this pool: close their engine")
            self._close()

    def _close(self) -> None:
        """Close it whoever has leases, once no batch runs any more; without the lock, too."""
        with self._lock:
            self._closed = True
            try:
                if self.device.type == "cuda":
                    # Of this thread alone: while a graph is captured elsewhere, no device waits.
                    torch.cuda.current_stream(self.device).synchronize()
            finally:
                for version in self._by_uid.values():
                    version.host, version.placement, version.slot = None, None, 0
                for version in self._leaving:
                    self._by_uid.pop(version.uid, None)
                self._leaving.clear()
                for factors in self._factors:
                    factors.clear()
                self._in_slots = {}
                self._allocator, self._free_slots = PageAllocator(0), []
                self.arena = self.arena.new_empty(0)
                self.descriptors = self.descriptors.new_empty((len(self.names), 0, 4))

    # What an engine does.

    def lease(self, name: str | None) -> Lease:
        """Hold on to the version that a name has now; ``None`` is the base model.

        Raises:
            KeyError: there is no such adapter.
            RuntimeError: the pool is closed.
        """
        if name is None:
            return Lease(None, 0)
        with self._lock:
            self._check_open()
            version = self._named(name)
            version.leases += 1
            version.used = self._tick()
            return Lease(name, version.uid, version)

    def hold(self, lease: Lease) -> bool:
        """Keep a lease's adapter on the device until the lease ends; ``False`` if it is not there.

        For the base model it is always ``True``, and nothing is held.
        """
        with self._lock:
            version = lease._version
            if version is None:
                return True
            if version.slot and not lease._holds:
                lease._holds = True
                version.held += 1
            return lease._holds

    def make_ready(self, lease: Lease) -> bool:
        """Bring a lease's adapter to the device and hold it; ``False`` if there is no room as yet.

        Raises:
            AdapterError: it had to be read again, and that failed.
            RuntimeError: beside what is pinned there is no room, even when all others have left;
                or the pool is closed.
        """
        version = lease._version
        if version is None:
            return True
        self._bring_to_host(version)
        with self._lock:
            self._check_open()
            # Somebody else may have ended the lease meanwhile.
            if lease._version is not None and not self._place(version):
                if not self._fits_beside_pinned(version.pages):
                    raise RuntimeError(
                        self._no_room_for(lease, "there is too little beside what is pinned")
                    )
                return False
            self._trim_host()
            return self.hold(lease)

    def give_back(self, lease: Lease) -> None:
        """End a lease; again, it changes nothing."""
        with self._lock:
            version, lease._version = lease._version, None
            if version is None:
                return
            version.leases -= 1
            if lease._holds:
                version.held -= 1
                version.free_from = self._step + self.grace
            if version.leases == 0:
                if not version.named:
                    self._retire(version)
                elif version.host is not None and not version.slot:
                    self._trim_host()  # it was there for the lease

    def slot_of(self, uid: int) -> int:
        """Return the slot of a version, 0 for the base model."""
        version = self._by_uid.get(uid)
        return 0 if version is None else version.slot

    def advance(self) -> None:
        """Say that a step of the engine is over: what ended ``grace`` steps ago may be freed."""
        self._step += 1
        if self._leaving:
            with self._lock:
                for version in list(self._leaving):
                    self._retire(version)

    def has_adapters(self, linear: int) -> bool:
        """Return whether an adapter that is on the device changes a linear."""
        return bool(self._factors[linear])

    def in_slots(self, linear: int, slots: tuple[int, ...]) -> Adapters:
        """Return the adapters of one linear in these slots, as views of the arena."""
        known = self._in_slots.get(linear)
        if known is None or known[0] != slots:
            factors = [self._factors[linear].get(slot) for slot in slots]
            known = self._in_slots[linear] = (slots, Adapters(factors))
        return known[1]

    # Everything below is called with the lock held, unless it says otherwise.

    def _bring_to_host(self, version: Version) -> None:
        """Read an adapter again that was dropped; without the lock."""
        with self._lock:
            self._check_open()
            if version.slot or version.host is not None:
                return
        values = self._reader.read_again(version)
        with self._lock:
            self._check_open()
            version.host = values

    def _check_open(self) -> None:
        """Raise if the pool is closed; without the lock, too."""
        if self._closed:
            raise RuntimeError("the adapter pool is closed")

    def _place_instead(self, version: Version, old: Version | None) -> None:
        """Put a new version into the arena, if there is room, for which the old one may leave.

        Where that fails, the old one is what it was.
        """
        if old is None:
            self._place(version)
            return
        was_there, version.pinned, old.pinned = old.slot > 0, old.pinned, False
        try:
            self._place(version, old)
        except BaseException:
            old.pinned = version.pinned
            if was_there:
                with contextlib.suppress(Exception):
                    self._place(old)
            raise

    def _place(self, version: Version, old: Version | None = None) -> bool:
        """Put a packed adapter into the arena, in the place of idle ones if need be."""
        if version.slot:
            return True
        leaving = None if version.host is None else self._who_leaves_for(version.pages, old)
        if leaving is None:
            return False
        for each in leaving:
            if each is old:
                self._copy_to_host(each)
            self._evict(each)
        placement = self._allocator.place(version.pages)
        assert placement is not None, "it was tried"
        slot = self._free_slots.pop()
        try:
            self._upload(version, placement, slot)
        except BaseException:
            self._free(slot, placement)
            raise
        version.used = self._tick()
        # Last: who finds a slot may use it.
        version.placement, version.slot = placement, slot
        return True

    def _who_leaves_for(
        self, pages: Sequence[int], old: Version | None = None
    ) -> Sequence[Version] | None:
        """Return the idle adapters that make room for blocks, the least recently used first.

        ``None``: not even all of them do, and nobody has to leave for nothing. Before all others
        goes the old version of what comes.
        """
        idle = [v for v in self._by_uid.values() if v.placement and self._may_leave(v)]
        if sum(pages) > self._allocator.free + sum(v.size for v in idle):
            return None
        idle.sort(key=lambda version: (version is not old, version.used))
        trial = self._allocator.copy()
        for count in range(len(idle) + 1):
            if (self._free_slots or count) and trial.place(pages) is not None:
                return idle[:count]
            for version in idle[count : count + 1]:
                assert version.placement is not None
                trial.give_back(version.placement)
        return None

    def _fits_beside_pinned(self, pages: Sequence[int]) -> bool:
        """Return whether blocks fit when all have left that are not pinned: they will, some day."""
        trial, slots = self._allocator.copy(), len(self._free_slots)
        for version in self._by_uid.values():
            if version.placement is not None and not version.pinned:
                trial.give_back(version.placement)
                slots += 1
        return slots > 0 and trial.place(pages) is not None

    def _may_leave(self, version: Version) -> bool:
        return not (version.held or version.pinned) and version.free_from <= self._step

    def _upload(self, version: Version, placement: Placement, slot: int) -> None:
        assert version.host is not None
        at = 0
        for first, pages in placement.extents:
            part = version.host[at * PAGE : (at + pages) * PAGE]
            self.arena[first * PAGE : (first + pages) * PAGE].copy_(part, non_blocking=True)
            at += pages
        rows = torch.zeros((len(self.names), 4), dtype=torch.int32)
        for i, block in enumerate(version.blocks):
            page_a, page_b = placement.blocks[2 * i : 2 * i + 2]
            (bits,) = struct.unpack("<i", struct.pack("<f", block.scaling))
            rows[block.linear] = torch.tensor([page_a, page_b, block.rank, bits])
            self._factors[block.linear][slot] = Factors(
                self._view(page_a, block.rank, block.k),
                self._view(page_b, block.rank, block.n),
                block.scaling,
            )
        self.descriptors[:, slot] = rows.to(self.device)
        self._settle()
        max_rank, targeted = self.reach
        while max_rank < version.rank:
            max_rank *= 2
        alike = [self._alike[block.linear] for block in version.blocks]
        self.reach = Reach(max_rank, targeted.union(*alike))
        self._in_slots = {}

    def _settle(self) -> None:
        """Let what was written be there for other streams: of batches, and of other threads."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _view(self, page: int, rows: int, columns: int) -> Tensor:
        return self.arena[page * PAGE :][: rows * columns].view(rows, columns)

    def _copy_to_host(self, version: Version) -> None:
        if version.host is not None or version.placement is None:
            return
        # Piece by piece: the device may be full.
        host = torch.empty(version.size * PAGE, dtype=self.dtype)
        at = 0
        for first, pages in version.placement.extents:
            part = self.arena[first * PAGE : (first + pages) * PAGE]
            host[at * PAGE : (at + pages) * PAGE].copy_(part)
            at += pages
        version.host = host

    def _evict(self, version: Version) -> None:
        """Take an adapter from the device; what could not be read again goes to the host."""
        placement, slot = version.placement, version.slot
        assert placement is not None
        if version.leases or (version.named and version.source is None):
            self._copy_to_host(version)
        version.placement, version.slot = None, 0
        self._in_slots = {}
        try:
            self.descriptors[:, slot].zero_()
            self._settle()
        finally:
            self._free(slot, placement)

    def _free(self, slot: int, placement: Placement) -> None:
        """Take back what nobody finds any more; an upload writes all descriptors of its slot."""
        for factors in self._factors:
            factors.pop(slot, None)
        self._allocator.give_back(placement)
        self._free_slots.append(slot)

    def _retire(self, version: Version) -> None:
        """Let go of a version that has lost its name, as soon as nobody uses it."""
        version.named = version.pinned = False
        if version.leases:
            return  # the last of them comes here
        if version.free_from > self._step:
            self._leaving.add(version)
            return
        self._leaving.discard(version)
        try:
            if version.slot:
                self._evict(version)
        finally:
            self._by_uid.pop(version.uid, None)

    def _trim_host(self) -> None:
        """Drop host copies beyond the room for them, the least recently used first."""
        kept = sorted(
            (v for v in self._by_uid.values() if v.host is not None), key=lambda v: -v.used
        )
        room = self._host_room
        for version in kept:
            room -= self._bytes_of(version)
            # One without a slot may be the only copy, or what the holder of a lease waits for.
            only = version.source is None or version.leases
            if room < 0 and (version.slot or not only):
                version.host = None

    def _no_room_for(self, lease: Lease, what: str) -> str:
        assert lease._version is not None
        needed, total = size_of(self._bytes_of(lease._version)), size_of(self.memory_total)
        return f"{lease.name} needs {needed} of {total}, and {what}"

    def _named(self, name: str) -> Version:
        version = self._versions.get(name)
        if version is None:
            known = ", ".join(self._versions) or "none"
            raise KeyError(f"no adapter is called {name!r}; loaded are: {known}")
        return version

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _bytes_of(self, version: Version) -> int:
        return version.size * PAGE * self.dtype.itemsize

    def _info(self, version: Version) -> AdapterInfo:
        place = 0 if version.slot else 1 if version.host is not None else 2
        return AdapterInfo(
            name=version.name,
            source=version.shown,
            rank=version.rank,
            targets=version.targets,
            bytes=self._bytes_of(version),
            where=_WHERE[place],
            requests=version.leases,
            pinned=version.pinned,
            active=self._active == version.name,
        )
