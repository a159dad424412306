"""Config fields of data sets (source, filters, split) and of the tasks that process data.

These tasks convert, inspect and generate data sets.
"""

from __future__ import annotations

from mlip_jax.defaults.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, POSITIVE_OR_INFINITE
from mlip_jax.defaults.field import Field, Part, optional, task

DTYPES = ("float32", "float64")
_OFF = "no limit"


def seed(use: str) -> Field:
    """Return the field of the seed of a random choice."""
    return Field(0, f"Seed of {use}.")


def num_processes(use: str, **options) -> Field:
    """Return the field of a number of worker processes, which changes no result."""
    return Field(
        0,
        f"Number of worker processes {use}; 0 starts one per CPU core.",
        bounds=NOT_NEGATIVE,
        changes_results=False,
        **options,
    )


def dtype(use: str) -> Field:
    """Return the field of a floating-point precision."""
    return Field("float32", f"Floating-point precision of {use}.", choices=DTYPES)


SOURCE = Part(
    "Source of the structures.",
    path=optional(
        str,
        'Data file, folder or store; "a.hdf5,b.hdf5" or "*.hdf5" joins several files of one '
        "format.",
        unset="a SPICE file in data.directory, or otherwise the built-in molecules with GFN2-xTB "
        "labels, which are generated there",
    ),
    reader=Field(
        "auto",
        'Name of the reader, a file of mlip_jax/datasets/readers/; "auto" detects the format.',
    ),
    reader_options=Field(
        "", "Options of the reader, as in \"stages=('pm3','DFT_1st'); stride=4\"."
    ),
    directory=Field(
        "data", "Folder in which data files are searched and generated, and stores are kept."
    ),
    num_generated=Field(
        8_000, "Number of conformations in the generated data set.", bounds=AT_LEAST_ONE
    ),
    verify=optional(
        bool,
        "Verification of the checksums of a store at the start.",
        unset="stores of up to 4 GiB",
        changes_results=False,
    ),
    reject_invalid=Field(
        True,
        "Rejection of a new data file in which the checks find errors.",
        changes_results=False,
        former_name="refuse",
    ),
    confirm_units=Field(
        False,
        "Confirmation that energies are total energies in eV and forces in eV/Å, minus the "
        "gradient. It answers the question of the checks if their evidence is unclear; data "
        "that are clearly wrong are still rejected.",
        changes_results=False,
    ),
)

FILTERS = Part(
    "Conditions that structures must meet to be used.",
    elements=optional(tuple, "Symbols of the allowed elements.", unset="all elements"),
    charge=optional(
        float, "Total charge of the structures; nan allows any.", unit="e", unset="any charge"
    ),
    min_atoms=optional(
        int, "Minimum number of atoms per structure.", bounds=AT_LEAST_ONE, unset=_OFF
    ),
    max_atoms=optional(
        int, "Maximum number of atoms per structure.", bounds=AT_LEAST_ONE, unset=_OFF
    ),
    max_force=optional(
        float,
        "Maximum absolute value of a force component.",
        unit="eV/Å",
        bounds=POSITIVE_OR_INFINITE,
        unset=_OFF,
    ),
    min_distance=optional(
        float,
        "Minimum distance between two atoms.",
        unit="Å",
        bounds=POSITIVE_OR_INFINITE,
        unset=_OFF,
    ),
    max_energy_deviation=optional(
        float,
        "Maximum deviation of the energy per atom from the median over the conformations of the "
        "molecule.",
        unit="eV/atom",
        bounds=POSITIVE_OR_INFINITE,
        unset=_OFF,
    ),
    max_energy_z=optional(
        float,
        "Maximum robust z-score of the energy among the conformations of the molecule.",
        bounds=POSITIVE_OR_INFINITE,
        unset=_OFF,
    ),
    max_force_z=optional(
        float,
        "Maximum robust z-score of the RMS force among the conformations of the molecule.",
        bounds=POSITIVE_OR_INFINITE,
        unset=_OFF,
    ),
    require=Field(
        "any",
        "Labels that a structure must have.",
        choices={"any": "energy or forces", "energy": "", "forces": "", "both": "", "none": ""},
    ),
)

DATA = Part("Source of the structures, and the conditions that they must meet.", SOURCE, FILTERS)

