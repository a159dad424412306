"""Hook of mkdocs that adds CONTRIBUTING.md, which is outside of the folder docs/, to the site."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = "contributing.md"


def page() -> str:
    """Return the page with links relative to docs/."""
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")


def on_files(files, config):
    """Hook of mkdocs: add the page to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files
