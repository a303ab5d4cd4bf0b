"""Pre-training of the nano models: batches, loss, interruption, command line."""

import copy
import dataclasses
import json
import random
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.base.errors import UserError
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import forward, init_params, unembed
from oel_jax.models.huggingface import load_params
from oel_jax.nano import pretrain, vocabulary
from oel_jax.nano.examples import TASKS, draw_example
from oel_jax.nano.packing import PROMPT_WEIGHT, TASK_NAMES, make_batch
from oel_jax.parallel.mesh import make_mesh

PACKS = ((1, 384), (3, 192))
TINY = pretrain.Size(hidden=16, layers=1, heads=2, kv_heads=1, mlp=32, steps=12, packs=PACKS)
GLOSSARY = TASK_NAMES.index("glossary")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vocabulary")
    vocabulary.write(directory)
    return vocabulary.Encoder(directory)


def arrays(batch):
    return [array for pack in batch for array in pack.arrays()]


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(two), strict=True))


# --- batches


def test_batches_depend_on_seed_step_and_phase_alone(encoder):
    first = make_batch(encoder, 0, 3, PACKS)
    random.seed(1)
    np.random.seed(1)
    for _ in range(2):  # other batches in between change nothing
        assert not same(first, make_batch(encoder, 0, 4, PACKS))
        assert not same(first, make_batch(encoder, 1, 3, PACKS))
        assert not same(first, make_batch(encoder, 0, 3, PACKS, "early"))
        assert same(first, make_batch(encoder, 0, 3, PACKS))


def drawn_examples(encoder, seed, step, phase="main", count=200):
    """Token ids of prompt and reply -> (prompt length, task), as the step draws them."""
    rng = random.Random(f"nano pretraining {seed} {step}")
    found = {}
    for _ in range(count):
        example = draw_example(rng, phase)
        prompt = encoder.prompt(example.prompt, example.thinking)
        reply = encoder.reply(example.reply)
        found[tuple(prompt + reply)] = len(prompt), example.task
    return found


def placed(batch):
    """(pack, row, columns) of every example of a batch."""
    for pack in batch:
        for row in range(len(pack.tokens)):
            for number in range(1, pack.segments[row].max() + 1):
                columns = np.flatnonzero(pack.segments[row] == number)
                assert np.array_equal(columns, np.arange(columns[0], columns[-1] + 1))
                yield pack, row, slice(columns[0], columns[-1] + 1)


def test_rows_hold_whole_examples_with_their_targets_weights_and_tasks(encoder):
    tasks = set()
    for step in range(4):
        batch = make_batch(encoder, 0, step, PACKS)
        drawn = drawn_examples(encoder, 0, step)
        assert [pack.tokens.shape for pack in batch] == list(PACKS)
        covered = [np.zeros(pack.tokens.shape, bool) for pack in batch]
        for pack, row, columns in placed(batch):
            ids = pack.tokens[row, columns]
            prompt, task = drawn[tuple(ids.tolist())]
            tasks.add(task)
            size = len(ids)
            assert np.array_equal(pack.positions[row, columns], np.arange(size))
            assert np.array_equal(pack.targets[row, columns][:-1], ids[1:])
            weights = np.full(size, PROMPT_WEIGHT, np.float32)
            weights[prompt - 1 :], weights[-1] = 1.0, 0.0  # nothing follows the stop token
            np.testing.assert_array_equal(pack.weights[row, columns], weights)
            labels = np.full(size, len(TASK_NAMES))
            labels[prompt - 1 : -1] = TASK_NAMES.index(task)
            np.testing.assert_array_equal(pack.tasks[row, columns], labels)
            covered[[p is pack for p in batch].index(True)][row, columns] = True
        for pack, full in zip(batch, covered, strict=True):
            assert np.array_equal(full, pack.segments > 0)
            assert not pack.weights[~full].any()
            assert (pack.tasks[~full] == len(TASK_NAMES)).all()
    assert len(tasks) >= 6


def test_little_room_is_wasted_and_no_task_is_crowded_out(encoder):
    kept, drawn, full = Counter(), Counter(), []
    size = pretrain.SIZES["small"]
    for step in range(8):
        batch = make_batch(encoder, 5, step, size.packs)
        full.append(sum((pack.segments > 0).sum() for pack in batch) / size.tokens)
        known = drawn_examples(encoder, 5, step)
        used = 0
        for ids, (_, task) in known.items():  # in the order they were drawn
            if used < 0.97 * size.tokens:
                used += len(ids)
                drawn[task] += 1
        for pack, row, columns in placed(batch):
            kept[known[tuple(pack.tokens[row, columns].tolist())][1]] += 1
    assert np.mean(full) > 0.85
    assert kept.total() > 0.85 * drawn.total()
    assert all(kept[task] > 0.6 * drawn[task] for task in drawn), (kept, drawn)


