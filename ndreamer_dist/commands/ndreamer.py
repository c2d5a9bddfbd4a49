"""`NDreamer`, for scripts written for the published package: its words in, its files out, this package's work between.

The class is a thin layer: every call is a `run` in `save_pth/run`, an ordinary run directory, and an `export` of the
results to `save_pth` in the published layout. What a call leaves out is what the published class takes when it is left
out (METHOD sections 2 and 4), which differs from the paper's sizes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from anndata import AnnData

from ndreamer_dist import keys
from ndreamer_dist.commands.ndreamer_layout import export
from ndreamer_dist.errors import SettingsError, suggest
from ndreamer_dist.pipeline import Run, run
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings

RUN: Final = "run"
"""Name of the run directory below `save_pth`."""
MISSPELT: Final = {
    "contorl_name": "control_name", "epoches": "epochs", "Estmiate_ITE_all": "Estimate_ITE_all",
}  # fmt: skip
NAMES: Final = {
    "condition_key": "cohort.condition_key",
    "control_name": "cohort.control",
    "batch_key": "cohort.batch_key",
    "encoder_hidden": "model.encoder",
    "decoder_hidden": "model.decoder",
}
"""Arguments that are called otherwise here; any other is a setting by its own name, `latent_noise` or `num_hvg`, say."""
BARE: Final = {"model.encoder": (2048, 1024), "train.batch_size": 2048, "train.epochs": 10}
"""What the published class takes where an argument is left out and the paper's default is another."""
FILTERS: Final = {"cohort.min_genes": 300, "cohort.min_cells": 10}
"""What it leaves out when it is asked to normalise."""
LATER: Final = {"effects.store": (), "match.neighbours": 1, "match.bandwidth": 1.0}
"""What is asked for after training; before it is, matches are searched and no layer is stored."""


