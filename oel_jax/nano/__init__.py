"""A small model organism of experiential learning, and the code that trains it from scratch."""
