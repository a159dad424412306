"""Report of the diversity study: structures against conformers."""
