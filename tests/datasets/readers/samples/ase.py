"""Extended XYZ: waters, an ammonium and a periodic salt, with invented labels in eV and Å."""

from pathlib import Path

FRAMES = """\
3
Properties=species:S:1:pos:R:3:forces:R:3:q:R:1 energy=-2078.25 charge=0 smiles=O mu=0.38 pbc="F F F"
O 0.000 0.000 0.119 0.00 0.00 -0.40 -0.8
H 0.000 0.763 -0.477 0.00 0.30 0.20 0.4
H 0.000 -0.763 -0.477 0.00 -0.30 0.20 0.4
3
Properties=species:S:1:pos:R:3:forces:R:3:q:R:1 energy=-2078.50 charge=0 smiles=O mu=0.40 pbc="F F F"
O 0.000 0.000 0.129 0.00 0.00 -0.10 -0.7
H 0.000 0.783 -0.477 0.00 0.10 0.05 0.35
H 0.000 -0.783 -0.477 0.00 -0.10 0.05 0.35
4
Properties=species:S:1:pos:R:3:forces:R:3:q:R:1 energy=-1540.75 charge=1 smiles="[NH4+]" mu=0.10 pbc="F F F"
N 0.000 0.000 0.110 0.00 0.00 0.00 -0.3
H 0.000 0.937 -0.257 0.10 0.00 0.00 0.4
H 0.811 -0.468 -0.257 0.00 0.20 0.00 0.4
H -0.811 -0.468 -0.257 -0.10 -0.20 0.00 0.5
2
Properties=species:S:1:pos:R:3:forces:R:3:q:R:1 charge=0 pbc="T T T" Lattice="4.2 0 0 0 4.2 0 0 0 4.2" config_type=salt
Na 0.0 0.0 0.0 0.5 0.0 0.0 1.0
Cl 2.4 0.0 0.0 -0.5 0.0 0.0 -1.0
"""


def make(folder: Path):
    path = folder / "frames.xyz"
    path.write_text(FRAMES)
    return path, {}
