"""Run OEL: `python -m oel_jax.main --config=configs/nano_frozen_lake.py --workdir=runs/nano`.

Single fields are overridden with `--config.rounds=2`; `--stages=deploy,extract` limits what is
done. The same command goes on where the last one stopped.
"""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from oel_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A python file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where all files of the run are kept.")
_STAGES = flags.DEFINE_list(
    "stages", ["deploy", "extract", "consolidate", "evaluate"], "Stages to do, in any subset."
)
_ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in an old workdir although the config has changed."
)


def _run(_: list[str]) -> None:
    if _CONFIG.value is None or not _WORKDIR.value:
        raise UserError(
            "give --config=FILE and --workdir=DIR, for example\n"
            "  python -m oel_jax.main --config=configs/nano_frozen_lake.py --workdir=runs/nano"
        )
    # Checked before JAX or a model is loaded: a bad value must fail at once.
    from oel_jax import games
    from oel_jax.config import as_json, validate

    config = _CONFIG.value
    remarks = validate(config, games=games.names())
    stages = [stage.strip() for stage in _STAGES.value if stage.strip()]
    known = _STAGES.default
    unknown = [stage for stage in stages if stage not in known]
    if unknown or not stages:
        raise UserError(
            f"--stages={','.join(_STAGES.value)}: choose from {', '.join(known)}"
        )
    from oel_jax.metrics import Metrics
    from oel_jax.workdir import Workdir

    with Workdir(_WORKDIR.value).open(as_json(config), allow_change=_ALLOW.value) as workdir:
        import jax

        from oel_jax.loop import learn
        from oel_jax.parallel.mesh import make_mesh
        from oel_jax.run import Run

        _compilation_cache(jax, config.compilation_cache)
        for remark in remarks:
            print(f"note: {remark}")
        devices = jax.devices()
        print(
            f"oel_jax: {len(devices)} {devices[0].device_kind} device(s), config "
            f"{Path(flags.FLAGS['config'].config_filename).name}, workdir {workdir.root}"
        )
        mesh = make_mesh(config.mesh.fsdp, config.mesh.tp)
        with Metrics(workdir, config.log.tensorboard) as metrics:
            learn(Run(config, workdir, metrics, mesh), stages)
        print(f"\nfiles: {workdir.root}   curves: tensorboard --logdir {workdir.root.parent}")


def _compilation_cache(jax, setting: str) -> None:
    """Keep compiled programs between runs, so that only the first run pays for them."""
    if setting == "off":
        return
    path = Path(setting) if setting else Path.home() / ".cache" / "oel_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(argv: list[str]) -> None:
    """Run, and turn what a user can mend into one message and an exit status."""
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX report every file they touch
    try:
        _run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\nstopped. Finished work is kept; the same command goes on from here.",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    app.run(main)
