"""The planner: bytes against a real run's arrays, FLOPs against slow counts and the compiler's."""

import importlib.util
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax import P
from tiers import meshes

from oel_jax.base.errors import UserError
from oel_jax.learner import consolidate
from oel_jax.learner.teacher import Teacher
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import abstract_params, forward, init_params, param_shardings
from oel_jax.parallel.mesh import device_bytes, make_mesh
from oel_jax.plan import command as plan
from oel_jax.plan import costs, programs, report, search, targets
from oel_jax.plan.collectives import array_bytes, parse
from oel_jax.plan.measure import compiled
from oel_jax.plan.shapes import KNOWN, hf_config, model_shape
from oel_jax.plan.workload import Assumptions, Layout, amounts, samplers, workload
from oel_jax.runs.policies import start_directory
from oel_jax.sampler.sampler import Sampler

CONFIG = str(tiny_run.NANO_CONFIG)
FIELDS = {name: value for name, value in tiny_run.FIELDS.items() if name != "compilation_cache"}
FLAGS = [f"--config.{name}={value}" for name, value in FIELDS.items() if name != "mesh.fsdp"]


def one_device(config, cfg, **assumed):
    """Shapes of a run on one device."""
    mesh = make_mesh(1, 1, jax.devices()[:1])
    layout = Layout(mesh, mesh, 1)
    work = workload(config, layout, Assumptions.of(config, **assumed))
    return programs.Arrays(config, cfg, layout, work)


def planned(path, target, **fields):
    """The plan of the default recipe for a model, nothing compiled."""
    config = tiny_run.tiny_config(
        **{"model__path": path, "mesh__fsdp": -1, "sampler__max_len": 0} | fields
    )
    assumed = Assumptions.of(config)
    return search.on_target(config, model_shape(path), target, assumed)


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, billions",
    zip(KNOWN, (0.596, 1.72, 4.02, 4.02, 8.19, 14.77, 32.76), strict=True),
)
def test_known_shapes_have_the_parameters_of_the_real_models(path, billions):
    cfg = model_shape(path)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)))
    assert costs.parameters(cfg) == count
    assert count / 1e9 == pytest.approx(billions, rel=2e-3)
    assert cfg.max_positions == (262_144 if "2507" in path else 40_960)


def test_a_shape_from_a_directory_and_one_that_nobody_knows(tiny_models):
    assert model_shape(str(tiny_models["qwen2"])).family == "qwen2"
    assert model_shape("nano").num_layers > 0
    with pytest.raises(UserError, match=r"path=no/such is no directory here.*Qwen3-8B"):
        model_shape("no/such")


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_bytes_by_class_are_those_of_a_real_run(finished_run, tmp_path, monkeypatch, rank):
    config = tiny_run.tiny_config(lora__rank=rank, consolidate__steps=1, evaluate__steps=())
    work = tiny_run.copy_of(finished_run, tmp_path / "run", "consolidate", "evaluate")
    seen = {}
    original = consolidate.held_bytes

    def spy(*given):
        (teacher,) = (one for one in given if isinstance(one, Teacher))
        (sampler,) = (one for one in given if isinstance(one, Sampler))
        widths = [prefix.cache.keys.shape[2] for prefix in teacher.encoded]
        seen.update(widths=widths, header=sampler.config.longest_prefix, held=original(*given))
        return seen["held"]

    monkeypatch.setattr(consolidate, "held_bytes", spy)
    with tiny_run.opened(work, config, change=True) as run:
        consolidate.consolidate(run, 1)
        cfg = ModelConfig.from_directory(start_directory(run.config))
    arrays = one_device(config, cfg, header_tokens=seen["header"])
    mine = programs.held(arrays)
    real = seen["held"]
    assert list(mine) == list(real)
    knowledge = "knowledge, encoded"
    for name in set(mine) - {knowledge}:
        assert mine[name] == real[name], name
    assert mine[knowledge] >= real[knowledge] > 0  # planned for texts at their cap
    each = []
    for width in seen["widths"]:
        arrays.work = replace(arrays.work, knowledge=width)
        each.append(device_bytes(arrays.knowledge()))
    assert sum(each) == real[knowledge]


