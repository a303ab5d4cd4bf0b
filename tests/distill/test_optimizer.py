"""Moments in bfloat16 and in host memory, against AdamW in float64 and against plain rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_step import settings

from oel_jax.distill.dither import dither
from oel_jax.distill.optimizer import adamw, make_optimizer
from oel_jax.distill.step import update
from oel_jax.parallel.mesh import make_mesh

SIZE, STEPS = 512, 2000


def gradients(kind, count=STEPS):
    """[count, SIZE] of very different sizes, as `kind` says."""
    draw = np.random.default_rng(0)
    sizes = 1e-3 * np.exp(2 * draw.normal(size=SIZE))
    step = np.arange(count)[:, None]
    noise = draw.normal(size=(count, SIZE))
    shapes = {
        "noise": noise,
        "fading": noise * np.exp(-step / 500),
        "constant": np.ones((count, SIZE)),
        "rare": noise * (draw.random((count, SIZE)) < 0.02),
        "every 13th": noise * (step % 13 == 0),
    }
    return (sizes * shapes[kind]).astype(np.float32)


def float64(series, rate=1e-3, decay=0.01):
    """(parameters, first moment, second moment) of AdamW after the series, from zeros."""
    p, m, v = (np.zeros(SIZE) for _ in range(3))
    for number, g in enumerate(series.astype(np.float64), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**number) / (np.sqrt(v / (1 - 0.999**number)) + 1e-8)
        p = p - rate * (step + decay * p)
    return p, m, v


def trained(tx, series, after=lambda moments: moments):
    """The same by our optimizer in one scan; the moments as they are stored."""

    def body(carry, g):
        changes, state = tx.update({"w": g}, carry[1], carry[0])
        return (optax.apply_updates(carry[0], changes), after(state)), None

    params = {"w": jnp.zeros(SIZE)}
    start = (params, tx.init(params))
    (params, state), _ = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(start, series)
    return np.asarray(params["w"]), state.mu["w"], state.nu["w"]


def nearest(moments):
    """The naive way: what a step leaves is rounded to the nearest bfloat16."""

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(x.dtype)

    return moments._replace(
        mu=jax.tree.map(rounded, moments.mu), nu=jax.tree.map(rounded, moments.nu)
    )


def off(second, expected):
    """(mean, root mean square) of the relative error of a second moment."""
    error = np.asarray(second, np.float64) / expected - 1
    return abs(error.mean()), np.sqrt((error**2).mean())


@pytest.mark.parametrize("kind", ["noise", "fading", "constant", "rare", "every 13th"])
def test_bfloat16_moments_follow_float64(kind):
    series = gradients(kind)
    p, m, v = float64(series)
    wide = trained(make_optimizer(settings()), series)
    assert [x.dtype for x in wide[1:]] == [jnp.float32] * 2
    np.testing.assert_allclose(wide[0], p, atol=2e-5 * np.abs(p).max())
    np.testing.assert_allclose(wide[2], v, rtol=1e-4)
    narrow = trained(make_optimizer(settings(moments_dtype="bfloat16")), series)
    assert [x.dtype for x in narrow[1:]] == [jnp.bfloat16] * 2
    mean, spread = off(narrow[2], v)
    assert mean < 0.01 and spread < 0.04, (mean, spread)
    # What it is for: the parameters go the same way.
    assert np.sqrt(((narrow[0] - p) ** 2).mean()) < 0.03 * np.sqrt((p**2).mean())
    # The naive way would not pass.
    assert max(off(trained(make_optimizer(settings()), series, nearest)[2], v)) > 0.1


@pytest.mark.parametrize("rate", [1e-3, optax.cosine_decay_schedule(1e-2, 40)])
def test_it_is_optax_adamw(rate):
    """To float32's last places: a constant rate and a schedule, leaves of any shape."""
    draw = np.random.default_rng(2)
    shapes = {"matrix": (17, 5), "vector": (33,), "scalar": (), "stack": (2, 3, 4)}

    def leaves(scale):
        return {k: jnp.asarray(scale * draw.normal(size=s), jnp.float32) for k, s in shapes.items()}

    params = leaves(1.0)
    ours = adamw(rate, b1=0.9, b2=0.95, eps=1e-8, decay=0.1)
    theirs = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    sides = [[params, tx.init(params), tx] for tx in (ours, theirs)]
    for number in range(50):
        gradients = leaves(10.0 ** (number % 7 - 3))
        for side in sides:
            changes, side[1] = side[2].update(gradients, side[1], side[0])
            side[0] = optax.apply_updates(side[0], changes)
    for name in shapes:
        np.testing.assert_allclose(sides[0][0][name], sides[1][0][name], rtol=2e-6, atol=2e-7)


def test_equal_settings_are_one_optimizer():
    """The jitted step takes it as a static argument: another object would compile it again."""
    assert make_optimizer(settings()) is make_optimizer(settings())
    with pytest.raises(ValueError, match="needs the parameters"):
        tx = make_optimizer(settings())
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))


