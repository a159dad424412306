"""Tests for the notebooks: valid, without outputs, with existing names; slow tests run them."""

import ast
import importlib
import os
import re
import urllib.request
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
SO3LR = "MLIP_JAX_SO3LR"
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path):
    """Return the code cells, with magics and shell commands converted to Python."""
    cells = nbformat.read(path, 4).cells
    return [TransformerManager().transform_cell(c.source) for c in cells if c.cell_type == "code"]


def test_there_are_six_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_train",
        "02_relax",
        "03_md_so3lr",
        "04_properties",
        "05_diversity",
        "06_label_budget",
    ]


@each
def test_notebook_is_valid_and_has_no_outputs(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert all(
        not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code"
    )
    assert path.stat().st_size < 50_000


@each
def test_first_cell_installs_the_package_if_missing(path):
    first = next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
    assert (
        "import mlip_jax\nexcept ImportError:" in first
        and '%pip install -q "mlip-flax[{EXTRAS}] @ git+' in first
    )
    assert len(re.findall(r"^REPOSITORY = .*# PLACEHOLDER", first, re.MULTILINE)) == 1


@each
def test_imported_names_of_the_package_exist(path):
    for number, code in enumerate(code_of(path)):
        for node in ast.walk(ast.parse(code, f"{path.name}, code cell {number}")):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mlip_jax":
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.import_module(
                        f"{node.module}.{name.name}"
                    )


@each
def test_configs_exist(path):
    configs = {
        m for c in nbformat.read(path, 4).cells for m in re.findall(r"configs/\w+\.py", c.source)
    }
    assert configs or path.stem == "03_md_so3lr"
    assert not [name for name in configs if not (REPOSITORY / name).is_file()]


def _reachable(url):
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=10
        ) as answer:
            return answer.status == 200
    except OSError:
        return False


def _need_so3lr(path):
    given = os.environ.get(SO3LR)
    if given and Path(given).is_file():
        return
    urls = re.findall(r'https://raw\.githubusercontent\.com[^"]*"\s*"[^"]*', "".join(code_of(path)))
    assert urls, "the notebook has no URL of params.pkl"
    url = re.sub(r'"\s*"', "", urls[0])
    if not _reachable(url):
        pytest.skip(f"SO3LR's params.pkl: {SO3LR} is not a file, and {url} is not reachable")


@pytest.mark.slow
@each
def test_notebook_runs_and_shows_figures(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    pytest.importorskip("rdkit")
    pytest.importorskip("tblite")
    if path.stem == "03_md_so3lr":
        _need_so3lr(path)
        if os.environ.get(SO3LR):
            monkeypatch.setenv(SO3LR, str(Path(os.environ[SO3LR]).resolve()))
    # the kernel and its commands import this package
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    )
    notebook = nbformat.read(path, 4)
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()  # raises if a cell raises
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [
        o.text
        for o in outputs
        if o.output_type == "stream" and re.search(r"^error: ", o.text, re.MULTILINE)
    ]