def test_samplers_are_those_of_a_real_run(finished_run, tmp_path, monkeypatch):
    config = tiny_run.tiny_config()
    work = tiny_run.copy_of(finished_run, tmp_path / "run", "extract", "consolidate", "evaluate")
    made = []
    original = Sampler.__init__

    def spy(sampler, *given, **named):
        original(sampler, *given, **named)
        made.append(sampler)

    monkeypatch.setattr(Sampler, "__init__", spy)
    tiny_run.go(work, config, ["extract", "consolidate", "evaluate"])
    mesh = make_mesh(1, 1, jax.devices()[:1])
    header = max(made[1].config.longest_prefix, 64)
    play, informed, extractor = samplers(config, Layout(mesh, mesh, 1), header)
    # extractor, the student's answers, then games with knowledge and without
    for slots, real in zip((extractor, play, informed, play), made, strict=True):
        found = real.config
        assert found.prefixes <= slots.prefixes and found.longest_prefix <= slots.longest_prefix
        same = dict(prefixes=slots.prefixes, longest_prefix=slots.longest_prefix)
        assert replace(found, **same) == slots


@pytest.mark.parametrize("grid", meshes((2, 4), (8, 1), (4, 2)))
def test_placed_bytes_are_those_of_real_arrays(grid):
    config = tiny_run.tiny_config(consolidate__moments_dtype="bfloat16")
    cfg = ModelConfig.from_hf(hf_config((64, 3, 8, 4, 16, 128, 512, False)))
    mesh = make_mesh(*grid, jax.devices()[:8])
    layout = Layout(mesh, mesh, 1)
    work = workload(config, layout, Assumptions.of(config))
    arrays = programs.Arrays(config, cfg, layout, work)
    params = jax.jit(
        lambda: init_params(cfg, jax.random.key(0)), out_shardings=param_shardings(cfg, mesh)
    )()
    assert device_bytes(arrays.masters) == device_bytes(params)
    with jax.set_mesh(mesh):
        assert device_bytes(arrays.moments) == device_bytes(jax.jit(arrays.tx.init)(params))


@pytest.mark.parametrize("grid", [(256, 1), (128, 2), (64, 4)])
def test_a_device_of_256_holds_its_256th(grid):
    """Parameters and optimizer, within the 10 % that the issue allows."""
    target = targets.Target("toy:256", targets.TPUS["v6e"], 256, 4)
    path, slots = "Qwen/Qwen3-8B", {"sampler__slots": 64, "sampler__prefill_rows": 64}
    arrays = planned(path, target, mesh__fsdp=grid[0], mesh__tp=grid[1], **slots).arrays
    held = device_bytes(arrays.masters) + device_bytes(arrays.moments)
    whole = 12 * costs.parameters(arrays.cfg)
    assert whole / 256 <= held <= 1.1 * whole / 256


def test_what_lives_together(monkeypatch):
    target = targets.find("cpu:8")
    stages = {one.name: one for one in planned("nano", target).stages}
    assert list(stages) == list(programs.STAGES[:-1])  # nothing is gathered for one process
    assert "gradients, float32" in stages["update"].held
    assert "gradients, float32" not in stages["rollouts"].held
    assert "AdamW's moments" not in stages["play"].held
    resume = stages["resume"].held
    assert resume["restored"] == resume["student, float32"] + resume["AdamW's moments"]
    update = stages["update"]
    assert update.total == sum(update.held.values()) + update.temporaries
    several = planned("nano", targets.Target("toy", target.device, 8, 4))
    assert {one.name for one in several.stages} == set(programs.STAGES)
    # Each process has the whole policy on its own devices.
    assert device_bytes(several.arrays.policy) > 1.5 * device_bytes(several.arrays.teacher)


# --- FLOPs ----------------------------------------------------------------------------------------


