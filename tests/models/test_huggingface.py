"""Weights in and out of Hugging Face directories: values, bits, memory, and every refusal."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_model

from oel_jax.base.errors import UserError
from oel_jax.models import safetensors_io
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import abstract_params, param_shardings
from oel_jax.models.huggingface import load_params, resolve, save_model
from oel_jax.models.weight_table import Layout, weights
from oel_jax.parallel.mesh import make_mesh

KINDS = ("qwen3_tied", "qwen3_untied", "qwen2", "llama3")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, jax.devices()[:1])


def load(directory, mesh, dtype=jnp.float32):
    cfg = ModelConfig.from_directory(directory)
    return cfg, load_params(directory, cfg, mesh=mesh, dtype=dtype)


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors by the reference reader."""
    from safetensors import safe_open

    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "numpy") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}
    return found


def rewrite(directory: Path, change) -> None:
    """Applies `change` to the dict of tensors and writes one file again (reference writer)."""
    from safetensors.numpy import save_file

    values = tensors(directory)
    change(values)
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def torch_logits(directory: Path):
    torch = pytest.importorskip("torch")
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report  # no tensor made up or left over
    with torch.no_grad():
        return model.eval()(torch.arange(48)[None] % 304).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_are_the_tensors_of_the_file(kind, tiny_models, mesh):
    cfg, params = load(tiny_models[kind], mesh)
    abstract = abstract_params(cfg)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    theirs = tensors(tiny_models[kind])
    ours = jax.tree.map(np.asarray, params)
    x = np.random.default_rng(0).normal(size=(5, cfg.hidden_size)).astype(np.float32)
    for i in range(cfg.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], ours["layers"])
        prefix = f"model.layers.{i}."
        attention = prefix + "self_attn."
        for name in ("q", "k", "v"):  # what nn.Linear computes, heads split off afterwards
            y = (x @ theirs[f"{attention}{name}_proj.weight"].T).reshape(5, -1, cfg.head_dim)
            np.testing.assert_allclose(
                np.einsum("td,dnh->tnh", x, layer[name]), y, rtol=1e-5, atol=1e-5
            )
            if cfg.attention_bias:
                bias = theirs[f"{attention}{name}_proj.bias"].reshape(-1, cfg.head_dim)
                assert same_bits(layer[f"{name}_bias"], bias)
        heads = np.random.default_rng(1).normal(size=(5, cfg.num_heads, cfg.head_dim))
        np.testing.assert_allclose(
            np.einsum("tnh,nhd->td", heads, layer["o"]),
            heads.reshape(5, -1) @ theirs[attention + "o_proj.weight"].T,
            rtol=1e-5,
            atol=1e-5,
        )
        for name in ("gate", "up", "down"):
            assert same_bits(layer[name], theirs[f"{prefix}mlp.{name}_proj.weight"].T)
        assert same_bits(layer["attn_norm"], theirs[prefix + "input_layernorm.weight"])
        assert same_bits(layer["mlp_norm"], theirs[prefix + "post_attention_layernorm.weight"])
        if cfg.qk_norm:
            assert same_bits(layer["q_norm"], theirs[attention + "q_norm.weight"])
            assert same_bits(layer["k_norm"], theirs[attention + "k_norm.weight"])
    assert same_bits(ours["embed"], theirs["model.embed_tokens.weight"])
    assert same_bits(ours["final_norm"], theirs["model.norm.weight"])
    assert ("lm_head" in ours) == (kind != "qwen3_tied")
    if "lm_head" in ours:
        assert same_bits(ours["lm_head"], theirs["lm_head.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_transformers_equal_logits(kind, tiny_models, mesh, tmp_path):
    cfg, params = load(tiny_models[kind], mesh)
    save_model(tmp_path / "out", cfg, params, source=tiny_models[kind], dtype=jnp.float32)
    np.testing.assert_array_equal(torch_logits(tmp_path / "out"), torch_logits(tiny_models[kind]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 60_000])
def test_round_trip_is_bitwise(dtype, shard_bytes, mesh, tmp_path):
    shards = 1 if shard_bytes > 1e6 else 3
    source = write_model(tmp_path / "source", "qwen3", dtype=dtype, shards=shards)
    assert (source / "model.safetensors.index.json").exists() == (shard_bytes < 1e6)
    # Through float32 masters and through the dtype itself: both are exact.
    for i, middle in enumerate((jnp.float32, jnp.dtype(dtype))):
        cfg, params = load(source, mesh, middle)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(middle)}
        out = tmp_path / f"out{i}"
        save_model(out, cfg, params, source=source, dtype=dtype, shard_bytes=shard_bytes)
        before, after = tensors(source), tensors(out)
        assert before.keys() == after.keys()
        assert all(same_bits(before[name], after[name]) for name in before)
        _, again = load(out, mesh, middle)
        assert jax.tree.all(jax.tree.map(same_bits, params, again))
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
        files = sorted(out.glob("*.safetensors"))
        if shard_bytes < 1e6:
            placed = json.loads((out / "model.safetensors.index.json").read_text())
            assert set(placed["weight_map"].values()) == {file.name for file in files}
            assert placed["metadata"]["total_size"] == sum(v.nbytes for v in before.values())
            assert len(files) > 2
        else:
            assert [file.name for file in files] == ["model.safetensors"]


def test_lower_precision_rounds_to_nearest_even(tiny_models, mesh):
    cfg, wide = load(tiny_models["qwen2"], mesh)
    _, narrow = load(tiny_models["qwen2"], mesh, jnp.bfloat16)
    # XLA's and torch's cast; truncation would differ in half of the values
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    assert jax.tree.all(jax.tree.map(same_bits, narrow, expected))


@pytest.mark.parametrize(("fsdp", "tp"), [(4, 2), (1, 2)])
def test_sharded_loading_places_the_same_values(fsdp, tp, tiny_models, mesh, tmp_path):
    source = tiny_models["qwen2"]
    cfg, plain = load(source, mesh)
    grid = make_mesh(fsdp, tp, jax.devices()[: fsdp * tp])
    params = load_params(source, cfg, mesh=grid, dtype=jnp.float32)
    assert jax.tree.all(jax.tree.map(same_bits, plain, params))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    assert shardings == param_shardings(cfg, grid)
    shard = params["layers"]["gate"].addressable_shards[0]
    assert shard.data.shape == (2, 64 // fsdp, 96 // tp)
    save_model(tmp_path / "out", cfg, params, source=source, dtype=jnp.float32)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert all(same_bits(before[name], after[name]) for name in before)


def test_loading_never_holds_the_model_twice(tmp_path):
    """Peak memory of a fresh process: the parameters and a leaf or so, not a second model."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system has not")
    config = dict(
        model_type="qwen3",
        vocab_size=2048,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        max_position_embeddings=512,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = ModelConfig.from_hf(config)
    shapes = {}
    for weight in weights(cfg):
        layout = Layout(weight, cfg)
        shapes |= dict.fromkeys(layout.names(weight), layout.theirs)
    safetensors_io.write(
        tmp_path / "model.safetensors",
        list(shapes.items()),
        np.dtype(np.float32),
        lambda name: np.ones(shapes[name], np.float32),
    )
    script = r"""
        import re, sys
        from pathlib import Path
        import jax, jax.numpy as jnp
        from oel_jax.models.config import ModelConfig
        from oel_jax.models.huggingface import load_params
        from oel_jax.parallel.mesh import make_mesh
        def peak():  # not getrusage, which inherits the peak of the parent process
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])
        directory = Path(sys.argv[1])
        mesh = make_mesh(1, 1, jax.devices()[:1])
        cfg = ModelConfig.from_directory(directory)
        before = peak()
        params = load_params(directory, cfg, mesh=mesh, dtype=jnp.float32)
        jax.block_until_ready(params)
        leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
        print(peak() - before, sum(leaves), max(leaves))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    extra, model, largest = map(int, done.stdout.split())
    assert model > 100e6
    assert 0.9 * model < extra < model + largest + 64e6 < 1.6 * model


