"""The style of figures and where they go: colours that most eyes can distinguish, panels, files.

Names of genes, cell types and conditions come from data, so their text is drawn as it is: `$` starts no formula.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager, patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from natsort import natsorted

from ndreamer_dist.storage.files import Storage, open_storage

P = ParamSpec("P")
Answer = TypeVar("Answer")
Drawn = TypeVar("Drawn", Axes, list[Axes])
Save = str | os.PathLike[str] | None

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#5A5A5A")
"""Okabe and Ito's colours, which the colour-blind tell apart, the palest last."""
UP, DOWN, QUIET, INK = "#D55E00", "#0072B2", "#C4C8CC", "#22262B"
MOST_NAMED = 40
"""Categories beyond which a legend would be longer than the figure."""
UNKNOWN = "not known"
FONTS = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
DPI = 200
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 100,
    "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 8, "axes.labelsize": 10, "axes.labelcolor": INK, "text.color": INK, "axes.edgecolor": "#8A9099",
    "axes.linewidth": 0.8, "xtick.color": "#5B616A", "ytick.color": "#5B616A", "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9, "legend.title_fontsize": 9.5,
    "legend.handletextpad": 0.4, "text.parse_math": False, "axes.unicode_minus": True,
}  # fmt: skip


def styled(plot: Callable[P, Answer]) -> Callable[P, Answer]:
    """Make a function draw in our style, whatever the style outside."""

    @functools.wraps(plot)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> Answer:
        with mpl.rc_context({**STYLE, "font.family": [_font()]}):
            drawn, interactive = plot(*args, **kwargs), mpl.is_interactive()
        mpl.interactive(interactive)  # a notebook's back end sets it at the first figure, and shows none without it
        return drawn

    return drawing


@functools.cache
def _font() -> str:
    installed = set(font_manager.get_font_names())
    return next(name for name in FONTS if name in installed)


def panels(number: int, ax: Axes | None, *, size: tuple[float, float], columns: int = 3) -> list[Axes]:
    """Return axes to draw on: the given one, or those of a new figure with panels of this size in inches.

    Raises
    ------
    ValueError
        One axis was given for several panels.
    """
    if ax is not None:
        if number > 1:
            msg = f"one `ax` was given for {number} panels; ask for one, or leave `ax` out"
            raise ValueError(msg)
        return [ax]
    across = min(number, columns)
    down = math.ceil(number / across)
    figure, grid = plt.subplots(down, across, figsize=(size[0] * across, size[1] * down), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    axes = list(grid.flat)
    for spare in axes[number:]:
        spare.remove()
    return axes[:number]


def finish(drawn: Drawn, *, show: bool, save: Save) -> Drawn:
    """Save and show the figure of some axes, where that is asked for; return them."""
    figure = (drawn if isinstance(drawn, Axes) else drawn[0]).get_figure(root=True)
    if save is not None and figure is not None:
        name = os.fspath(save)
        write_file(name, figure_bytes(figure, name.rpartition(".")[2]))
    if show:
        plt.show()
    return drawn


def figure_bytes(figure: Figure, form: str = "png") -> bytes:
    """Return a figure as a file of this form."""
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=DPI, bbox_inches="tight", pad_inches=0.08, facecolor="white")
    return file.getvalue()


def write_file(path: str | os.PathLike[str], data: bytes) -> str:
    """Write a file whole or not at all, here or on object storage; return its address."""
    address = open_storage(path).url
    folder, _, name = address.rpartition("/")
    Storage(folder or "/").write_atomic(name, data)
    return address


# --- categories ------------------------------------------------------------------------------------------------------


def categories(values: pd.Series) -> pd.Categorical:
    """Return values as names in natural order (type_2 before type_10), missing ones last."""
    names = values.astype(object).where(values.notna(), UNKNOWN).astype(str)
    levels = natsorted(set(names) - {UNKNOWN}) + [UNKNOWN] * bool((names == UNKNOWN).any())
    return pd.Categorical(names, categories=levels)


Palette = str | Sequence[str] | Mapping[str, str] | None
"""Colours of categories, in their order or by name; a colour map by its name."""


