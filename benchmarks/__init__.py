"""Measurements against peers: `python -m benchmarks.NAME`, each prints ratios and writes JSON."""
