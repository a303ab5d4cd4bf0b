"""Which request goes into which slot, and what of its prompt has to be encoded. Imports no JAX.

The scheduler knows slots by number, the ids that each slot holds, and which shared prefix each slot
reads. It gives out work (prefixes to load, pieces of prompts to encode, prompts to copy, requests
to start) as plain numbers; `sampler.py` makes arrays of them and dispatches.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeVar

from oel_jax.models.lengths import common_prefix, padded_length
from oel_jax.sampler.requests import Request


@dataclass
class Slot:
    """What the host knows of a slot.

    Attributes:
      running: the request that decodes in it.
      session: whose last prompt and response it holds.
      ids: what its cache holds, after the shared part.
      shared: how much of the prefix its session reads.
      response: what the host knows of the response that is under way.
    """

    running: Request | None = None
    session: Hashable = None
    ids: Sequence[int] = ()
    shared: int = 0
    response: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A request on its way into a slot.

    Attributes:
      own: prompt ids after the shared part.
      start: how many of them are in the slot already.
      source: the slot of an equal prompt that enters at the same time; -1: none.
      donor: the slot that has the first `start` of them, to be copied before anything is encoded;
        -1: they are in the slot itself.
    """

    request: Request
    slot: int
    shared: int
    own: Sequence[int]
    start: int
    source: int = -1
    donor: int = -1

    @property
    def missing(self) -> Sequence[int]:
        """Ids to be encoded: the last prompt token is left for decoding."""
        return self.own[self.start : -1]


@dataclass(frozen=True)
class PromptPiece:
    """A piece of an entry's missing ids, from number `first` on."""

    entry: Entry
    first: int
    ids: Sequence[int]

    @property
    def slot(self) -> int:
        return self.entry.slot

    @property
    def size(self) -> int:
        """Tokens that it is padded to."""
        return padded_length(len(self.ids))


@dataclass(frozen=True)
class Assignment:
    """What is to be done before the next decoding, in this order.

    Attributes:
      loads: shared prefixes to encode: (number of the prefix, its ids).
      entries: requests whose prompts go into slots.
      more: others can enter as soon as these have.
    """

    loads: list[tuple[int, tuple[int, ...]]]
    entries: list[Entry]
    more: bool = False


_InSlot = TypeVar("_InSlot", Entry, PromptPiece)
Rows = list[tuple[int, _InSlot]]  # (row of a batch, what is in it)


