"""Consolidation's numerics: the loss, its plain reference, packing, step, optimizer, LoRA."""
