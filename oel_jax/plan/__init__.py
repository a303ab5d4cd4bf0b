"""The planner: does a config fit a device that is not at hand, and what would a round cost?

`targets` knows devices and makes their topologies without them, `shapes` knows models without their
weights, `workload` reads from a config what a round does, `programs` lowers the very functions of
the run for it, `costs` counts what they compute, read and send, `collectives` reads what the
compiler made of it, `estimate` puts hours on it, `search` looks for a mesh that fits, `auto` takes
it where the config says 'auto', and `report` says it all. The command is `oel_jax/plan/command.py`.
"""
