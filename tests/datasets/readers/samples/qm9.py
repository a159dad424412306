"""The first five molecules of QM9 in the layout of its archive, and a list with the second one.

Labels, and geometries to 8 decimals, are those of QM9 (CC0; via metatrain's test data, BSD-3).
Charges and frequencies are invented. The fourth molecule is changed: it has exponents of
Mathematica.
"""

import bz2
import io
import tarfile
from pathlib import Path

METHANE = """5
gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t-40.47893\t-40.476062\t\
-40.475117\t-40.498597\t6.469\t
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 0.002150416\t-0.0060313176\t 0.0019761204\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 0.0002765748\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""
AMMONIA = """4
gdb 2\t293.60975\t293.54111\t191.39397\t1.6256\t9.46\t-0.257\t0.0829\t0.3399\t26.1563\t0.034358\t-56.525887\t\
-56.523026\t-56.522082\t-56.544961\t6.316\t
N\t-0.0404260543\t 1.0241077531\t 0.0625637998\t-0.707143
H\t 0.0172574639\t 0.0125452063\t-0.0273771593\t 0.235712
H\t 0.9157893661\t 1.3587451948\t-0.0287577581\t 0.235712
H\t-0.5202777357\t 1.3435321258\t-0.7755426124\t 0.235719
1103.8733\t1684.1158\t1684.3072\t3458.7145\t3579.0424\t3579.1043
N\tN\t
InChI=1S/H3N/h1H3\tInChI=1S/H3N/h1H3
"""
WATER = """3
gdb 3\t799.58812\t437.90386\t282.94545\t1.8511\t6.31\t-0.2928\t0.0687\t0.3615\t19.0002\t0.021375\t-76.404702\t\
-76.401867\t-76.400922\t-76.422349\t6.002\t
O\t-0.0343604951\t 0.9775395708\t 0.0076015923\t-0.589706
H\t 0.0647664923\t 0.0205721989\t 0.0015346341\t 0.294853
H\t 0.8717903737\t 1.3007924048\t 0.0006931336\t 0.294853
1671.4222\t3803.6305\t3907.698
O\tO\t
InChI=1S/H2O/h1H2\tInChI=1S/H2O/h1H2
"""
CYANIDE = """3
gdb 5\t0.\t44.593883\t44.593883\t2.8937\t12.99\t-0.3604\t0.0191\t0.3796\t48.7476\t0.016601\t-93.411888\t-93.40937\t\
-93.408425\t-93.431246\t6.278\t
C\t-0.0133239314\t 1.1324657151\t 0.0082758861\t 0.1\t
N\t 0.0023107217\t-0.0191585871\t 0.0019287298\t-0.2\t
H\t-0.0278026991\t 2.1989492992\t 0.0141537856\t 0.1\t
799.0101\t799.0101\t2198.4393\t3490.3686
C#N\tC#N\t
InChI=1S/CHN/c1-2/h1H\tInChI=1S/CHN/c1-2/h1H
"""
# Not from QM9: acetylene on the x axis, to hold tiny numbers and SMILES that differ.
ACETYLENE = """4
gdb 4\t0.\t35.6100361\t35.6100361\t1.5*^-4\t16.28\t-0.2845\t0.0506\t0.3351\t59.5248\t0.026841\t-77.308427\t\
-77.305527\t-77.304583\t-77.327429\t8.574\t
C\t 0.5995394918\t 1.2*^-6\t 1.\t-0.207019
C\t-0.5995394918\t 0.\t 1.\t-0.207019
H\t-1.6616385861\t-3.*^-7\t 1.\t 0.207019
H\t 1.6616385861\t 0.\t 1.\t 2.07019*^-1
549.7648\t549.7648\t795.2713\t795.2713\t2078.1639\t3415.2296\t3513.5546
C#C\t[CH]=[CH]\t
InChI=1S/C2H2/c1-2/h1-2H\tInChI=1S/C2H2/c1-2/h1-2H
"""
MOLECULES = (METHANE, AMMONIA, WATER, ACETYLENE, CYANIDE)

UNCHARACTERIZED = f"""


List of molecules among the 133885 GDB9 molecules, whose geometries lead to
5 different strings

{"=" * 110}
#   Index                  GDB17 SMILES        SMILES for B3LYP XYZ     SMILES for Corina generated XYZ      D_IJ
{"=" * 110}
       2                             N                           N                                   N  6.036217
   21725                    NC(=N)C=O                   NC(=N)C=O                    [NH]C(=[NH2])C=O  5.631463
{"=" * 110}
"""


def write_archive(path: Path, molecules=MOLECULES) -> Path:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for text in molecules:
            index = int(text.split("\n")[1].split()[1])
            info = tarfile.TarInfo(f"dsgdb9nsd_{index:06d}.xyz")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    path.write_bytes(bz2.compress(stream.getvalue()))
    return path


def make(folder: Path):
    (folder / "uncharacterized.txt").write_text(UNCHARACTERIZED)
    return write_archive(folder / "dsgdb9nsd.xyz.tar.bz2"), {}
