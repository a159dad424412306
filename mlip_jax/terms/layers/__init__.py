"""Building blocks that the energy terms share."""
