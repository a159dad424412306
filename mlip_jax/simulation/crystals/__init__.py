"""Properties of crystals: equation of state and phonons."""
