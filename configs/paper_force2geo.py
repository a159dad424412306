"""Tables and figures of Force2Geo and Force2Prop (arXiv:2507.00407) at reduced size.

All results are in one report.

    python -m mlip_jax.main --config=configs/paper_force2geo.py:DATA.lmdb \\
        --workdir=runs/paper --sweep
    python -m mlip_jax.main --config=configs/paper_force2geo.py:DATA.lmdb,tables \\
        --workdir=runs/tables --sweep
    python -m mlip_jax.main --config=configs/paper_force2geo.py:DATA.lmdb,runs/qcr \\
        --workdir=runs/paper --sweep

DATA.lmdb has trajectories in PubChemQCR's layout, along with a summary.csv that contains the
gap, preferably with off-equilibrium geometries (benchmarks/off_equilibrium.py). Force fields
are pre-trained first, on molecules that are in no test split. runs/qcr is an existing force
field to use instead of the main one; it must not be trained on the test molecules. The report
is runs/paper/report.html. Rerun the same command to resume; two at a time share the work.

"tables" only fills the comparison of predictors (Tables 1, 4, 5, 6 and 9): GIN-virtual, Uni-Mol+,
SchNet, ComENet, DimeNet++, SphereNet, TorchMD-Net and PaiNN from scratch, PaiNN with geometry
fine-tuning, and Force2Prop, on the random and the scaffold split. The default has all other tables,
too. Words after the path select the size:

    molecules=800   training molecules of each predictor; 0 for all
    subset=250      training molecules in Table 6; Table 9 has all; 0 leaves out Table 6
    epochs=10       epochs of each predictor; fine-tuning takes half of them
    width=128       features of all models
    steps=31000     training steps of the force field, with 8 structures each
    seeds=3         number of seeds
    second=PATH     data set of Table 5, as ∇²DFT with its summary.csv; without it, Table 5 shows
                    the random split
    published       published sizes and numbers of epochs in place of these

GIN-virtual reads bonds, not geometries. Uni-Mol+ reads bonds and a geometry from RDKit or from the
start of the cheap stage, and learns the geometry of the labels.

Hardware: with 2,400 training molecules about 3 minutes per variant on one CPU core.
"""

from pathlib import Path
from typing import NamedTuple

import ml_collections

from mlip_jax.config import unknown_name
from mlip_jax.configs import force2prop, spice

RELAXED = "relaxed(pm3:first)"
GEOMETRIES = ("labels", "pm3", "pm3:first", "etkdg", RELAXED, "relaxed(etkdg)")
TABLE_GEOMETRIES = ("labels", "pm3:first", "etkdg", RELAXED)
MAIN = "force-field"
# Architectures that are trained from scratch for comparison. GIN-virtual and Uni-Mol+ read bonds.
SPATIAL = ("schnet", "comenet", "dimenetpp", "spherenet", "equivariant_transformer")
BONDS = ("gin_virtual", "unimol_plus", "unimol_plus_cheap")
SPLITS = {"": "molecule", "scaffold-": "scaffold"}
# Start geometries of Uni-Mol+ by the name of its variant (Table 4).
UNIMOL_STARTS = {"unimol_plus": "etkdg", "unimol_plus_cheap": "pm3:first"}
_PROPERTY, _FIELD = "configs/force2prop.py:{},{}", "configs/pubchemqcr.py:{}"
_STAGES = "stages=('pm3','DFT_1st'); level_of_theory=GFN2-xTB"
_TRAINING_STAGES = "stages=('DFT_1st','DFT_2nd'); level_of_theory=GFN2-xTB"
_HELD_OUT = "{sweep}/split/split_records.json,{sweep}/scaffold-split/split_records.json"


# _SHORT: schedule of a predictor with a few hundred steps.
# _FAST: optimizer of a force field, more accurate than Adam with batches of 4 in the same time; see
# configs/pubchemqcr.py.
_SHORT = {"optimizer.warmup_steps": 30, "optimizer.learning_rate": 1e-3}
_FAST = {"optimizer.name": "muon", "optimizer.learning_rate": 2e-3, "train.batch_size": 8}


