"""Reports of simulations: dynamics, stability, vibrations, crystals and reaction paths."""
