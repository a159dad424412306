"""Every field of the configs, with its default: one function for each task."""

from __future__ import annotations

import ml_collections
from ml_collections.config_dict import placeholder

from mlip_jax.config import TERMS


def train_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "train", with its default. Units are eV and Å."""
    c = ml_collections.ConfigDict()
    c.task = "train"
    c.seed = 0

    c.data = ml_collections.ConfigDict()
    data_defaults(c.data)
    c.data.elements = ("H", "C", "N", "O", "S")
    _split_defaults(c.data)
    c.data.num_train, c.data.num_valid, c.data.num_test = 100_000, 20_000, 20_000
    # Or "isolated_atoms", "none", or "H=-13.6,C=-1029.4,..." in eV; with init.workdir least squares of what it leaves.
    c.data.reference_energies = "least_squares"

    c.init = ml_collections.ConfigDict()
    c.init.workdir = ""  # of a force field to fine-tune (or "so3lr:params.pkl", ...); empty: begin at random

    c.model = ml_collections.ConfigDict()
    c.model.name = "so3krates"  # empty: that of init.workdir
    c.model.options = ml_collections.ConfigDict()  # fields of the model's class

    c.potential = ml_collections.ConfigDict()
    _term_defaults(c.potential)

    c.loss = ml_collections.ConfigDict()
    c.loss.beta = 0.99  # (1 - beta) * energy + beta * force
    c.loss.beta_end = 0.99  # reached at the last step ...
    c.loss.beta_begin = 0.5  # ... from this fraction of the steps on ...
    c.loss.beta_schedule = "geometric"  # ... in 1 - beta; "linear", or "step": at once
    c.loss.penalty = "mse"  # "mse", "mae", "huber", "rmse" (of each structure)
    c.loss.force_penalty = placeholder(str)  # another one for the forces; also "norm" and "relative" (losses.py)
    c.loss.huber_delta = 0.05
    c.loss.force_floor = 0.1  # eV/Å: "relative" is |error|² / (|force|² + force_floor²) of an atom
    c.loss.energy_per_atom = True

    _optimization_defaults(c)

    c.report = ml_collections.ConfigDict()
    c.report.max_train = 5_000  # training structures that the report evaluates
    c.report.max_test = 50_000  # validation and test structures that it evaluates
    c.report.max_domain = 1_000  # structures of each part that tell what lies outside of the domain; 0: domain unknown
    return c


def property_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "property", with its default. Units are eV and Å, or those of the property."""
    c = ml_collections.ConfigDict()
    c.task = "property"
    c.seed = 0

    c.data = ml_collections.ConfigDict()
    data_defaults(c.data)
    c.data.require = "none"
    _split_defaults(c.data)
    c.data.num_train, c.data.num_valid, c.data.num_test = 0.8, 0.1, 0.1
    # What training, validation and tests see: "labels" (the geometry of the property), a stage as "pm3" (its last
    # snapshot) or "pm3:first", "etkdg", "etkdg:mmff", "relaxed(pm3)" (simulation/geometry_sources.py).
    c.data.geometry = "labels"
    c.data.valid_geometry = ""  # empty: as data.geometry
    c.data.test_geometries = ("labels",)
    c.data.force_field = ""  # workdir of the one that makes relaxed(...)

    c.property = ml_collections.ConfigDict()
    c.property.targets = ()  # names of properties of the data: ("gap",)
    c.property.pooling = "mean"  # of numbers of a structure: "mean", "sum" (grows with the size), "attention"
    c.property.heads = ml_collections.ConfigDict()  # by target, what differs: {"u0": {"pooling": "sum", "weight": 2.0}}
    c.property.penalty = "mae"  # "mse", "huber", "rmse"; of the property over its spread
    c.property.huber_delta = 1.0

    c.init = ml_collections.ConfigDict()
    c.init.workdir = ""  # of a force field or a predictor to begin from; empty: at random
    c.init.train = "all"  # or "heads": the backbone stays as it is

    c.align = ml_collections.ConfigDict()  # geometry alignment, or denoising
    c.align.weight = 0.0
    c.align.loss = "cosine"  # or "mse": denoising of coordinates
    c.align.noise = 0.0  # Å, on each coordinate of training inputs
    c.align.frames = ""  # stages whose snapshots are training inputs, too: "pm3,DFT_1st"
    c.align.frames_share = 0.5

    c.dens = ml_collections.ConfigDict()  # pre-training of a force field with denoising (training/dens.py)
    c.dens.weight = 0.0  # of denoising; above 0 there are no property.targets: energies and forces are learned
    c.dens.share = 0.25  # of the structures that are displaced, by align.noise
    c.dens.beta = 0.95  # (1 - beta) * energy + beta * force

    c.model = ml_collections.ConfigDict()
    c.model.name = ""  # empty: that of init.workdir
    c.model.options = ml_collections.ConfigDict()

    _optimization_defaults(c)
    c.optimizer.learning_rate = 5e-4
    c.report = ml_collections.ConfigDict()
    c.report.max_domain = 5_000  # training molecules that are kept to tell what lies outside of their domain
    return c


