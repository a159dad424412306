"""What a force field is for: an ASE calculator, relaxation, molecular dynamics."""