class Scheduler:
    """A fixed set of slots, equally many on each device, and the queue before them.

    Nothing that depends on what else is in the batch changes what a request reads: a prompt is cut
    by its own length and reuses only what its own session and its own prefix hold.
    """

    def __init__(
        self,
        *,
        slots: int,
        devices: int,
        prefixes: int,
        longest_prefix: int,
        prefill_rows: int,
        prefill_chunk: int,
    ):
        self.slots = [Slot() for _ in range(slots)]
        self.pending: deque[Request] = deque()
        self.prefixes: list[tuple[int, ...]] = [()] * prefixes
        self.per_device, self._devices = slots // devices, devices
        self._longest_prefix = longest_prefix
        self._rows, self._chunk = prefill_rows, prefill_chunk

    @property
    def busy(self) -> bool:
        """Whether anything is queued or running."""
        return bool(self.pending) or any(slot.running for slot in self.slots)

    def running(self) -> list[int]:
        """Numbers of the slots that decode."""
        return [index for index, slot in enumerate(self.slots) if slot.running]

    def shared(self, request: Request) -> int:
        """How much of the shared prefix a prompt reads; its last token is always its own."""
        if not self._longest_prefix or not request.prefix:
            return 0
        return min(common_prefix(request.prompt, request.prefix), len(request.prompt) - 1)

    def prefix_of(self, slot: int) -> int:
        """The number of the prefix that a slot reads."""
        return slot % self.per_device % len(self.prefixes)

    def forget(self) -> None:
        """Nothing that the slots and prefixes hold is used again."""
        self.prefixes = [()] * len(self.prefixes)
        for slot in self.slots:
            slot.session = None

    def finish(self, index: int, response: Sequence[int]) -> Request:
        """Free a slot whose response is complete; returns its request."""
        slot = self.slots[index]
        request, slot.running = slot.running, None
        # The last sampled token was never read, so its keys and values are not in the cache.
        slot.ids = [*slot.ids, *response[:-1]]
        return request

    def withdraw(self, requests: Sequence[Request]) -> list[int]:
        """Forget these very requests, pending or running; returns the slots that they free."""
        unwanted = {id(request) for request in requests}
        self.pending = deque(r for r in self.pending if id(r) not in unwanted)
        freed = [i for i in self.running() if id(self.slots[i].running) in unwanted]
        for index in freed:
            self.finish(index, self.slots[index].response)
        return freed

    # --- who enters which slot

    def assign(self) -> Assignment:
        """Put as many pending requests as possible into slots."""
        continued = self._continue_sessions()
        loads, begun = self._fill_free_slots()
        return Assignment(loads, continued + begun)

    def _continue_sessions(self) -> list[Entry]:
        """Requests whose session has a slot go there."""
        places = {slot.session: i for i, slot in enumerate(self.slots) if slot.session is not None}
        entries, others = [], deque()
        for request in self.pending:
            index = places.get(request.session) if request.session is not None else None
            if index is None or self.slots[index].running:
                others.append(request)
                continue
            slot, shared = self.slots[index], self.shared(request)
            own = request.prompt[shared:]
            prefix = self.prefixes[self.prefix_of(index)]
            same = shared == slot.shared and prefix == request.prefix
            start = min(common_prefix(own, slot.ids), len(own) - 1) if same else 0
            if not same and shared:
                others.append(request)  # another prefix: it must go where that one is read
                slot.session = None
                continue
            entries.append(self._enter(request, index, shared, start))
        self.pending = others
        return entries

    def _fill_free_slots(self) -> tuple[list[tuple[int, tuple[int, ...]]], list[Entry]]:
        """Requests from the front of the queue go into free slots that read their prefix."""
        free: list[list[int]] = [[] for _ in self.prefixes]
        used = [False] * len(self.prefixes)
        # Slots with nothing worth keeping come first, and devices take turns.
        order = sorted(
            range(len(self.slots)),
            key=lambda i: (self.slots[i].session is not None, i % self.per_device),
        )
        for index in reversed(order):
            number = self.prefix_of(index)
            if self.slots[index].running:
                used[number] = True
            else:
                free[number].append(index)
        loads: list[tuple[int, tuple[int, ...]]] = []
        entries: list[Entry] = []
        first: dict[tuple, int] = {}  # of equal prompts on one device, the slot of the first
        others: deque[Request] = deque()
        while self.pending and any(free):
            request = self.pending.popleft()
            number, load = self._choose_prefix(request, free, used)
            if number is None:
                others.append(request)
                continue
            if load:
                self._replace_prefix(number, request.prefix)
                loads.append((number, request.prefix))
            used[number] = True
            index = free[number].pop()
            shared = self.shared(request)
            same = (index // self.per_device, number, shared, tuple(request.prompt))
            source = first.setdefault(same, index)
            entries.append(
                self._enter(request, index, shared, 0, source if source != index else -1)
            )
        self.pending.extendleft(reversed(others))
        return loads, entries

    def _choose_prefix(
        self, request: Request, free: list[list[int]], used: list[bool]
    ) -> tuple[int | None, bool]:
        """A prefix number with a free slot for the request, and whether its text is to be loaded.

        None: the request has to wait.
        """
        with_room = [number for number in range(len(free)) if free[number]]
        if not self.shared(request):
            return max(with_room, key=lambda number: len(free[number])), False
        if request.prefix in self.prefixes:
            number = self.prefixes.index(request.prefix)
            return (number if free[number] else None), False
        return next((number for number in with_room if not used[number]), None), True

    def _replace_prefix(self, number: int, prefix: tuple[int, ...]) -> None:
        """Another text takes the place of one that nothing running reads."""
        for index, slot in enumerate(self.slots):
            if self.prefix_of(index) == number:
                slot.session = None
        self.prefixes[number] = prefix

    def _enter(
        self, request: Request, index: int, shared: int, start: int, source: int = -1
    ) -> Entry:
        own = request.prompt[shared:]
        self.slots[index] = Slot(request, request.session, own, shared)
        return Entry(request, index, shared, own, start, source)

    # --- batches: a row of a batch belongs to the device of its slot

    def prefills(self, entries: Sequence[Entry]) -> Iterator[tuple[int, int, Rows[PromptPiece]]]:
        """Batches of prompt pieces: (number of their prefix, padded size, rows).

        Each prompt is cut by its own length: whole chunks, then the padded rest. A wave takes the
        next piece of all; pieces of one size travel together however long their prompts are.
        """
        cut = [self._pieces(entry) for entry in entries if entry.source < 0]
        for wave in zip_longest(*cut):
            alike: dict[tuple[int, int], list[PromptPiece]] = defaultdict(list)
            for piece in wave:
                if piece is not None:
                    number = self.prefix_of(piece.slot) if piece.entry.shared else -1
                    alike[number, piece.size].append(piece)
            for (number, size), pieces in alike.items():
                for rows in self.batches(pieces):
                    yield max(number, 0), size, rows

    def copies(self, entries: Sequence[Entry], length: int) -> Iterator[tuple[int, Rows[Entry]]]:
        """Batches of entries that copy an equal prompt: (cache columns to copy, rows).

        Args:
          length: columns of a slot's cache.
        """
        copying = [e for e in entries if e.source >= 0 and e.missing]
        yield from self._by_width(copying, lambda entry: len(entry.missing), length)

    def donations(self, entries: Sequence[Entry], length: int) -> Iterator[tuple[int, Rows[Entry]]]:
        """Batches of entries that copy their beginning from a donor, as `copies`."""
        copying = [entry for entry in entries if entry.donor >= 0]
        yield from self._by_width(copying, lambda entry: entry.start, length)

    def _by_width(
        self, entries: Sequence[Entry], columns: Callable[[Entry], int], length: int
    ) -> Iterator[tuple[int, Rows[Entry]]]:
        by_width: dict[int, list[Entry]] = defaultdict(list)
        for entry in entries:
            by_width[min(padded_length(columns(entry)), length)].append(entry)
        for width, some in by_width.items():
            for rows in self.batches(some):
                yield width, rows

    def batches(self, entries: Sequence[_InSlot]) -> Iterator[Rows[_InSlot]]:
        """Batches of at most `prefill_rows`, equally many rows for each device."""
        each = self._rows // self._devices
        waiting: list[list[_InSlot]] = [[] for _ in range(self._devices)]
        for entry in entries:
            waiting[entry.slot // self.per_device].append(entry)
        count = max((-(-len(some) // each) for some in waiting), default=0)
        for i in range(count):
            yield [
                (device * each + row, entry)
                for device, some in enumerate(waiting)
                for row, entry in enumerate(some[i * each : (i + 1) * each])
            ]

    def _pieces(self, entry: Entry) -> list[PromptPiece]:
        missing = entry.missing
        return [
            PromptPiece(entry, first, missing[first : first + self._chunk])
            for first in range(0, len(missing), self._chunk)
        ]
