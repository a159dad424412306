"""Comparison of predictors in the report of configs/paper_force2geo.py: Tables 1, 4, 5, 6 and 9."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mlip_jax.reports import figures
from mlip_jax.reports import html_page as page
from mlip_jax.reports.force2geo.seeds import VALID, Spread, verdict

At = Callable[..., Spread]  # (variant, test geometry) -> error over seeds

CHEAP, RELAXED = "pm3:first", "relaxed(pm3:first)"
_SPLITS = {"": "random", "scaffold-": "scaffold"}
# Published test errors (eV) on the random and the scaffold split, from 600,000 molecules (Table 6)
# and all molecules (Table 9) of Molecule3D, and on ∇²DFT (Table 5).
MODELS = (
    ("GIN-virtual (bonds)", "gin_virtual-scratch", "0.1272, 0.2421", "0.1053, 0.2492", ""),
    ("Uni-Mol+ (RDKit)", "unimol_plus-scratch", "0.1090, 0.2245", "0.0850, 0.2044", ""),
    ("SchNet", "schnet-scratch", "0.0731, 0.1837", "0.0438, 0.1619", "0.1461"),
    ("SphereNet", "spherenet-scratch", "", "", "0.0819"),
    ("ComENet", "comenet-scratch", "0.0693, 0.1876", "0.0438, 0.1805", "0.1135"),
    ("DimeNet++", "dimenetpp-scratch", "0.0569, 0.1729", "0.0418, 0.1451", "0.0786"),
    (
        "TorchMD-Net",
        "equivariant_transformer-scratch",
        "0.0525, 0.1454",
        "0.0364, 0.1403",
        "0.1029",
    ),
    ("PaiNN", "scratch", "0.0575, 0.1548", "0.0356, 0.1378", "0.0857"),
    ("Force2Prop, PaiNN", "force2prop", "0.0486, 0.1298", "0.0324, 0.1204", "0.0683"),
)
STARTS = {"unimol_plus-scratch": "etkdg", "unimol_plus_cheap-scratch": CHEAP}
# Rows of Table 4: title, variant, test geometry, published errors.
GEOMETRIES = (
    ("RDKit + Uni-Mol+", "unimol_plus-scratch", "etkdg", "0.1090, 0.2245"),
    ("cheap stage + Uni-Mol+", "unimol_plus_cheap-scratch", CHEAP, "0.1080, 0.2211"),
    ("RDKit + PaiNN", "finetune", "etkdg", "0.1598, 0.2741"),
    ("cheap stage + PaiNN", "finetune", CHEAP, "0.0916, 0.1880"),
    ("relaxed by the force field + PaiNN", "finetune", RELAXED, "0.0822, 0.1832"),
    ("ground truth + PaiNN", "scratch", "labels", "0.0575, 0.1548"),
)
# Orderings: claim, better (variant, geometry), worse (variant, geometry).
_ORDERINGS = (
    (
        "Uni-Mol+ is better than GIN-virtual, which reads only bonds",
        ("unimol_plus-scratch", "etkdg"),
        ("gin_virtual-scratch", "labels"),
    ),
    (
        "PaiNN on geometries relaxed by the force field is better than Uni-Mol+",
        ("finetune", RELAXED),
        ("unimol_plus-scratch", "etkdg"),
    ),
    (
        "PaiNN on ground-truth geometries is better than on relaxed ones",
        ("scratch", "labels"),
        ("finetune", RELAXED),
    ),
    (
        "Force2Prop is better than PaiNN from scratch",
        ("force2prop", "labels"),
        ("scratch", "labels"),
    ),
)


def orderings(at: At) -> Iterator[str]:
    """Yield one sentence per ordering of predictors that the paper claims, on both splits."""
    for prefix, split in _SPLITS.items():
        for claim, better, worse in _ORDERINGS:
            yield page.paragraph(
                verdict(
                    f"{claim} ({split} split)",
                    at(prefix + better[0], better[1]),
                    at(prefix + worse[0], worse[1]),
                    paired=better[0] == "scratch",  # the other one starts from it
                )
            )


def tables(at: At, num_train: int) -> Iterator[str]:
    """Yield the tables of errors by architecture and by geometry.

    Args:
      at: Function that returns the error of a variant at a test geometry.
      num_train: Number of training molecules, 0 if unknown.
    """
    yield page.heading("Bonds, cheap geometries and ground truth (Tables 1 and 4)")
    yield page.paragraph(
        "PaiNN is trained on ground-truth geometries, then fine-tuned on displaced ones with "
        "alignment, except in the last row. Uni-Mol+ learns to refine the geometry that it reads."
    )
    yield page.table(
        ["geometry and model", *_split_columns(), "published (eV)"],
        [
            (title, *_both_splits(at, name, geometry), published)
            for title, name, geometry, published in GEOMETRIES
        ],
    )
    count = f"{num_train:,} training molecules" if num_train else "all training molecules"
    for title, prefix, column in (
        ("Architectures, fewer training molecules (Table 6)", "subset-", 2),
        (f"Architectures, {count} (Table 9)", "", 3),
    ):
        yield page.heading(title)
        yield page.table(
            ["architecture", *_split_columns(), "published (eV)"],
            [
                (
                    row[0],
                    *_both_splits(at, row[1], STARTS.get(row[1], "labels"), prefix),
                    row[column],
                )
                for row in MODELS
            ],
        )
    yield from _second_data_set(at)
    yield from _figure(at)


def _split_columns() -> list[str]:
    return [f"{split}, {part} (eV)" for split in _SPLITS.values() for part in ("valid", "test")]


def _both_splits(at: At, name: str, geometry: str, first: str = "") -> list[str]:
    """Return validation and test errors on both splits."""
    return [str(at(first + prefix + name, g)) for prefix in _SPLITS for g in (VALID, geometry)]


def _second_data_set(at: At) -> Iterator[str]:
    """Yield Table 5: models of geometries on another data set, or on the random split."""
    known = any(at(f"second-{row[1]}").count for row in MODELS)
    prefix = "second-" if known else ""
    yield page.heading("Models of geometries (Table 5)")
    if not known:
        yield page.paragraph(
            "No second data set is given (second=PATH), so errors are those on the random split; "
            "the paper has ∇²DFT."
        )
    yield page.table(
        ["architecture", "valid (eV)", "test (eV)", "published (eV)"],
        [
            (row[0], str(at(prefix + row[1], VALID)), str(at(prefix + row[1])), row[4])
            for row in MODELS
            if row[4]
        ],
    )


def _figure(at: At) -> Iterator[str]:
    """Yield a figure of the test errors of all predictors."""
    fig, axes = figures.figure("Random split", "Scaffold split", size=(9.2, 3.8))
    for ax, prefix in zip(axes, _SPLITS):
        errors = [at(prefix + row[1], STARTS.get(row[1], "labels")) for row in MODELS]
        rows = [i for i, e in enumerate(errors) if e.count]
        ax.errorbar(
            [errors[i].mean for i in rows],
            rows,
            xerr=[errors[i].std if errors[i].count > 1 else 0.0 for i in rows],
            fmt="o",
            color=figures.BLUE,
            markersize=4,
            capsize=3,
        )
        ax.set_yticks(range(len(MODELS)), [row[0] for row in MODELS], fontsize=8)
        ax.invert_yaxis()
        ax.set(xlabel="gap MAE (eV)")
    yield page.figure(
        fig, "Test errors, as mean ± sample standard deviation over seeds.", wide=True
    )
