"""Logs of conversations: read in the common formats, redacted, imported, forgotten."""
