"""Pieces of the report page: what is read (`data`), drawn (`charts`) and written (`sections`)."""