def _split_defaults(data: ml_collections.ConfigDict) -> None:
    data.split = "molecule"  # "random", "scaffold", "scaffold_random", "size", "official"
    data.split_files = ""  # record numbers of an own split: "split.json" or "train=a.csv,test=b.csv"
    data.split_seed = 0
    # Files of other splits (split_records.json of a run on the same data) whose test molecules are not trained on.
    data.held_out = ""
    # Train on so many conformations of each of so many molecules of the training part; a larger subset holds a smaller.
    data.num_molecules, data.num_conformers = placeholder(int), 1
    data.min_conformers = placeholder(int)  # that a molecule must have; the largest num_conformers of a comparison
    data.fewer_conformers = "exclude"  # molecules with fewer than that; "last": drawn where the others do not suffice
    # Of these molecules; "maxmin": each as unlike those before as can be, by fingerprints; "embedding": by the features
    # of a force field.
    data.selection = "random"
    data.selection_force_field = ""  # workdir of its training run


def _optimization_defaults(c: ml_collections.ConfigDict) -> None:
    """The parts "optimizer" and "train"."""
    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "adam"  # "adam", "amsgrad", "adamw", "muon"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.learning_rate_end = 1e-5
    c.optimizer.schedule = "cosine"  # "cosine", "exponential", "step", "plateau", "constant"
    c.optimizer.warmup_steps = 200
    c.optimizer.decay_factor = 0.5  # of "step" and "plateau"
    c.optimizer.decay_epochs = 40.0  # of "step"
    c.optimizer.plateau_patience = 10  # epochs without a better validation loss that "plateau" endures
    c.optimizer.plateau_threshold = 1e-4  # relative: what counts as better
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.999, 1e-8
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 10.0
    c.optimizer.freeze = ()  # paths of parameters that stay as they are: ("params/embedding/*",)
    c.optimizer.rates = ""  # factors to the learning rate by path: "params/backbone/*=0.1"

    c.train = ml_collections.ConfigDict()
    c.train.num_steps = 10_000
    c.train.num_epochs = placeholder(float)  # instead of num_steps
    c.train.batch_size = 16  # average structures of an update, of all devices together
    c.train.micro_batches = placeholder(int)  # that an update is made of; unset: one for each device of the first start
    c.train.ema_decay = 0.999
    c.train.log_every = 50
    c.train.valid_every = 500
    c.train.checkpoint_every = 500
    c.train.max_valid = 2_000  # structures of a validation while training; the report uses all
    c.train.on_nonfinite = "stop"  # at a loss that is not finite; "skip" the update, or "rollback" to the checkpoint
    # Data that stay on the device, where batches are built; unset: on a GPU or TPU if they take little of its memory.
    c.train.resident = placeholder(bool)
    c.train.steps_per_dispatch = 0  # updates of one call to the device; 0: many if the data are resident
    c.train.profile_steps = 0  # steps whose trace is written to trace/ in the workdir; also --profile