def test_missing_unexpected_and_misshaped_tensors_in_one_message(tiny_models, mesh, tmp_path):
    directory = copy(tiny_models["qwen3_untied"], tmp_path / "m")

    def spoil(values):
        del values["model.layers.1.mlp.up_proj.weight"]
        del values["lm_head.weight"]
        values["model.layers.7.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
        values["model.norm.weight"] = np.zeros(65, np.float32)
        values["model.layers.0.self_attn.q_norm.weight"] = np.zeros(24, np.int8)

    rewrite(directory, spoil)
    with pytest.raises(UserError) as caught:
        load(directory, mesh)
    message = str(caught.value)
    assert str(directory) in message
    assert "2 missing: model.layers.1.mlp.up_proj.weight, lm_head.weight" in message
    assert "1 unexpected: model.layers.7.mlp.up_proj.weight" in message
    assert "1 of the wrong shape: model.norm.weight [65] instead of [64]" in message
    assert "model.layers.0.self_attn.q_norm.weight I8" in message
    assert "tie_word_embeddings" in message


def test_computed_buffers_and_a_tied_head_are_ignored(tiny_models, mesh, tmp_path):
    directory = copy(tiny_models["qwen3_tied"], tmp_path / "m")

    def add(values):
        values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(12, np.float32)
        values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()

    rewrite(directory, add)
    _, params = load(directory, mesh)
    _, plain = load(tiny_models["qwen3_tied"], mesh)
    assert jax.tree.all(jax.tree.map(same_bits, plain, params))


def test_a_tied_model_with_another_head_is_refused(tiny_models, mesh, tmp_path):
    directory = copy(tiny_models["qwen3_untied"], tmp_path / "m")
    edit_json(directory / "config.json", tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load(directory, mesh)


@pytest.fixture
def sharded(tiny_models, mesh, tmp_path) -> Path:
    cfg, params = load(tiny_models["llama3"], mesh)
    source = tiny_models["llama3"]
    save_model(tmp_path / "s", cfg, params, source=source, dtype="float32", shard_bytes=90_000)
    return tmp_path / "s"


def test_missing_shard(sharded, mesh):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}.*missing"):
        load(sharded, mesh)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file(keep, sharded, mesh):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{shard.name} .*truncated"):
        load(sharded, mesh)


def test_damaged_header(sharded, mesh):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[8:20] = b"x" * 12
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"{shard.name} has a damaged safetensors header"):
        load(sharded, mesh)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors"])
