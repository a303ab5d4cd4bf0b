"""A model is loaded slice by slice: the host never holds it twice."""

from pathlib import Path

import pytest

from benchmarks.load import load_apart, write_model
from benchmarks.models import hf_config

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc, which only Linux has"
)

# Where a slip would show: large leaves, as many layers as a leaf may be split by.
WIDE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=32_768)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(directory, bytes) of 410 MB, in the proportions of a real model."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    size = write_model(directory, hf_config("qwen3_8b") | WIDE, shard_bytes=100_000_000)
    return directory, size


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_loading_takes_little_more_than_the_model(model, shape):
    directory, size = model
    assert 200e6 < size < 500e6
    found = load_apart(directory, *shape)
    assert found["samples"] > 20  # it was watched
    assert size <= found["arrays"] <= 1.05 * size
    # Virtual devices are host memory: less than the arrays would mean that nothing was counted.
    # 1.09 was seen, and 1.27 when a leaf was read for all devices before any was placed.
    assert 0.95 * size <= found["anonymous"] <= 1.2 * size
