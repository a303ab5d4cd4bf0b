"""What any prompt has left in a slot is reused, and no bit of an answer depends on it."""

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import make_mesh
from oel_jax.sampler import reuse
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.reuse import ReusingScheduler, chunks_of, common_chunks
from oel_jax.sampler.sampler import Sampler

LIMIT, STOPS = 290, (5, 7)
CHUNK = 16


@pytest.fixture(scope="module")
def model(tiny_models):
    return load_model(tiny_models["qwen3_tied"])


def make(model, mesh=None, **changes):
    sizes = dict(slots=4, prefill_rows=4, length=288, response=24, prefill_chunk=CHUNK)
    sizes = SamplerConfig(**sizes | dict(reuse=True) | changes)
    how = Sampling(0.9)
    return Sampler(model.cfg, mesh or model.mesh, sizes, limit=LIMIT, stop_ids=STOPS, sampling=how)


def text(seed, count):
    return np.random.default_rng(seed).integers(8, LIMIT, count).tolist()


SYSTEMS = [text([7, k], 37 + 20 * k) for k in range(3)]


def talk(model, sampler, conversations=7, turns=4):
    """Conversations with one of three system prompts, more than slots; answers by (who, turn)."""
    histories = [[*SYSTEMS[c % 3], *text([8, c], 3 + 4 * c)] for c in range(conversations)]
    answers, prompts = {}, {}

    def ask(c, turn):
        prompts[c, turn] = list(histories[c])
        key = request_key("talk", c, turn)
        return Request(prompts[c, turn], key, 12, (c, turn))

    sampler.submit(ask(c, 0) for c in range(conversations))
    while sampler.busy:
        for done in sampler.poll(model.params):
            c, turn = done.tag
            answers[done.tag] = done
            histories[c] += [*done.ids, *text([9, c, turn], 6)]
            if turn + 1 < turns:
                sampler.submit([ask(c, turn + 1)])
    return answers, prompts


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, answer in ours.items():
        assert (answer.ids, answer.stopped) == (theirs[key].ids, theirs[key].stopped), key
        np.testing.assert_array_equal(answer.log_probs, theirs[key].log_probs)


@pytest.mark.parametrize(
    "changes",
    [{}, {"slots": 8}, {"overlap": True}, {"draft": 2}, {"follow": True}, {"prefill_chunk": 20}],
    ids=str,
)
def test_answers_are_the_same_to_the_bit(model, changes):
    plain = make(model, reuse=False, **changes)
    kept = make(model, **changes)
    expected, prompts = talk(model, plain)
    answers, _ = talk(model, kept)
    same(answers, expected)
    assert kept.encoded < 0.7 * plain.encoded
    if changes.get("slots") == 8:  # a slot for each: all but the last rests and what was said
        least = sum(len(p) - 1 for (_, turn), p in prompts.items() if turn == 3)
        assert kept.encoded < 1.6 * least


def test_keeping_too_much_would_be_noticed(model, monkeypatch):
    expected, _ = talk(model, make(model, reuse=False))
    right = reuse.common_chunks
    monkeypatch.setattr(reuse, "common_chunks", lambda a, b: min(right(a, b) + 1, len(a), len(b)))
    answers, _ = talk(model, make(model))
    assert any(answers.get(key) is None or answers[key].ids != e.ids for key, e in expected.items())


@pytest.mark.parametrize("shape", [(2, 1), (4, 2)])
def test_the_same_on_many_devices(model, shape):
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    split = load_model(model.directory, mesh=mesh)
    plain, kept = (make(split, mesh, slots=8, reuse=on) for on in (False, True))
    expected, _ = talk(split, plain)
    answers, _ = talk(split, kept)
    same(answers, expected)
    assert kept.encoded < 0.9 * plain.encoded


def test_one_system_prompt_is_encoded_once(model):
    """Even when all come at once: the first encodes it, the others copy it from its slot."""
    system = text(1, 5 * CHUNK)
    prompts = [[*system, *text([2, k], 9)] for k in range(8)]
    requests = [Request(p, request_key("shared", k), 8, k) for k, p in enumerate(prompts)]
    sampler = make(model)
    answers = sampler.generate(model.params, requests)
    assert sampler.encoded == len(system) + 8 * 8
    plain = make(model, reuse=False).generate(model.params, requests)
    same(dict(enumerate(answers)), dict(enumerate(plain)))


def test_samples_of_one_prompt_are_encoded_once(model):
    prompt = text(3, 40)
    requests = [Request(prompt, request_key("n", k), 8, k) for k in range(4)]
    sampler = make(model)
    answers = sampler.generate(model.params, requests)
    assert sampler.encoded == 39
    plain = make(model, reuse=False).generate(model.params, requests)
    same(dict(enumerate(answers)), dict(enumerate(plain)))


