"""The notebooks: whole, without outputs, and made of what the package has; run from top to bottom where time allows."""

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
    """The code cells, magics and shell commands made Python."""
    cells = nbformat.read(path, 4).cells
    return [TransformerManager().transform_cell(c.source) for c in cells if c.cell_type == "code"]


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_train",
        "02_relax",
        "03_md_so3lr",
        "04_properties",
        "05_diversity",
    ]


@each
def test_is_a_notebook_without_outputs(path):
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
def test_first_installs_the_package_where_it_is_missing(path):
    first = next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
    assert (
        "import mlip_jax\nexcept ImportError:" in first
        and '%pip install -q "mlip-flax[{EXTRAS}] @ git+' in first
    )
    assert len(re.findall(r"^REPOSITORY = .*# PLACEHOLDER", first, re.MULTILINE)) == 1


@each
def test_all_that_it_imports_of_the_package_is_there(path):
    for number, code in enumerate(code_of(path)):
        for node in ast.walk(ast.parse(code, f"{path.name}, code cell {number}")):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mlip_jax":
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.import_module(
                        f"{node.module}.{name.name}"
                    )


@each
def test_every_config_that_it_names_exists(path):
    named = {
        m for c in nbformat.read(path, 4).cells for m in re.findall(r"configs/\w+\.py", c.source)
    }
    assert named or path.stem == "03_md_so3lr"
    assert not [name for name in named if not (REPOSITORY / name).is_file()]


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
    assert urls, "the notebook has no address of params.pkl"
    url = re.sub(r'"\s*"', "", urls[0])
    if not _reachable(url):
        pytest.skip(f"needs SO3LR's params.pkl: {SO3LR} names no file, and {url} cannot be reached")


@pytest.mark.slow
@each
def test_runs_from_top_to_bottom_and_shows_pictures(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    pytest.importorskip("rdkit")
    pytest.importorskip("tblite")
    if path.stem == "03_md_so3lr":
        _need_so3lr(path)
        if os.environ.get(SO3LR):
            monkeypatch.setenv(SO3LR, str(Path(os.environ[SO3LR]).resolve()))
    # the kernel and the commands that it starts import the package that is tested
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    )
    notebook = nbformat.read(path, 4)
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()  # raises where a cell does
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [
        o.text
        for o in outputs
        if o.output_type == "stream" and re.search(r"^error: ", o.text, re.MULTILINE)
    ]