class Size(NamedTuple):
    """Size of the study; see the module."""

    tables: bool = False
    published: bool = False
    field: str = ""
    second: str = ""
    molecules: int = 0
    subset: int = 250
    epochs: float = 10.0
    width: int = 128
    steps: int = 31_000
    seeds: int = 3


def get_config(argument: str = "data/trajectories.lmdb") -> ml_collections.ConfigDict:
    c = force2prop.get_config("scratch,small")
    c.data.path, c.data.reader_options = argument.partition(",")[0], _STAGES
    _size(argument)  # reports unknown words
    return c


def sweep(argument: str = "data/trajectories.lmdb") -> list[dict]:
    data, size = argument.partition(",")[0], _size(argument)
    field = size.field or "{sweep}/" + MAIN
    runs = _Runs(data, field, size)
    for split in SPLITS.values():
        runs.split(split)
    if not size.field:
        runs.field(MAIN)
    _comparison(runs, field, size)
    if not size.tables:
        _ablations(runs, field, size)
    return runs.variants


def report(folder: Path) -> Path:
    from mlip_jax.reports.force2geo.paper import write_paper_report

    return write_paper_report(folder)


def _size(argument: str) -> Size:
    """Return the size that the words of an argument select."""
    values = {}
    for word in argument.split(",")[1:]:
        name, equals, value = word.partition("=")
        if not equals:
            flags = name in ("tables", "published")
            values |= {name: True} if flags else {"field": name}
        elif name not in Size._fields or name in ("tables", "published"):
            raise ValueError(unknown_name("word of this config", name, list(Size._fields)))
        else:
            values[name] = type(Size._field_defaults[name])(value)
    return Size(**values)


def _comparison(runs, field, size):
    """Add the rows of Tables 1, 4, 5, 6 and 9, all of one seed before those of the next one.

    An interrupted sweep then has complete tables with fewer seeds.
    """
    for seed in range(size.seeds):
        for prefix, split in SPLITS.items():
            for model in (*BONDS, *SPATIAL):
                name, only = f"{prefix}{model}-scratch", ("labels",) if size.tables else ()
                runs.property(name, "scratch", (seed,), split, model=model, geometries=only)
            runs.property(prefix + "scratch", "scratch", (seed,), split)
            runs.property(prefix + "force2prop", "all", (seed,), split, init=field)
            runs.fine_tuning(prefix + "finetune", (seed,), split)
    for seed in range(size.seeds if size.subset else 0):
        for prefix, split in SPLITS.items():  # Table 6, the same with fewer molecules
            few = dict(molecules=size.subset, geometries=("labels",))
            for model in (*BONDS, *SPATIAL):
                name = f"subset-{prefix}{model}-scratch"
                runs.property(name, "scratch", (seed,), split, model=model, **few)
            runs.property(f"subset-{prefix}scratch", "scratch", (seed,), split, **few)
            runs.property(f"subset-{prefix}force2prop", "all", (seed,), split, init=field, **few)
    for seed in range(size.seeds if size.second else 0):
        for model in ("", *SPATIAL):
            name = f"second-{model}-scratch" if model else "second-scratch"
            runs.property(name, "scratch", (seed,), data=size.second, model=model)
        runs.property("second-force2prop", "all", (seed,), data=size.second, init=field)


