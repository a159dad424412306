"""Tables and figures of Force2Geo and Force2Prop (arXiv:2507.00407) at reduced size.

All results are in one report.

    python -m mlip_jax.main --config=configs/paper_force2geo.py:DATA.lmdb \\
        --workdir=runs/paper --sweep
    python -m mlip_jax.main --config=configs/paper_force2geo.py:DATA.lmdb,runs/qcr \\
        --workdir=runs/paper --sweep

DATA.lmdb has trajectories in PubChemQCR's layout, along with a summary.csv that contains the
gap, preferably with off-equilibrium geometries (benchmarks/off_equilibrium.py). Force fields
are pre-trained first, on molecules that are in no test split. runs/qcr is an existing force
field to use instead of the main one; it must not be trained on the test molecules. The report
is runs/paper/report.html. Rerun the same command to resume; two at a time share the work. For
the published size use configs/force2prop.py, configs/geometry_finetune.py and
configs/denoise.py without "small".

SchNet, ComENet, DimeNet++, SphereNet and GIN-virtual are trained from scratch for comparison, the
last four at a fifth to half of the published width. GIN-virtual reads bonds, not geometries.

Hardware: with 2,400 training molecules about 3 minutes per variant on one CPU core, two hours
on two cores.
"""

from pathlib import Path

import ml_collections

from mlip_jax.configs import force2prop, spice

SEEDS = (0, 1, 2)
EPOCHS, FINE_TUNING_EPOCHS = 10.0, 4.0
RELAXED = "relaxed(pm3:first)"
GEOMETRIES = ("labels", "pm3", "pm3:first", "etkdg", RELAXED, "relaxed(etkdg)")
MAIN = "force-field"
# Architectures that are trained from scratch for comparison.
_DIRECTIONAL = dict(
    num_features=64,
    num_layers=2,
    cutoff=4.5,
    num_radial=6,
    max_degree=3,
    num_triplet_features=32,
    energy_width=128,
)
ARCHITECTURES = {
    "schnet": {**spice.MODELS["schnet"], "cutoff": 4.5, "num_layers": 4},
    "comenet": dict(num_features=64, num_layers=3, cutoff=4.5, num_radial=3, max_degree=1),
    "dimenetpp": _DIRECTIONAL,
    "spherenet": _DIRECTIONAL,
    "gin_virtual": force2prop.BOND_MODELS["gin_virtual"]["small"],
}
_PROPERTY, _FIELD = "configs/force2prop.py:{},small", "configs/pubchemqcr.py:small"
_STAGES = "stages=('pm3','DFT_1st'); level_of_theory=GFN2-xTB"
_TRAINING_STAGES = "stages=('DFT_1st','DFT_2nd'); level_of_theory=GFN2-xTB"
_HELD_OUT = "{sweep}/split/split_records.json,{sweep}/scaffold-split/split_records.json"


def get_config(argument: str = "data/trajectories.lmdb") -> ml_collections.ConfigDict:
    c = force2prop.get_config("scratch,small")
    c.data.path, c.data.reader_options = argument.partition(",")[0], _STAGES
    return c


def sweep(argument: str = "data/trajectories.lmdb") -> list[dict]:
    data, _, given = argument.partition(",")
    field = given or "{sweep}/" + MAIN
    runs = _Runs(data, field)
    for split in ("molecule", "scaffold"):
        runs.split(split)
    if not given:
        runs.field(MAIN)
    runs.property("scratch", "scratch", seeds=SEEDS)
    runs.property("force2prop", "all", field, SEEDS)
    runs.fine_tuning("finetune", SEEDS)
    runs.fine_tuning("finetune-no-alignment", SEEDS, weight=0.0)
    # equally long, without noise or alignment
    runs.fine_tuning("continued", SEEDS, weight=0.0, noise=0.0, frames="")
    runs.property("heads", "heads", field, SEEDS)
    runs.property("random-heads", "random_heads", seeds=SEEDS)
    for molecules in (250, 800):
        for name, mode in (("scratch", "scratch"), ("force2prop", "all")):
            runs.property(
                f"{name}-{molecules}",
                mode,
                field if mode == "all" else "",
                SEEDS,
                molecules=molecules,
            )
    runs.property("scaffold-scratch", "scratch", seeds=SEEDS, split="scaffold")
    runs.property("scaffold-force2prop", "all", field, SEEDS, split="scaffold")
    runs.field("force-field-300", molecules=300)
    runs.property("force2prop-300", "all", "{sweep}/force-field-300", SEEDS)
    runs.denoising("denoising")
    runs.property("denoising-force2prop", "all", "{sweep}/denoising", SEEDS)
    runs.property("rdkit-scratch", "scratch", seeds=SEEDS, geometry="etkdg")
    for weight in (0.01, 1.0):
        runs.fine_tuning(f"finetune-weight-{weight:g}", SEEDS, weight=weight)
    for noise in (0.05, 0.3):
        runs.fine_tuning(f"finetune-noise-{noise:g}", SEEDS, noise=noise)
    runs.field("force-field-schnet", model="schnet")
    runs.property("schnet-force2prop", "all", "{sweep}/force-field-schnet", SEEDS)
    runs.dens("force-field-dens")
    runs.property("dens-force2prop", "all", "{sweep}/force-field-dens", SEEDS)
    for model in ARCHITECTURES:
        runs.property(f"{model}-scratch", "scratch", seeds=SEEDS, model=model)
        runs.property(
            f"scaffold-{model}-scratch", "scratch", seeds=SEEDS, split="scaffold", model=model
        )
    return runs.variants


