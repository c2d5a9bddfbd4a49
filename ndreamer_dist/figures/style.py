"""The style of figures: colours that colour-blind readers can distinguish, panels, legends, names of points, files.

Names of genes, cell types and conditions come from data and are drawn literally: `$` starts no formula.
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
"""The colours of Okabe and Ito, which colour-blind readers can distinguish; the palest are last."""
UP, DOWN, QUIET, INK = "#D55E00", "#0072B2", "#C4C8CC", "#22262B"
"""Colours of positive, negative and non-significant effects, and of text and lines."""
MOST_NAMED = 40
"""Most categories in a legend; more would be longer than the figure."""
UNKNOWN = "not known"
"""Category of missing values."""
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
    """Make a function draw in the style of this module, without changing matplotlib's settings outside it."""

    @functools.wraps(plot)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> Answer:
        with mpl.rc_context({**STYLE, "font.family": [_font()]}):
            drawn, interactive = plot(*args, **kwargs), mpl.is_interactive()
        mpl.interactive(interactive)  # a notebook's back end sets it at the first figure; rc_context would undo that
        return drawn

    return drawing


@functools.cache
def _font() -> str:
    installed = set(font_manager.get_font_names())
    return next(name for name in FONTS if name in installed)


def panels(number: int, ax: Axes | None, *, size: tuple[float, float], columns: int = 3) -> list[Axes]:
    """Return the axes to draw on: `ax`, or those of a new figure.

    Parameters
    ----------
    number
        Number of panels.
    size, columns
        Size of a panel in inches, and most panels in a row of a new figure.

    Raises
    ------
    ValueError
        `ax` is given for several panels.
    """
    if ax is not None:
        if number > 1:
            msg = f"one `ax` cannot hold {number} panels; draw one panel, or leave `ax` out"
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
    """Save the figure of the axes if `save` is a path, show it if `show`, and return the axes."""
    figure = (drawn if isinstance(drawn, Axes) else drawn[0]).get_figure(root=True)
    if save is not None and figure is not None:
        name = os.fspath(save)
        write_file(name, figure_bytes(figure, name.rpartition(".")[2]))
    if show:
        plt.show()
    return drawn


def figure_bytes(figure: Figure, form: str = "png") -> bytes:
    """Return a figure as the bytes of a file in this format."""
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=DPI, bbox_inches="tight", pad_inches=0.08, facecolor="white")
    return file.getvalue()


def write_file(path: str | os.PathLike[str], data: bytes) -> str:
    """Write a file atomically, on a local disk or on object storage, and return its address."""
    address = open_storage(path).url
    folder, _, name = address.rpartition("/")
    Storage(folder or "/").write_atomic(name, data)
    return address


# --- categories ------------------------------------------------------------------------------------------------------


def categories(values: pd.Series) -> pd.Categorical:
    """Return values as categories in natural order (type_2 before type_10), missing values last."""
    names = values.astype(object).where(values.notna(), UNKNOWN).astype(str)
    levels = natsorted(set(names) - {UNKNOWN}) + [UNKNOWN] * bool((names == UNKNOWN).any())
    return pd.Categorical(names, categories=levels)


Palette = str | Sequence[str] | Mapping[str, str] | None
"""Colours of categories, by name or in the order of the categories; or the name of a colour map."""


def colours(levels: Sequence[str], palette: Palette = None) -> list[str]:
    """Return a colour per level: Okabe and Ito's for up to eight levels, else scanpy's; grey for missing values.

    Parameters
    ----------
    palette
        Colours to use instead: in the order of the levels, by level (other levels are grey), or the name of a colour
        map.
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
    """Draw a legend outside the axes, on the right."""
    marks = [
        plt.Line2D([], [], marker="o", linestyle="", color=shade, markersize=6.5, label=shortened(level, 34))
        for level, shade in zip(levels, shades, strict=True)
    ]
    ax.legend(
        handles=marks, loc="center left", bbox_to_anchor=(1.0, 0.5), alignment="left",
        ncols=1 if len(levels) <= 18 else 2, borderaxespad=0.3,
    )  # fmt: skip


SYMBOLS = ("gene_symbols", "gene_symbol", "symbol", "feature_name", "gene_name", "gene_names", "hgnc_symbol")
"""Names, in lower case, of columns of var with gene symbols."""


def gene_labels(var: pd.DataFrame) -> dict[str, str]:
    """Return the symbols of genes that are named by Ensembl IDs, by name; empty if var has no symbols or no such names.

    A symbol that several genes share is followed by the gene's name.
    """
    names = pd.Series([str(name) for name in var.index], index=var.index)
    column = next((name for name in var if str(name).lower() in SYMBOLS), None)
    if column is None or names.str.fullmatch(r"ENS[A-Z]*\d{6,}(\.\d+)?").mean() < 0.5:
        return {}
    symbols = var[column].astype(object).where(var[column].notna(), "").astype(str)
    labels = symbols.where(~symbols.duplicated(keep=False), symbols + " (" + names + ")")
    return {name: label for name, symbol, label in zip(names, symbols, labels, strict=True) if symbol}


def shortened(name: str, most: int = 28) -> str:
    """Return a name, cut to at most this many characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


