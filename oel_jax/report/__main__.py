"""`python -m oel_jax.report`: see `page`."""

import sys

from oel_jax.report.page import main

sys.exit(main())
