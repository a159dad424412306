"""Figures of the tests: without a layout and, in pages, at a low resolution or not at all.

Tests of tests/reports draw everything, which shows most errors, in half of the time. Whole training
runs, whose pages tests/reports covers, embed a blank image instead of each figure: drawing takes a
quarter of the time of a small run.
"""

import base64
import functools
import io
import sys

# BLANK: a PNG image of one pixel
BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
_options = {"blank": False}


def simplify(blank=False):
    """Simplify the figures of this process if it has imported Matplotlib.

    Args:
      blank: Whether pages get blank images from now on.
    """
    _options["blank"] = blank
    module = sys.modules.get("matplotlib.figure")
    if module is None or hasattr(module.Figure.savefig, "__wrapped__"):
        return
    draw = module.Figure.savefig

    @functools.wraps(draw)
    def savefig(figure, target, **options):
        figure.set_layout_engine("none")
        if isinstance(target, io.BytesIO):  # of a page
            if _options["blank"]:
                target.write(BLANK)
                return
            options["dpi"] = 50
        draw(figure, target, **options)

    module.Figure.savefig = savefig
