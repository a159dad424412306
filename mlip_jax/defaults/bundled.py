"""Name of the force field that comes with the package."""

from __future__ import annotations

# docs/force_field.md describes it
BUNDLED = "drugs-gfn2"
