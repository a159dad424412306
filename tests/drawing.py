"""Figures of the tests are drawn without a layout and, in pages, at a low resolution.

Everything is still drawn, which shows most errors, in half of the time.
"""

import functools
import io
import sys


def simplify():
    """Simplify the figures of this process if it has imported Matplotlib."""
    module = sys.modules.get("matplotlib.figure")
    if module is None or hasattr(module.Figure.savefig, "__wrapped__"):
        return
    draw = module.Figure.savefig

    @functools.wraps(draw)
    def savefig(figure, target, **options):
        figure.set_layout_engine("none")
        if isinstance(target, io.BytesIO):  # of a page
            options["dpi"] = 50
        draw(figure, target, **options)

    module.Figure.savefig = savefig
