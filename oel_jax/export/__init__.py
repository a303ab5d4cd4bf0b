"""A policy of a run as a Hugging Face directory."""