def _term_defaults(potential: ml_collections.ConfigDict) -> None:
    """Energy terms that are added to the model's energy."""
    for term in TERMS:
        potential[term] = False
        potential[f"{term}_options"] = ml_collections.ConfigDict()  # fields of the term's class
    potential.long_range_cutoff = 12.0  # Å, of electrostatics and dispersion; inf: all pairs, for open structures alone


def diversity_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "diversity", with its default: those of task "train", and what is evaluated."""
    c = train_defaults()
    c.task = "diversity"
    c.diversity = ml_collections.ConfigDict()
    c.diversity.ood_path = placeholder(str)  # data set of other molecules; unset: no OOD-S
    c.diversity.ood_reader, c.diversity.ood_reader_options = "auto", ""  # as data.reader and data.reader_options
    c.diversity.rmsd_threshold = 1.0  # Å over the heavy atoms, to the nearest training conformer: beyond is OOD-C
    c.diversity.rmsd_bins = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # Å; the last one holds all beyond
    c.diversity.max_molecules = 1_000  # training molecules whose unseen conformers are evaluated
    c.diversity.max_structures = 20_000  # of IID-S and OOD-S
    c.diversity.num_processes = 0  # that find symmetries; 0: one for each core
    return c


def diversity_report_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "diversity_report", with its default."""
    c = ml_collections.ConfigDict()
    c.task = "diversity_report"
    c.sweeps = ""  # folders of sweeps of task "diversity", or of single runs: "runs/n_fixed,runs/ns_fixed"
    # Or "energy_mae_mev_per_atom", "relative_mae_mev" (of differences within a molecule), "force_mae_mev_per_ang" (of
    # runs that were trained on forces).
    c.metric = "energy_mae_mev"
    return c


def convert_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "convert", with its default."""
    c = ml_collections.ConfigDict()
    c.task = "convert"
    c.data = ml_collections.ConfigDict()
    data_defaults(c.data)
    c.data.require = "none"  # structures without energies and forces may have properties, or be there to be relaxed
    c.store = ml_collections.ConfigDict()
    c.store.dtype = "float32"  # of positions, forces and atom properties; or "float64"
    c.store.atoms_per_shard = 1_000_000
    c.store.num_processes = 0  # 0: one for each core
    return c


def inspect_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "inspect_data", with its default."""
    c = ml_collections.ConfigDict()
    c.task = "inspect_data"
    c.data = ml_collections.ConfigDict()
    data_defaults(c.data)
    c.data.require = "none"
    return c


