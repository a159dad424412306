"""Tests for pages from templates: text never becomes HTML, and parts are inserted as they are."""

import re

import pytest
from ase import Atoms
from matplotlib.figure import Figure

from mlip_jax.reports import html_page as page
from mlip_jax.reports.molecules import Picture, molecule_figure

TEXT = """<script>&"'{{ 1 + 1 }}"""
ESCAPED = "&lt;script&gt;&amp;&#34;&#39;{{ 1 + 1 }}"


@pytest.mark.parametrize(
    "part",
    [
        lambda: page.heading(TEXT),
        lambda: page.paragraph(TEXT),
        lambda: page.callout(TEXT),
        lambda: page.cards([(TEXT, TEXT, TEXT, TEXT)]),
        lambda: page.table([TEXT], [[TEXT]]),
        lambda: page.pairs({TEXT: TEXT}),
        lambda: page.section(TEXT, {TEXT: TEXT}),
        lambda: page.figure(Figure(figsize=(1, 1)), TEXT),
        lambda: page.grid([TEXT]),
        lambda: TEXT,
    ],
)
def test_text_is_escaped_once(part):
    html = page.render(TEXT, [part()])  # in the title, and in the part
    assert html.count(ESCAPED) >= 2 and "<script" not in html and "&amp;lt;" not in html


def test_characters_that_utf8_cannot_hold_are_replaced():
    page.render("\udcff", [page.paragraph("\udcff")]).encode("utf-8")


def test_units_of_a_header_are_not_broken():
    assert 'error <span class="unit">(meV/Å)</span>' in page.table(["error (meV/Å)"], [])


def test_a_figure_is_not_enlarged():
    """Detects a blurred picture of a single molecule that fills the page."""
    picture = Picture("", Atoms("H"), Atoms("H"))
    (width,) = re.findall(r"max-width: (\d+)px", page.figure(molecule_figure([picture]), ""))
    assert int(width) <= 300
    (width,) = re.findall(r"max-width: (\d+)px", page.figure(Figure(figsize=(9.2, 4)), ""))
    assert int(width) > 1080


@pytest.mark.parametrize("unit", [r"$\frac{$", "$x_$", "$" + "{" * 5000 + "$", r"$x^2$"])
def test_labels_that_are_no_formulas_are_drawn(unit):
    """The unit of a property is text from a predictor of other people; it ended the report."""
    fig = Figure(figsize=(2, 2))
    fig.subplots().set(xlabel=unit, title=unit)
    page.figure(fig, "x")


def test_links_lead_to_headings():
    heading = 'Outside the "domain" (1 %)'
    (target,) = re.findall('href="#(.*?)"', page.link(heading, "below"))
    assert f'id="{target}"' in page.heading(heading)


def test_nothing_is_loaded():
    assert "default-src 'none'" in page.render("", [])