def test_long_examples_go_to_long_rows_and_too_long_ones_nowhere(encoder):
    longest = [0, 0]
    for step in range(12):
        for index, pack in enumerate(make_batch(encoder, 0, step, PACKS)):
            sizes = [c.stop - c.start for _, _, c in placed([pack])]
            longest[index] = max(longest[index], *sizes)
    assert 192 < longest[0] <= 384
    assert 150 < longest[1] <= 192


# --- loss


def test_the_loss_of_packed_rows_is_that_of_the_examples_one_by_one(encoder):
    cfg = ModelConfig.from_hf(pretrain.hf_config(TINY))
    params = init_params(cfg, jax.random.key(0))
    params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, params)  # far from uniform
    batch = make_batch(encoder, 0, 2, PACKS)
    loss = jax.jit(pretrain.loss, static_argnums=2)
    value, per_task = loss(params, tuple(pack.arrays() for pack in batch), cfg)

    @jax.jit
    def losses(tokens):
        """Cross-entropy of every next token of one example that has the row to itself."""
        alone = jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
        logits = unembed(cfg, params, forward(cfg, params, tokens, *alone))
        chosen = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits[:, :-1], axis=-1) - chosen

    drawn = drawn_examples(encoder, 0, 2)
    total = weight = 0.0
    replies = {name: [] for name in TASK_NAMES}
    for pack, row, columns in placed(batch):
        ids = pack.tokens[row, columns]
        prompt, task = drawn[tuple(ids.tolist())]
        padded = np.zeros((1, 384), np.int32)  # attention is causal: what follows does not matter
        padded[0, : len(ids)] = ids
        each = np.asarray(losses(padded))[0, : len(ids) - 1]
        total += PROMPT_WEIGHT * each[: prompt - 1].sum() + each[prompt - 1 :].sum()
        weight += PROMPT_WEIGHT * (prompt - 1) + len(ids) - prompt
        replies[task] += each[prompt - 1 :].tolist()
    np.testing.assert_allclose(value, total / weight, rtol=2e-5)
    assert sum(bool(values) for values in replies.values()) >= 4
    for name, got in zip(TASK_NAMES, np.asarray(per_task), strict=True):
        if replies[name]:
            np.testing.assert_allclose(got, np.mean(replies[name]), rtol=2e-4)
        else:
            assert np.isnan(got)


# --- phases


@pytest.fixture(scope="module")
def started():
    """A run of 360 steps that has not begun."""
    return pretrain.State(TINY, 360, 1)


def phases_of(started, glossary_loss):
    """The phase of every step for these glossary losses, and the first main step on record."""
    state, steps = copy.copy(started), 360
    drawn = [state.phase(0)]
    while len(drawn) < steps:
        drawn.append(state.phase(state.step + 1))  # the next batch is drawn before the update
        losses = np.full(len(TASK_NAMES) + 1, 0.5)
        losses[GLOSSARY] = glossary_loss(state.step)
        state.step += 1
        state.note(losses)
    return drawn, state.main_from


@pytest.mark.parametrize(
    ("glossary_loss", "early"),
    [
        (lambda step: 0.5 if step < 60 else 0.0, (80, 100)),  # the running mean comes after
        (lambda step: 0.05 if step % 2 else 0.5, (180, 180)),  # single low losses do not count
        (lambda step: np.nan if step < 50 else 0.0, (51, 53)),  # no glossary in a batch
    ],
)
def test_the_early_mixture_lasts_until_look_up_has_emerged(started, glossary_loss, early):
    phases, count = phases_of(started, glossary_loss)  # what a resumed run goes by
    assert phases == ["early"] * count + ["main"] * (360 - count)
    assert early[0] <= count <= early[1]


# --- training


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run that nothing interrupted, and its state."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain.prepare(TINY, out)
    return out, pretrain.run(TINY, out, 1, save_every=100)


