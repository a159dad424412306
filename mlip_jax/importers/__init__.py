"""Force fields that were trained elsewhere, read from weights in open formats: one file for each program.

Each has functions that map a flat dict of weights to the options and parameters of one of mlip_jax.models, and
`load(path, ...)`, which gives a `Potential`. Constants that the program keeps (in single precision, most often) are
taken over as they are, so that the numbers agree to rounding.
"""