def conformers_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "generate_conformers", with its default."""
    c = ml_collections.ConfigDict()
    c.task = "generate_conformers"
    c.smiles = ""  # file of SMILES, .smi or .csv
    c.subset = "Conformers"  # that they are filed under
    c.num_molecules = placeholder(int)  # the first so many that are fit; unset: all
    c.seed = 0  # of the embedding
    c.molecules_per_file = 1_000  # that are held in memory
    c.num_processes = 0  # 0: one for each core

    c.select = ml_collections.ConfigDict()  # molecules of the file that are fit
    c.select.elements = ()  # symbols; empty: any
    c.select.charge = placeholder(int)  # e; unset: any
    c.select.charge = 0
    c.select.min_atoms, c.select.max_atoms = placeholder(int), placeholder(int)  # hydrogens included
    c.select.min_rotatable = 0

    c.conformers = ml_collections.ConfigDict()
    c.conformers.num_conformers = 20  # of a molecule, at most: those of the lowest energy by the force field
    c.conformers.min_conformers = 1  # a molecule with fewer different ones is left out
    c.conformers.candidates = 2.0  # geometries that are embedded for each conformer that is wanted
    c.conformers.prune_rmsd = 0.25  # Å over the heavy atoms; conformers closer than that are the same
    c.conformers.mmff_steps = 1_000
    c.conformers.gfn2_steps = 0  # evaluations of GFN2-xTB that relax each conformer; 0: single points only
    return c


def force2geo_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "force2geo_eval", with its default. Units are eV and Å."""
    c = ml_collections.ConfigDict()
    c.task = "force2geo_eval"
    c.seed = 0  # of the selection, the embedding of SMILES and the bootstrap
    c.force_field = placeholder(str)  # workdir of a training run; several to compare: "name=path,name2=path2"

    c.data = ml_collections.ConfigDict()
    data_defaults(c.data)  # path: also SMILES (.smi, .csv); unset: the test part of the first force field's own data
    c.data.require = "none"
    c.data.stage = placeholder(str)  # start from the first snapshot of this subset: "pm3"; unset: of any
    c.data.reference = "oracle"  # whose minimum counts: the oracle's, from the start; "data": the last snapshot there
    c.data.reference_stage = placeholder(str)  # subset of that snapshot: "DFT_1st"
    c.data.num_molecules = 1_000
    c.data.selection = "maxmin"  # "random", "all"
    c.data.first = placeholder(str)  # name of the molecule that MaxMin begins with; unset: drawn by the seed
    c.data.allow_seen = False  # take molecules that were in a force field's training or validation part, too

    c.relax = ml_collections.ConfigDict()
    c.relax.optimizer = "bfgs"  # "lbfgs", "fire"
    c.relax.fmax = 0.05  # eV/Å, largest force on an atom at the end
    c.relax.max_steps = 500
    c.relax.maxstep = 0.2  # Å
    c.relax.dtype = "float32"
    c.relax.batch_atoms = placeholder(int)  # atoms relaxed at a time; unset: by the device

    c.oracle = ml_collections.ConfigDict()
    _oracle_defaults(c.oracle)
    c.oracle.fmax = 0.05  # eV/Å, of its own minima
    c.oracle.max_steps = 500
    c.oracle.cache = ""  # file that keeps its results, which runs may share; empty: oracle.jsonl in the workdir

    c.metrics = ml_collections.ConfigDict()
    c.metrics.chemical_accuracy = 1.0  # kcal/mol above the oracle's minimum
    c.metrics.fmax = 0.05  # eV/Å, of the oracle's forces
    c.metrics.min_gap = 1e-3  # eV between start and minimum, below which a percentage means nothing
    c.metrics.num_bootstrap = 1_000
    return c


def _input_defaults(c: ml_collections.ConfigDict) -> None:
    """A force field and the molecules that it is used on."""
    # Workdir of a training run, or so3lr:params.pkl, schnetpack:FILE.safetensors, torchmdnet:FILE.safetensors,
    # parameters:FOLDER.
    c.force_field = ""
    _molecule_defaults(c)


def _molecule_defaults(c: ml_collections.ConfigDict) -> None:
    c.input = ""  # .smi, .csv, .sdf, .xyz, .db, what ASE reads, or a store
    c.smiles_column, c.name_column = "", ""  # of a CSV file; empty: looked for
    c.limit = placeholder(int)  # molecules from the start of the input; a later run may take more
    c.mmff = False  # relax geometries that are embedded from SMILES with MMFF94 first


def _oracle_defaults(oracle: ml_collections.ConfigDict) -> None:
    """The reference method."""
    oracle.method = "GFN2-xTB"  # "GFN1-xTB", or "package.module:Class" of any ASE calculator, which is run as it is
    oracle.options = ""  # keyword arguments of its class: "accuracy=0.1; max_iterations=500"
    oracle.num_processes = 0  # 0: one for each core


