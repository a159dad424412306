"""Applications of a force field: ASE calculators, relaxation, molecular dynamics."""
