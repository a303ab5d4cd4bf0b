"""The server side: extraction of knowledge and its consolidation. Never imports an environment."""
