"""Config fields of the tasks "diversity" and "diversity_report".

They compare the benefits of more molecules and of more conformers.
"""

from __future__ import annotations

from mlip_jax.defaults.bounds import NOT_NEGATIVE, POSITIVE, Bounds
from mlip_jax.defaults.data import num_processes
from mlip_jax.defaults.field import Field, Part, optional, task
from mlip_jax.defaults.training import TRAIN

DIVERSITY = Part(
    "Training of a force field, and its evaluation on unseen molecules and conformers.",
    TRAIN.replace(task="diversity"),
    diversity=Part(
        "Evaluation on unseen molecules (IID-S), molecules of another data set (OOD-S), and "
        "unseen conformers near to (IID-C) and far from (OOD-C) the training conformers.",
        ood_path=optional(str, "Data set of other molecules.", unset="no OOD-S"),
        ood_reader=Field("auto", 'Name of the reader of ood_path; "auto" detects the format.'),
        ood_reader_options=Field("", "Options of the reader of ood_path."),
        rmsd_threshold=Field(
            1.0,
            "RMSD of the heavy atoms to the nearest training conformer above which a conformer "
            "is OOD-C.",
            unit="Å",
            bounds=POSITIVE,
        ),
        rmsd_bins=Field(
            (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0),
            "Edges of the bins of the RMSD to the nearest training conformer, ascending; the last "
            "bin has no upper edge.",
            unit="Å",
            bounds=Bounds("[0, inf]"),
        ),
        max_molecules=Field(
            1_000,
            "Maximum number of training molecules whose unseen conformers are evaluated.",
            bounds=NOT_NEGATIVE,
        ),
        max_structures=Field(
            20_000, "Maximum number of structures of IID-S, and of OOD-S.", bounds=NOT_NEGATIVE
        ),
        num_processes=num_processes("that find symmetries of molecules"),
    ),
)

DIVERSITY_REPORT = task(
    "diversity_report",
    "Report on the runs of a diversity study.",
    sweeps=Field(
        "",
        'Folders of sweeps of task "diversity", or of single runs, as in '
        '"runs/n_fixed,runs/ns_fixed".',
    ),
    metric=Field(
        "energy_mae_mev",
        "Error measure that the report shows.",
        choices={
            "energy_mae_mev": "",
            "energy_mae_mev_per_atom": "",
            "relative_mae_mev": "energy differences between conformers of a molecule",
            "force_mae_mev_per_ang": "for runs trained on forces",
        },
    ),
)
