"""What a study is made of: its plan, the shelf its runs share, its results and plots.

The command is `oel_jax/study/command.py`; study files are in `configs/studies/`.
"""
