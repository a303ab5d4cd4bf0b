"""Weights of response tokens: each aggregation's formula, and the released code's micro-batches."""

import numpy as np
import pytest
from test_packing import make_samples

from oel_jax.distill.aggregation import released_groups, sample_weights


def test_weights_are_those_of_the_formulas():
    samples = make_samples()
    lengths = np.array([len(s.response) for s in samples])
    kl = [np.random.default_rng(i).random(n) for i, n in enumerate(lengths)]

    def total(name, gpus=0):
        weights = sample_weights(samples, name, gpus)
        return sum(w * values.sum() for w, values in zip(weights, kl, strict=True))

    assert np.isclose(total("token_mean"), np.concatenate(kl).mean())
    assert np.isclose(total("seq_mean"), np.mean([values.mean() for values in kl]))
    groups = released_groups([len(s.prompt) + len(s.response) for s in samples], 5)
    assert len(groups) == 5  # 40 short samples: a micro-batch for each GPU
    by_group = [np.concatenate([kl[i] for i in group]).mean() for group in groups]
    assert np.isclose(total("micro_token_mean", 5), np.mean(by_group))
    names = ("token_mean", "seq_mean", "micro_token_mean")
    assert len({total(n, 5).round(9) for n in names}) == 3
    with pytest.raises(ValueError, match=r"config\.loss\.aggregation"):
        sample_weights(samples, "mean")


def test_groups_are_those_of_the_released_code():
    """Each GPU's six samples in as many micro-batches as the fuller GPU needs: 27,800 / 10,000."""
    lengths = [3000, 2500, 9000, 4100, 700, 700, 5200, 6100, 8000, 300, 4100, 4100]
    groups = released_groups(lengths, 2, 10_000)
    # By the released function itself, for 3 micro-batches of each half.
    assert groups == [[2], [3, 4, 5], [0, 1], [7, 10], [6, 11], [8, 9]]
    assert released_groups(lengths, 2, 20_000) == [[0, 1, 3, 4], [2, 5], [7, 10, 11], [6, 8, 9]]


@pytest.mark.parametrize("count, gpus", [(1, 1), (3, 16), (16, 16), (250, 16), (41, 4)])
@pytest.mark.parametrize("longest", [2, 400, 20_000])
def test_groups_hold_every_sample_once(count, gpus, longest):
    lengths = np.random.default_rng(count).integers(1, longest, count).tolist()
    groups = released_groups(lengths, gpus)
    assert sorted(index for group in groups for index in group) == list(range(count))
    parts = np.array_split(np.arange(count), gpus)  # a group never crosses GPUs
    owner = {int(index): gpu for gpu, part in enumerate(parts) for index in part}
    assert all(len({owner[index] for index in group}) == 1 for group in groups)
    needed = max(-(-sum(lengths[i] for i in part) // 20_480) for part in parts)
    each = [sum(owner[group[0]] == gpu for group in groups) for gpu in range(gpus)]
    assert each == [min(needed, len(part)) for part in parts]
