"""What a model directory states twice: each contradiction is refused before weights are read."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_model
from safetensors.numpy import load_file, save_file
from tiny_run import tiny_config

from oel_jax import load_model
from oel_jax.base.errors import UserError
from oel_jax.models import bundled
from oel_jax.models.agreement import fitting_tokenizer
from oel_jax.models.config import ModelConfig
from oel_jax.models.huggingface import copy_model, load_params
from oel_jax.models.weight_files import all_finite, open_weights
from oel_jax.parallel.mesh import make_mesh
from oel_jax.runs.policies import check_model

WEIGHTS = "model.safetensors"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A copy of the bundled tiny model."""
    return Path(shutil.copytree(bundled.model_dir("tiny"), tmp_path / "model"))


def edit(directory: Path, file: str = "config.json", **fields) -> None:
    path = directory / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | fields))


def rewrite(directory: Path, change) -> None:
    values = load_file(directory / WEIGHTS)
    change(values)
    save_file(values, directory / WEIGHTS, metadata={"format": "pt"})


def check(directory: Path) -> None:
    check_model(tiny_config(), directory, make_mesh(1, 1, jax.devices()[:1]))


def no_values(directory: Path) -> None:
    """Keep the header of the weights and make its data unreadable: a sparse file of that size."""
    file = directory / WEIGHTS
    size, raw = file.stat().st_size, file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    with file.open("wb") as out:
        out.write(raw[:end])
        out.truncate(size)


# --- config.json and weights ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocab_size": 400}, r"vocab_size is 400, model.embed_tokens.weight has 304 rows"),
        ({"hidden_size": 32}, r"hidden_size is 32, model.norm.weight has 64 rows"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers is 3, the weights have 2 layers"),
        ({"num_hidden_layers": 1}, r"num_hidden_layers is 1, the weights have 2 layers"),
        ({"num_attention_heads": 8}, r"attention_heads \(8\) x head_dim \(24\) is 192, .* 96 rows"),
        ({"num_key_value_heads": 4}, r"value_heads \(4\) x head_dim \(24\) is 96, .* has 48 rows"),
        ({"head_dim": 16}, r"head_dim is 16, model.layers.0.self_attn.q_norm.weight has 24 rows"),
        ({"intermediate_size": 128}, r"intermediate_size is 128, .*gate_proj.weight has 96 rows"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false, but there is no lm_head"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_and_tensors(fields, said, tmp_path):
    directory = write_model(tmp_path / "m", "qwen3", tied=True)
    config = json.loads((directory / "config.json").read_text())
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config | fields))
    no_values(directory)
    cfg = ModelConfig.from_directory(directory)
    with pytest.raises(UserError, match=said) as caught:
        open_weights(directory, cfg)
    assert str(directory) in str(caught.value) and "one model" in str(caught.value)


def test_check_model_reads_headers_only(tiny):
    check(tiny)
    no_values(tiny)
    check(tiny)
    edit(tiny, num_hidden_layers=7, layer_types=None)
    with pytest.raises(UserError, match="num_hidden_layers is 7, the weights have"):
        check(tiny)


def test_layer_types_count_layers(tiny):
    edit(tiny, layer_types=["full_attention"] * 9)
    with pytest.raises(UserError, match="layer_types lists 9 layers"):
        check(tiny)


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("several", [False, True])
def test_ids_of_both_config_files_have_rows(file, field, several, tiny):
    rows = ModelConfig.from_directory(tiny).vocab_size
    stop = fitting_tokenizer(tiny, ModelConfig.from_directory(tiny)).stop_ids[0]
    edit(tiny, file, **{field: [stop, rows] if several else rows})
    with pytest.raises(UserError, match=rf"{file}: {field} is {rows}, .* below {rows}"):
        check(tiny)
    with pytest.raises(UserError, match=field):
        load_model(tiny)


def test_no_padding_token_is_minus_one(tiny):
    edit(tiny, "generation_config.json", pad_token_id=-1)
    edit(tiny, pad_token_id=-1)
    check(tiny)


def test_stop_ids_of_the_generation_config_win(tiny):
    transformers = pytest.importorskip("transformers")
    cfg = ModelConfig.from_directory(tiny)
    edit(tiny, "generation_config.json", eos_token_id=[5, 3])
    edit(tiny, eos_token_id=7)
    theirs = transformers.GenerationConfig.from_pretrained(tiny).eos_token_id
    assert list(fitting_tokenizer(tiny, cfg).stop_ids) == theirs == [5, 3]


def grow(directory: Path, rows: int) -> int:
    """Give the embedding more or fewer rows, as resizing does; returns what it had."""
    old = ModelConfig.from_directory(directory).vocab_size

    def change(values):
        table = values[EMBED]
        values[EMBED] = np.resize(table, (rows, table.shape[1])).copy()

    rewrite(directory, change)
    edit(directory, vocab_size=rows)
    return old


def test_fewer_rows_than_tokens(tiny):
    old = grow(tiny, 300)
    said = f"ids up to {old - 1}, but vocab_size .* only 300 rows; text can contain the token 300"
    with pytest.raises(UserError, match=said):
        check(tiny)
    with pytest.raises(UserError, match=said):
        _ = load_model(tiny).tokenizer


def test_padding_rows_are_fine_but_no_stop(tiny):
    old = grow(tiny, 1024)
    check(tiny)
    assert load_model(tiny).vocab_limit == old
    edit(tiny, "generation_config.json", eos_token_id=old + 1)
    with pytest.raises(UserError, match=f"stop id {old + 1} .* no token .* below {old}"):
        check(tiny)


