"""`python -m oel_jax.plan`: see `command`."""

import sys

from oel_jax.plan.command import main

sys.exit(main())