def relax_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "relax", with its default. Units are eV and Å."""
    c = ml_collections.ConfigDict()
    c.task = "relax"
    _input_defaults(c)
    c.num_conformers = 1  # of each SMILES
    c.seed = 0  # of the embedding
    c.num_processes = 0  # that embed SMILES, beside each process of the run; 0: one for each core

    c.optimizer = "bfgs"  # "bfgs", "lbfgs", "fire"
    c.fmax = 0.05  # eV/Å: relaxed when no force on an atom is larger
    c.max_steps = 500
    c.maxstep = 0.2  # Å that an atom moves in a step at most
    c.dtype = "float32"  # or "float64"
    c.batch_atoms = placeholder(int)  # atoms of a batch on the device; unset: what suits it
    c.trajectory_every = 0  # steps between the frames of trajectories.xyz; 0: none
    c.formats = ("xyz", "sdf")  # of the relaxed molecules: relaxed.xyz, and relaxed.sdf where bonds are known
    return c


def ensemble_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "ensemble", with its default."""
    c = ml_collections.ConfigDict()
    c.task = "ensemble"
    c.members = ""  # workdirs of training runs: "runs/a,runs/b,runs/c"; it is the data of the first that are used
    c.max_structures = 2_000  # of its validation part, and of its test part
    c.seed = 0  # of their choice
    return c


def export_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "export", with its default."""
    c = ml_collections.ConfigDict()
    c.task = "export"
    c.force_field = ""  # as of task "relax"
    c.max_atoms = 64  # of a structure
    c.max_pairs = placeholder(int)  # within the cutoff, each counted once; unset: all, or those of a dense solid
    c.max_long_range_pairs = placeholder(int)  # the same within the long-range cutoff, where there is one
    c.periodic = False  # with cell and stress
    c.dtype = "float32"  # or "float64"
    c.platforms = ("cpu", "cuda", "tpu")  # out of simulation/export.py's PLATFORMS
    return c


def predict_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "predict", with its default. Units are eV and Å, or those of the property."""
    c = ml_collections.ConfigDict()
    c.task = "predict"
    c.predictor = ""  # workdir of a run of the task "property"; several are an ensemble: "runs/gap-0,runs/gap-1"
    _molecule_defaults(c)
    # Workdir that relaxes the molecules first (or what tasks/relax.py takes); unset: data.force_field of the
    # predictor's own run; "none": geometries as they are given or embedded.
    c.force_field = placeholder(str)
    c.seed = 0  # of the embedding
    c.num_processes = 0  # that embed SMILES, beside each process of the run; 0: one for each core
    c.fmax = 0.05  # eV/Å: relaxed when no force on an atom is larger
    c.max_steps = 500
    c.batch_size = 64  # molecules that are predicted at a time
    return c


def md_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "md", with its default. Units are fs, K, Å, bar."""
    c = ml_collections.ConfigDict()
    c.task = "md"
    _input_defaults(c)
    c.replicas = 1  # of each molecule, with momenta and noise of their own; all are simulated side by side
    c.num_steps = 20_000  # a later run may take more
    c.restart_seconds = 60.0  # between restart files

    c.ensemble = "langevin"  # "nve", "rescaling" (stochastic velocity rescaling), "npt" (stochastic cell rescaling)
    c.timestep = 0.5
    c.temperature = 300.0
    c.initial_temperature = placeholder(float)  # unset: the temperature
    c.friction = 0.01  # 1/fs, of "langevin"
    c.thermostat_time = 100.0  # of "rescaling" and "npt"
    c.pressure = 1.01325  # of "npt"
    c.barostat_time = 1000.0
    c.compressibility = 4.6e-5  # 1/bar, an estimate: of water
    c.fix_com = True  # take out the motion of the centre of mass
    c.fix_rotation = True  # take out that of open molecules as a whole, at the start
    c.record_every = 20  # steps between the lines of thermo.csv
    c.frame_every = 200  # steps between frames; 0: none
    c.trajectory_format = "extxyz"  # of the frames; or "hdf5"
    c.skin = 0.4  # neighbours are listed so far beyond the cutoff
    c.watch_bonds = True  # a molecule of which a bond breaks is stopped
    c.bond_range = (0.5, 1.5)  # in which bonds must stay, in terms of the sum of the covalent radii
    c.max_temperature = placeholder(float)  # at which a molecule is stopped; unset: ten times its own, 5000 at least
    c.dtype = "float32"  # or "float64"
    c.seed = 0
    return c


def minima_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "minima", with its default. Units are eV, Å, K, ps."""
    c = ml_collections.ConfigDict()
    c.task = "minima"
    _input_defaults(c)
    c.geometries = 20  # that are embedded of each SMILES
    c.batch = 16  # molecules that are searched side by side
    c.search = ml_collections.ConfigDict()  # see simulation/relaxation/minima.py
    c.search.rounds = 2  # of dynamics; 0: the embedded geometries alone
    c.search.replicas, c.search.temperature, c.search.picoseconds = 8, 600.0, 1.0
    c.search.frames = 4  # of each dynamics that are relaxed
    c.search.window = 0.5  # eV above the lowest minimum that are kept
    c.search.fmax, c.search.max_steps = 0.02, 500
    c.search.same_energy, c.search.same_rmsd = 0.005, 0.125  # eV and Å; minima closer than both are one
    c.search.timestep, c.search.dtype, c.search.seed = 0.5, "float32", 0
    c.judged = 0  # lowest minima of each molecule that the reference method judges
    c.oracle = ml_collections.ConfigDict()
    _oracle_defaults(c.oracle)
    return c


