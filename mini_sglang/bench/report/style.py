"""How charts look: told apart by hatch, dashes, marker and label first, by colour only beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

INK, QUIET, RULE, PAPER = "#16191d", "#565d66", "#d9dde2", "#ffffff"
OURS = "#0b4a5e"
OTHER_FACE, OTHER_HATCH, OTHER_EDGE = "#eceff1", "#9aa3ab", "#5d656e"

# Ours is solid: its dark face is a pattern of its own. None is of dots, which make an SVG ten times as large.
HATCHES = ("", "///", "\\\\\\", "---", "xxx", "|||", "+++", "//", "\\\\", "--", "xx", "||", "++")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "solid",
    (0, (6, 2)),
    (0, (1.5, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (3, 1.2)),
    (0, (8, 2, 1.5, 2, 1.5, 2)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
COLOURS = (OURS, "#b0501c", "#5b3f8c", "#2c6e36", "#8c1d49", "#3c4550")

RC: Mapping[str, object] = MappingProxyType(
    {
        "font.family": "DejaVu Sans",
        "text.color": INK,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": QUIET,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "hatch.linewidth": 0.7,
        # A name with two dollar signs is not a formula.
        "text.parse_math": False,
        "text.usetex": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "mini-sglang",
        "axes.formatter.use_mathtext": False,
    }
)


def hatch(style: int) -> str:
    """Of the bar of this style; the first ones all differ, and denser ones follow."""
    if style == 0:
        return HATCHES[0]
    again, place = divmod(style - 1, len(HATCHES) - 1)
    return HATCHES[place + 1] * (again + 1)


@dataclass(frozen=True)
class Layout:
    """Sizes in CSS pixels, at which the picture is meant to be seen.

    Attributes:
        width: of the picture.
        text, small: heights of letters.
        labels: room for the names left of bars; 0 where they stand above them.
    """

    width: float
    text: float
    small: float
    labels: float

    @property
    def narrow(self) -> bool:
        return self.labels == 0


WIDE = Layout(width=860, text=14.5, small=13, labels=216)
NARROW = Layout(width=340, text=13.5, small=12.5, labels=0)
