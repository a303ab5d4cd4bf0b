"""LoRA: the adapter is what its formula says, and the base stays one set of frozen arrays."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_step import CFG, CONTEXTS, KL, close, make_model, make_samples, prompts, run
from tiers import meshes
from tiny_run import copy_of, go, interrupt_consolidation, opened, policy_of, tiny_config

from oel_jax.base.files import read_json
from oel_jax.config.rules import ADAPTABLE as CONFIG_ADAPTABLE
from oel_jax.distill.aggregation import sample_weights
from oel_jax.distill.lora import (
    Lora,
    abstract_adapter,
    adapted,
    adapter_shardings,
    fresh_adapter,
    merged,
    merged_layer,
    save_adapter,
)
from oel_jax.distill.optimizer import make_optimizer
from oel_jax.distill.packing import Sample, fill, plan
from oel_jax.distill.step import StepConfig, accumulate, zeros_like
from oel_jax.learner.student import begin, round_checkpoints
from oel_jax.learner.teacher import Teacher
from oel_jax.models import bundled
from oel_jax.models.decoder import ADAPTABLE, KeyValues, abstract_params
from oel_jax.models.huggingface import save_model
from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import make_mesh, put_batch
from oel_jax.runs.keys import generation_key
from oel_jax.runs.metrics import read_metrics
from oel_jax.runs.policies import policy_directory
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler

module = importlib.import_module("oel_jax.learner.consolidate")
__all__ = ["prompts"]  # a fixture of test_step

LORA = Lora(4, 12.0, tuple(ADAPTABLE))
KEY = np.array([7, 8], np.uint32)
ROWS = [[5, 6, 7, 8, 9, 100, 3], [9, 10, 11]]


def random_adapter(cfg, lora, mesh, seed=0):
    """An adapter in the middle of training: both factors far from zero."""
    draw = np.random.default_rng(seed)
    fresh = jax.device_get(fresh_adapter(cfg, lora, mesh, KEY))
    values = jax.tree.map(lambda x: 0.2 * draw.normal(size=x.shape).astype(np.float32), fresh)
    return jax.device_put(values, adapter_shardings(lora, mesh))


def with_adapter(model, adapter, lora):
    """The same model with an adapter beside its weights."""
    params = adapted(model.params, adapter, lora.scale, jnp.float32)
    return type(model)(model.directory, model.cfg, model.mesh, params)


def plain_merge(weight, a, b, scale):
    """W + alpha / r * B A as PEFT states it: W [out, in], A [r, in], B [out, r]; float64."""
    return weight.astype(np.float64) + scale * b.astype(np.float64) @ a.astype(np.float64)


# --- the adapter and the model --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_untied", "qwen2", "llama3"])
def test_adapter_equals_merged_weights_in_every_family(tiny_models, tmp_path, family):
    model = load_model(tiny_models[family])
    adapter = random_adapter(model.cfg, LORA, model.mesh)
    ours = with_adapter(model, adapter, LORA).logits(ROWS)
    policy = merged(model.params, adapter, LORA)
    save_model(tmp_path / "m", model.cfg, policy, source=model.directory, dtype=jnp.float32)
    expected = load_model(tmp_path / "m").logits(ROWS)
    before = model.logits(ROWS)
    assert np.abs(ours - expected)[0].max() <= 2e-5 * np.abs(expected).max()
    assert np.abs(before - expected)[0].max() > 0.1
    # The files, against the formula.
    save_adapter(tmp_path / "a", model.cfg, adapter, LORA, base="some/model")
    assert_merged(tmp_path / "m", model.directory, tmp_path / "a", LORA, np.float32)


def assert_merged(policy: Path, start: Path, adapter: Path, lora: Lora, dtype) -> None:
    """Every tensor of a policy is the start's, or start and adapter by PEFT's formula."""
    after, before = (load_file(d / "model.safetensors") for d in (policy, start))
    factors = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for name, value in after.items():
        expected = before[name].astype(np.float32)
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in factors:
            a, b = (factors.pop(f"{key}.lora_{side}.weight") for side in "AB")
            assert a.shape == (lora.rank, expected.shape[1])
            assert b.shape == (expected.shape[0], lora.rank)
            expected = plain_merge(expected, a, b, lora.scale)
            changed += 1
        # Half a unit of the last place, and what float32 sums lose against float64.
        step = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
        if dtype is not np.float32:
            step = step * 2**16
        difference = np.abs(value.astype(np.float64) - expected)
        assert (difference <= 0.5 * step + 1e-6 * np.abs(expected).max()).all(), name
    assert not factors and changed == len(lora.targets) * after_layers(after)


def after_layers(tensors) -> int:
    return len([name for name in tensors if name.endswith("mlp.down_proj.weight")])


def test_a_fresh_adapter_changes_nothing(tiny_models):
    model = load_model(tiny_models["qwen3_tied"])
    fresh = fresh_adapter(model.cfg, LORA, model.mesh, KEY)
    np.testing.assert_array_equal(with_adapter(model, fresh, LORA).logits(ROWS), model.logits(ROWS))
    for name, sides in fresh.items():
        a, width = np.asarray(sides["a"]), np.prod(sides["a"].shape[1:-1])
        assert not np.asarray(sides["b"]).any(), name
        # Uniform in +-1 / sqrt(inputs): both ends are met, and the variance is a third.
        assert np.abs(a).max() <= width**-0.5 and np.abs(a).max() > 0.95 * width**-0.5
        assert a.var() == pytest.approx(1 / 3 / width, rel=0.2)
    other = fresh_adapter(model.cfg, LORA, model.mesh, KEY + 1)
    assert (np.asarray(other["q"]["a"]) != np.asarray(fresh["q"]["a"])).mean() > 0.99


def test_targets_choose_the_weights():
    assert tuple(ADAPTABLE) == CONFIG_ADAPTABLE
    section = tiny_config(lora__rank=2, lora__alpha=3.0, lora__targets=("down", "q")).lora
    lora = Lora.of(section)
    assert lora == Lora(2, 3.0, ("q", "down")) and lora.scale == 1.5
    assert Lora.of(tiny_config().lora) is None
    mesh = make_mesh(1, 1, jax.devices()[:1])
    adapter = fresh_adapter(CFG, lora, mesh, KEY)
    shapes = jax.tree.map(lambda leaf: leaf.shape, adapter)
    assert shapes == {
        "q": {"a": (2, 64, 2), "b": (2, 2, 8, 24)},
        "down": {"a": (2, 96, 2), "b": (2, 2, 64)},
    }


def test_peft_computes_the_same(tiny_models, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with PEFT, which needs PyTorch")
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    import transformers

    lora = Lora(4, 12.0, ("q", "v", "o", "gate", "down"))
    model = load_model(tiny_models["qwen3_tied"])
    adapter = random_adapter(model.cfg, lora, model.mesh)
    save_adapter(tmp_path / "a", model.cfg, adapter, lora, base=str(model.directory))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        model.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ROWS[:1])).logits.numpy()
        merged_too = theirs.merge_and_unload()(torch.tensor(ROWS[:1])).logits.numpy()
    ours = np.asarray(with_adapter(model, adapter, lora).logits(ROWS[:1]))
    assert np.abs(ours - expected).max() <= 1e-4 and np.abs(ours - merged_too).max() <= 1e-4
    assert np.abs(np.asarray(model.logits(ROWS[:1])) - expected).max() > 0.1


def test_the_sampler_plays_with_the_adapter(tiny_models, tmp_path):
    model = load_model(tiny_models["qwen3_tied"])
    adapter = random_adapter(model.cfg, LORA, model.mesh)
    policy = merged(model.params, adapter, LORA)
    save_model(tmp_path / "m", model.cfg, policy, source=model.directory, dtype=jnp.float32)
    draw = np.random.default_rng(0)
    requests = [
        Request(draw.integers(0, 300, 20).tolist(), request_key("lora", i), 16) for i in range(16)
    ]
    answers = []
    for params in (
        with_adapter(model, adapter, LORA).params,
        load_model(tmp_path / "m").params,
        model.params,
    ):
        sampler = Sampler(
            model.cfg,
            model.mesh,
            SamplerConfig(slots=8, length=48, response=16),
            sampling=Sampling(0.7),
            limit=290,
            stop_ids=(5,),
        )
        answers.append([answer.ids for answer in sampler.generate(params, requests)])
    assert answers[0] == answers[1] != answers[2]


# --- the step -------------------------------------------------------------------------------------


def lora_run(mesh, prompts, remat="none", adapter=None, **changes):
    """Loss, gradient and last sums of a step for an adapter on model 0, the teacher's weights."""
    model = make_model(0, mesh)
    teacher = Teacher(model, CONTEXTS, thinking=True)
    samples = make_samples(teacher, prompts)
    adapter = adapter or random_adapter(CFG, LORA, mesh)
    step = StepConfig(CFG, KL, jnp.float32, remat, 256, lora=LORA.scale, **changes)
    shape, batches = plan(samples, 100_000, mesh.shape["fsdp"])
    weights = sample_weights(samples, "token_mean")
    with jax.set_mesh(mesh):
        gradients, loss = zeros_like(adapter), 0.0
        for text, rows in batches:
            batch = put_batch(mesh, fill(samples, weights, rows, shape))
            inputs = (adapter, model.params, teacher.prefix(text).cache, batch)
            gradients, sums = accumulate(gradients, *inputs, step=step)
            loss += float(sums.loss)
    return loss, jax.device_get(gradients), sums, (model, adapter, teacher, samples)


