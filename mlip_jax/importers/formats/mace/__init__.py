"""Files of MACE."""
