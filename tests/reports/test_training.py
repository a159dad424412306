"""Tests for the report of a training run: self-contained, complete, no HTML from names."""

import html.parser
import json

import numpy as np
import pytest

from mlip_jax.reports import error_figures, figures
from mlip_jax.reports import html_page as page
from mlip_jax.reports.predictions import Predictions
from mlip_jax.reports.training import metrics, read_metrics, write_report

# Ignore warnings about objects of other tests, which the garbage collector may raise here.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
HOSTILE = "<script>alert('$x^')</script>\"&$\\frac"
HEADER = (
    "step,epoch,seconds,learning_rate,train_loss,train_energy_mae_mev_per_atom,"
    "train_force_mae_mev_per_ang,valid_loss,valid_energy_mae_mev_per_atom,"
    "valid_force_mae_mev_per_ang,structures_per_second"
)
VOID = {"meta", "img", "br", "link"}


def make(
    *, count=60, seed=0, energies=True, forces=True, noise=0.02, name="molecule", sizes=(3, 12)
):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(*sizes, count))]).astype(int)
    atoms = offsets[-1]
    energy, force = rng.normal(-500, 50, count), rng.normal(size=(atoms, 3))
    return Predictions(
        numbers=rng.choice([1, 6, 8], atoms),
        offsets=offsets,
        energy=energy if energies else np.full(count, np.nan),
        energy_predicted=energy + noise * rng.normal(size=count),
        forces=force if forces else np.full((atoms, 3), np.nan),
        forces_predicted=force + noise * rng.normal(size=(atoms, 3)),
        molecule=[f"{name}{i // 3}" for i in range(count)],
        conformer=np.arange(count) % 3,
        subset=rng.choice([f"{name} A", f"{name} B"], count) if count else [],
        source=["xtb"] * count,
    )