def test_a_shard_outside_the_directory_is_refused(name, sharded, mesh):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the model directory"):
        load(sharded, mesh)


def test_directories_without_weights(tiny_models, mesh, tmp_path):
    shutil.copy(tiny_models["qwen2"] / "config.json", tmp_path)
    with pytest.raises(UserError, match="neither model.safetensors nor model.safetensors.index"):
        load(tmp_path, mesh)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin is not read"):
        load(tmp_path, mesh)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        load(tmp_path, mesh)


def test_export_carries_files_and_changes_only_the_dtype(tiny_models, mesh, tmp_path):
    source = copy(tiny_models["qwen2"], tmp_path / "source")
    carried = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt")
    for name in (*carried, "optimizer.pt", "README.md"):
        (source / name).write_text(f"content of {name}")
    cfg, params = load(source, mesh)
    save_model(tmp_path / "new", cfg, params, source=source, dtype=jnp.bfloat16)
    for name in (*carried, "generation_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert names == {*carried, "generation_config.json", "config.json", "model.safetensors"}
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "new" / "config.json").read_text())
    assert after == before | {"dtype": "bfloat16"}
    # and in the older spelling
    old = {k: v for k, v in before.items() if k not in ("dtype", "rope_parameters")}
    old |= {"torch_dtype": "float32", "rope_theta": before["rope_parameters"]["rope_theta"]}
    (source / "config.json").write_text(json.dumps(old))
    assert ModelConfig.from_directory(source) == cfg
    save_model(tmp_path / "old", cfg, params, source=source, dtype=jnp.bfloat16)
    after = json.loads((tmp_path / "old" / "config.json").read_text())
    assert after == old | {"torch_dtype": "bfloat16"}


