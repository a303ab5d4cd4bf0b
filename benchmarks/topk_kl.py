"""The fused top-k reverse KL, loss and gradient, against its own matrix products.

    python -m benchmarks.topk_kl [--tokens=2048] [--width=1024] [--vocabulary=151936] [--top-k=256]

The bound: four products per chunk of tokens (student's logits, teacher's logits, gradient of the
hidden states, gradient of the output matrix) and nothing else. Memory is what the compiler reports
for temporaries, in addition to the float32 logits of one side.
"""

import sys

import jax
import jax.numpy as jnp

from benchmarks import side_by_side
from benchmarks.side_by_side import Bar, finish, race, ratio, spread
from oel_jax.distill.topk_kl import KLConfig, _add_outer, fused_topk_kl


def products(chunk: int, h_s, w_s, h_t, w_t):
    """The four products of every chunk, in the order and with the memory of the loss."""

    def body(total, pair):
        student, teacher = pair
        z = jnp.einsum("cd,vd->cv", student, w_s, preferred_element_type=jnp.float32)
        z_t = jnp.einsum("cd,vd->cv", teacher, w_t, preferred_element_type=jnp.float32)
        # The cheapest use of both that the compiler cannot leave out.
        grad = (z - z_t).astype(student.dtype)
        d_hidden = jnp.einsum("cv,vd->cd", grad, w_s, preferred_element_type=jnp.float32)
        return _add_outer(total, grad, student), d_hidden

    chunks = tuple(h.reshape(-1, chunk, h.shape[1]) for h in (h_s, h_t))
    return jax.lax.scan(body, jnp.zeros(w_s.shape, jnp.float32), chunks)


def main() -> int:
    """Command line; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    tokens, width, vocabulary = options.tokens, options.width, options.vocabulary
    cfg, dtype = KLConfig(top_k=options.top_k), jnp.dtype(options.dtype)
    keys = jax.random.split(jax.random.key(0), 5)
    h_s, h_t = (jax.random.normal(key, (tokens, width), dtype) for key in keys[:2])
    w_s, w_t = (
        (width**-0.5 * jax.random.normal(key, (vocabulary, width))).astype(dtype)
        for key in keys[2:4]
    )
    sampled = jax.random.randint(keys[4], (tokens,), 0, vocabulary)
    weight = jnp.full(tokens, 1.0 / tokens)

    def loss(h_s, w_s, h_t, w_t):
        return fused_topk_kl(cfg, h_s, w_s, h_t, w_t, sampled, weight)[0]

    chunk = cfg.chunk_for(tokens)
    inputs = (h_s, w_s, h_t, w_t)
    fused = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile()
    alone = jax.jit(lambda *args: products(chunk, *args)).lower(*inputs).compile()
    sides = {
        "loss and gradient": lambda: jax.block_until_ready(fused(*inputs)),
        "products alone": lambda: jax.block_until_ready(alone(*inputs)),
    }
    seconds = race(sides, options.repeats)
    found = ratio(seconds["loss and gradient"], seconds["products alone"])
    flops = 4 * 2 * tokens * width * vocabulary
    rows = [
        [name, f"{min(some):.2f}", f"{flops / min(some) / 1e9:.0f}"]
        for name, some in seconds.items()
    ]
    temporary = fused.memory_analysis().temp_size_in_bytes
    logits = 4 * tokens * vocabulary
    print(f"loss / products: {spread(found)}; chunks of {chunk} tokens")
    print(f"temporaries {temporary / 1e6:.0f} MB; full logits of one side {logits / 1e6:.0f} MB")
    bars = [
        Bar("fused loss / its own products", found[0], 1.25, most=True),
        Bar("temporaries / full logits", temporary / logits, 1 / 8, most=True),
    ]
    settings = {"tokens": tokens, "width": width, "vocabulary": vocabulary}
    settings |= {"top_k": options.top_k, "dtype": options.dtype}
    measured = {"seconds": seconds, "ratio": found, "flops": flops, "temporary_bytes": temporary}
    headers = ["side", "best seconds", "GFLOP/s"]
    return finish("topk_kl", settings, rows, headers, bars, measured, options)


if __name__ == "__main__":
    sys.exit(main())
