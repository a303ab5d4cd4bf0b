"""Packing: every response token is there once, at the right place, with the right weight."""

import numpy as np
import pytest

from oel_jax.distill.packing import Sample, fill, plan


def make_samples(count=40, texts=3, seed=0):
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        prompt = draw.integers(1, 99, int(draw.integers(1, 60))).tolist()
        response = draw.integers(1, 99, int(draw.integers(1, 30))).tolist()
        suffix = draw.integers(1, 99, int(draw.integers(1, 60))).tolist()
        log_probs = draw.normal(size=len(response)).astype(np.float32)
        shared = int(draw.integers(0, 9))
        samples.append(
            Sample(prompt, suffix, shared, response, log_probs, int(draw.integers(texts)))
        )
    return samples


@pytest.mark.parametrize("budget", [64, 500, 4000])
@pytest.mark.parametrize("fsdp", [1, 4])
def test_every_token_is_packed_once(budget, fsdp):
    samples = make_samples()
    shape, batches = plan(samples, budget, fsdp)
    assert shape.rows % fsdp == 0
    assert shape.rows * shape.tokens <= budget or shape.rows == fsdp
    seen = [index for _, rows in batches for row in rows for index in row]
    assert sorted(seen) == list(range(len(samples)))
    weights = [float(index + 1) for index in range(len(samples))]
    found = {}
    for text, rows in batches:
        batch = fill(samples, weights, rows, shape)
        assert batch.student.tokens.shape == (shape.rows, shape.tokens)
        for r, c in zip(*np.nonzero(batch.mask), strict=True):
            index = int(batch.weight[r, c]) - 1
            sample = samples[index]
            assert sample.knowledge == text
            step = found.setdefault(index, 0)
            found[index] += 1
            assert batch.sampled[r, c] == sample.response[step]
            assert batch.log_prob[r, c] == sample.log_probs[step]
            for view, prompt, shared in (
                (batch.student, sample.prompt, 0),
                (batch.teacher, sample.suffix, sample.shared),
            ):
                column = view.predict[r, c]
                context = [*prompt, *sample.response[:step]]
                start = column - len(context) + 1
                assert view.tokens[r, start : column + 1].tolist() == context
                assert (
                    view.positions[r, start : column + 1] == shared + np.arange(len(context))
                ).all()
                assert len(set(view.segments[r, start : column + 1])) == 1
                assert view.segments[r, column] > 0
                assert (view.shared[r, start : column + 1] == shared).all()
                if start:
                    assert view.segments[r, start - 1] != view.segments[r, start]
    assert found == {index: len(s.response) for index, s in enumerate(samples)}
