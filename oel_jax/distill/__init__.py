"""Consolidation's numerics: the fused top-k reverse KL, its plain reference, the optimizer."""