SPLIT = Part(
    "Split into training, validation and test structures, and the training subset.",
    split=Field(
        "molecule",
        "Rule by which structures are assigned to the splits.",
        choices={
            "auto": "by molecule if there are enough molecules, otherwise random",
            "molecule": "no molecule in two splits",
            "random": "conformations of a molecule in all splits",
            "scaffold": "the most frequent scaffolds train",
            "scaffold_random": "random scaffolds",
            "size": "the smallest molecules train",
            "official": "the split of the data set's authors",
        },
    ),
    split_files=Field(
        "",
        'Files with the record numbers of a custom split, which replaces data.split: "split.json" '
        'or "train=a.csv,test=b.csv".',
    ),
    split_seed=seed("the split and of the training subset"),
    num_train=Field(
        100_000,
        "Number of training structures, or a fraction if all three are fractions.",
        bounds=NOT_NEGATIVE,
    ),
    num_valid=Field(20_000, "Number of validation structures, or a fraction.", bounds=NOT_NEGATIVE),
    num_test=Field(20_000, "Number of test structures, or a fraction.", bounds=NOT_NEGATIVE),
    held_out=Field(
        "",
        "Split files (split_records.json of runs on the same data), separated by commas, whose "
        "test molecules are excluded from training and validation.",
        legacy_value="",
    ),
    num_molecules=optional(
        int,
        "Number of molecules in the training subset; 0 uses all structures. A larger subset "
        "contains the smaller ones.",
        bounds=NOT_NEGATIVE,
        unset="all structures",
    ),
    num_conformers=Field(
        1, "Number of conformations per molecule in the training subset.", bounds=AT_LEAST_ONE
    ),
    min_conformers=optional(
        int,
        "Minimum number of conformations of a molecule in the training subset: the largest "
        "num_conformers of a comparison of runs.",
        bounds=AT_LEAST_ONE,
        unset="data.num_conformers",
    ),
    below_min_conformers=Field(
        "exclude",
        "Treatment of molecules with fewer than min_conformers conformations.",
        choices={"exclude": "", "last": "drawn after all others"},
        legacy_value="exclude",
        former_name="fewer_conformers",
    ),
    selection=Field(
        "random",
        "Order in which molecules enter the training subset.",
        choices={
            "random": "",
            "maxmin": "most dissimilar fingerprints first",
            "embedding": "most dissimilar features of a force field first",
        },
        legacy_value="random",
    ),
    selection_force_field=Field(
        "",
        'Workdir of the force field whose features data.selection="embedding" compares.',
        legacy_value="",
    ),
)

CONVERT = task(
    "convert",
    "Conversion of a data set into a store.",
    # unlabeled structures may have properties, or be relaxed later
    data=DATA.replace(require="none"),
    store=Part(
        "Layout of the store.",
        dtype=dtype("positions, forces and atom properties"),
        atoms_per_shard=Field(
            1_000_000, "Number of atoms per file of the store.", bounds=AT_LEAST_ONE
        ),
        num_processes=num_processes("that convert"),
    ),
)

INSPECT = task(
    "inspect_data",
    "Report on the contents and errors of a data set.",
    data=DATA.replace(require="none"),
)

GENERATE = task(
    "generate",
    "Generation of the built-in data set: conformations of small molecules with GFN2-xTB energies "
    "and forces.",
    data=Part(
        "Conformations to generate.",
        path=Field("", "Path of the HDF5 file; if empty, embedded.h5 in the workdir."),
        num_conformations=Field(
            8_000, "Number of conformations of all molecules together.", bounds=AT_LEAST_ONE
        ),
        seed=seed("the sampling"),
        num_processes=num_processes("that sample and label"),
        molecules=Field(
            "", 'File of molecules, one "SMILES name" per line; if empty, the built-in molecules.'
        ),
        kinds=Field(
            ("conformations",),
            "Kinds of geometries: conformations (thermal), torsions (one to three bonds turned to "
            "any angle, also those of amides), dimers (each molecule with a random one of the list "
            "that has at most 20 atoms), stretches (normal modes and stretched bonds of molecules "
            "of 2 to 12 atoms).",
        ),
    ),
)

GENERATE_CONFORMERS = task(
    "generate_conformers",
    "Generation of conformers of given molecules with GFN2-xTB energies and forces.",
    smiles=Field("", "File of SMILES, .smi or .csv."),
    subset=Field("Conformers", "Name of the subset that the molecules are stored under."),
    num_molecules=optional(
        int,
        "Number of molecules, taken from the start of the file.",
        bounds=AT_LEAST_ONE,
        unset="all molecules",
    ),
    seed=seed("the embedding"),
    molecules_per_file=Field(
        1_000, "Number of molecules per output file, which are held in memory.", bounds=AT_LEAST_ONE
    ),
    num_processes=num_processes("that generate conformers"),
    select=Part(
        "Conditions that molecules of the file must meet.",
        elements=Field((), "Symbols of the allowed elements; if empty, all elements."),
        charge=optional(int, "Total charge.", unit="e", unset="any charge", default=0),
        min_atoms=optional(
            int, "Minimum number of atoms, including hydrogens.", bounds=NOT_NEGATIVE, unset=_OFF
        ),
        max_atoms=optional(
            int, "Maximum number of atoms, including hydrogens.", bounds=AT_LEAST_ONE, unset=_OFF
        ),
        min_rotatable=Field(0, "Minimum number of rotatable bonds.", bounds=NOT_NEGATIVE),
    ),
    conformers=Part(
        "Generation of the conformers of a molecule.",
        num_conformers=Field(
            20,
            "Maximum number of conformers per molecule: those of lowest MMFF94 energy.",
            bounds=AT_LEAST_ONE,
        ),
        min_conformers=Field(
            1,
            "Number of distinct conformers below which a molecule is skipped.",
            bounds=NOT_NEGATIVE,
        ),
        candidates=Field(
            2.0, "Number of ETKDG geometries per requested conformer.", bounds=POSITIVE
        ),
        prune_rmsd=Field(
            0.25,
            "RMSD of the heavy atoms below which two conformers are the same.",
            unit="Å",
            bounds=NOT_NEGATIVE,
        ),
        mmff_steps=Field(
            1_000, "Maximum number of MMFF94 minimization steps.", bounds=NOT_NEGATIVE
        ),
        gfn2_steps=Field(
            0,
            "Number of GFN2-xTB evaluations that relax each conformer; 0 labels the MMFF94 "
            "geometry.",
            bounds=NOT_NEGATIVE,
        ),
    ),
)