def one_layer(width=256, vocabulary=4096):
    return ModelConfig.from_hf(hf_config((width, 1, 8, 4, 32, 512, vocabulary, False)))


def slow_pairs(tokens, queries, keys):
    """Pairs of query and key in the tiles that are worked on, one by one."""
    count = 0
    for tile in range(-(-tokens // queries)):
        for start in range(0, tokens, keys):
            if start < (tile + 1) * queries:  # a tile wholly behind the queries is never touched
                count += sum(1 for _ in range(queries) for _ in range(keys))
    return count


@pytest.mark.parametrize("tokens, queries, keys", [(64, 32, 64), (600, 256, 320), (1024, 256, 512)])
def test_pairs_of_queries_and_keys(tokens, queries, keys):
    assert costs.own_pairs(tokens, queries) == slow_pairs(tokens, queries, keys)
    assert costs.prefix_pairs(64, 512, 32) == 64 * 512


def test_flops_of_the_layers_product_by_product():
    cfg, tokens, keys = one_layer(), 3, 5
    total = 0
    for _ in range(tokens):
        for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads):  # q, k, v
            total += sum(2 for _ in range(heads * cfg.head_dim) for _ in range(cfg.hidden_size))
        total += 2 * cfg.num_heads * cfg.head_dim * cfg.hidden_size  # o
        total += 3 * 2 * cfg.intermediate_size * cfg.hidden_size  # gate, up, down
        for _ in range(cfg.num_heads):  # scores, and their mean of the values
            total += sum(2 * 2 * cfg.head_dim for _ in range(keys))
    assert costs.layers_flops(cfg, tokens, tokens * keys) == total


def test_flops_of_a_forward_pass_are_the_compilers():
    """One layer and one tile: no loop body counts less than it should."""
    cfg = one_layer()
    shape = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    done = (
        jax.jit(lambda p, t, i, s: forward(cfg, p, t, i, s))
        .lower(abstract_params(cfg), shape, shape, shape)
        .compile()
    )
    mine = costs.layers_flops(cfg, 256, costs.own_pairs(256, 256))
    assert mine == pytest.approx(done.cost_analysis()["flops"], rel=0.05)


@pytest.fixture(scope="module")
def one_tile():
    """Programs of one layer on one device whose loops all run once."""
    config = tiny_run.tiny_config(
        sampler__max_prompt=20,
        sampler__max_response=12,
        sampler__max_len=64,
        extract__l_max=40,
        extract__max_prompt=100,
        consolidate__token_budget=64,
        loss__chunk=4096,
        model__attention_block=512,
    )
    arrays = one_device(config, one_layer(), header_tokens=0)
    return arrays, {one.name: one for one in programs.programs(arrays)}


# Not a prefill: of a single layer it needs the keys and values alone, and the compiler sees that.
@pytest.mark.parametrize("name", ["micro-batch", "decode, play"])
def test_flops_of_programs_are_the_compilers(one_tile, name):
    arrays, found = one_tile
    program = found[name]
    mine = costs.cost(program, arrays).flops
    # Norms, softmaxes and sampling are not products; at this width they are a tenth at most.
    assert mine == pytest.approx(compiled(program).flops, rel=0.12)


def test_remat_and_an_adapter_change_the_work(one_tile):
    arrays, found = one_tile
    flops = {}
    for name, fields in (
        ("layer", {}),
        ("none", {"consolidate__remat": "none"}),
        ("adapter", {"lora__rank": 2}),
    ):
        config = tiny_run.tiny_config(**fields)
        other = one_device(config, one_layer())
        program = next(p for p in programs.programs(other) if p.name == "micro-batch")
        flops[name] = costs.cost(program, other).flops
    assert flops["none"] < flops["layer"]
    assert flops["adapter"] < flops["layer"]


# --- collectives ----------------------------------------------------------------------------------


def test_collectives_of_a_real_program():
    mesh = make_mesh(4, 2, jax.devices()[:8])

    def local(x):  # x: float32 [4, 8]
        def body(carry, _):
            whole = jax.lax.all_gather(carry, "fsdp", axis=0, tiled=True)
            return whole.reshape(4, 4, 8).sum(0) * 0.5 + carry, None

        x, _ = jax.lax.scan(body, x, length=5)
        x = x + jax.lax.psum(x[0, 0], ("fsdp", "tp"))
        x = jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True).reshape(4, 8)
        x = jax.lax.ppermute(x, "tp", [(0, 1), (1, 0)])
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)

    shape = jax.ShapeDtypeStruct(
        (16, 16), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp", "tp"))
    )
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            local, in_specs=P("fsdp", "tp"), out_specs=P("fsdp", "tp"), check_vma=False
        )
        text = jax.jit(run).lower(shape).compile().as_text()
    found = {one.kind: one for one in parse(text, 8)}
    gather = found["all-gather"]
    assert (gather.bytes, gather.group, gather.times) == (16 * 8 * 4, 4, 5)
    assert (gather.received, gather.total) == (384, 5 * 384)
    assert (found["all-reduce"].group, found["all-reduce"].bytes) == (8, 4)
    assert found["all-reduce"].received == 7  # 2 * 4 bytes * 7 / 8
    assert (found["all-to-all"].bytes, found["all-to-all"].group) == (4 * 8 * 4, 4)
    permute = found["collective-permute"]
    assert permute.received == permute.bytes == 4 * 8 * 4
    scatter = found["reduce-scatter"]  # one row of four stays
    assert (scatter.bytes, scatter.group, scatter.received) == (4 * 8 * 4, 4, 96)


