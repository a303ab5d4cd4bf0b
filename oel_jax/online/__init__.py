"""The paper's Figure 2 on one machine: server, learner and users as separate processes.

    python -m oel_jax.online --config=nano_frozen_lake_online --workdir=runs/online

The users (`players`) play a game whose board is in their own process; what the server and the
learner see are messages and textual feedback. The parts share a directory and nothing else, and
each can be run by hand on another machine.
"""
