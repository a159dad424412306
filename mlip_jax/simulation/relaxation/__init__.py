"""Batched relaxation on the device, the minimizers, and the search for minima."""