def test_forgotten_and_cancelled_work_is_not_mixed_in(model):
    sampler = make(model)
    requests = [Request(text([4, k], 70), request_key(k), 24, k, stop_ids=()) for k in range(6)]
    sampler.submit(requests)
    sampler.poll(model.params)
    sampler.cancel(requests[:2])
    others = [replace(request, key=request_key("again", k)) for k, request in enumerate(requests)]
    while sampler.busy:
        sampler.poll(model.params)
    before = sampler.encoded
    answers = sampler.generate(model.params, others)
    reused = sampler.encoded - before
    plain = make(model, reuse=False).generate(model.params, others)
    same(dict(enumerate(answers)), dict(enumerate(plain)))
    other = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    sampler.forget()
    before = sampler.encoded
    answers = sampler.generate(other, others)
    assert sampler.encoded - before == 6 * 69 > reused
    plain = make(model, reuse=False).generate(other, others)
    same(dict(enumerate(answers)), dict(enumerate(plain)))


def test_with_shared_prefixes_it_is_refused(model):
    with pytest.raises(ValueError, match="no shared prefixes"):
        make(model, longest_prefix=64)


# --- who goes where: plain numbers


def test_it_imports_no_jax():
    code = "import sys; sys.modules['jax'] = None; import oel_jax.sampler.reuse"
    subprocess.run([sys.executable, "-c", code], check=True)


def schedule(slots=4, devices=1):
    sizes = dict(prefixes=1, longest_prefix=0, prefill_rows=4, prefill_chunk=CHUNK)
    return ReusingScheduler(slots=slots, devices=devices, **sizes)


def put(one, *prompts):
    one.pending.extend(Request(p, np.zeros(2, np.uint32), 4) for p in prompts)
    return one.assign()


def finish(one, *slots):
    for slot in slots:
        one.finish(slot, [1])


def test_chunks_stand_for_all_that_is_before_them():
    prompt = text(0, 5 * CHUNK + 1)
    assert len(chunks_of(prompt, CHUNK)) == 5
    assert len(chunks_of(prompt[:-1], CHUNK)) == 4  # the last token is left for decoding
    assert chunks_of([9], CHUNK) == ()
    for place in range(0, 5 * CHUNK, 7):
        other = list(prompt)
        other[place] += 1
        common = common_chunks(chunks_of(prompt, CHUNK), chunks_of(other, CHUNK))
        assert common == place // CHUNK


def test_a_conversation_returns_to_its_slot():
    one = schedule()
    first = text(0, 50)
    (entry,) = put(one, first).entries
    finish(one, entry.slot)
    (again,) = put(one, [*first, *text(1, 30)]).entries
    assert (again.slot, again.start, again.donor) == (entry.slot, 3 * CHUNK, -1)


def test_another_conversation_copies_and_leaves_the_old_one():
    one, system = schedule(), text(0, 2 * CHUNK)
    (first,) = put(one, [*system, *text(1, 40)]).entries
    finish(one, first.slot)
    (second,) = put(one, [*system, *text(2, 40)]).entries
    assert second.slot != first.slot
    assert (second.donor, second.start) == (first.slot, 2 * CHUNK)
    (third,) = put(one, [*system, *text(3, 40)]).entries  # from one that runs or one that rests
    assert third.donor in (first.slot, second.slot) and third.start == 2 * CHUNK


def test_the_slot_that_rested_longest_is_given_away():
    one = schedule()
    entries = put(one, *(text(k, 40) for k in range(4))).entries
    finish(one, *(entry.slot for entry in entries))
    (again,) = put(one, [*text(0, 40), 9]).entries
    assert again.slot == entries[0].slot
    finish(one, again.slot)
    (new,) = put(one, text(9, 40)).entries
    assert new.slot == entries[1].slot


def test_nothing_is_copied_from_what_is_being_written():
    """Whatever enters together: no slot is copied into that another one copies from."""
    draw = np.random.default_rng(0)
    for devices in (1, 2):
        one, base = schedule(slots=8, devices=devices), [text(k, 6 * CHUNK) for k in range(3)]
        copied = 0
        for _ in range(300):
            for _ in range(int(draw.integers(1, 6))):
                start = base[int(draw.integers(3))][: int(draw.integers(1, 6 * CHUNK))]
                own = draw.integers(8, 290, int(draw.integers(1, 60))).tolist()
                one.pending.append(Request([*start, *own], np.zeros(2, np.uint32), 4))
            while True:
                held = list(one._held)
                running = set(one.running())
                work = one.assign()
                into = [e.slot for e in work.entries if e.donor >= 0]
                assert len({e.slot for e in work.entries}) == len(work.entries)
                assert not running & {e.slot for e in work.entries}
                for e in work.entries:
                    assert e.donor not in into
                    assert e.source >= 0 or e.start % CHUNK == 0
                    if e.start:
                        origin = e.slot if e.donor < 0 else e.donor
                        assert origin // one.per_device == e.slot // one.per_device
                        mine = chunks_of(e.request.prompt, CHUNK)
                        assert common_chunks(held[origin], mine) >= e.start // CHUNK
                        copied += e.donor >= 0
                if not work.more:
                    break
            for slot in one.running():
                if draw.integers(2):
                    one.finish(slot, [1, 2])
        assert copied > 100