def _ablations(runs, field, size):
    """Add the runs of the other tables and figures."""
    seeds = range(size.seeds)
    runs.fine_tuning("finetune-no-alignment", seeds, weight=0.0)
    # equally long, without noise or alignment
    runs.fine_tuning("continued", seeds, weight=0.0, noise=0.0, frames="")
    runs.property("heads", "heads", seeds, init=field)
    runs.property("random-heads", "random_heads", seeds)
    for molecules in (250, 800):
        for name, mode in (("scratch", "scratch"), ("force2prop", "all")):
            init = field if mode == "all" else ""
            runs.property(f"{name}-{molecules}", mode, seeds, molecules=molecules, init=init)
    runs.field("force-field-300", molecules=300)
    runs.property("force2prop-300", "all", seeds, init="{sweep}/force-field-300")
    runs.denoising("denoising")
    runs.property("denoising-force2prop", "all", seeds, init="{sweep}/denoising")
    runs.property("rdkit-scratch", "scratch", seeds, geometry="etkdg")
    for weight in (0.01, 1.0):
        runs.fine_tuning(f"finetune-weight-{weight:g}", seeds, weight=weight)
    for noise in (0.05, 0.3):
        runs.fine_tuning(f"finetune-noise-{noise:g}", seeds, noise=noise)
    runs.field("force-field-schnet", model="schnet")
    runs.property("schnet-force2prop", "all", seeds, init="{sweep}/force-field-schnet")
    runs.dens("force-field-dens")
    runs.property("dens-force2prop", "all", seeds, init="{sweep}/force-field-dens")


