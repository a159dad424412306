"""Config fields of the tasks "md" and "stability", which run molecular dynamics."""

from __future__ import annotations

import dataclasses

from mlip_jax.defaults.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Bounds
from mlip_jax.defaults.data import dtype
from mlip_jax.defaults.field import Field, Part, optional, task
from mlip_jax.defaults.shared_parts import FORCE_FIELD, MOLECULES, ORACLE

TRAJECTORY_FORMAT = Field(
    "extxyz", "Format of the frames.", choices=("extxyz", "hdf5"), legacy_value="extxyz"
)
RESTART_SECONDS = Field(
    60.0, "Time between restart files.", unit="s", bounds=Bounds("[0, inf]"), changes_results=False
)

# Fields that all tasks with molecular dynamics share.
COMMON = Part(
    "Integration.",
    timestep=Field(0.5, "Time step.", unit="fs", bounds=POSITIVE),
    friction=Field(0.01, "Friction of Langevin dynamics.", unit="1/fs", bounds=NOT_NEGATIVE),
    record_every=Field(20, "Number of steps between the rows of thermo.csv.", bounds=AT_LEAST_ONE),
    skin=Field(
        0.4,
        "Distance beyond the cutoff up to which neighbors are listed.",
        unit="Å",
        bounds=POSITIVE,
    ),
    bond_range=Field(
        (0.5, 1.5),
        "Shortest and longest length of an intact bond, relative to the sum of the covalent radii.",
        bounds=Bounds("[0, inf]"),
    ),
    max_temperature=optional(
        float,
        "Temperature above which a molecule is frozen.",
        unit="K",
        bounds=NOT_NEGATIVE,
        unset="ten times its own temperature, but at least 5000 K",
    ),
    dtype=dtype("the dynamics"),
    seed=Field(0, "Seed of the initial momenta and of the noise.", bounds=NOT_NEGATIVE),
    allow_nonconservative=Field(
        False,
        "Dynamics also with a force field whose forces are not the gradient of its energy.",
        legacy_value=False,
    ),
)

MD = task(
    "md",
    "Molecular dynamics with a force field.",
    FORCE_FIELD,
    MOLECULES,
    COMMON,
    replicas=Field(
        1, "Number of trajectories per molecule, which run in parallel.", bounds=AT_LEAST_ONE
    ),
    num_steps=Field(
        20_000,
        "Number of steps, which a later run may increase.",
        bounds=AT_LEAST_ONE,
        changes_results=False,
    ),
    restart_seconds=RESTART_SECONDS,
    ensemble=Field(
        "langevin",
        "Thermodynamic ensemble and thermostat.",
        choices={
            "nve": "constant energy",
            "langevin": "constant temperature by friction and noise",
            "rescaling": "constant temperature by stochastic velocity rescaling",
            "npt": "constant pressure and temperature by stochastic cell rescaling",
        },
    ),
    temperature=Field(300.0, "Temperature of the thermostat.", unit="K", bounds=NOT_NEGATIVE),
    initial_temperature=optional(
        float,
        "Temperature of the initial momenta.",
        unit="K",
        bounds=NOT_NEGATIVE,
        unset="temperature",
    ),
    draw_momenta=Field(
        False,
        "Random initial momenta also for molecules whose file has momenta. Otherwise the dynamics "
        "of these molecules continue with their momenta.",
        legacy_value=False,
    ),
    thermostat_time=Field(
        100.0,
        'Time constant of the thermostat of "rescaling" and "npt".',
        unit="fs",
        bounds=POSITIVE,
    ),
    pressure=Field(1.01325, 'Pressure of "npt".', unit="bar", bounds=Bounds("(-inf, inf)")),
    barostat_time=Field(
        1000.0, 'Time constant of the barostat of "npt".', unit="fs", bounds=POSITIVE
    ),
    compressibility=Field(
        4.6e-5,
        'Estimate of the compressibility for "npt"; the default is that of water.',
        unit="1/bar",
        bounds=POSITIVE,
    ),
    fix_com=Field(True, "Removal of the motion of the center of mass."),
    fix_rotation=Field(
        True, "Removal of the overall rotation of non-periodic molecules at the start."
    ),
    frame_every=Field(
        200, "Number of steps between frames; 0 writes no frames.", bounds=NOT_NEGATIVE
    ),
    trajectory_format=TRAJECTORY_FORMAT,
    stop_on_bond_break=Field(
        True, "Freezing of a molecule when one of its bonds breaks.", former_name="watch_bonds"
    ),
)

_COMPARED = ("compare_picoseconds",)
STABILITY = task(
    "stability",
    "Stability of molecular dynamics: energy drift, broken bonds, and spectra against a reference "
    "method.",
    FORCE_FIELD,
    MOLECULES,
    COMMON.replace(record_every=50),
    relax_first=Field(
        True, "Relaxation of the molecules with the force field before the dynamics."
    ),
    temperatures=Field(
        (300.0, 500.0, 800.0, 1200.0),
        "Temperatures of the Langevin dynamics.",
        unit="K",
        bounds=NOT_NEGATIVE,
    ),
    replicas=Field(5, "Number of trajectories per molecule and temperature.", bounds=AT_LEAST_ONE),
    picoseconds=Field(
        100.0, "Length of each trajectory at constant temperature.", unit="ps", bounds=POSITIVE
    ),
    nve_picoseconds=Field(
        20.0,
        "Length of the trajectory of each molecule at constant energy; 0 runs none.",
        unit="ps",
        bounds=NOT_NEGATIVE,
    ),
    nve_temperature=Field(
        300.0,
        "Initial temperature of the trajectory at constant energy.",
        unit="K",
        bounds=NOT_NEGATIVE,
    ),
    compare_picoseconds=Field(
        0.0,
        "Length of the trajectories of each molecule with the force field and with the "
        "reference method, which are compared; 0 compares none.",
        unit="ps",
        bounds=NOT_NEGATIVE,
        only_with=_COMPARED,
    ),
    compare_temperature=Field(
        300.0,
        "Temperature of the compared trajectories.",
        unit="K",
        bounds=POSITIVE,
        only_with=_COMPARED,
    ),
    trajectory_format=dataclasses.replace(
        TRAJECTORY_FORMAT,
        description="Format of the frames of the compared trajectories.",
        only_with=_COMPARED,
    ),
    oracle=Part("Reference method of the compared trajectories.", ORACLE, only_with=_COMPARED),
    restart_seconds=RESTART_SECONDS,
)
