"""What the leaves of our pytrees of arrays may be."""

import jax
import numpy as np

# An array of JAX, or one of NumPy that is on its way to the devices, or the shape of one for a
# program that is compiled and not run. For the fields of registered dataclasses.
Leaf = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