@pytest.fixture
def with_qwen3(qwen3_tokenizer_dir, tmp_path):
    """Makes a directory with Qwen3's tokenizer and an embedding of so many rows."""

    def make(rows: int, **template) -> Path:
        shutil.copytree(qwen3_tokenizer_dir, tmp_path / "m")
        config = json.loads((bundled.model_dir("tiny") / "config.json").read_text())
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            config.pop(name, None)
        config |= {"vocab_size": rows, "eos_token_id": min(151_645, rows - 1)}
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        edit(tmp_path / "m", "tokenizer_config.json", **template)
        return tmp_path / "m"

    return make


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (151_936, None),  # as published
        (151_669, None),  # a row for each token
        (151_668, None),  # </think> lacks one; the template below does not use it
        (151_644, "the chat template contains the token 151644 .*im_start"),
        (151_000, "text can contain the token 151000"),
    ],
)
def test_control_tokens_need_rows_only_where_they_are_used(rows, said, with_qwen3):
    template = "<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n"
    directory = with_qwen3(rows, chat_template=template)
    cfg = ModelConfig.from_directory(directory)
    if said is None:
        assert fitting_tokenizer(directory, cfg).vocab_size == 151_669
        return
    with pytest.raises(UserError, match=said):
        fitting_tokenizer(directory, cfg)


# --- tied tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [EMBED, HEAD])
def test_one_of_two_tied_tensors_is_enough(kept, tmp_path):
    plain = write_model(tmp_path / "plain", "qwen3", tied=True)
    directory = Path(shutil.copytree(plain, tmp_path / "m"))
    rewrite(directory, lambda values: values.update({kept: values.pop(EMBED)}))
    expected, found = load_model(plain), load_model(directory)
    assert jax.tree.all(jax.tree.map(np.array_equal, expected.params, found.params))
    copy_model(tmp_path / "cast", source=directory, dtype="float32")
    copy_model(tmp_path / "copy", source=directory)
    for made in ("cast", "copy"):
        again = load_model(tmp_path / made).params
        assert jax.tree.all(jax.tree.map(np.array_equal, expected.params, again))
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.arange(8)[None]).logits.numpy()
    np.testing.assert_allclose(found.logits([list(range(8))]), logits, atol=2e-5)


def test_neither_is_not_enough(tmp_path):
    directory = write_model(tmp_path / "m", "qwen3", tied=True)
    rewrite(directory, lambda values: values.pop(EMBED))
    with pytest.raises(UserError, match="1 missing: model.embed_tokens.weight"):
        load_model(directory)


# --- damaged values -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16], ids=str)
def test_all_finite_by_bits(dtype):
    """Every bit pattern of the 16-bit types; for float32 the limits; any place in any size."""
    dtype = np.dtype(dtype)
    if dtype.itemsize == 2:
        every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    else:
        bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, np.uint32)
        limits = [0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF]
        limits = np.array([*limits, *(x | 1 << 31 for x in limits)], np.uint32)
        every = np.concatenate([bits, limits]).view(dtype)
    finite = np.isfinite(every.astype(np.float32))
    assert 0 < finite.sum() < finite.size
    for value, right in zip(
        every[:: 1 if dtype.itemsize == 4 else 37],
        finite[:: 1 if dtype.itemsize == 4 else 37],
        strict=True,
    ):
        assert all_finite(np.array([[value]])) == right
    assert all_finite(every[finite])
    assert all_finite(np.zeros((0, 3), dtype)) and all_finite(np.zeros((), dtype))
    for size in (1, 7, 1 << 15, (1 << 15) + 1, 100_000):
        for place in {0, size // 2, size - 1}:
            values = np.ones(size, dtype)
            values[place] = np.nan
            assert not all_finite(values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", [EMBED, "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_damaged_weights_are_named(value, name, dtype, tmp_path):
    directory = write_model(tmp_path / "m", "qwen3", tied=True, dtype=dtype)
    rewrite(directory, lambda values: values[name].reshape(-1).__setitem__(-1, value))
    for into in ("float32", "bfloat16"):
        with pytest.raises(UserError, match=rf"{WEIGHTS}: {name} has NaN or infinite values \(1 "):
            load_model(directory, dtype=into)
    load_model(directory, check_weights=False)
    cfg, mesh = ModelConfig.from_directory(directory), make_mesh(2, 2, jax.devices()[:4])
    with pytest.raises(UserError, match=name):  # also in the part of another device
        load_params(directory, cfg, mesh=mesh, dtype=jnp.float32)


def test_values_too_large_for_the_dtype_are_named(tmp_path):
    directory = write_model(tmp_path / "m", "qwen3", tied=True)
    rewrite(directory, lambda values: values[EMBED].reshape(-1).__setitem__(3, 1e6))
    load_model(directory, dtype="bfloat16")
    with pytest.raises(UserError, match=f"{EMBED} has values too large for float16"):
        load_model(directory, dtype="float16")


# --- in a notebook --------------------------------------------------------------------------------


def test_a_model_prints_as_two_lines():
    model = load_model("nano:tiny")
    shown = repr(model)
    assert len(shown.splitlines()) == 2 and len(shown) < 400
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    for part in ("qwen3", f"{count:,} parameters", "float32", "1 cpu device", str(model.directory)):
        assert part in shown