def colours(levels: Sequence[str], palette: Palette = None) -> list[str]:
    """Return a colour per level: Okabe and Ito's for up to eight, scanpy's beyond; grey for what is not known.

    Parameters
    ----------
    palette
        Colours to use instead: in the order of the levels, by level (the others grey), or of a colour map by its name.
    """
    if isinstance(palette, Mapping):
        return [palette.get(level, QUIET) for level in levels]
    if isinstance(palette, str):
        palette = [str(to_hex(shade)) for shade in plt.get_cmap(palette, max(len(levels), 1))(range(len(levels)))]
    if palette is not None:
        return [palette[place % len(palette)] for place in range(len(levels))]
    from scanpy.plotting import palettes

    named = len(levels) - (UNKNOWN in levels)
    shades = next(
        (p for p in (PALETTE, palettes.default_20, palettes.default_28) if named <= len(p)), palettes.default_102
    )
    return [QUIET if level == UNKNOWN else shades[place % len(shades)] for place, level in enumerate(levels)]


def legend_outside(ax: Axes, levels: Sequence[str], shades: Sequence[str]) -> None:
    """Put a legend to the right of an axis, outside: nothing is covered."""
    marks = [
        plt.Line2D([], [], marker="o", linestyle="", color=shade, markersize=6.5, label=shortened(level, 34))
        for level, shade in zip(levels, shades, strict=True)
    ]
    ax.legend(
        handles=marks, loc="center left", bbox_to_anchor=(1.0, 0.5), alignment="left",
        ncols=1 if len(levels) <= 18 else 2, borderaxespad=0.3,
    )  # fmt: skip


SYMBOLS = ("gene_symbols", "gene_symbol", "symbol", "feature_name", "gene_name", "gene_names", "hgnc_symbol")
"""Columns of var that hold what people call genes, in lower case."""


def gene_labels(var: pd.DataFrame) -> dict[str, str]:
    """Return what to call genes that are named by Ensembl's numbers, by name: the symbols that var holds, if any.

    A symbol of several genes stands with the name of each.
    """
    names = pd.Series([str(name) for name in var.index], index=var.index)
    column = next((name for name in var if str(name).lower() in SYMBOLS), None)
    if column is None or names.str.fullmatch(r"ENS[A-Z]*\d{6,}(\.\d+)?").mean() < 0.5:
        return {}
    symbols = var[column].astype(object).where(var[column].notna(), "").astype(str)
    labels = symbols.where(~symbols.duplicated(keep=False), symbols + " (" + names + ")")
    return {name: label for name, symbol, label in zip(names, symbols, labels, strict=True) if symbol}


