"""Adds configs/ to the package as oel_jax.configs, where it is found by name once installed."""

from setuptools import find_packages, setup

CONFIGS = {"oel_jax.configs": "configs", "oel_jax.configs.studies": "configs/studies"}

setup(packages=[*find_packages(include=["oel_jax*"]), *CONFIGS], package_dir=CONFIGS)
