"""`python -m oel_jax.config` prints docs/configuration.md."""

from oel_jax.config.page import page

print(page(), end="")
