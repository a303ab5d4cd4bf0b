"""`python -m oel_jax.evaluate`: see `command`."""

import sys

from oel_jax.evaluate.command import main

sys.exit(main())