# --- text on points --------------------------------------------------------------------------------------------------


def halo() -> list[patheffects.AbstractPathEffect]:
    """Return the path effect of a white outline, which keeps text readable on points."""
    return [patheffects.withStroke(linewidth=2.4, foreground="white")]


NAME_SIZE = 8.5
"""Font size of the names of points."""
SPOTS = (
    (7.0, 3.0), (7.0, -6.0), (-7.0, 3.0), (-7.0, -6.0), (0.0, 11.0), (0.0, -13.0),  # beside the point
    *(
        (math.copysign(reach * math.cos(angle), side), reach * math.sin(angle))
        for reach in (22.0, 34.0, 48.0)
        for angle in (0.5, -0.5, 1.1, -1.1)
        for side in (1, -1)
    ),
)  # fmt: skip
"""Candidate positions of a name relative to its point, in points; the first free one is used."""
FAR_NAMES = 6
"""Index of the first candidate position that needs a leader line to the point."""
LEADER = {"arrowstyle": "-", "linewidth": 0.6, "color": "#8A9099", "shrinkA": 0, "shrinkB": 2}


def label_points(ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], most: int) -> None:
    """Draw names of points, in order, where there is room; names without a free position are left out.

    A name covers no other text and none of the points to name. Without a leader line, its own point is the nearest of
    these. Other points are covered only if there is no other position. The axes' limits must be final, because
    positions are measured in pixels.

    Parameters
    ----------
    x, y
        (points,) positions of the points to name, in data units.
    names
        A name per point, the most important first.
    most
        Most names to draw.
    """
    figure = ax.get_figure(root=True)
    if figure is None:
        return
    figure.canvas.draw()  # fixes the layout
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
    """Draw a name at its final position, as a new annotation: the leader line cannot be added to an existing one."""
    written = ax.annotate(
        text.get_text(), text.xy, xytext=spot.centre, textcoords="offset points", fontsize=NAME_SIZE, ha="center",
        va="center", path_effects=halo(), arrowprops={**LEADER, "relpos": spot.end} if spot.end else None,
    )  # fmt: skip
    written.set_in_layout(False)


@dataclass(frozen=True)
class _Spot:
    """The position of a name.

    Attributes
    ----------
    centre
        Offset of the name's centre from the point, in points.
    end
        End of the leader line on the name, in shares of its width and height; None without a line.
    """

    centre: tuple[float, float]
    end: tuple[float, float] | None


@dataclass(frozen=True)
class _Room:
    """The free room of an axes: what names must not cover. All positions are in pixels."""

    frame: Bbox
    own: np.ndarray  # (points to name, 2)
    points: np.ndarray  # (all points drawn, 2)
    radii: np.ndarray  # (all points drawn,)
    taken: list[Bbox]
    lines: list[np.ndarray]
    scale: float  # pixels per typographic point

    @classmethod
    def of(cls, ax: Axes, own: np.ndarray, scale: float) -> _Room:
        """Measure the points and texts on the axes; `own` are the points to name."""
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
        """Return the first free position for the name of a point and reserve it; None if there is none."""
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
    """Return whether two straight lines, as (points, 2), cross or touch."""
    if not len(one) or not len(other):
        return False
    (a, b), (c, d) = (one[0], one[-1]), (other[0], other[-1])

    def turns(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> float:
        return float((q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]))

    return turns(a, b, c) * turns(a, b, d) <= 0 and turns(c, d, a) * turns(c, d, b) <= 0


def _distance(box: Bbox, points: np.ndarray) -> np.ndarray:
    return np.hypot(*(points - _nearest(box, points)).T)