@pytest.mark.aot
@pytest.mark.parametrize("grid", [(8, 1), (4, 2)])
def test_what_is_sent_is_near_the_count_by_hand(monkeypatch, grid):
    """The estimate that stands in where nothing is compiled; float32, as a CPU computes."""
    monkeypatch.setitem(KNOWN, "toy", (64, 3, 8, 4, 16, 128, 512, False))
    one = planned("toy", targets.find("cpu:8"), mesh__fsdp=grid[0], mesh__tp=grid[1])
    for name in ("decode, play", "read a text, rollouts"):
        program = one.programs[name]
        sent = costs.cost(program, one.arrays).sent
        assert compiled(program).received == pytest.approx(sent, rel=0.25), name


_CHAIN = """\
%piece.1 (p: bf16[1,8]) -> bf16[4,8] {
  ROOT %g.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=mesh['a'=4,'b'=2] \
{'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%piece.2 (p: bf16[1,8]) -> bf16[4,8] {
  ROOT %g.2 = bf16[4,8]{1,0} all-gather(%p), replica_groups=[2,4]<=[4,2]T(1,0), \
frontend_attributes={chain_id="3"}
}

%test (t: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %a = bf16[4,8] fusion(%x), kind=kCustom, calls=%piece.1
  %b = bf16[4,8] fusion(%x), kind=kCustom, calls=%piece.2
  %s = ((f32[4]{0}, f32[2]{0}), (f32[8]{0}, f32[4]{0})) all-gather-start(%y, %z), \
replica_groups={{0,1},{2,3}}, dimensions={0}
  %d = (f32[8]{0}, /*index=1*/f32[4]{0}) all-gather-done(%s)
}

%all-reduce-scatter.1 (p: bf16[8,8]) -> bf16[2,8] {
  %r = bf16[8,8] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (p: bf16[1,8]) -> bf16[4,8] {
  %w = (s32[], bf16[4,8]) while(%init), condition=%test, body=%body
  %f = bf16[2,8] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_as_tpu_and_gpu_compilers_write_them():
    """A chain of fusions is one gather; a loop's length stands in its condition; start and done."""
    chain, pair, scatter = parse(_CHAIN, 8)
    assert (chain.bytes, chain.group, chain.times) == (64, 4, 6)
    assert (pair.bytes, pair.group, pair.times) == (48, 2, 6)
    assert (scatter.kind, scatter.bytes, scatter.received) == ("reduce-scatter", 128, 96)
    assert array_bytes("(pred[3], f8e4m3fn[4], s64[2,2]{1,0}, f32[])") == 3 + 4 + 32 + 4