class Parser(html.parser.HTMLParser):
    """Check that tags are closed in order, and collect tags, loaded resources and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loads, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value
            for key, value in attrs
            if key in ("src", "href", "srcset", "data", "action", "poster")
            and not (value or "").startswith("#")  # a link to another part of the page
        ]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    content = path.read_text(encoding="utf-8")
    parser = Parser()
    parser.feed(content)
    parser.close()
    assert not parser.open
    assert parser.loads and all(
        load.startswith("data:image/png;base64,") for load in parser.loads if load
    )
    assert not {"script", "link", "iframe", "object", "embed"} & set(parser.tags)
    assert "@import" not in content and "url(" not in content
    return parser, " ".join(parser.text)


def report(tmp_path, predictions, **options):
    defaults = {
        "title": "A run",
        "info": {"data": {"name": "toy"}},
        "metrics_csv": None,
        "seconds": 12.0,
    }
    path = write_report(tmp_path / "run", predictions, **defaults | options)
    assert sorted(file.name for file in path.parent.iterdir()) == ["metrics.json", "report.html"]
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} in metrics.json")}
    return path, json.loads((path.parent / "metrics.json").read_text(encoding="utf-8"), **strict)


def log(tmp_path, *rows):
    path = tmp_path / "metrics.csv"
    path.write_text("\n".join([HEADER, *rows]), encoding="utf-8")
    return path


def test_report_contains_all_sections(tmp_path):
    valid = {s: "1,2,3,4" for s in range(100, 900, 100)}
    rows = (
        f"{s},0.1,{s},{1e-3 / s},{1 / s},{9 / s},{90 / s},{valid.get(s, ',,,')}"
        for s in range(1, 900)
    )
    splits = {name: make(seed=i) for i, name in enumerate(("train", "valid", "test"))}
    notes = ["Labels are GFN2-xTB."]
    path, result = report(
        tmp_path,
        splits,
        metrics_csv=log(tmp_path, *rows),
        notes=notes,
        seconds=8000.0,
        sizes={"train": 1000, "valid": 60, "test": 60},
    )
    parser, text = parse(path)
    assert len(parser.loads) == 7
    shown = ("A run", *notes, "2 h 13 min", "None: no atom has a force error", "molecule0", "toy")
    assert all(expected in text for expected in shown)
    # the number of training structures, and how many of them the report evaluates
    assert "1,000 training structures" in text and "60 of its 1,000 structures" in text
    assert "errors of the test split are those of" not in text
    assert result["seconds"] == 8000 and result["shown_split"] == "test"
    for split in ("train", "valid", "test"):
        assert (
            result[split]["num_structures"] == 60 and result[split]["energy_mae_mev_per_atom"] > 0
        )
    assert set(result["per_element_correction"]) == {"fitted_on_valid", "fitted_on_test"}
    assert f"{result['test']['force_mae_mev_per_ang']:.2f}" in text


def test_hostile_names_are_escaped(tmp_path):
    predictions = {"test": make(name=HOSTILE, noise=8.0)}
    info = {HOSTILE: {HOSTILE: HOSTILE, "lone surrogate": "\ud800"}}
    path, _ = report(tmp_path, predictions, title=HOSTILE, info=info, notes=[HOSTILE])
    _, text = parse(path)
    # Title, heading, note, info (three times), worst molecules, outliers, subsets.
    assert text.count(HOSTILE) > 8
    assert "<script" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"energies": False}, "no reference energies"),
        ({"forces": False}, "no reference forces"),
        ({"energies": False, "forces": False}, "There are no labels."),
        ({"sizes": (5, 6)}, "The slope is undefined"),
        ({"count": 1}, "The slope is undefined"),
        ({"noise": 30.0}, "atoms have a force error of more than 8 eV/Å"),
    ],
)
def test_missing_labels_are_reported(tmp_path, options, sentence):
    nothing_measured = log(tmp_path, "1" + "," * 10 + "2")
    path, _ = report(
        tmp_path, {"test": make(**options), "valid": make(seed=1)}, metrics_csv=nothing_measured
    )
    text = path.read_text(encoding="utf-8")
    assert sentence in text and "No learning curve recorded." in text


def test_empty_test_split_falls_back_to_valid(tmp_path):
    path, result = report(tmp_path, {"train": make(), "valid": make(seed=1), "test": make(count=0)})
    _, text = parse(path)
    assert "The test split is empty." in text and "results are for the valid split" in text
    assert result["shown_split"] == "valid" and result["test"]["energy_mae_ev"] is None


@pytest.mark.parametrize("predictions", [{}, {"test": make(count=0)}])
def test_no_predictions_at_all(tmp_path, predictions):
    path, result = report(tmp_path, predictions)
    assert result["shown_split"] is None and result["train"] is None
    assert "There are no test structures" in path.read_text(encoding="utf-8")


def test_nonfinite_predictions_are_reported(tmp_path):
    p = make()
    p.energy_predicted[:] = np.nan
    p.forces_predicted[5] = 1e30
    path, result = report(tmp_path, {"test": p})
    assert result["test"]["num_nonfinite_predictions"] == 60
    assert "60 predicted energies or force components" in path.read_text(encoding="utf-8")


def test_unknown_split_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"unknown splits \['dev'\]; must be among"):
        write_report(tmp_path, {"dev": make()}, title="", info={}, metrics_csv=None, seconds=0.0)


def test_failed_figure_leaves_the_old_report(tmp_path, monkeypatch):
    path, _ = report(tmp_path, {"test": make()})
    before = path.read_bytes()
    monkeypatch.setattr(error_figures, "energy_parity", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(tmp_path, {"test": make(seed=1)})
    assert path.read_bytes() == before


def test_metrics_of_a_single_split():
    result = metrics({"valid": make()}, seconds=1.0)
    assert result["shown_split"] == "valid" and result["test"] is None
    assert [group["label"] for group in result["per_element"]] == ["H", "C", "O"]


def test_incomplete_metrics_file_is_read(tmp_path):
    assert read_metrics(None) == {} and read_metrics(tmp_path / "absent.csv") == {}
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"")
    assert read_metrics(path) == {}
    path.write_bytes(b"step,train_loss\n1,0.5\n\n2,\n3,abc\xff\0\n4")
    columns = read_metrics(path)
    np.testing.assert_array_equal(columns["step"], [1, 2, 3, 4])
    np.testing.assert_array_equal(columns["train_loss"], [0.5, np.nan, np.nan, np.nan])
    assert figures.learning_curves(columns) is not None


def test_resumed_run_shows_the_later_value():
    columns = {"step": np.array([1.0, 2, 3, 2, 3]), "train_loss": np.array([5.0, 4, 3, 2, 1])}
    (line,) = figures.learning_curves(columns).axes[0].get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[1, 5], [2, 2], [3, 1]])


@pytest.mark.parametrize(
    "columns",
    [{}, {"step": np.arange(3.0)}, {"step": np.arange(2.0), "train_loss": np.full(2, np.nan)}],
)
def test_no_curves_is_none(columns):
    assert figures.learning_curves(columns) is None


def test_parity_shows_predictions_that_are_all_shifted():
    """Limits of the references alone left an empty panel for a constant error."""
    _, ax = figures.figure("Energy")
    reference = np.linspace(-1, 1, 20)
    figures.parity(
        ax, reference, reference + 5, color="red", axis="energy", error=np.full(20, 5.0), unit="eV"
    )
    low, high = ax.get_ylim()
    assert np.mean((reference + 5 >= low) & (reference + 5 <= high)) >= 0.8


def test_one_extreme_prediction_does_not_set_the_limits_of_parity():
    _, ax = figures.figure("Energy")
    reference = np.linspace(-1, 1, 20)
    predicted = reference.copy()
    predicted[0] = 1e6
    error = predicted - reference
    figures.parity(ax, reference, predicted, color="red", axis="energy", error=error, unit="eV")
    assert ax.get_ylim()[1] < 2


def test_an_undefined_slope_is_not_in_the_log():
    scores = {"energy_mae_mev_per_atom": 1.5, "force_mae_mev_per_ang": 20.0}
    text = page.scores_text({**scores, "energy_slope_mev_per_atom": None})
    assert text == "energy 1.5 meV/atom, force 20 meV/Å"
    assert page.scores_text({}) == "no labels"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (42.4, "42 s"),
        (750, "12.5 min"),
        (8000, "2 h 13 min"),
        (86398, "24 h 0 min"),
        (183600, "2 d 3 h"),
    ],
)
def test_duration(seconds, expected):
    assert page.duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (np.nan, "–"),
        (0.0, "0"),
        (3, "3"),
        (12345, "12,345"),
        (-1.234, "−1.23"),
        (0.0012, "0.0012"),
    ],
)
def test_number(value, expected):
    assert page.number(value) == expected


def test_every_axis_has_a_label_with_unit():
    columns = {name: np.arange(1.0, 5) for name in HEADER.split(",")}
    p = make()
    drawn_figures = [
        error_figures.energy_parity(p),
        error_figures.force_parity(make(count=400)),
        error_figures.energy_error_against_size(p),
        error_figures.error_distributions({"test": p}),
        figures.learning_curves(columns),
    ]
    for fig in drawn_figures:
        for ax in fig.axes:
            assert ax.get_xlabel() and ax.get_ylabel()
    assert all("meV" in ax.get_ylabel() for ax in drawn_figures[4].axes[1:3])
