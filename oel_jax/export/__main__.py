"""`python -m oel_jax.export`: see `command`."""

import sys

from oel_jax.export.command import main

sys.exit(main())
