"""`python -m oel_jax.review`: see `command`."""

import sys

from oel_jax.review.command import main

sys.exit(main())
