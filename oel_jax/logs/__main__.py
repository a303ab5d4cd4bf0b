"""`python -m oel_jax.logs`: see `command`."""

import sys

from oel_jax.logs.command import main

sys.exit(main())