def test_rounding_is_to_a_neighbour_and_without_bias():
    draw = np.random.default_rng(1)
    x = (draw.normal(size=4096) * 10.0 ** draw.integers(-20, 20, 4096)).astype(np.float32)
    rounded = np.stack([np.asarray(dither(x, s, 3), np.float32) for s in range(1, 129)])
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    low, high = bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)
    assert ((rounded == low) | (rounded == high)).all()
    share, fraction = (rounded == high).mean(0), (x - low) / (high - low)
    assert np.abs(share - fraction).max() < 0.04  # independent draws: about 0.16
    assert abs((share - fraction).mean()) < 1e-3
    at_once = (rounded == high).mean(1) - fraction.mean()  # and within each step, over elements
    assert np.abs(at_once).max() < 0.04
    exact = np.array([0.0, -0.0, 1.0, -2.5, 2.0**-120], np.float32)
    np.testing.assert_array_equal(np.asarray(dither(exact, 7, 0), np.float32), exact)
    odd = np.asarray(dither(np.array([np.inf, -np.inf, np.nan], np.float32), 7, 0), np.float32)
    assert odd[0] == np.inf and odd[1] == -np.inf and np.isnan(odd[2])


def tree(mesh, spec, count=0):
    """Two leaves, split over the mesh."""
    draw = np.random.default_rng(count)
    values = {name: draw.normal(size=(16, 32)).astype(np.float32) for name in ("a", "b")}
    return jax.device_put(values, NamedSharding(mesh, spec))


def updated(mesh, spec, moments, kind="device", steps=5):
    """Parameters and state after some updates, the state lying in memory `kind`."""
    tx = make_optimizer(settings(moments_dtype=moments))
    with jax.set_mesh(mesh):
        params = tree(mesh, spec)
        state = jax.jit(tx.init)(params)
        state = jax.tree.map(
            lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(kind)), state
        )
        for number in range(1, steps + 1):
            new = tree(mesh, spec, number)
            if number == 3:  # an update that is skipped
                new = jax.tree.map(lambda leaf: leaf * np.nan, new)
            params, state, done = update(params, state, new, tx=tx, clip_norm=1e9)
            assert bool(done.skipped) == (number == 3)
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {kind}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params)} == {"device"}
    return jax.device_get((params, state))


def test_rounding_does_not_depend_on_the_devices():
    """To the bit; the rest of an update differs in its last place, as compiled code does."""
    rounded = []
    for mesh in (make_mesh(1, 1, jax.devices()[:1]), make_mesh(4, 2), make_mesh(2, 4)):
        with jax.set_mesh(mesh):
            x = tree(mesh, PartitionSpec("fsdp", "tp"))["a"]
            rounded.append(np.asarray(jax.jit(dither, static_argnums=2)(x, jnp.int32(5), 1)))
    np.testing.assert_array_equal(rounded[0], rounded[1])
    np.testing.assert_array_equal(rounded[0], rounded[2])
    plain = np.asarray(dither(tree(mesh, PartitionSpec())["a"], 5, 2))
    assert 0.2 < (plain != rounded[0]).mean() < 0.5  # another seed, another pattern


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_host_memory_changes_nothing(moments, shape):
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    spec = PartitionSpec("fsdp", "tp")
    here, there = (updated(mesh, spec, moments, kind) for kind in ("device", "pinned_host"))
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_compiled_for_a_tpu_the_moments_stay_on_the_host():
    """The compiler's own numbers for 16 chips: all moments on the host, few at once on the chip."""
    pytest.importorskip("libtpu", reason="compiles for a TPU, which needs libtpu (jax[tpu])")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
    except Exception as error:  # libtpu's own kinds of error, e.g. in use by another process
        pytest.skip(f"libtpu gives no topology: {str(error).splitlines()[0]}")
    mesh = make_mesh(16, 1, devices)
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    scalar = NamedSharding(mesh, PartitionSpec())
    params = {
        f"w{n}": jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=place) for n in range(8)
    }
    tx, needs = make_optimizer(settings()), {}
    with jax.set_mesh(mesh):
        for kind in ("device", "pinned_host"):
            state = jax.tree.map(
                lambda leaf, kind=kind: jax.ShapeDtypeStruct(
                    leaf.shape,
                    leaf.dtype,
                    sharding=(place if leaf.shape else scalar).with_memory_kind(kind),
                ),
                jax.eval_shape(tx.init, params),
            )
            needs[kind] = (
                update.lower(params, state, params, tx=tx, clip_norm=1.0)
                .compile()
                .memory_analysis()
            )
    moments = 2 * 8 * 4 * 4096 * 4096 // 16
    here, there = needs["device"], needs["pinned_host"]
    assert here.host_argument_size_in_bytes == 0
    for side in ("argument", "output", "alias"):
        assert getattr(there, f"host_{side}_size_in_bytes") == pytest.approx(moments, rel=0.01)
    assert there.argument_size_in_bytes < here.argument_size_in_bytes - 0.99 * moments
    assert there.temp_size_in_bytes < 0.8 * moments, there.temp_size_in_bytes / moments