def assert_same_run(out, state, whole):
    assert state.step == whole[1].step == TINY.steps
    assert state.main_from == whole[1].main_from
    np.testing.assert_array_equal(state.mean, whole[1].mean)
    for a, b in zip(
        jax.tree.leaves((state.params, state.state)),
        jax.tree.leaves((whole[1].params, whole[1].state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert (out / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


class Killed(BaseException):
    """Nothing catches this: what is left of the run is what is on the disk."""


def test_a_run_that_stopped_at_a_checkpoint_goes_on_bit_for_bit(whole, tmp_path, capsys):
    pretrain.prepare(TINY, tmp_path)
    pretrain.run(TINY, tmp_path, 1, stop=5)
    assert json.loads((tmp_path / "card.json").read_text())["step"] == 5
    state = pretrain.run(TINY, tmp_path, 1, save_every=100)
    assert "resuming from step 5" in capsys.readouterr().out
    assert_same_run(tmp_path, state, whole)


def test_a_run_killed_between_checkpoints_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, capsys):
    pretrain.prepare(TINY, tmp_path)
    update = pretrain.State.update

    def dying(state, batch):
        if state.step == 7:
            raise Killed
        return update(state, batch)

    monkeypatch.setattr(pretrain.State, "update", dying)
    with pytest.raises(Killed):
        pretrain.run(TINY, tmp_path, 1, save_every=3)
    monkeypatch.undo()
    state = pretrain.run(TINY, tmp_path, 1, save_every=3)
    assert "resuming from step 6" in capsys.readouterr().out
    assert_same_run(tmp_path, state, whole)


def test_a_run_killed_while_it_saved_goes_on_from_the_checkpoint_before(
    whole, tmp_path, monkeypatch, capsys
):
    pretrain.prepare(TINY, tmp_path)
    savez = np.savez

    def half(path, **data):
        if data["step"] < 8:
            return savez(path, **data)
        path.write_bytes(b"PK half a file")
        raise Killed

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(Killed):
        pretrain.run(TINY, tmp_path, 1, save_every=4)
    monkeypatch.undo()
    state = pretrain.run(TINY, tmp_path, 1, save_every=4)
    assert "resuming from step 4" in capsys.readouterr().out
    assert_same_run(tmp_path, state, whole)


def test_pretraining_lowers_the_loss(whole, started):
    def held_out(params):
        values = []
        for step in range(100, 103):
            batch = make_batch(vocabulary.Encoder(whole[0]), 9, step, PACKS)
            packs = tuple(pack.arrays() for pack in batch)
            values.append(float(loss(params, packs, whole[1].cfg)[0]))
        return np.mean(values)

    loss = jax.jit(pretrain.loss, static_argnums=2)
    assert held_out(whole[1].params) < held_out(started.params) - 0.3


def test_the_seed_decides_where_training_starts(started):
    again, other = (pretrain.State(TINY, 12, seed).params["embed"] for seed in (1, 2))
    np.testing.assert_array_equal(started.params["embed"], again)
    assert (other != again).any()


@pytest.mark.parametrize(
    "change", [{"size": dataclasses.replace(TINY, hidden=32)}, {"steps": 13}, {"seed": 2}]
)
def test_a_checkpoint_of_another_run_is_refused(whole, change):
    state = pretrain.State(**{"size": TINY, "steps": 12, "seed": 1} | change)
    with pytest.raises(UserError, match="belongs to another run .* Choose another --out"):
        state.restore(whole[0] / "state.npz")


def test_the_model_directory_is_complete_and_holds_the_trained_weights_in_bf16(whole):
    out, state = whole
    card = json.loads((out / "card.json").read_text())
    assert card["run"] == json.loads(state.identity)
    assert card["run"]["seed"] == 1
    assert (card["step"], card["tokens"]) == (12, 12 * (384 + 3 * 192))
    assert card["main_from"] == TINY.steps // 2  # so both phases have been trained
    assert set(card["loss"]) == set(TASKS)
    assert set(card["made_with"]) == {"commit", "jax", "device", "cores"}
    assert card["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    cfg = ModelConfig.from_directory(out)
    assert cfg.family == "qwen3"
    params = load_params(out, cfg, mesh=make_mesh(1, 1, jax.devices()[:1]), dtype=jnp.float32)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state.params)
    assert jax.tree.structure(params) == jax.tree.structure(rounded)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", pretrain.SIZES)
def test_every_size_of_the_family_is_a_small_qwen3(name):
    size = pretrain.SIZES[name]
    cfg = ModelConfig.from_hf(pretrain.hf_config(size))
    shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert 3e5 < count < 4e6
    assert cfg.head_dim * size.heads == size.hidden
    assert size.heads % size.kv_heads == 0
    # Rows have room for every kind of example, transcripts included.
    assert max(length for _, length in size.packs) >= 512
    assert size.tokens == sum(rows * length for rows, length in size.packs)


# --- command line


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, words)])
    pretrain.main()


def test_pretrain_says_which_sizes_there_are(monkeypatch, tmp_path):
    message = "--size=huge does not exist; choose one of tiny, small, medium"
    with pytest.raises(UserError, match=re.escape(message)):
        call(monkeypatch, "--size=huge", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_the_command_trains_a_size_and_goes_on(whole, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(pretrain.SIZES, "minute", TINY)
    for _ in range(2):
        call(monkeypatch, "--size=minute", f"--out={tmp_path}", "--seed=1")
    said = capsys.readouterr().out
    assert "step 12/12" in said
    assert "resuming from step 12" in said
    assert (tmp_path / "model.safetensors").read_bytes() == (
        whole[0] / "model.safetensors"
    ).read_bytes()