# --- hours ----------------------------------------------------------------------------------------


def test_a_round_is_the_sum_of_its_parts():
    target = targets.find("cpu:8")
    one = planned("nano", target)
    config, work = one.arrays.config, one.arrays.work
    times = {name: time.seconds for name, time in one.times.items()}
    micro = times.get("micro-batch, usual", times["micro-batch"])
    steps = config.consolidate.steps
    expected = steps * (work.batches * micro + times["update"])
    assert one.hours["consolidate: updates"] * 3600 == pytest.approx(expected)
    # 3 steps of 4 games; 2 chains of 2 games; 4 boards, 2 seeds, with and without knowledge.
    count = amounts(config, one.assumed)
    assert (count.rollouts, count.deploy) == (4 * 12, 4 * (4 + 12))
    assert (count.plain, count.informed) == (4 * 8, 4 * 8)
    assert (count.extractor_calls, count.extractor_waves) == (4, 2)
    slower = planned("nano", target, sampler__slots=8)
    faster = replace(one.assumed, compute=0.8, memory=1.0, network=1.0)
    assert sum(slower.hours.values()) >= sum(one.hours.values())
    assert sum(replace(one, assumed=faster).hours.values()) < sum(one.hours.values())


def test_the_slowest_of_three_limits_a_program():
    one = planned("nano", targets.find("cpu:8"))
    program = one.programs["micro-batch"]
    device, share = one.target.device, one.assumed
    for name, cost in (
        ("compute", costs.Cost(device.flops, 0.0, 0.0)),
        ("memory", costs.Cost(1.0, device.bandwidth, 0.0)),
        ("network", costs.Cost(1.0, 1.0, device.link)),
    ):
        time = one.time(cost, program)
        assert time.bound == name
        assert time.seconds == pytest.approx(1 / getattr(share, name))


# --- the command ----------------------------------------------------------------------------------


def run(*words):
    return plan.main([f"--config={CONFIG}", *FLAGS, "--config.mesh.fsdp=-1", *words])


@pytest.mark.aot
def test_a_config_that_fits(capsys, tmp_path):
    small = ["--config.extract.experience=none"]
    small += ["--config.evaluate.in_context=False"]  # fewer programs to compile
    out = tmp_path / "plan.json"
    assert run("--target=cpu:8", "--config.mesh.tp=2", *small, f"--out={out}") == 0
    text = capsys.readouterr().out
    assert "8 x CPU (a virtual device)" in text and "mesh fsdp 4 x tp 2" in text
    assert "FITS: at most" in text and "nothing was run" in text
    record = json.loads(out.read_text())["given"]
    micro = record["programs"]["micro-batch"]
    # What the compiler is given is what is counted, but for what it leaves out.
    assert sum(micro["given"].values()) == pytest.approx(micro["compiled"]["arguments"], rel=0.02)
    assert {"all-gather", "all-reduce"} <= {one["kind"] for one in micro["compiled"]["collectives"]}
    assert record["fits"] and record["mesh"] == {"fsdp": 4, "tp": 2}
    assert "all-gather" in text and "a round, estimated" in text


