"""`python -m oel_jax.online`: see `command`."""

from oel_jax.base import preemption

preemption.listen()  # before what takes time to import: a notice may come at once

import sys  # noqa: E402

from oel_jax.online.command import main  # noqa: E402

sys.exit(main())
