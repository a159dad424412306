"""Published force fields that importers read: facts about each of them.

Facts are those of the packages and papers of the authors. None means that a fact is not known here.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from mlip_jax.defaults.bundled import BUNDLED


class PublishedForceField(NamedTuple):
    """Facts about a published force field.

    Attributes:
      name: Name for `load_force_field`.
      importer: Name of the importer.
      elements: Elements that it covers.
      method: Reference method of its training data.
      license: License of the weights, with its conditions.
      citation: Paper.
      url: URL of the file, or None.
      size: Size of the file (bytes), or None.
      sha256: Checksum of the file, or None.
      package: Python package that contains the file, "" if none does.
      file: File in that package.
      note: Intended use and required options.
    """

    name: str
    importer: str
    elements: str | None
    method: str | None
    license: str | None
    citation: str | None
    url: str | None = None
    size: int | None = None
    sha256: str | None = None
    package: str = ""
    file: str = ""
    note: str = ""

    @property
    def source(self) -> str:
        """Where the file comes from, as in "pip install --no-deps sevenn"."""
        if self.url:
            return "downloaded once"
        return f"pip install --no-deps {self.package.replace('_', '-')}"


_SEVENNET = "https://github.com/MDIL-SNU/SevenNet/releases/download/"
_MACE_MP = "https://github.com/ACEsuit/mace-mp/releases/download/"
_MACE = "https://github.com/ACEsuit/mace-foundations/releases/download/"
_MACE_OFF = "https://raw.githubusercontent.com/ACEsuit/mace-off/main/mace_off23/"
_NEQUIX = "https://github.com/atomicarchitects/nequix/raw/"
_PARK = "Park et al., J. Chem. Theory Comput. 20, 4857 (2024)"
_BATATIA = "Batatia et al., arXiv:2401.00096"
_KOVACS = "Kovács et al., arXiv:2312.15211"
_KOKER = "Koker et al., arXiv:2508.16067"
_KOKER_PHONONS = "Koker et al., arXiv:2601.07742"
_ELEMENTS_89 = "89 elements"
_PBE = "PBE, with +U for some compounds"
_KIM = "Kim et al., J. Am. Chem. Soc. 147, 1042 (2025)"
LIST_COMMAND = (
    "The list of published force fields: python -m mlip_jax.main --config=configs/published.py"
)
_ASL = "Academic Software License (not for commercial use)"
_SPICE = "ωB97M-D3(BJ)/def2-TZVPPD (SPICE)"
_OFF_ELEMENTS = "H C N O F P S Cl Br I"
_MODALITIES = "requires modality="


def _sevennet(name, folder, file, size, sha256, note="", method=_PBE, citation=_PARK):
    """Return a force field that the package sevenn contains."""
    return PublishedForceField(
        name=name,
        importer="sevennet",
        elements=_ELEMENTS_89,
        method=method,
        license="MIT",
        citation=citation,
        size=size,
        sha256=sha256,
        package="sevenn",
        file=f"pretrained_potentials/{folder}/{file}",
        note=note,
    )


def _mace(
    name, url, elements=_ELEMENTS_89, method=_PBE, license_="MIT", note="", citation=_BATATIA
):
    """Return a force field of MACE for materials."""
    return PublishedForceField(name, "mace", elements, method, license_, citation, url, note=note)


def _mace_off(size):
    """Return a force field of MACE-OFF23."""
    return PublishedForceField(
        name=f"mace-off23-{size}",
        importer="mace",
        elements=_OFF_ELEMENTS,
        method=_SPICE,
        license=_ASL,
        citation=_KOVACS,
        url=f"{_MACE_OFF}MACE-OFF23_{size}.model",
    )


def _nequix(name, commit, citation=_KOKER_PHONONS, method=_PBE, note=""):
    """Return a force field of Nequix; its repository has the weights under the license of the code."""
    url = f"{_NEQUIX}{commit}/models/{name}.nqx"
    return PublishedForceField(
        name, "nequix", _ELEMENTS_89, method, "MIT", citation, url, note=note
    )


_NEQUIX_MP = "7c2854de8e754b1a60274c7d9d2e014989ed632e"
_NEQUIX_OMAT = "9c852a9c4cce69ae5e75bc5a2cf670be21ff8c28"
_PHONONS = "fine-tuned on phonons"

FORCE_FIELDS = (
    PublishedForceField(
        BUNDLED,
        "parameters",
        "H C N O F P S Cl Br I",
        "GFN2-xTB",
        "Apache-2.0",
        "mlip_jax (CITATION.cff)",
        size=1_489_336,
        sha256="11d2e605e5dc8f2cd2b2f1e8d96a86dd5d75eab4ff98ba47ccccba24055b2997",
        package="mlip_jax",
        file=f"force_fields/{BUNDLED}/parameters.safetensors",
        note="for energies, geometries and dynamics of drug-like molecules, neutral or charged; "
        "not for complexes, reactions, radicals and crystals",
    ),
    _sevennet(
        "sevennet-0",
        "SevenNet_0__11Jul2024",
        "checkpoint_sevennet_0.pth",
        10_268_648,
        "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36",
    ),
    _sevennet(
        "sevennet-0-may2024",
        "SevenNet_0__22May2024",
        "checkpoint_sevennet_0.pth",
        10_268_712,
        "5d389fafd512e6ae2830d74d0b66ffc49a55d3832653ff8e7bf7f1343013c1d1",
    ),
    _sevennet(
        "sevennet-l3i5",
        "SevenNet_l3i5",
        "checkpoint_l3i5.pth",
        14_345_754,
        "a7ff190d41efe5b8317a03d20a468e4036a1a3e64e0b14fdbab64ac3f4bfc09d",
    ),
    _sevennet(
        "sevennet-mf-0",
        "SevenNet_MF_0",
        "checkpoint_sevennet_mf_0.pth",
        10_322_158,
        "81791329b37d445f46b531578c182c41792d98c7814222c9e5dde276402225fd",
        note=f"{_MODALITIES}PBE or R2SCAN",
        method="PBE and R2SCAN",
        citation=_KIM,
    ),
    PublishedForceField(
        "sevennet-mf-ompa",
        "sevennet",
        None,
        None,
        None,
        None,
        f"{_SEVENNET}v0.11.0.cp/checkpoint_sevennet_mf_ompa.pth",
        note=_MODALITIES + "mpa or omat24",
    ),
    PublishedForceField(
        "sevennet-omat",
        "sevennet",
        None,
        None,
        None,
        None,
        f"{_SEVENNET}v0.11.0.cp/checkpoint_sevennet_omat.pth",
    ),
    _mace("mace-mp-0-small", f"{_MACE_MP}mace_mp_0/2023-12-10-mace-128-L0_energy_epoch-249.model"),
    _mace("mace-mp-0-medium", f"{_MACE_MP}mace_mp_0/2023-12-03-mace-128-L1_epoch-199.model"),
    _mace("mace-mp-0-large", f"{_MACE_MP}mace_mp_0/MACE_MPtrj_2022.9.model"),
    _mace("mace-mp-0b3-medium", f"{_MACE_MP}mace_mp_0b3/mace-mp-0b3-medium.model"),
    _mace("mace-mpa-0-medium", f"{_MACE_MP}mace_mpa_0/mace-mpa-0-medium.model"),
    _mace(
        "mace-omat-0-medium",
        f"{_MACE_MP}mace_omat_0/mace-omat-0-medium.model",
        elements=None,
        method=None,
        license_=_ASL,
        citation=None,
    ),
    _mace(
        "mace-matpes-r2scan-0",
        f"{_MACE}mace_matpes_0/MACE-matpes-r2scan-omat-ft.model",
        elements=None,
        method="R2SCAN",
        license_=_ASL,
        citation=None,
    ),
    _mace_off("small"),
    _mace_off("medium"),
    _mace_off("large"),
    _nequix("nequix-mp-1", _NEQUIX_MP, _KOKER),
    _nequix("nequix-mp-1-pft", _NEQUIX_MP, note=_PHONONS),
    _nequix("nequix-mp-1-pft-no-cotrain", _NEQUIX_MP, note=f"{_PHONONS}, without other data"),
    _nequix("nequix-omat-1", _NEQUIX_OMAT, method=f"{_PBE}; pseudopotentials 54 of VASP"),
    _nequix("nequix-oam-1", _NEQUIX_OMAT),
    _nequix("nequix-oam-1-pft", _NEQUIX_OMAT, note=_PHONONS),
    PublishedForceField(
        "so3lr",
        "so3lr",
        "H C N O F P S Cl",
        "PBE0+MBD",
        None,
        "Kabylda et al., J. Am. Chem. Soc. 147, 33723 (2025)",
        package="so3krates_torch",
        file="pretrained/so3lr/so3lr.model",
    ),
)

_BY_NAME = {entry.name: entry for entry in FORCE_FIELDS}


def is_known(name: str) -> bool:
    """Return whether this is the name of a published force field, ignoring case."""
    return name.lower() in _BY_NAME


def nearest(name: str) -> str | None:
    """Return the most similar name of a published force field; None if none is similar.

    >>> nearest("drug-gfn2"), nearest("runs/spice")
    ('drugs-gfn2', None)
    """
    near = difflib.get_close_matches(name.lower(), _BY_NAME, n=1, cutoff=0.75)
    return near[0] if near else None


def find(name: str) -> PublishedForceField:
    """Return the facts about a force field.

    Raises:
      ValueError: There is no force field with this name.
    """
    if not is_known(name):
        raise ValueError(
            f"expected the name of a published force field, one of {', '.join(_BY_NAME)}; "
            f"received {name!r}"
        )
    return _BY_NAME[name.lower()]
