"""`python -m oel_jax.serve ...`"""

import sys

from oel_jax.serve.command import main

sys.exit(main())
