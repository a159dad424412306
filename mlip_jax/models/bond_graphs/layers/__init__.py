"""Building blocks of models of bonds."""