@pytest.fixture(scope="module")
def whole(prompts):
    return lora_run(make_mesh(1, 1, jax.devices()[:1]), prompts)


def test_gradient_equals_that_of_merged_weights_by_the_chain_rule(whole):
    """dA = s dW B^T and dB = s A^T dW, with dW from ordinary training of the merged weights."""
    loss, gradients, _, (model, adapter, teacher, samples) = whole
    layers = dict(model.params["layers"])
    for name, sides in adapter.items():
        each = [
            merged_layer(name, layers[name], sides["a"], sides["b"], layer, LORA.scale)
            for layer in range(CFG.num_layers)
        ]
        layers[name] = jnp.stack(each)
    student = type(model)(Path("."), CFG, model.mesh, model.params | {"layers": layers})
    expected_loss, full, _ = run(student, teacher, samples, 100_000)
    assert abs(loss - expected_loss) <= 1e-5 * abs(expected_loss)
    expected = {}
    for name, sides in jax.device_get(adapter).items():
        a, b = sides["a"], sides["b"]
        rows, columns = int(np.prod(a.shape[1:-1])), int(np.prod(b.shape[2:]))
        d_w = full["layers"][name].reshape(-1, rows, columns)
        d_a = LORA.scale * np.einsum("lio,lro->lir", d_w, b.reshape(len(b), LORA.rank, columns))
        d_b = LORA.scale * np.einsum("lir,lio->lro", a.reshape(len(a), rows, LORA.rank), d_w)
        expected[name] = {"a": d_a.reshape(a.shape), "b": d_b.reshape(b.shape)}
    close(gradients, expected, 1e-4)