def options_of(model: str, size: Size) -> dict:
    """Return the options of a model, e.g. "painn", in the study."""
    model = "unimol_plus" if model == "unimol_plus_cheap" else model
    if model in force2prop.BOND_MODELS:
        kind = "published" if size.published else "small"
        narrow = {"num_features": size.width} if kind == "small" else {}
        narrow |= {"num_layers": 2} if narrow and model == "unimol_plus" else {}
        return dict(force2prop.BOND_MODELS[model][kind]) | narrow
    if size.published:
        return force2prop.PAINN["published"] if model == "painn" else dict(spice.MODELS[model])
    half = max(size.width // 2, 32)
    directional = dict(
        num_features=half,
        num_layers=2,
        cutoff=4.5,
        num_radial=6,
        max_degree=3,
        num_triplet_features=max(half // 2, 8),
        energy_width=size.width,
    )
    return {
        "painn": dict(num_features=size.width, num_layers=3, cutoff=4.5, num_radial=32),
        "schnet": dict(num_features=size.width, num_layers=4, cutoff=4.5, num_radial=20),
        "comenet": dict(num_features=half, num_layers=3, cutoff=4.5, num_radial=3, max_degree=1),
        "dimenetpp": directional,
        "spherenet": directional,
        "equivariant_transformer": dict(
            num_features=size.width, num_layers=3, num_heads=8, cutoff=4.5, num_radial=32
        ),
    }[model]


class _Runs:
    """List of variants, with a method for each kind of run."""

    def __init__(self, data: str, field: str, size: Size):
        self.variants, self._data, self._field, self._size = [], data, field, size
        self._word = "published" if size.published else "small"
        self._geometries = TABLE_GEOMETRIES if size.tables else GEOMETRIES

    def property(
        self,
        name,
        mode,
        seeds=(0,),
        split="molecule",
        molecules=None,
        model="",
        init="",
        geometry="labels",
        geometries=(),
        data="",
    ):
        geometries = geometries or self._geometries
        if data or model == "gin_virtual":
            geometries = ("labels",)
        for seed in seeds:
            variant = {
                "name": f"{name}-{seed}",
                "config": _PROPERTY.format(mode, self._word),
                "seed": seed,
                "data.path": data or self._data,
                "data.split": split,
                "data.geometry": geometry,
                "data.test_geometries": geometries,
            }
            if any(source.startswith("relaxed") for source in geometries):
                variant["data.force_field"] = self._field
            if not data:
                variant["data.reader_options"] = _STAGES
            if not self._size.published:
                variant |= {"train.num_epochs": self._size.epochs, **_SHORT}
            if init:
                variant["init.workdir"] = init
            if molecules or self._size.molecules:
                variant["data.num_molecules"] = molecules or self._size.molecules
            if not init:
                variant |= self._architecture(model or "painn")
            if model in UNIMOL_STARTS:
                variant |= _refinement(UNIMOL_STARTS[model])
                variant.pop("data.force_field", None)
            self.variants.append(variant)

    def split(self, by):
        """Add a run that only provides its split for the training of the force field."""
        self.variants.append(
            {
                "name": "split" if by == "molecule" else f"{by}-split",
                "config": _PROPERTY.format("scratch", "small"),
                "data.path": self._data,
                "data.reader_options": _STAGES,
                "data.split": by,
                "data.num_molecules": 50,
                "train.num_epochs": 1.0,
            }
        )

    def fine_tuning(
        self, name, seeds, split="molecule", weight=0.1, noise=0.1, frames="pm3,DFT_1st"
    ):
        prefix = next(p for p, s in SPLITS.items() if s == split)
        for seed in seeds:
            variant = {
                "name": f"{name}-{seed}",
                "config": f"configs/geometry_finetune.py:{self._word}",
                "seed": seed,
                "data.path": self._data,
                "data.reader_options": _STAGES,
                "data.split": split,
                "init.workdir": f"{{sweep}}/{prefix}scratch-{seed}",
                "data.force_field": self._field,
                "align.frames": frames,
                "align.weight": weight,
                "align.noise": noise,
                "data.test_geometries": self._geometries,
            }
            if not self._size.published:
                variant |= {"train.num_epochs": self._size.epochs / 2, **_SHORT}
            if self._size.molecules:
                variant["data.num_molecules"] = self._size.molecules
            self.variants.append(variant)

    def field(self, name, molecules=None, model="painn"):
        variant = {
            "name": name,
            "config": _FIELD.format(self._word),
            "data.path": self._data,
            "data.reader_options": _TRAINING_STAGES,
            "data.held_out": _HELD_OUT,
            "data.num_train": 80_000_000,
            **self._architecture(model),
        }
        if not self._size.published:
            steps = self._size.steps // (4 if model != "painn" else 1)
            variant |= {**_FAST, "train.num_steps": steps}
        if molecules:
            variant |= {
                "data.num_molecules": molecules,
                "data.num_conformers": 12,
                "train.num_steps": self._size.steps // 8,
            }
        self.variants.append(variant)

    def dens(self, name):
        variant = {
            "name": name,
            "config": f"configs/dens.py:{self._word}",
            "data.path": self._data,
            "data.reader_options": _TRAINING_STAGES,
            "data.held_out": _HELD_OUT,
        }
        if not self._size.published:
            options = self._architecture("painn")["model.options"] | {"force_encoding": True}
            steps = self._size.steps // 2
            variant |= {**_FAST, "model.options": options, "train.num_steps": steps}
        self.variants.append(variant)

    def denoising(self, name):
        variant = {
            "name": name,
            "config": f"configs/denoise.py:{self._word}",
            "data.path": self._data,
            "data.reader_options": "stages=('DFT_1st',); level_of_theory=GFN2-xTB",
            "data.held_out": _HELD_OUT,
        }
        if not self._size.published:
            variant |= {"model.options": self._architecture("painn")["model.options"]}
            variant["train.num_epochs"] = 4.0
        self.variants.append(variant)

    def _architecture(self, model: str) -> dict:
        """Return the fields of an architecture."""
        name = "unimol_plus" if model in UNIMOL_STARTS else model
        return {"model.name": name, "model.options": options_of(model, self._size)}


def _refinement(start: str) -> dict:
    """Return the fields that train Uni-Mol+ to refine a geometry, without its loss of distances.

    Inputs are the geometry of the labels with noise (80 %), or the start geometry (20 %).
    """
    return {
        "align.loss": "mae",
        "align.weight": 0.3,
        "align.noise": 0.2,
        "align.frames": start,
        "align.frames_share": 0.2,
        "data.valid_geometry": start,
        "data.test_geometries": (start,),
    }
