"""Who goes into which slot: plain numbers, without JAX."""

import subprocess
import sys

import numpy as np

from oel_jax.sampler.requests import Request
from oel_jax.sampler.scheduler import Scheduler

KEY = np.zeros(2, np.uint32)


def make(**changes):
    settings = dict(
        slots=8, devices=2, prefixes=2, longest_prefix=100, prefill_rows=4, prefill_chunk=32
    )
    return Scheduler(**settings | changes)


def ask(prompt, tag=None, **more):
    return Request(prompt, KEY, 4, tag, **more)


def text(seed, count):
    return np.random.default_rng(seed).integers(0, 300, count).tolist()


def test_it_imports_no_jax():
    code = "import sys; sys.modules['jax'] = None; import oel_jax.sampler.scheduler"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_request_gets_one_slot_in_its_turn():
    schedule, order = make(), []
    schedule.pending.extend(ask(text(i, 5), i) for i in range(19))
    while schedule.busy:
        entries = schedule.assign().entries
        assert len({entry.slot for entry in entries}) == len(entries) <= 8
        order += [entry.request.tag for entry in entries]
        for index in schedule.running()[:3]:
            schedule.finish(index, [1, 2])
    assert order == list(range(19))


def test_devices_take_turns():
    schedule = make(prefixes=1)
    schedule.pending.extend(ask(text(i, 5)) for i in range(4))
    entries = schedule.assign().entries
    assert sorted(entry.slot // schedule.per_device for entry in entries) == [0, 0, 1, 1]


def test_a_session_returns_to_its_slot_and_encodes_what_is_new():
    schedule = make()
    prompt = text(0, 20)
    schedule.pending.append(ask(prompt, session="a"))
    (first,) = schedule.assign().entries
    assert (first.start, len(first.missing)) == (0, 19)
    schedule.finish(first.slot, [7, 8, 9])
    assert schedule.slots[first.slot].ids == [*prompt, 7, 8]  # the last token was never read
    schedule.pending.append(ask([*prompt, 7, 8, 9, 10, 11], session="a"))
    (second,) = schedule.assign().entries
    assert second.slot == first.slot
    assert (second.start, second.missing) == (22, [9, 10])
    schedule.finish(second.slot, [1])
    schedule.forget()
    schedule.pending.append(ask([*prompt, 7, 8, 9, 10, 11, 1, 2], session="a"))
    (third,) = schedule.assign().entries
    assert third.start == 0


def test_a_session_waits_for_its_own_slot():
    schedule = make()
    schedule.pending.append(ask(text(0, 9), session="a"))
    (first,) = schedule.assign().entries
    schedule.pending.append(ask(text(1, 9), session="b"))
    (other,) = schedule.assign().entries
    assert other.slot != first.slot


def test_prefixes_are_loaded_once_and_kept_while_they_are_read():
    texts = [tuple(text(10 + i, 70)) for i in range(3)]
    schedule = make()
    schedule.pending.extend(
        ask([*texts[i % 3], i, 1, 2], i, prefix=texts[i % 3]) for i in range(12)
    )
    work = schedule.assign()
    assert [prefix for _, prefix in work.loads] == list(texts[:2])  # two places for three texts
    for entry in work.entries:
        number = schedule.prefix_of(entry.slot)
        assert schedule.prefixes[number] == entry.request.prefix and entry.shared == 70
        assert entry.own == [entry.request.tag, 1, 2]
    assert [r.tag for r in schedule.pending] == [2, 5, 8, 11]
    assert schedule.assign().entries == []  # both places are in use
    for index in schedule.running():
        schedule.finish(index, [1])
    work = schedule.assign()
    assert [prefix for _, prefix in work.loads] == [texts[2]]
    assert [entry.request.tag for entry in work.entries] == [2, 5, 8, 11]


def test_a_prompt_that_shares_a_part_reads_that_part():
    prefix = tuple(text(3, 70))
    schedule = make()
    schedule.pending.append(ask([*prefix[:40], 301, 302], prefix=prefix))
    schedule.pending.append(ask(list(prefix), prefix=prefix))  # the last token stays its own
    schedule.pending.append(ask([301, 302], prefix=prefix))
    shared = [entry.shared for entry in schedule.assign().entries]
    assert shared == [40, 69, 0]


def test_equal_prompts_of_one_device_are_encoded_once():
    schedule = make(prefixes=1)
    schedule.pending.extend(ask(text(5, 30), i) for i in range(8))
    entries = schedule.assign().entries
    assert sum(entry.source < 0 for entry in entries) == 2  # one on each device
    for entry in entries:
        if entry.source >= 0:
            assert entry.source // 4 == entry.slot // 4
    copied = [
        (row, entry)
        for width, rows in schedule.copies(entries, 64)
        for row, entry in rows
        if width == 32
    ]
    assert len(copied) == 6


def test_batches_give_each_device_its_rows():
    schedule = make(prefixes=1)
    schedule.pending.extend(ask(text(i, 3 + i)) for i in range(8))
    entries = schedule.assign().entries
    batches = list(schedule.batches(entries))
    assert sorted(e.slot for rows in batches for _, e in rows) == list(range(8))
    for rows in batches:
        assert len({row for row, _ in rows}) == len(rows) <= 4
        assert all(row // 2 == entry.slot // 4 for row, entry in rows)


def test_prompts_are_cut_by_their_own_length():
    schedule = make(prefixes=1)
    lengths = [1, 2, 33, 34, 66, 100]
    schedule.pending.extend(ask(text(i, n), n) for i, n in enumerate(lengths))
    entries = schedule.assign().entries
    pieces = {n: [] for n in lengths}
    for _, size, rows in schedule.prefills(entries):
        for _, piece in rows:
            assert len(piece.ids) <= size
            pieces[piece.entry.request.tag].append((piece.first, len(piece.ids), size))
    assert pieces == {
        1: [],  # its only token is left for decoding
        2: [(0, 1, 16)],
        33: [(0, 32, 32)],
        34: [(0, 32, 32), (32, 1, 16)],
        66: [(0, 32, 32), (32, 32, 32), (64, 1, 16)],
        100: [(0, 32, 32), (32, 32, 32), (64, 32, 32), (96, 3, 16)],
    }
