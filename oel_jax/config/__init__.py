"""What a run may be told: fields, defaults, rules, checks. Imports no JAX, but for `fit`."""
