"""A scheduler that reuses what any prompt has left, and changes no bit of a result by it.

Conversations come back without a name, and many requests begin with one system prompt. A prompt is
cut into whole chunks and a rest, from its beginning. The keys and values of a whole chunk follow
from the chunk and what is before it, through one program with one shape, whoever else is in the
batch. So they may be taken from any slot in which a prompt with this beginning was encoded: in
place, or as a copy. The rest of a prompt and the tokens that were decoded went through programs of
other shapes, whose results differ in the last digits: these are encoded again.

Imports no JAX.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from oel_jax.sampler.requests import Request
from oel_jax.sampler.scheduler import Assignment, Entry, Scheduler, Slot

Chunks = tuple[bytes, ...]  # entry k is the digest of chunks 0 .. k of a prompt


def chunks_of(prompt: Sequence[int], size: int) -> Chunks:
    """Digests of the beginnings of a prompt in whole chunks; its last token is in none."""
    count = (len(prompt) - 1) // size
    ids = np.asarray(prompt[: count * size], np.int32).reshape(count, size)
    found, so_far = [], hashlib.blake2b(digest_size=16)
    for chunk in ids:
        so_far.update(chunk.tobytes())
        found.append(so_far.digest())
    return tuple(found)


def common_chunks(first: Chunks, second: Chunks) -> int:
    """How many whole chunks two prompts have in common at their beginning."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in same)


@dataclass(frozen=True)
class _Place:
    """A slot for a prompt, and the slot of its device whose first `chunks` it takes over."""

    slot: int
    donor: int
    chunks: int


class ReusingScheduler(Scheduler):
    """Puts a prompt where most of its beginning is. Names of sessions are not looked at."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self._held: list[Chunks] = [()] * len(self.slots)
        self._used = [0] * len(self.slots)  # when each slot was given out last
        self._clock = 0

    def forget(self) -> None:
        """Nothing that the slots hold is used again."""
        super().forget()
        self._held = [()] * len(self.slots)

    def assign(self) -> Assignment:
        """Put pending requests into slots.

        What begins like another one that enters now is put off to the next call: it can then copy.
        """
        free = [index for index, slot in enumerate(self.slots) if not slot.running]
        before = list(self._held)  # copies are made before anything is encoded
        targets: set[int] = set()
        donors: set[int] = set()
        entering: list[tuple[Request, int, Chunks]] = []
        entries: list[Entry] = []
        put_off = False
        others: deque[Request] = deque()
        for request, chunks in self._next(len(free)):
            equal = [slot for other, slot, _ in entering if other.prompt == request.prompt]
            near = self._slot_near(equal, free)
            new = max((common_chunks(chunks, other) for _, _, other in entering), default=0)
            if near is not None:
                slot, source = near
                entry = self._enter(request, slot, 0, 0, source)
            elif (place := self._place(chunks, free, before, targets, donors)) is None:
                others.append(request)
                continue
            elif new > place.chunks:
                others.append(request)
                put_off = True
                continue
            else:
                slot = place.slot
                entry = self._enter_at(request, place)
                if place.donor not in (slot, -1):
                    donors.add(place.donor)
                entering.append((request, slot, chunks))
            entries.append(entry)
            free.remove(slot)
            targets.add(slot)
            self._held[slot], self._used[slot] = chunks, self._clock
            self._clock += 1
        self.pending.extendleft(reversed(others))
        return Assignment([], entries, put_off)

    def _next(self, count: int) -> list[tuple[Request, Chunks]]:
        """Take the oldest pending requests; those come first of which the slots hold most.

        Otherwise a new conversation would be given the slot of one that is about to continue.
        """
        count = min(count, len(self.pending))
        taken = [self.pending.popleft() for _ in range(count)]
        some = [(request, chunks_of(request.prompt, self._chunk)) for request in taken]

        def there(one: tuple[Request, Chunks]) -> int:
            return max(common_chunks(one[1], held) for held in self._held)

        return sorted(some, key=there, reverse=True)

    def _slot_near(self, equal: Sequence[int], free: Sequence[int]) -> tuple[int, int] | None:
        """(a free slot, the slot on its device that an equal prompt has just entered)."""
        for source in equal:
            device = source // self.per_device
            for slot in sorted(free, key=lambda i: (bool(self._held[i]), self._used[i])):
                if slot // self.per_device == device:
                    return slot, source
        return None

    def _place(
        self,
        chunks: Chunks,
        free: Sequence[int],
        before: Sequence[Chunks],
        targets: set[int],
        donors: set[int],
    ) -> _Place | None:
        """The best free slot: one that the prompt continues, or the one that is missed least.

        Args:
          before: what the slots hold until something is encoded.
          targets: slots that are given out in this call: what they hold now may be overwritten.
          donors: slots that others copy from in this call: nothing may be copied into them.
        """
        common = [common_chunks(chunks, held) for held in before]
        common = [0 if i in targets else count for i, count in enumerate(common)]

        starts = range(0, len(common), self.per_device)
        best = [max(range(i, i + self.per_device), key=common.__getitem__) for i in starts]

        def place(slot: int) -> _Place:
            donor = best[slot // self.per_device]
            if slot in donors or common[slot] == common[donor]:
                donor = slot
            return _Place(slot, donor, common[donor])

        def merit(one: _Place) -> tuple:
            held = len(before[one.slot])
            continued = one.donor == one.slot and one.chunks == held > 0
            return one.chunks, continued, held == 0, -self._used[one.slot], -one.slot

        return max(map(place, free), key=merit, default=None)

    def _enter_at(self, request: Request, place: _Place) -> Entry:
        self.slots[place.slot] = Slot(request, None, request.prompt, 0)
        donor = -1 if place.donor == place.slot else place.donor
        start = place.chunks * self._chunk
        return Entry(request, place.slot, 0, request.prompt, start, donor=donor)