def stability_defaults() -> ml_collections.ConfigDict:
    """Every field of a config of task "stability", with its default. Units are fs, K, Å."""
    c = ml_collections.ConfigDict()
    c.task = "stability"
    _input_defaults(c)
    c.relax_first = True  # bring molecules to a minimum of the force field first
    c.temperatures = (300.0, 500.0, 800.0, 1200.0)
    c.replicas = 5  # of each molecule at each temperature
    c.picoseconds = 100.0  # of each replica
    c.nve_picoseconds = 20.0  # of each molecule at constant energy; 0: none
    c.nve_temperature = 300.0  # at its start
    c.compare_picoseconds = 0.0  # of each molecule with the force field and with the reference method; 0: none
    c.compare_temperature = 300.0
    c.trajectory_format = "extxyz"  # of the frames of that; or "hdf5"
    c.oracle = ml_collections.ConfigDict()
    _oracle_defaults(c.oracle)
    c.timestep = 0.5
    c.friction = 0.01  # 1/fs
    c.record_every = 50
    c.skin = 0.4
    c.bond_range = (0.5, 1.5)
    c.max_temperature = placeholder(float)
    c.dtype = "float32"
    c.seed = 0
    c.restart_seconds = 60.0
    return c


def data_defaults(data: ml_collections.ConfigDict) -> None:
    """Fields that say where structures come from and which are used. A filter that is unset is off."""
    # File, folder, several of them (a,b or *.hdf5) or a store; unset: look in data.directory, else make GFN2-xTB data.
    data.path = placeholder(str)
    data.reader = "auto"  # a file of mlip_jax/datasets/readers/
    data.reader_options = ""  # arguments of its class: "stages=('pm3','DFT_1st'); stride=4"
    data.directory = "data"  # where data files are looked for and made, and stores kept
    data.num_generated = 8_000  # conformations of the embedded data set
    data.verify = placeholder(bool)  # compare a store with its checksums at the start; unset: up to 4 GiB
    data.refuse = True  # stop when the checks of a new file find errors
    data.elements = placeholder(tuple)
    data.charge = placeholder(float)  # only this total charge; nan: any
    data.min_atoms = placeholder(int)
    data.max_atoms = placeholder(int)
    data.max_force = placeholder(float)  # largest force component, eV/Å
    data.min_distance = placeholder(float)  # smallest distance between two atoms, Å
    data.max_energy_deviation = placeholder(float)  # from the median of the molecule's conformations, eV/atom
    data.max_energy_z = placeholder(float)  # the same as a robust z-score
    data.max_force_z = placeholder(float)  # robust z-score of the RMS force within the molecule
    data.require = "any"  # labels that must be known: "any", "energy", "forces", "both", "none"