@pytest.mark.aot
def test_a_config_that_does_not_fit(capsys):
    words = ["--target=cpu:8", "--no_compile", "--config.model.path=Qwen/Qwen3-1.7B"]
    words += ["--config.sampler.max_len=0", "--config.sampler.slots=2048"]
    assert run(*words, "--memory_gb=12") == 2
    text = capsys.readouterr().out
    assert "DOES NOT FIT: at most" in text and "GB too much" in text
    assert "=== this would fit: --config.mesh.fsdp=" in text
    slots = int(text.partition("--config.sampler.slots=")[2].split()[0])
    assert slots < 2048 and "FITS: at most" in text.partition("this would fit")[2]
    assert run(*words, "--memory_gb=0.5") == 2
    assert "no mesh and number of slots of cpu:8 was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--target=v99:2x2"], "--target=v99:2x2: no such target"),
        (["--target=h200:12"], "several nodes have 8 GPUs each"),
        (["--target=cpu:8", "--config.model.path=a/b"], "config.model.path=a/b is no directory"),
        (["--target=cpu:8", "--config.loss.topk=3"], "config.loss.topk is not a field"),
        (["--target=cpu:8", "--config.sampler.slots=0"], "config.sampler.slots is 0"),
        (["--target=cpu:8", "--config.consolidate.offload=optimizer"], "plan with ()"),
        (["--target=cpu:8", "--turns=0"], "--turns=0: give a number above 0"),
        (["--target=cpu:8", "--compute=2"], "--compute=2: give a number above 0 and at most 1"),
        (["--target=cpu:8", "--memory_gb=-1"], "--memory_gb=-1"),
        (["--target=cpu:8", "--slots=8"], "'--slots=8' is no flag"),
    ],
)
def test_mistakes(capsys, words, message):
    assert run("--no_compile", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.mesh.tp=3"], "config.mesh.fsdp=-1 x config.mesh.tp=3 does not give the 8"),
        (["--config.mesh.fsdp=3"], "config.mesh.fsdp=3 x config.mesh.tp=1"),
        (["--config.mesh.tp=8"], "config.mesh.tp=8 does not divide the model's num_heads"),
    ],
)
def test_a_mesh_that_is_not_for_these_devices_or_this_model(capsys, words, message):
    assert run("--target=cpu:8", "--no_compile", *words) == 2
    said = capsys.readouterr()
    assert f"error: {message}" in said.err
    assert "this would fit: --config.mesh.fsdp=" in said.out


def test_targets(monkeypatch):
    eight = targets.find("cpu:8")
    assert (eight.count, eight.processes, len(eight.devices)) == (8, 1, 8)
    with pytest.raises(UserError, match="has started with 8 CPU"):
        targets.find("cpu:9")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu, which is not installed.*pip install"):
        targets.find("v5e:4x4")
    gpus = targets.find("h200:16")
    assert (gpus.processes, gpus.devices) == (2, ())
    assert gpus.why == "JAX's CUDA plugin is not installed here"
    assert gpus.link == gpus.device.far < gpus.device.link
    monkeypatch.setenv(targets.MEMORY_SHARE, "0.5")
    half = targets.find("h200:8")
    assert half.device.memory == targets.GPUS["h200"].memory // 2 and half.link == half.device.link
    said = report.full_report(planned("Qwen/Qwen3-8B", half), "x.py")
    assert "not compiled: JAX's CUDA plugin is not installed here" in said


def test_a_gpu_is_described_with_all_its_numbers():
    text = targets._described(targets.GPUS["h200"])
    assert "memory_bandwidth: 4800000000000\n" in text and '"NVIDIA H200 141GB"' in text
    assert "device_memory_size: 150" in text


@pytest.mark.aot
def test_compiled_for_a_tpu_that_is_not_here():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (pip install libtpu)")
    target = targets.find("v5e:2x2")
    assert (target.count, target.device.memory) == (4, int(15.75 * 2**30))
    with pytest.raises(UserError, match="libtpu does not take it: .*not divisible"):
        targets.find("v5p:3x3x3")
    small = planned("Qwen/Qwen3-0.6B", target, model__dtype="bfloat16").programs["cast"]
    done = compiled(small)
    assert not done.too_large and done.seconds > 0
    assert done.arguments == pytest.approx(sum(small.bytes.values()), rel=0.01)
    large = planned("Qwen/Qwen3-32B", target, model__dtype="bfloat16")
    refused = compiled(large.programs["cast"])
    assert "15.75G" in refused.too_large
    verdict = report.verdict(replace(large, compiled={"cast": refused}))
    assert verdict == "DOES NOT FIT: the compiler refuses cast"
    assert np.isnan(refused.flops or np.nan)
