"""What crosses between user and server side: trajectories, and the texts around them. No JAX."""
