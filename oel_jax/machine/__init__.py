"""The machine that a command runs on: paths, caches, signals."""
