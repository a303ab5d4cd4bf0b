"""`python -m oel_jax.online`: see `command`."""

import sys

from oel_jax.online.command import main

sys.exit(main())