def shortened(name: str, most: int = 28) -> str:
    """Return a name that fits on an axis."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


# --- text on points --------------------------------------------------------------------------------------------------


def halo() -> list[patheffects.AbstractPathEffect]:
    """Return what keeps text readable on points."""
    return [patheffects.withStroke(linewidth=2.4, foreground="white")]


NAME_SIZE, GAP = 8.5, 2.0
"""Size of names of points, and the room kept free around points and names, in points."""
SPOTS = (
    (7.0, 3.0), (7.0, -6.0), (-7.0, 3.0), (-7.0, -6.0), (0.0, 11.0), (0.0, -13.0),  # beside the point
    *(
        (math.copysign(reach * math.cos(angle), side), reach * math.sin(angle))
        for reach in (22.0, 34.0, 48.0)
        for angle in (0.5, -0.5, 1.1, -1.1)
        for side in (1, -1)
    ),
)  # fmt: skip
"""Where a name may stand, from its point, in points; the first that is free is taken. A line leads to those farther off."""
FAR_NAMES = 6
LEADER = {"arrowstyle": "-", "linewidth": 0.6, "color": "#8A9099", "shrinkA": 0, "shrinkB": 2}


def label_points(ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], most: int) -> None:
    """Name points, in the order given, where there is room; a name without a free place is left out.

    A name covers no other text and none of the points to name, and beside its point no other of these is nearer to it. Points
    that get no name are covered only where there is no other place. The axes' limits must be final: places are measured in pixels.

    Parameters
    ----------
    x, y
        Positions of the points to name, in data units, (points,).
    most
        Names at most.
    """
    figure = ax.get_figure(root=True)
    if figure is None:
        return
    figure.canvas.draw()  # now the layout is known
    room = _Room.of(ax, ax.transData.transform(np.column_stack([x, y])), figure.dpi / 72)
    named = 0
    for place, name in enumerate(names):
        if named == most:
            return
        text = ax.annotate(
            shortened(name, 20), (x[place], y[place]), xytext=(0, 0), textcoords="offset points", fontsize=NAME_SIZE,
            ha="center", va="center", path_effects=halo(),
        )  # fmt: skip
        text.set_in_layout(False)
        box = text.get_window_extent()
        spot = room.take(place, box.width, box.height)
        if spot is not None:
            _write(ax, text, spot)
            named += 1
        text.remove()


def _write(ax: Axes, text: Annotation, spot: _Spot) -> None:
    """Write a name anew at its place; whether a line leads there is fixed when a text is made."""
    written = ax.annotate(
        text.get_text(), text.xy, xytext=spot.centre, textcoords="offset points", fontsize=NAME_SIZE, ha="center",
        va="center", path_effects=halo(), arrowprops={**LEADER, "relpos": spot.end} if spot.end else None,
    )  # fmt: skip
    written.set_in_layout(False)


@dataclass(frozen=True)
class _Spot:
    """A place of a name: its centre from the point, in points, and where on it a line from the point ends, if there is one.

    The end is a share of the name's width and height.
    """

    centre: tuple[float, float]
    end: tuple[float, float] | None


@dataclass(frozen=True)
class _Room:
    """What a plot's names may not cover. All in pixels."""

    frame: Bbox
    own: np.ndarray  # (points to name, 2)
    points: np.ndarray  # (all points drawn, 2)
    radii: np.ndarray  # (all points drawn,)
    taken: list[Bbox]
    lines: list[np.ndarray]
    scale: float  # pixels a point

    @classmethod
    def of(cls, ax: Axes, own: np.ndarray, scale: float) -> _Room:
        """Measure the points and the texts that are drawn on an axis."""
        drawn, radii = [own], [np.full(len(own), 3.0)]
        for cloud in ax.collections:
            at = ax.transData.transform(np.ma.getdata(cloud.get_offsets()).reshape(-1, 2))
            drawn.append(at)
            radii.append(np.broadcast_to(np.sqrt(np.resize(cloud.get_sizes(), len(at))) / 2, len(at)))  # type: ignore[attr-defined]
        legend = ax.get_legend()
        texts = [text for text in ax.texts if text.get_text()] + ([legend] if legend else [])
        boxes = [text.get_window_extent() for text in texts]
        points, sizes = np.concatenate(drawn), np.concatenate(radii) * scale
        return cls(ax.get_window_extent(), own, points, sizes, boxes, [], scale)

    def take(self, place: int, width: float, height: float) -> _Spot | None:
        """Return the first free place for the name of a point, and keep it from the others; None if there is none."""
        inward = 1 if self.own[place, 0] >= (self.frame.x0 + self.frame.x1) / 2 else -1
        for sparing in (True, False):
            for number, (right, up) in enumerate(SPOTS):
                far = number >= FAR_NAMES
                right, shift = right * inward, math.copysign(width / 2, right * inward) if right else 0.0
                centre = self.own[place] + (right * self.scale + shift, up * self.scale)
                box = Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)
                line = np.linspace(self.own[place], _nearest(box, self.own[place]), 24) if far else np.empty((0, 2))
                if self._is_free(box, line, place, sparing=sparing):
                    self.taken.append(box)
                    self.lines.append(line)
                    offset = (centre - self.own[place]) / self.scale
                    end = (line[-1] - box.min) / (width, height) if far else None
                    return _Spot(
                        (float(offset[0]), float(offset[1])), None if end is None else (float(end[0]), float(end[1]))
                    )
        return None

    def _is_free(self, box: Bbox, line: np.ndarray, place: int, *, sparing: bool) -> bool:
        frame = self.frame
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 8
        if not inside or any(box.overlaps(other) or other.count_contains(line) for other in self.taken):
            return False
        if any(box.count_contains(other) or _cross(line, other) for other in self.lines):
            return False
        distance = _distance(box, self.own)
        if distance.min() < 3 * self.scale or (len(line) == 0 and distance.min() < distance[place] - 1e-6):
            return False
        others = np.delete(self.own, place, axis=0)
        if len(line) and len(others) and np.hypot(*(line[2:, None] - others).T).min() < 3 * self.scale:
            return False
        return not sparing or bool((_distance(box, self.points) > self.radii).all())


def _nearest(box: Bbox, points: np.ndarray) -> np.ndarray:
    """Return the points of a box that are nearest to points, (..., 2)."""
    return np.clip(points, box.min, box.max)


def _cross(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two straight lines of points cross, or lead to the same place."""
    if not len(one) or not len(other):
        return False
    (a, b), (c, d) = (one[0], one[-1]), (other[0], other[-1])

    def turns(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> float:
        return float((q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]))

    return turns(a, b, c) * turns(a, b, d) <= 0 and turns(c, d, a) * turns(c, d, b) <= 0


def _distance(box: Bbox, points: np.ndarray) -> np.ndarray:
    return np.hypot(*(points - _nearest(box, points)).T)
