"""Rules of the optimizer for parts of the parameters: paths, Muon for matrices, low-rank updates."""
