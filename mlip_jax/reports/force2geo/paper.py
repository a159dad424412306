"""Report of configs/paper_force2geo.py: tables and figures of the paper at reduced size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.reports import figures
from mlip_jax.reports import html_page as page
from mlip_jax.reports.errors import json_safe
from mlip_jax.reports.force2geo import predictors
from mlip_jax.reports.force2geo.seeds import PROPERTY, Spread, gain, read, verdict
from mlip_jax.workdir import write_text

RELAXED = predictors.RELAXED
_GEOMETRIES = {
    "etkdg": "RDKit",
    "relaxed(etkdg)": "RDKit, relaxed by the force field",
    "pm3:first": "start of the cheap stage",
    RELAXED: "the same, relaxed by the force field",
    "pm3": "end of the cheap stage",
    "labels": "ground truth",
}
# Reduction of the MAE by Force2Prop as reported in the paper.
_PUBLISHED = {
    "force2prop": "16 % (Molecule3D, random)",
    "scaffold-force2prop": "16 % (Molecule3D, scaffold)",
}


def write_paper_report(folder: Path) -> Path:
    """Write report.html and paper.json of all completed variants to the folder of a sweep.

    Returns:
      Path of report.html.
    """
    scores = read(Path(folder))
    missing = Spread(float("nan"), float("nan"), 0)

    def at(name: str, geometry: str = "labels") -> Spread:
        return scores.get(name, {}).get(geometry, missing)

    num_train = _num_train(Path(folder))
    body = [
        page.heading("Force2Prop and geometry fine-tuning", 1),
        page.paragraph(
            "Mean absolute error of the HOMO-LUMO gap in eV on test molecules on which no "
            "predictor and no force field was trained, as mean ± sample standard deviation over "
            "seeds. A gain is the reduction of the mean, ± its standard error over the seeds."
        ),
        *_claims(at),
        *_training(at),
        *predictors.tables(at, num_train),
        *_geometries(at),
        *_sizes(at, num_train),
        *_sweeps(at),
    ]
    # Use `shared`, because each process of a sweep writes the report at its end.
    write_text(
        Path(folder) / "paper.json",
        json.dumps(
            json_safe(
                {name: {g: s._asdict() for g, s in by.items()} for name, by in scores.items()}
            ),
            indent=2,
            allow_nan=False,
        )
        + "\n",
        shared=True,
    )
    write_text(
        Path(folder) / "report.html",
        page.render("Force2Prop and geometry fine-tuning", body),
        shared=True,
    )
    return Path(folder) / "report.html"


def _claims(at) -> Iterator[str]:
    """Yield one sentence per ordering that the paper claims."""
    yield page.heading("Claims of the paper")
    yield from predictors.orderings(at)
    for line in (
        verdict(
            "Frozen features of the force field are better than random ones",
            at("heads"),
            at("random-heads"),
        ),
        verdict(
            "Initialization from a force field is better than from denoising",
            at("force2prop"),
            at("denoising-force2prop"),
        ),
        verdict("More pre-training data are better", at("force2prop"), at("force2prop-300")),
        verdict(
            "RDKit geometries are better after relaxation",
            at("scratch", "relaxed(etkdg)"),
            at("scratch", "etkdg"),
            paired=True,
        ),
        verdict(
            "Geometries from the start of the cheap stage are better after relaxation",
            at("scratch", RELAXED),
            at("scratch", "pm3:first"),
            paired=True,
        ),
        verdict(
            "On relaxed geometries, geometry fine-tuning is better than no fine-tuning",
            at("finetune", RELAXED),
            at("scratch", RELAXED),
            paired=True,
        ),
        verdict(
            "On relaxed geometries, geometry fine-tuning is better than as many further steps",
            at("finetune", RELAXED),
            at("continued", RELAXED),
            paired=True,
        ),
        verdict(
            "Alignment is better than fine-tuning without it",
            at("finetune", RELAXED),
            at("finetune-no-alignment", RELAXED),
            paired=True,
        ),
    ):
        yield page.paragraph(line)


def _training(at) -> Iterator[str]:
    """Yield a table of errors by the initialization of the predictor."""
    yield page.heading("Initialization of the predictor (Figure 4, Tables 7 and 10)")
    lines = []
    for title, name, baseline in (
        ("from scratch", "scratch", ""),
        ("Force2Prop", "force2prop", "scratch"),
        ("from denoising", "denoising-force2prop", "scratch"),
        ("from a force field with denoising (DeNS)", "dens-force2prop", "scratch"),
        ("only the head, features of the force field", "heads", "random-heads"),
        ("only the head, random features", "random-heads", ""),
        ("scaffold split: from scratch", "scaffold-scratch", ""),
        ("scaffold split: Force2Prop", "scaffold-force2prop", "scaffold-scratch"),
        ("SchNet: from scratch", "schnet-scratch", ""),
        ("SchNet: Force2Prop", "schnet-force2prop", "schnet-scratch"),
    ):
        value, error = gain(at(name), at(baseline)) if baseline else (float("nan"), 0.0)
        lines.append(
            (
                title,
                str(at(name)),
                at(name).count,
                f"{value:.1f} ± {error:.1f}" if np.isfinite(value) else "–",
                _PUBLISHED.get(name, ""),
            )
        )
    yield page.table(["training", "MAE (eV)", "seeds", "gain (%)", "published"], lines)


def _geometries(at) -> Iterator[str]:
    """Yield a table and a figure of errors by the origin of the test geometries."""
    yield page.heading("Origin of the geometries (Tables 4 and 13)")
    names = {
        "trained on ground truth": "scratch",
        "the same, fine-tuned with alignment": "finetune",
        "the same, fine-tuned without alignment": "finetune-no-alignment",
        "the same, trained for as many further steps": "continued",
        "Force2Prop": "force2prop",
        "trained on RDKit geometries": "rdkit-scratch",
    }
    yield page.table(
        ["predictor", *(f"tested on: {title}" for title in _GEOMETRIES.values())],
        [(title, *(str(at(name, g)) for g in _GEOMETRIES)) for title, name in names.items()],
    )
    fig, ax = figures.figure("Error by origin of the test geometry", size=(9.2, 4.4))
    for number, (title, name) in enumerate(names.items()):
        _errorbars(
            ax,
            np.arange(len(_GEOMETRIES)) + 0.12 * (number - 2),
            [at(name, g) for g in _GEOMETRIES],
            title,
            number,
            line=False,
        )
    ax.set_xticks(
        range(len(_GEOMETRIES)),
        [title.replace(", ", ",\n") for title in _GEOMETRIES.values()],
        fontsize=8,
    )
    ax.set(ylabel="gap MAE (eV)")
    ax.set_title("")  # the legend replaces the title
    ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    yield page.figure(
        fig,
        "Errors for the same test molecules at geometries of different origin. Labels are those of "
        "the ground-truth geometries.",
        wide=True,
    )


def _num_train(folder: Path) -> int:
    """Return the number of training molecules of runs without a limit, 0 if none is complete."""
    for path in sorted(folder.glob("scratch-?/metrics.json")):
        return (
            parse_json(read_bytes(path))["scores"]
            .get("train", {})
            .get(PROPERTY, {})
            .get("count", 0)
        )
    return 0


def _sizes(at, num_all: int) -> Iterator[str]:
    """Yield a figure and a table of errors by the number of training molecules."""
    yield page.heading("Amount of data (Figures 5 and 6)")
    fig, axes = figures.figure(
        "Molecules with the property", "Molecules for pre-training", size=(9.2, 3.8)
    )
    for number, (title, name) in enumerate(
        {"from scratch": "scratch", "Force2Prop": "force2prop"}.items()
    ):
        _errorbars(
            axes[0],
            [250, 800, num_all or 2_500],
            [at(f"{name}-250"), at(f"{name}-800"), at(name)],
            title,
            number,
        )
    _errorbars(
        axes[1], [0, 1, 2], [at("scratch"), at("force2prop-300"), at("force2prop")], "Force2Prop", 1
    )
    for ax in axes:
        ax.set(xlabel="training molecules", ylabel="gap MAE (eV)")
        ax.legend(frameon=False, fontsize=9)
    axes[0].set_xscale("log")
    axes[0].set_xticks(
        [250, 800, num_all or 2_500], ["250", "800", f"{num_all:,}" if num_all else "all"]
    )
    axes[1].set_xticks([0, 1, 2], ["none", "300", "all"])
    axes[0].minorticks_off()
    yield page.figure(
        fig,
        "Error against the number of training molecules of the predictor (left) and of the force "
        "field (right).",
        wide=True,
    )
    yield page.table(
        ["molecules with the property", "from scratch (eV)", "Force2Prop (eV)", "gain (%)"],
        [
            (
                f"{n:,}" if n else "all",
                str(at(f"scratch{end}")),
                str(at(f"force2prop{end}")),
                "{:.1f} ± {:.1f}".format(*gain(at(f"force2prop{end}"), at(f"scratch{end}"))),
            )
            for n, end in ((250, "-250"), (800, "-800"), (num_all, ""))
        ],
    )


def _sweeps(at) -> Iterator[str]:
    """Yield a table of errors by the noise and weight of the alignment."""
    yield page.heading("Noise and weight of the alignment (Tables 11 and 12)")
    yield page.table(
        ["noise (Å)", "weight", "MAE on relaxed geometries (eV)"],
        [
            (noise, weight, str(at(name, RELAXED)))
            for noise, weight, name in (
                ("0.05", "0.1", "finetune-noise-0.05"),
                ("0.1", "0.1", "finetune"),
                ("0.3", "0.1", "finetune-noise-0.3"),
                ("0.1", "0", "finetune-no-alignment"),
                ("0.1", "0.01", "finetune-weight-0.01"),
                ("0.1", "1", "finetune-weight-1"),
            )
        ],
    )


def _errorbars(ax, x, values: Sequence[Spread], label: str, number: int, line: bool = True) -> None:
    """Draw the available means with standard deviations over seeds, in the color of a number."""
    colors = (figures.GREY, figures.BLUE, figures.VERMILLION, figures.GREEN, "#CC79A7", "#E69F00")
    known = [i for i, v in enumerate(values) if v.count]
    ax.errorbar(
        np.asarray(x, float)[known],
        [values[i].mean for i in known],
        [0.0 if values[i].count < 2 else values[i].std for i in known],
        color=colors[number % len(colors)],
        marker="o",
        markersize=4,
        capsize=3,
        linewidth=1.4 if line else 0,
        elinewidth=1.2,
        label=label,
    )