class NDreamer:
    """The published class, on this package: train, embed, decompose, estimate, each writing its files to `save_pth`.

    Parameters
    ----------
    adata
        (cells, genes): an AnnData, or the path or URL of an h5ad file or a zarr store. Never modified.
    save_pth
        Local folder for the files; the run directory is `run` in it. What an interrupted or earlier call with the same
        arguments has done there is not done again; with other arguments it is.
    condition_key, control_name
        Column of `obs` that holds the condition, and the name of the control in it.
    batch_key
        Column or columns of `obs` that hold the batch; none for one batch.
    settings
        Dotted settings of this package, `{"train.workers": 2}`; they win.
    **arguments
        `epochs`, `batch_size`, `encoder_hidden`, `decoder_hidden`, and any setting by its own name (`num_hvg`,
        `latent_noise`, `device`, ...). The published spellings `contorl_name` and `epoches` are taken, with a warning.

    Raises
    ------
    SettingsError
        An argument is unknown, or given in both spellings, or out of range, or `save_pth` is a URL.
    """

    def __init__(
        self,
        adata: AnnData | str | os.PathLike[str],
        *,
        save_pth: str | os.PathLike[str],
        condition_key: str,
        batch_key: str | Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        if "://" in os.fspath(save_pth):
            msg = f"save_pth is a folder on this machine, found {os.fspath(save_pth)}; `run` and `export` take more"
            raise SettingsError(msg)
        self.adata = adata
        self.save_pth = Path(save_pth).expanduser().absolute()
        given = _spelled({"condition_key": condition_key, "batch_key": batch_key, **arguments})
        named = {_setting(name): value for name, value in given.items() if value is not None}
        if named.get("cohort.normalise") == "counts":
            named = {**FILTERS, **named}
        self._settings = {**BARE, **named, **(settings or {})}
        Settings.build(overrides=self._settings)  # refused now, not when training starts
        self._later = self._asked_before()

    @property
    def run(self) -> Run:
        """The run: `ndreamer.run.results` reads its results in pieces."""
        return Run(str(self.save_pth / RUN))

    def train_model(self) -> list[Path]:
        """Prepare the cohort, train, and write `preprocessed.h5ad`, the mappings, the network and its weights.

        Returns
        -------
        The files written.
        """
        return self._finish("model")

    def get_modifier_space(self) -> list[Path]:
        """Write `adata.h5ad`: the effect modifiers in `obsm["X_effect_modifier_space"]` and their PCA (section 5).

        Returns
        -------
        The files written.
        """
        return self._finish("space")

    def decompose_true_expression_batch_effect_all(
        self, nearest_neighbor: int = 1, bandwidth: float = 1.0
    ) -> list[Path]:
        """Write denoised expression and batch effect of every group (METHOD section 6).

        Parameters
        ----------
        nearest_neighbor
            Counterparts in every group that are averaged.
        bandwidth
            Of their weights, where they are more than one.

        Returns
        -------
        The files written.
        """
        self._ask(nearest_neighbor, bandwidth)
        return self._finish("decomposition")

    def Estimate_ITE_all(self, nearest_neighbor: int = 1, bandwidth: float = 1.0) -> list[Path]:  # noqa: N802
        """Write the effects, own condition minus control, of every group that is not control (METHOD section 6).

        Parameters are those of `decompose_true_expression_batch_effect_all`.

        Returns
        -------
        The files written.
        """
        self._ask(nearest_neighbor, bandwidth)
        return self._finish("effects")

    def Estmiate_ITE_all(self, *args: Any, **kwargs: Any) -> list[Path]:  # noqa: N802
        """Do as `Estimate_ITE_all`, by its published spelling."""
        _warn("Estmiate_ITE_all", 3)
        return self.Estimate_ITE_all(*args, **kwargs)

    def _ask(self, neighbours: int, bandwidth: float) -> None:
        """Ask for all layers, and for other matches than before if so: the class has its words for that alone."""
        self._later = {
            "effects.store": keys.LAYERS, "match.neighbours": neighbours, "match.bandwidth": bandwidth,
        }  # fmt: skip

    def _finish(self, part: Any) -> list[Path]:
        """Do what is not done yet, and write a part of the layout."""
        made = run(self.adata, out=self.run.url, settings={**self._later, **self._settings}, redo=True)
        return export(made.results, out=self.save_pth, parts=[part])

    def _asked_before(self) -> dict[str, Any]:
        """Return what an earlier call in this folder asked of matching and effects, so that it is not undone."""
        directory = RunDirectory.at(self.run.url)
        if not directory.storage.exists(keys.RUN_JSON):
            return dict(LATER)
        before = directory.read_run()["settings"]
        return {name: before[stage][field] for name in LATER for stage, field in [name.split(".")]}


def _spelled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments under their right names; `SettingsError` where one is given in both spellings."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        right = MISSPELT.get(name, name)
        if right != name:
            _warn(name, 4)
        if right in found or (right != name and right in arguments):
            msg = f"{right} is given twice, also as {name}; give it once"
            raise SettingsError(msg)
        found[right] = {True: "counts", False: "none"}.get(value, value) if right == "normalise" else value
    return found


def _warn(name: str, stacklevel: int) -> None:
    msg = f"{name} is the published spelling; write {MISSPELT[name]}"
    warnings.warn(msg, DeprecationWarning, stacklevel=stacklevel)


def _setting(name: str) -> str:
    """Return the dotted name of the setting that an argument means."""
    if name in NAMES:
        return NAMES[name]
    if name == "seed":
        return name
    stages = {stage: getattr(field.annotation, "model_fields", {}) for stage, field in Settings.model_fields.items()}
    found = [f"{stage}.{name}" for stage, names in stages.items() if name in names]
    if len(found) != 1:
        known = {*NAMES, *MISSPELT, *(field for names in stages.values() for field in names)}
        what = f"means {' or '.join(found)}: say which by settings={{...}}" if found else "is no argument of NDreamer"
        msg = f"{name} {what}.{'' if found else suggest(name, sorted(known))}"
        raise SettingsError(msg)
    return found[0]
