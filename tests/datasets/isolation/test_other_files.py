"""Tests that parsers of ASE open no other files of the user."""

import os

import pytest
from ase import Atoms
from ase.io import write

from mlip_jax.datasets import readers
from mlip_jax.datasets.isolation import other_files
from mlip_jax.datasets.molecules.files import read_molecules
from mlip_jax.datasets.reader import DatasetError

OCTOPUS = "Dimensions = 3\nPeriodicDimensions = 0\nBoxShape = minimum\nXYZCoordinates = '{}'\n"
ONETEP = "include_file : {}\n"
ACE = "%% BasicInformation\n GeometryFilename {}\n GeometryFormat xyz\n%% End\n"


@pytest.fixture
def private(tmp_path):
    """Return a file of the user, outside of the folder of the foreign file."""
    path = tmp_path / "private.xyz"
    write(path, Atoms("CO", [[0, 0, 0], [0, 0, 1.1]]), plain=True)
    return path


@pytest.mark.parametrize("through_link", [False, True], ids=["path", "link"])
@pytest.mark.parametrize(
    ("format", "text"), [("octopus-in", OCTOPUS), ("onetep-in", ONETEP), ("acemolecule-input", ACE)]
)
def test_included_files_are_not_read(tmp_path, private, format, text, through_link):
    """Detects private files of the user in a store that is then shared."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    target = private
    if through_link:
        target = folder / "link.xyz"
        target.symlink_to(private)
    path = folder / "inp"
    path.write_text(text.format(target))
    message = r"link.xyz', a link out of its folder, to .*private.xyz.* replace it by a copy"
    message = message if through_link else r"refers to another file, .*private.xyz"
    with pytest.raises(DatasetError, match=message):
        list(readers.open_data(path, "ase", format=format))


def test_files_of_the_same_folder_are_read(tmp_path, private):
    (tmp_path / "inp").write_text(OCTOPUS.format(private))
    (record,) = read_molecules(tmp_path / "inp")
    assert list(record.atoms.symbols) == ["C", "O"]


def test_files_next_to_a_link_are_read(tmp_path, private):
    """Detects that only the folder of the target was allowed, if a user names a link."""
    (tmp_path / "run").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store/inp").write_text(OCTOPUS.format(tmp_path / "run/atoms.xyz"))
    (tmp_path / "run/inp").symlink_to("../store/inp")
    (tmp_path / "run/atoms.xyz").write_bytes(private.read_bytes())
    (record,) = read_molecules(tmp_path / "run/inp")
    assert list(record.atoms.symbols) == ["C", "O"]


def test_cells_of_castep_are_read_without_castep(tmp_path):
    """Detects that ASE starts CASTEP for a list of its keywords, which is refused."""
    text = "%BLOCK LATTICE_CART\n9 0 0\n0 9 0\n0 0 9\n%ENDBLOCK LATTICE_CART\n"
    text += "%BLOCK POSITIONS_ABS\nC 0 0 0\nO 0 0 1.1\n%ENDBLOCK POSITIONS_ABS\n"
    (tmp_path / "a.cell").write_text(text)
    (record,) = read_molecules(tmp_path / "a.cell")
    assert list(record.atoms.symbols) == ["C", "O"]


def test_pipes_of_the_same_folder_are_not_opened(tmp_path):
    """Detects an endless wait for the writer of a pipe."""
    os.mkfifo(tmp_path / "pipe.xyz")
    (tmp_path / "inp").write_text(OCTOPUS.format(tmp_path / "pipe.xyz"))
    with pytest.raises(DatasetError, match="pipe.xyz', not a regular file, which was not opened"):
        list(read_molecules(tmp_path / "inp"))


def test_other_code_may_open_files(tmp_path, private):
    """The restriction ends with the block, also after an error, and can be nested."""
    with pytest.raises(KeyError), other_files.only(tmp_path / "a" / "b"):
        with pytest.raises(DatasetError), other_files.only(tmp_path / "c" / "d"):
            private.read_bytes()
        with pytest.raises(DatasetError, match="os.system"):
            os.system("true")
        with pytest.raises(DatasetError):
            open(tmp_path / "a" / "b", "w")  # noqa: SIM115
        raise KeyError
    assert private.read_bytes()
