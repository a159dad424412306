"""Config fields of the task "property", which trains predictors of molecular properties."""

from __future__ import annotations

from mlip_jax.defaults.bounds import FRACTION, NOT_NEGATIVE, PROBABILITY
from mlip_jax.defaults.data import DATA, SPLIT, seed
from mlip_jax.defaults.field import Field, Part, task
from mlip_jax.defaults.optimizer import OPTIMIZER
from mlip_jax.defaults.training import LOOP, MODEL, PENALTIES

GEOMETRIES = Part(
    "Geometries at which a property is learned and predicted; see simulation/geometry_sources.py.",
    geometry=Field(
        "labels",
        'Geometry of training inputs: "labels" (that of the property), a stage such as "pm3" (its '
        'last snapshot) or "pm3:first", "etkdg", "etkdg:mmff", or "relaxed(pm3)".',
    ),
    valid_geometry=Field("", "Geometry of validation inputs; if empty, data.geometry."),
    test_geometries=Field(
        ("labels",),
        "Geometries of test inputs. Each one is tested separately. Predictions for "
        '"etkdg:10" are means over 10 conformers.',
        changes_results=False,
    ),
    force_field=Field("", 'Workdir of the force field that relaxes the geometries "relaxed(...)".'),
)

PROPERTY = task(
    "property",
    "Training of a predictor of molecular properties.",
    seed=seed("the initial parameters and of the order of the training data"),
    data=Part(
        "Training, validation and test structures.",
        DATA.replace(require="none"),
        SPLIT.replace(num_train=0.8, num_valid=0.1, num_test=0.1),
        GEOMETRIES,
    ),
    property=Part(
        "Properties to predict.",
        targets=Field((), "Names of properties of the data, as in ('gap',)."),
        pooling=Field(
            "mean",
            "Pooling of atoms into the number of a structure.",
            choices={"mean": "", "sum": "grows with the size", "attention": ""},
        ),
        heads=Field(
            {},
            "Options by target where they differ, as in {'u0': {'pooling': 'sum', 'weight': 2.0}}.",
        ),
        penalty=Field(
            "mae",
            "Penalty of an error in units of the standard deviation of the property.",
            choices=PENALTIES,
        ),
        huber_delta=Field(
            1.0,
            'Error at which the penalty "huber" becomes linear, in standard deviations.',
            bounds=NOT_NEGATIVE,
        ),
    ),
    init=Part(
        "Start of the parameters.",
        workdir=Field(
            "",
            "Workdir of a force field or predictor to start from; if empty, training starts from "
            "random parameters.",
        ),
        train=Field(
            "all",
            "Parameters that are trained.",
            choices={"all": "", "heads": "the backbone is frozen"},
        ),
    ),
    align=Part(
        "Geometry alignment, or denoising of coordinates.",
        weight=Field(0.0, "Weight of the alignment loss.", bounds=NOT_NEGATIVE),
        loss=Field(
            "cosine",
            "Alignment loss.",
            choices={
                "cosine": "direction to the geometry of the labels",
                "mse": "denoising of coordinates",
                "mae": "positions that unimol_plus refines",
            },
        ),
        noise=Field(
            0.0,
            "Standard deviation of the noise on each coordinate of training inputs.",
            unit="Å",
            bounds=NOT_NEGATIVE,
        ),
        frames=Field(
            "",
            'Stages whose snapshots are training inputs as well, as in "pm3,DFT_1st". For '
            "unimol_plus, one geometry as in data.geometry.",
        ),
        frames_share=Field(0.5, "Fraction of training inputs that are snapshots.", bounds=FRACTION),
    ),
    dens=Part(
        "Pretraining of a force field with denoising of displaced structures (DeNS).",
        only_with=["dens.weight"],
        weight=Field(
            0.0,
            "Weight of denoising; a positive weight trains on energies and forces, without "
            "property.targets.",
            bounds=NOT_NEGATIVE,
        ),
        share=Field(
            0.25, "Fraction of structures that are displaced by align.noise.", bounds=FRACTION
        ),
        beta=Field(
            0.95,
            "Weight of the forces in (1 - beta) * energy loss + beta * force loss.",
            bounds=FRACTION,
        ),
    ),
    model=MODEL.replace(name=""),
    optimizer=OPTIMIZER.replace(learning_rate=5e-4),
    train=LOOP,
    report=Part(
        "Size of the report.",
        max_domain=Field(
            5_000,
            "Maximum number of training molecules that calibrate the detection of inputs outside "
            "the training domain.",
            bounds=NOT_NEGATIVE,
            legacy_value=1_000,
        ),
        coverage=Field(
            0.9,
            "Probability that a prediction interval contains the property.",
            bounds=PROBABILITY,
            changes_results=False,
        ),
    ),
)