@pytest.mark.parametrize("remat", ["products", "layer"])
def test_remat_changes_nothing(prompts, whole, remat):
    loss, gradients, *_ = lora_run(make_mesh(1, 1, jax.devices()[:1]), prompts, remat=remat)
    assert abs(loss - whole[0]) <= 1e-6 * abs(whole[0])
    close(gradients, whole[1], 1e-5)


@pytest.mark.parametrize("shape", meshes((2, 4), (4, 2), (8, 1)))
def test_eight_devices_equal_one(prompts, whole, shape):
    loss, gradients, _, (_, adapter, _, _) = lora_run(make_mesh(*shape), prompts)
    assert abs(loss - whole[0]) <= 1e-5 * abs(whole[0])
    close(gradients, whole[1], 1e-4)
    gate = adapter["gate"]
    assert gate["a"].addressable_shards[0].data.size == gate["a"].size // shape[0]
    assert gate["b"].addressable_shards[0].data.size == gate["b"].size // shape[1]


def test_retention_holds_on_to_the_base(prompts):
    """Student and teacher agree without knowledge as long as the adapter changes nothing."""
    mesh = make_mesh(1, 1, jax.devices()[:1])
    kept = []
    for adapter in (fresh_adapter(CFG, LORA, mesh, KEY), random_adapter(CFG, LORA, mesh)):
        how = dict(retention="plain", retention_weight=1.0)
        kept.append(float(lora_run(mesh, prompts[:2], adapter=adapter, **how)[2].retention))
    assert abs(kept[0]) < 1e-4 < 1e-1 < kept[1]


def test_there_is_no_second_copy_of_the_weights():
    """The compiler's own numbers: beside the base, an adapter's step needs little more than none.

    Full training of the same model shows that the bounds can be missed.
    """
    # Wide against the few tokens it reads: weights outweigh what is computed from them.
    cfg = dataclasses.replace(CFG, num_layers=6, hidden_size=512, intermediate_size=2048)
    ids = list(range(8))
    samples = [Sample(ids, ids, 0, ids[:4], np.zeros(4, np.float32), 0) for _ in range(2)]
    shape, batches = plan(samples, 64, 1)
    weights = sample_weights(samples, "token_mean")
    batch = fill(samples, weights, batches[0][1], shape)
    cache = jnp.zeros((cfg.num_layers, cfg.num_kv_heads, 64, cfg.head_dim))
    base = abstract_params(cfg)
    adapter = abstract_adapter(cfg, LORA)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(base))
    for remat in ("none", "layer"):
        step = StepConfig(cfg, KL, jnp.float32, remat, 256)
        needs = []
        for trained, how in ((base, step), (adapter, dataclasses.replace(step, lora=2.0))):
            inputs = (trained, trained, base, KeyValues(cache, cache), batch)
            memory = accumulate.lower(*inputs, step=how).compile().memory_analysis()
            needs.append((memory.argument_size_in_bytes, memory.temp_size_in_bytes))
        (full_held, full_temporary), (held, temporary) = needs
        assert held < 1.1 * size and full_held > 3 * size
        # 'none' keeps activations, 0.5 of the weights here; the gradient alone is 1.0 of them.
        assert temporary < 0.6 * size and full_temporary > temporary + 0.9 * size


