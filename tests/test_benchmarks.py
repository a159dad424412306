"""Tests for the benchmarks: tables, ratios, clocks and the workload."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ase.build import molecule

from benchmarks import environments, gpu, relax, tables
from benchmarks.cases import CASES, chosen, is_ours
from benchmarks.crystals import comparison
from benchmarks.models import DRIVERS, Job, Runner, Work, environment, parse, prepare
from benchmarks.models import QUICK as EFFORT
from benchmarks.models import measure as run
from benchmarks.work import latency_systems, water_cluster
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.neighbors import neighbor_list
from mlip_jax.models import create
from mlip_jax.potential import Potential, example_graph
from mlip_jax.structure import Structure

PEERS = Path(environments.__file__).with_name("peers")


def _load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", PEERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measure = _load("measure")
sys.modules["measure"] = measure  # relaxing imports it by this name
relaxing = _load("relaxing")


def _training_line(case, number, rate, **more):
    return {
        "part": "train",
        "case": case,
        "round": number,
        "batch": 32,
        "machine": "a machine",
        "device": "cpu",
        "structures_per_s": rate,
        "structures_per_cpu_s": 2 * rate,
        "step_ms": {"median": 32e3 / rate},
        "peak_mib": 100.0,
        "compile_s": 3.0,
        "compile_cpu_s": 2.0,
        "parameters": 1234,
        "real_per_batch": {"structures": 32.0, "atoms": 1184.0, "edges": 23680.0},
    } | more


def _latency_line(case, number, milliseconds):
    system = {
        "atoms": 20,
        "ms": {"median": milliseconds},
        "cpu_ms": milliseconds / 2,
        "first_s": 1.0,
    }
    return {
        "part": "latency",
        "case": case,
        "round": number,
        "batch": 32,
        "machine": "a machine",
        "systems": {"small": system},
    }


def _cells(table, first):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    head = rows[0]
    return dict(zip(head, next(row for row in rows[2:] if first in row)))


def test_ratios_only_use_rounds_with_both_cases():
    lines = [_training_line("ours/painn", n, r) for n, r in enumerate((10.0, 30.0, 50.0))]
    lines += [_training_line("schnetpack/painn", n, r) for n, r in ((1, 10.0), (0, 5.0))]
    assert tables.ratios(
        lines, lambda line: line["structures_per_s"], "ours/painn", "schnetpack/painn"
    ) == [2.0, 3.0]


def test_training_table():
    lines = [
        _training_line("ours/painn", n, r, flops=2e9 if n == 0 else None, bytes=3e9)
        for n, r in enumerate((10.0, 30.0, 20.0))
    ]
    lines += [_training_line("schnetpack/painn", n, 10.0) for n in range(3)]
    row = _cells(tables.training(lines), "ours/painn")
    assert row["structures/s"] == "20 (10 to 30)" and row["structures/CPU-s"] == "40 (20 to 60)"
    assert row["to its peer"] == "2 (1 to 3) × schnetpack/painn"
    assert row["edges/structure"] == "740" and row["GFLOP/step"] == "2" and row["GB/step"] == "3"
    assert row["parameters"] == "1,234" and row["compilation, CPU-s"] == "2 (2 to 2)"
    peer = _cells(tables.training(lines), "schnetpack/painn")
    assert peer["to its peer"] == "-" and peer["GFLOP/step"] == "-"


def test_gpu_table_uses_wall_time_and_device_memory():
    lines = [
        _training_line(
            "ours/painn", 0, 30.0, device="gpu", structures_per_cpu_s=1.0, peak_device_mib=7.0
        ),
        _training_line("schnetpack/painn", 0, 10.0, device="cuda", structures_per_cpu_s=9.0),
    ]
    row = _cells(tables.training(lines), "ours/painn")
    assert row["to its peer"].startswith("3 ×") and row["peak MiB"] == "7"


def test_latency_is_compared_with_the_same_architecture_and_with_the_fastest_peer():
    lines = [
        _latency_line("ours/painn", 0, 2.0),
        _latency_line("schnetpack/painn", 0, 8.0),
        _latency_line("mlip/visnet", 0, 4.0),
    ]
    assert (
        tables.fastest_peer(lines, lambda line: line["systems"]["small"]["ms"]["median"])
        == "mlip/visnet"
    )
    row = _cells(tables.latency(lines), "ours/painn")
    assert row["to its peer"] == "0.25 × schnetpack/painn"
    assert row["to the fastest peer"] == "0.5 × mlip/visnet" and row["CPU, ms"] == "1"


@pytest.mark.parametrize("second, verdict", [("aa", "identical"), ("bb", "DIFFERENT")])
def test_repeat_table_compares_hashes(second, verdict):
    lines = [{"case": "ours/painn", "hashes": {"gradients": h}} for h in ("aa", second)]
    assert _cells(tables.repeat(lines), "ours/painn")["bits"] == verdict


def test_roofline_share():
    limits = {"kind": "a device", "flops_per_s": 100e9, "bytes_per_s": 10e9}
    # a step takes one second of wall time and half a second of processor time
    line = _training_line("ours/painn", 0, 32.0, flops=25e9, bytes=1e9, limits=limits)
    assert tables.share(line) == pytest.approx({"flops": 0.5, "bytes": 0.2})
    assert tables.share(line | {"device": "gpu"}) == pytest.approx({"flops": 0.25, "bytes": 0.1})
    row = _cells(tables.roofline([line]), "ours/painn")
    assert (row["% of the FLOP/s"], row["% of the bytes/s"], row["bound by"]) == (
        "50",
        "20",
        "FLOPs",
    )


def test_report_has_a_table_per_part_and_lists_failures():
    lines = [
        _training_line("ours/painn", 0, 1.0),
        _training_line("ours/painn", 0, 1.0, batch=64),
        _latency_line("ours/painn", 0, 2.0),
        {
            "part": "train",
            "case": "ours/schnet",
            "round": 0,
            "batch": 32,
            "failed": "not installed",
        },
    ]
    text = tables.report(lines)
    assert text.startswith("Measured on a machine.")
    for expected in ("batch 32:", "batch 64:", "Latency:", "train of ours/schnet: not installed"):
        assert text.count(expected) == 1
    assert "Roofline" not in text


def test_last_result_ignores_other_output():
    assert tables.last_result('{"a": 1}\nwarning\n{"a": 2}\nbye\n') == {"a": 2}
    with pytest.raises(ValueError, match="no result"):
        tables.last_result("nothing\n")


def test_summary():
    assert tables.summary([]) == tables.summary([None]) == "-"
    assert tables.summary([1234.0]) == "1,234"
    assert tables.summary([3.0, 1.0, 2.0, None]) == "2 (1 to 3)"


def test_peers_and_environments_of_cases_exist():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.environment in DRIVERS and DRIVERS[case.environment].is_file()
        assert not case.peer or is_ours(case) and case.peer in names
        peer = next((c for c in CASES if c.name == case.peer and c.model == case.model), None)
        if peer:  # the same model, so it must have the same size
            assert dict(peer.options) == {key: case.options[key] for key in peer.options}


def test_chosen_cases():
    assert [c.name for c in chosen(["schnetpack/"])] == ["schnetpack/painn", "schnetpack/schnet"]
    assert chosen([]) == list(CASES) and len(chosen([], quick=True)) == 5
    with pytest.raises(ValueError, match="no case name contains 'gemnet'"):
        chosen(["gemnet"])


def test_command_line():
    arguments = parse(
        ["all", "--home=somewhere", "--batch=32,128", "--pin=1", "--only=painn", "--only=schnet"]
    )
    assert (
        arguments.batch == [32, 128]
        and arguments.only == ["painn", "schnet"]
        and arguments.pin == 1
    )
    assert {"train", "latency", "repeat", "roofline"} <= set(arguments.parts)
    with pytest.raises(SystemExit):
        parse(["training", "--home=somewhere"])


def test_processes_have_the_same_allocator_and_one_thread_if_pinned(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--kept")
    pinned = environment(0, True)
    assert pinned["OMP_NUM_THREADS"] == "1" and "malloc" in pinned["GLIBC_TUNABLES"]
    assert pinned["XLA_FLAGS"].split() == ["--kept", "--xla_cpu_multi_thread_eigen=false"]
    assert environment(None, False)["GLIBC_TUNABLES"] == ""
    assert environment(None, True)["XLA_FLAGS"] == "--kept"


def test_jobs_for_large_batches_and_cases_of_later_rounds():
    work = Work(list(CASES), "work.npz", 100, EFFORT._replace(batches=4))
    case = chosen(["ours/painn"])[0]
    assert [work.training(case, batch, False).batches for batch in (10, 32, 64, 1000)] == [
        4,
        3,
        1,
        1,
    ]
    assert work.in_round(0) == list(CASES)
    assert {c.name for c in work.in_round(1) if not is_ours(c)} == {
        "schnetpack/painn",
        "schnetpack/schnet",
        "torchmd-net/et",
        "mace-torch/mace",
        "nequip/nequip",
        "nequip/allegro",
        "sevenn/sevennet",
        "pyg/dimenetpp",
        "faenet/faenet",
    }


def test_a_case_without_environment_is_skipped_with_one_message(tmp_path, capsys):
    runner = Runner(tmp_path, tmp_path / "results.jsonl", None, True)
    case = chosen(["mlip/mace"])[0]
    for number in range(2):
        runner.measure(case, Job("train", case.model, case.options, "work.npz"), "train", number)
    lines = tables.read(tmp_path / "results.jsonl")
    assert (
        len(lines) == 1
        and lines[0]["failed"].endswith("v_mlip")
        and lines[0]["case"] == "mlip/mace"
    )
    assert capsys.readouterr().out.count("skipped") == 1


def test_time_steps_counts_whole_passes_without_the_first_calls():
    calls = []
    times = measure.time_steps(
        lambda item: calls.append(item) or time.sleep(0.002), ["a", "b"], 0.02
    )
    assert calls[:4] == ["a", "a", "a", "b"] and len(times.wall) == len(times.cpu) == len(calls) - 2
    assert len(times.wall) % 2 == 0 and min(times.wall) >= 0.002 and times.first >= 0.002
    together = measure.time_steps(
        lambda item: None, [0.0, 0.01], 0.0, lambda: time.sleep(0.01), each=False
    )
    # one wait for both steps
    assert len(together.wall) == 2 and together.wall[0] == together.wall[1] >= 0.005


def test_training_result_counts_real_structures():
    times = measure.Times(
        3.0, 2.0, [1.0, 2.0, 1.0, 40.0], [0.5, 1.0, 0.5, 1.0]
    )  # the last one stalled
    result = measure.training_result(times, [(30, 900, 18000), (33, 1000, 20000)], 7, device="cpu")
    assert result["structures_per_s"] == pytest.approx(31.5 / 1.5)
    assert result["structures_per_cpu_s"] == pytest.approx(31.5 / 0.75)
    assert (
        result["step_ms"] == {"median": 1500, "lowest": 1000, "highest": 40000}
        and result["compile_s"] == 1.5
    )
    assert result["real_per_batch"] == {"structures": 31.5, "atoms": 950, "edges": 19000}
    assert 10 < result["peak_mib"] < 1e5


def test_edges_agree_with_the_neighbor_list():
    positions = np.random.default_rng(0).uniform(0, 9, (30, 3))
    receivers, senders = measure.edges(positions)
    expected = neighbor_list(positions, measure.CUTOFF)
    assert sorted(zip(receivers, senders)) == sorted(zip(expected.receivers, expected.senders))
    assert (np.diff(receivers) >= 0).all()


def test_water_cluster_is_dense_and_has_no_overlaps():
    cluster = water_cluster(4, seed=0)
    assert len(cluster) == 192 and (cluster.numbers == 8).sum() == 64
    distances = cluster.get_all_distances()
    same = np.arange(192)[:, None] // 3 == np.arange(192)[None] // 3
    assert distances[~same].min() > 1.0
    assert distances[same & (distances > 0)].min() == pytest.approx(0.97, abs=0.02)
    neighbors = (distances[cluster.numbers == 8][:, cluster.numbers == 8] < 5.0).sum(1) - 1
    assert 8 < neighbors.mean() < 18  # 17 in the bulk of the liquid; this cluster is mostly surface
    assert np.array_equal(cluster.positions, water_cluster(4, seed=0).positions)


def _structures(sizes):
    rng = np.random.default_rng(0)
    return [
        Structure(
            numbers=rng.choice([1, 6, 8], n).astype(np.int32),
            positions=rng.uniform(0, 8, (n, 3)),
            forces=rng.normal(size=(n, 3)),
            energy=float(n),
        )
        for n in sizes
    ]


def test_latency_systems_are_the_nearest_in_size():
    arrays = latency_systems(Columns.from_structures(_structures([12, 22, 57, 70])), seed=0)
    assert len(arrays["small_numbers"]) == 22 and len(arrays["medium_positions"]) == 57
    assert len(arrays["cluster_numbers"]) == 1029


def test_the_workload_of_a_file_is_reproducible(tmp_path):
    data = Path(__file__).parent / "data" / "gfn2_small.hdf5"
    works = [prepare(tmp_path / name, [], str(data), EFFORT) for name in ("a", "b")]
    assert works[0].structures == works[1].structures > 10
    first, second = (measure.read_molecules(work.path, 10) for work in works)
    for a, b in zip(first, second):
        assert np.array_equal(a.positions, b.positions) and np.array_equal(a.numbers, b.numbers)
        assert a.energy == b.energy
        assert (
            np.isfinite(a.energy)
            and np.isfinite(a.forces).all()
            and a.forces.shape == (len(a.numbers), 3)
        )
    atoms = measure.read_system(works[0].path, "cluster")
    assert len(atoms) == 1029 and atoms.info["charge"] == 0
    job = Job("train", "", {}, works[0].path, batch=4, batches=2)._asdict()
    assert [len(group) for group in measure.batches(job)] == [4, 4]
    with pytest.raises(ValueError, match="structures"):
        measure.batches(job | {"batches": 10**4})


def test_main_prints_one_line_of_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["driver", json.dumps({"part": "double", "value": 21})])
    measure.main({"double": lambda job: {"value": 2 * job["value"]}}, ("numpy",))
    printed = json.loads(capsys.readouterr().out)
    assert printed["value"] == 42 and printed["versions"] == {"numpy": np.__version__}


def test_a_missing_environment_has_no_version():
    assert environments.installed_version(Path("nowhere/python"), "schnetpack") is None
    assert environments.installed_version(Path(sys.executable), "numpy") == np.__version__
    assert environments.installed_version(Path(sys.executable), "no-such-package-here") is None


@pytest.mark.slow
def test_our_models_are_measured_end_to_end(tmp_path, capsys):
    data = Path(__file__).parent / "data" / "gfn2_small.hdf5"
    work = prepare(
        tmp_path, chosen(["ours/painn"])[:1], str(data), EFFORT._replace(systems=("small",))
    )
    small = work.cases[0]._replace(options={"num_features": 8, "num_layers": 1})
    work = work._replace(cases=[small])
    runner = Runner(tmp_path, tmp_path / "results.jsonl", None, True)
    run(runner, ["train", "latency", "repeat", "roofline"], work, [4])
    assert not [line for line in runner.lines if "failed" in line]
    by_part = {line["part"]: line for line in runner.lines}
    assert by_part["train"]["flops"] > 1e6 and by_part["train"]["bytes"] > 1e6
    assert (
        by_part["train"]["real_per_batch"]["structures"] <= by_part["train"]["padded"]["graphs"] - 1
    )
    # the result of part train is reused
    assert by_part["roofline"]["structures_per_s"] == by_part["train"]["structures_per_s"]
    report = tables.report(tables.read(runner.results))
    for quantity in ("gradients", "state after 3 steps"):
        assert (
            _cells(
                tables.repeat([line for line in runner.lines if line["part"] == "repeat"]), quantity
            )["bits"]
            == "identical"
        )
    assert all(heading in report for heading in ("batch 4:", "Latency:", "Repeat:", "Roofline:"))
    assert "compiled in" in capsys.readouterr().out


def _relax_line(case, rate, **more):
    return {
        "part": "painn",
        "case": case,
        "round": 0,
        "machine": "a machine",
        "molecules": 10,
        "converged": 9,
        "molecules_per_cpu_s": rate,
        "cpu_ms_per_step": 5.0,
        "model_share": 0.9,
        "molecule_steps": 1000,
        "peak_mib": 300.0,
    } | more


def test_table_of_relaxations():
    lines = [
        _relax_line("ours bfgs", 2.0, compiles=4, sizes=2, minimizer_ms=0.04),
        _relax_line("ours bfgs", 4.0),
        _relax_line("torch-sim fire", 1.0),
        {"part": "morse", "case": "x", "failed": "no environment"},
    ]
    text = relax.report(lines)
    ours, peer = _cells(text, "ours bfgs"), _cells(text, "torch-sim fire")
    assert ours["molecules per CPU-second"] == "3 (2 to 4)"
    assert ours["compiled programs"] == "4 in 2 size(s)"
    assert (
        ours["mean steps"] == "100"
        and ours["minimizer separately, ms"] == "0.04"
        and peer["minimizer separately, ms"] == "-"
    )
    assert "Not measured: morse x: no environment" in text


def test_drops_and_results_of_relaxations():
    drops = relaxing.drops(2)
    again = relaxing.drops(1)[0]
    assert (drops[0].positions == again.positions).all() and (
        drops[0].positions != drops[1].positions
    ).any()
    for drop in drops:
        distances = drop.get_all_distances() + 10 * np.eye(len(drop))
        assert len(drop) == relaxing.MORSE_ATOMS and distances.min() > 1.8
    begin = relaxing.Begin()
    time.sleep(0.05)
    result = relaxing.result(begin, 5, 45, 4, 0.01, steps=[1, 9, 35])
    assert result["molecule_steps"] == 50 and result["steps"] == {
        "lowest": 1,
        "median": 9,
        "highest": 35,
    }
    assert result["seconds"] >= 0.05 and 0 < result["model_share"] < 0.2
    assert result["molecules_per_s"] == pytest.approx(5 / result["seconds"])


def test_starts_contain_each_drug_before_any_is_repeated(tmp_path, monkeypatch):
    smiles = tmp_path / "some.smi"
    smiles.write_text("CCO a\nCCN b\nCCCO c\n")
    monkeypatch.setattr(relax, "DRUGS", smiles)
    path = relax.make_starts(tmp_path, 5)
    first = [a.get_chemical_formula() for a in relaxing.starts({"work": path, "batch": 4})]
    assert first == ["C2H6O", "C2H7N", "C3H8O", "C2H6O"] and len(np.load(path)["offsets"]) == 6
    assert relax.make_starts(tmp_path, 5) == path


def test_table_of_crystals_names_other_minima_and_failures(capsys):
    """An energy that is missing must not count as the same minimum."""
    energies = {"Cu": (-8.0, -8.0001), "NaCl": (-12.0, -12.02), "Ni": (-20.0, float("nan"))}
    original, ours = {}, {"all": {"cpu_s": 2.0, "first_cpu_s": 5.0}}
    for name, values in energies.items():
        line = {"name": name, "kind": "any", "atoms": 4, "steps": 7, "cpu_s": 2.0}
        original[name] = line | {"energy": values[0], "converged": True}
        ours[name] = line | {"energy": values[1], "converged": name != "Ni", "status": "as given"}
    comparison.relax(original, ours)
    text = capsys.readouterr().out
    assert "| any | 3 | 1 | 21, 21 |" in text and "at most 0.025 meV/atom" in text
    assert "NaCl: -5.00 meV/atom" in text and "Ni: +nan" in text and "not converged: Ni" in text
    assert "ratio 3.00" in text


def test_a_failed_measurement_is_a_row():
    def out_of_memory():
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nmore")

    assert gpu.row("a", out_of_memory) == "| a | failed: RESOURCE_EXHAUSTED: 3 GiB |"
    assert gpu.row("a", lambda: {"steps/s": 1234.56, "s": 2.0}) == "| a | 1,235 steps/s, 2 s |"


@pytest.mark.slow
def test_page_of_a_device_has_a_row_for_each_measurement(monkeypatch, tmp_path, capsys):
    options = {"num_features": 4, "num_layers": 1, "num_radial": 4}
    monkeypatch.setattr(gpu, "OPTIONS", {"painn": options})
    model = create("painn", cutoff=4.0, **options)
    params = jax.jit(model.init)(jax.random.key(0), example_graph())
    field = Potential(model, params, 4.0, np.zeros(119), 1.0, tuple(range(1, 93)))
    monkeypatch.setattr(gpu, "load_force_field", lambda name: field)
    monkeypatch.setattr(gpu, "MD", gpu.MD | {"temperature": 0.1})  # nothing holds it together
    monkeypatch.setattr(gpu, "drugs", lambda count: [molecule("CH3OH")])

    def out_of_memory(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nmore")

    monkeypatch.setattr(gpu, "relaxation", out_of_memory)
    path = tmp_path / "page.md"
    arguments = ["--models=painn", "--batches=2", "--relaxations=3", "--replicas=2", "--seconds=0"]
    assert gpu.main([*arguments, f"--out={path}"]) == 0
    rows = [line for line in path.read_text().splitlines() if line.startswith("| ")][1:]
    assert path.read_text() in capsys.readouterr().out
    assert [row.split(" | ")[0] for row in rows] == [
        "| training painn, batch 2",
        "| 3 relaxations",
        "| dynamics of 2 x 6 atoms",
    ]
    assert "structures/s" in rows[0] and "steps/s" in rows[2]
    assert rows[1] == "| 3 relaxations | failed: RESOURCE_EXHAUSTED: 3 GiB |"