def report(folder: Path) -> Path:
    from mlip_jax.reports.force2geo.paper import write_paper_report

    return write_paper_report(folder)


class _Runs:
    """List of variants, with a method for each kind of run."""

    def __init__(self, data: str, field: str):
        self.variants, self._data, self._field = [], data, field

    def property(
        self,
        name,
        mode,
        init="",
        seeds=(0,),
        split="molecule",
        molecules=None,
        model="",
        geometry="labels",
    ):
        for seed in seeds:
            variant = {
                "name": f"{name}-{seed}",
                "config": _PROPERTY.format(mode),
                "seed": seed,
                "data.path": self._data,
                "data.reader_options": _STAGES,
                "data.split": split,
                "train.num_epochs": EPOCHS,
                "data.geometry": geometry,
                "data.test_geometries": GEOMETRIES,
                "data.force_field": self._field,
            }
            if init:
                variant["init.workdir"] = init
            if molecules:
                variant["data.num_molecules"] = molecules
            variant |= _architecture(model)
            if model in force2prop.BOND_MODELS:  # no geometries, and no force field for them
                variant["data.test_geometries"] = ("labels",)
                del variant["data.force_field"]
            self.variants.append(variant)

    def split(self, by):
        """Add a run that only provides its split for the training of the force field."""
        self.variants.append(
            {
                "name": "split" if by == "molecule" else f"{by}-split",
                "config": _PROPERTY.format("scratch"),
                "data.path": self._data,
                "data.reader_options": _STAGES,
                "data.split": by,
                "data.num_molecules": 50,
                "train.num_epochs": 1.0,
            }
        )

    def fine_tuning(self, name, seeds, weight=0.1, noise=0.1, frames="pm3,DFT_1st"):
        for seed in seeds:
            self.variants.append(
                {
                    "name": f"{name}-{seed}",
                    "config": "configs/geometry_finetune.py:small",
                    "seed": seed,
                    "data.path": self._data,
                    "data.reader_options": _STAGES,
                    "init.workdir": f"{{sweep}}/scratch-{seed}",
                    "data.force_field": self._field,
                    "align.frames": frames,
                    "align.weight": weight,
                    "align.noise": noise,
                    "train.num_epochs": FINE_TUNING_EPOCHS,
                    "data.test_geometries": GEOMETRIES,
                }
            )

    def field(self, name, molecules=None, model=""):
        variant = {
            "name": name,
            "config": _FIELD,
            "data.path": self._data,
            "data.reader_options": _TRAINING_STAGES,
            "data.held_out": _HELD_OUT,
            "data.num_train": 80_000_000,
        }
        if molecules:
            variant |= {
                "data.num_molecules": molecules,
                "data.num_conformers": 12,
                "train.num_steps": 8_000,
            }
        if model:
            variant |= {**_architecture(model), "train.num_steps": 14_000}
        self.variants.append(variant)

    def dens(self, name):
        self.variants.append(
            {
                "name": name,
                "config": "configs/dens.py:small",
                "data.path": self._data,
                "data.reader_options": _TRAINING_STAGES,
                "data.held_out": _HELD_OUT,
                "train.num_steps": 28_000,
            }
        )

    def denoising(self, name):
        self.variants.append(
            {
                "name": name,
                "config": "configs/denoise.py:small",
                "data.path": self._data,
                "data.reader_options": "stages=('DFT_1st',); level_of_theory=GFN2-xTB",
                "data.held_out": _HELD_OUT,
                "train.num_epochs": 4.0,
            }
        )


def _architecture(model: str) -> dict:
    """Return the fields of an architecture, none for the default."""
    return {"model.name": model, "model.options": ARCHITECTURES[model]} if model else {}