# --- the stage ------------------------------------------------------------------------------------

FIELDS = dict(lora__rank=4, lora__alpha=8.0, consolidate__learning_rate=3e-3)


@pytest.fixture(scope="module")
def lora_stage(finished_run, tmp_path_factory):
    """The finished run's games and knowledge, consolidated into an adapter."""
    work = tmp_path_factory.mktemp("lora") / "run"
    copy_of(finished_run, work, "consolidate", "evaluate")
    go(work, tiny_config(**FIELDS), ["consolidate"], change=True)
    return work


def test_the_policy_is_the_start_with_the_adapter_merged(lora_stage):
    place = lora_stage / "round_001"
    lora = Lora(4, 8.0, tuple(ADAPTABLE))
    bf16 = ml_dtypes.bfloat16
    assert_merged(place / "policy", bundled.MODEL_DIR, place / "adapter", lora, bf16)
    factors = load_file(place / "adapter" / "adapter_model.safetensors")
    assert all(np.abs(value).max() > 1e-3 for name, value in factors.items() if "lora_B" in name)
    settings = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(bundled.MODEL_DIR)
    recorded = [
        file["path"]
        for entry in read_json(lora_stage / "manifest.json")["stages"]
        if entry["stage"] == "consolidate"
        for file in entry["files"]
    ]
    assert "round_001/adapter/adapter_model.safetensors" in recorded
    rows = [r for r in read_metrics(lora_stage / "metrics.jsonl") if r["stage"] == "consolidate"]
    assert len(rows) == 3 and rows[0]["values"]["log_prob_gap"] < 1e-3


def test_the_next_round_starts_from_the_merged_policy_with_a_fresh_adapter(lora_stage):
    with opened(lora_stage, tiny_config(**FIELDS, rounds=2), change=True) as run:
        with round_checkpoints(run.config, run.workdir, 2) as checkpoints:
            tx = make_optimizer(run.config.consolidate)
            with jax.set_mesh(run.mesh):
                student = begin(run, 2, tx, checkpoints)
        assert policy_directory(run.config, run.workdir, 2) == lora_stage / "round_001" / "policy"
        assert all(not np.asarray(sides["b"]).any() for sides in student.params.values())
        first = fresh_adapter(
            policy_of(run, 1).cfg,
            Lora.of(run.config.lora),
            run.mesh,
            generation_key(run.config, "lora", 1),
        )
    assert (np.asarray(first["q"]["a"]) != np.asarray(student.params["q"]["a"])).any()


def test_an_interrupted_round_goes_on_to_the_same_bits(
    finished_run, lora_stage, tmp_path, monkeypatch
):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    interrupt_consolidation(monkeypatch, work, tiny_config(**FIELDS), 2)
    saved = [p for p in (work / "round_001" / "consolidate").rglob("*") if p.is_file()]
    size = sum(path.stat().st_size for path in saved)
    model = (bundled.MODEL_DIR / "model.safetensors").stat().st_size
    adapter = (lora_stage / "round_001/adapter/adapter_model.safetensors").stat().st_size
    # Adapter and both moments, not the model.
    assert saved and size < 2 * 3.5 * adapter < model
    go(work, tiny_config(**FIELDS), ["consolidate"])
    for name in ("policy/model.safetensors", "adapter/adapter_model.safetensors"):
        mine, theirs = (w / "round_001" / name for w in (work, lora_stage))
        assert mine.read_bytes() == theirs.read_bytes(), name


@pytest.mark.e2e
def test_policies_inside_a_round_and_stability_options(finished_run, tmp_path):
    work = copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    options = dict(
        evaluate__steps=(1,),
        consolidate__retention="knowledge",
        consolidate__teacher="trust_region",
        consolidate__turn_fraction=0.5,
        guard__response_tokens=(0.1, 9.0),
    )
    go(work, tiny_config(**FIELDS, **options), ["consolidate"], change=True)
    start, inside, last = (
        load_file(d / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].astype(np.float32)
        for d in (
            bundled.MODEL_DIR,
            work / "round_001" / "policy_step_001",
            work / "round_001" / "policy",
        )
    )
    assert 0 < np.abs(inside - start).max() and (inside != last).any()
