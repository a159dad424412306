"""Tests that links, paths, configs, fields and names in the documentation exist."""

import ast
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


markdown = _load("docs_markdown", Path(__file__).with_name("markdown.py"))
reference = _load("config_reference", markdown.DOCS / "config_reference.py")
contributing = _load("contributing", markdown.DOCS / "contributing.py")
GENERATED = {reference.PAGE, contributing.PAGE}  # pages that hooks add to the site
PAGES = {str(p.relative_to(markdown.ROOT)): p.read_text() for p in markdown.pages()}
# files that the how-to pages create, and placeholders of file names
CREATED = {b.title for text in PAGES.values() for b in markdown.blocks(text) if b.title}
PLACEHOLDER = re.compile(r"/NAME\b")
COMMANDS = {name: text.replace("\\\n", " ") for name, text in PAGES.items()} | {
    str(p.relative_to(markdown.ROOT)): p.read_text()
    for p in (markdown.ROOT / "notebooks").glob("*.ipynb")
}


TEXTS = COMMANDS | {
    str(p.relative_to(markdown.ROOT)): p.read_text()
    for pattern in ("benchmarks/README.md", "configs/*.py", "launch/*", "mkdocs.yml", "Makefile")
    for p in markdown.ROOT.glob(pattern)
    if p.is_file()
}


@pytest.mark.parametrize("page", TEXTS)
def test_paths(page):
    """Detects pages with the old path of a file that moved."""
    folders = "mlip_jax|tests|configs|docs|launch|benchmarks|notebooks"
    for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", TEXTS[page]):
        if not PLACEHOLDER.search(path):
            assert (markdown.ROOT / path).exists() or path in CREATED, f"{page}: {path}"


@pytest.mark.parametrize("page", TEXTS)
def test_names_of_the_package(page):
    """Detects pages with the old name of a class or function."""
    for name in re.findall(r"(?<![\w./-])mlip_jax(?!\.tar)(?:\.[A-Za-z_]\w*)+", TEXTS[page]):
        pkgutil.resolve_name(name)


def test_development_page_lists_the_folders_in_order():
    architecture = _load("architecture", markdown.ROOT / "tests/test_architecture.py")
    section = PAGES["docs/development.md"].split("## Folders")[1].split("Files have at most")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.M)) == architecture.ORDER


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", markdown.without_code(PAGES[page])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (markdown.ROOT / page).parent / path if path else markdown.ROOT / page
        assert file.exists() or file.name in GENERATED, f"{page}: {target}"
        if anchor and file.exists() and file.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = {
                re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in heads
            }
            assert anchor in slugs, f"{page}: {target}"


@pytest.mark.parametrize("page", COMMANDS)
def test_configs_and_fields(page):
    """Detects configs that do not exist, and fields that their task does not have."""
    for name, rest in re.findall(
        r"--config=((?:configs/\w+\.py|[a-z]\w*)\b)(?!\.)([^\n]*)", COMMANDS[page]
    ):
        file = name if "/" in name else f"configs/{name}.py"
        if file in CREATED:
            continue
        assert (markdown.ROOT / file).is_file(), f"{page}: {file}"
        config = reference.config_of(importlib.import_module(f"mlip_jax.configs.{Path(file).stem}"))
        if config is None:
            continue
        known = dict(reference.fields(config))
        known |= dict(reference.TASKS[config.task].fields())
        for field in re.findall(r"--config\.([\w.]+)=", rest):
            free = re.match(r"model\.options\.|potential\.\w+_options\.|property\.heads\.", field)
            assert field in known or free, f"{page}: {file} has no field {field}"


def test_reference_has_every_field():
    page = reference.page()
    for name, task in reference.TASKS.items():
        part = page.split(f"### Task `{name}` ")[1].split("\n###")[0]
        for field, _ in task.fields():
            assert f"| `{field}` |" in part, (name, field)
    assert "| `fmax` | `0.05` | (eV/Å, positive) Maximum force on an atom" in page
    for name in reference.experiments():
        assert f"### `configs/{name}.py`" in page


@pytest.mark.parametrize("page", PAGES)
def test_imports(page):
    for block in markdown.blocks(PAGES[page]):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlip_jax":
                module = importlib.import_module(node.module)
                for name in node.names:
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.slow
def test_site_builds(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path),
        ],
        cwd=markdown.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train.num_steps" in (tmp_path / "config-reference/index.html").read_text()


def test_contributing_page_has_links_of_the_site():
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", contributing.page())
    assert links and all((markdown.DOCS / link).exists() for link in links)


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((markdown.ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((markdown.ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] and citation["license"] == project["license"]


def test_every_page_is_in_the_navigation():
    def leaves(node):
        values = node.values() if isinstance(node, dict) else node
        return {x for v in values for x in ([v] if isinstance(v, str) else leaves(v))}

    navigation = leaves(yaml.safe_load((markdown.ROOT / "mkdocs.yml").read_text())["nav"])
    assert navigation == GENERATED | {
        str(p.relative_to(markdown.DOCS)) for p in markdown.DOCS.rglob("*.md")
    }


def test_equations_are_converted_to_mathml():
    pytest.importorskip("latex2mathml")
    equations = _load("equations", markdown.ROOT / "docs/equations.py")
    shown = equations.on_page_content(
        '<p>With <span class="arithmatex">\\(a &lt; b\\)</span></p>'
        '<div class="arithmatex">\\[\nE = \\sum_i e_i\n\\]</div>'
    )
    assert shown.startswith(
        '<p>With <span><math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">'
    )
    assert "<mo>&#x0003C;</mo>" in shown and 'display="block"' in shown and "\\" not in shown
    for unknown in (r"\unknown a", r"\begin{aligned} a &= b \end{aligned}"):
        with pytest.raises(ValueError, match="cannot convert to MathML"):
            equations.on_page_content(f'<span class="arithmatex">\\({unknown}\\)</span>')
