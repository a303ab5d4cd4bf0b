"""Texts and ids: tokenizers, chat templates, and control tokens that outside text never becomes."""