def test_export_is_complete_or_absent(tiny_models, mesh, tmp_path):
    source = tiny_models["qwen2"]
    cfg, params = load(source, mesh)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="taken exists and is not empty"):
        save_model(taken, cfg, params, source=source, dtype="float32")
    with pytest.raises(UserError, match="not int8"):
        save_model(tmp_path / "a", cfg, params, source=source, dtype="int8")
    with pytest.raises(UserError, match="config.json"):
        save_model(tmp_path / "a", cfg, params, source=taken, dtype="float32")
    wrong = params | {"final_norm": jnp.zeros(3)}
    with pytest.raises(ValueError, match="final_norm"):
        save_model(tmp_path / "a", cfg, wrong, source=source, dtype="float32")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_model(tmp_path / "file" / "a", cfg, params, source=source, dtype="float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]
    (tmp_path / ".a.partial").mkdir()  # left by a killed run
    (tmp_path / "a").mkdir()  # empty: may be used
    save_model(tmp_path / "a", cfg, params, source=source, dtype="float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "taken"]


def test_reference_reader_accepts_our_files_and_the_reverse(tmp_path):
    values = {
        "matrix": np.arange(12, dtype=np.float32).reshape(3, 4).astype(jnp.bfloat16),
        "empty": np.zeros((0, 4), jnp.bfloat16),
        "scalar": np.asarray(3, jnp.bfloat16),
    }
    shapes = [(name, value.shape) for name, value in values.items()]
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    safetensors_io.write(ours, shapes, np.dtype(jnp.bfloat16), values.__getitem__)
    from safetensors.numpy import load_file, save_file

    read = load_file(ours)
    assert read.keys() == values.keys()
    assert all(same_bits(read[name], values[name]) for name in values)
    save_file(values, theirs)
    file = safetensors_io.SafetensorsFile(theirs)
    assert all(same_bits(file.tensor(name), values[name]) for name in values)


def test_split_by_size():
    sizes = [("a", (3,)), ("b", (3,)), ("c", (9,)), ("d", (1,))]
    split = safetensors_io.split_by_size(sizes, 2, 12)
    assert [[name for name, _ in shard] for shard in split] == [["a", "b"], ["c"], ["d"]]


def test_resolve_local(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    for missing in (str(tmp_path / "absent"), "./absent", "absent", "a/b/c"):
        with pytest.raises(UserError, match="no model directory"):
            resolve(missing)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a file"):
        resolve(str(tmp_path / "config.json"))


def test_resolve_hub_from_the_cache_and_offline(tmp_path):
    """A cached snapshot is found without a network; an unknown id gets one clear message."""
    cache = tmp_path / "models--someone--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    write_model(snapshot, "qwen3")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    script = """
        from oel_jax.base.errors import UserError
        from oel_jax.models.huggingface import resolve
        print(resolve("someone/tiny"))
        try:
            resolve("someone/absent")
        except UserError as error:
            print(error)
    """
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    found, refused = done.stdout.splitlines()
    assert found == str(snapshot)
    assert refused.startswith("someone/absent is neither a local directory nor whole in the cache")
    assert "HF_HUB_OFFLINE" in refused


def test_a_bias_free_norm_free_family_ignores_nothing(mesh, tmp_path):
    """A qwen2 file under a llama config: its biases are unexpected, not silently dropped."""
    directory = write_model(tmp_path / "m", "qwen2")
    edit_json(directory / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match="6 unexpected: .*q_proj.bias"):
        load(directory, mesh)
