"""`NDreamer`, for scripts written for the published package: its arguments and its files, with this package's work between.

The class is a thin layer. Every call is a `run` in `save_pth/run`, an ordinary run directory, followed by an `export` of
the results to `save_pth` in the published layout. Arguments that a call omits have the defaults of the published class,
which differ from the sizes in the paper (METHOD sections 2 and 4).
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from anndata import AnnData, read_h5ad

from ndreamer_dist import keys
from ndreamer_dist.commands.ndreamer_layout import export
from ndreamer_dist.errors import RunError, SettingsError, suggest
from ndreamer_dist.pipeline import Run, run
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import ModelSettings, Settings

RUN: Final = "run"
"""Name of the run directory below `save_pth`."""
MISSPELT: Final = {
    "contorl_name": "control_name", "epoches": "epochs", "Estmiate_ITE_all": "Estimate_ITE_all",
}  # fmt: skip
NAMES: Final = {
    "condition_key": "cohort.condition_key",
    "control_name": "cohort.control",
    "batch_key": "cohort.batch_key",
    "codes": "model.codes",
    "encoder_hidden": "model.encoder",
    "decoder_hidden": "model.decoder",
    "codebook_dim": "model.code_dim",
    "z_dim": "model.latent",
    "tau": "model.temperature",
    "resolution_low": "clusters.low_resolution",
    "resolution_high": "clusters.high_resolution",
    "random_seed": "seed",
    "lr": "train.learning_rate",
    "reset_interval": "train.reset_every",
    "reconstruct_scaler": "loss.reconstruction",
    "cos_loss_scaler": "loss.cosine",
    "KL_scaler": "loss.kl",
    "independent_loss_scaler": "loss.independence",
    "cluster_correlation_scaler": "loss.dependence",
    "triplet_scaler": "loss.triplet",
    "triplet_margin": "loss.margin",
    "num_triplets_per_label": "loss.triplet_pairs",
    "local_neighborhood_loss_scaler": "loss.neighbourhood",
    "n_neighbors": "loss.neighbours",
    "local_neighbor_sigma": "loss.sigma",
    "local_neighbor_across_cluster_scaler": "loss.across",
    "commitment_loss_scaler": "loss.commitment",
}
"""Arguments that are called otherwise here; any other is a setting by its own name, `latent_noise` or `num_hvg`, say."""
FIXED: Final[dict[str, tuple[Any, str]]] = {
    "developer_test_mode": (False, "`preset='small'` of ndreamer_dist.run is for trials"),
    "try_identify_cb_specific_subtypes": (
        False, "obs['ndreamer_overlap'] of the results says which cells have no counterpart under the control"
    ),
    "try_identify_perturb_escaped_cell": (False, "the effects of single cells are in layers['ite'] of the results"),
    "cluster_method": ("Leiden", "Leiden is the one clustering here (clusters.flavor says whose)"),
}  # fmt: skip
"""Arguments without a counterpart: the published value, which alone is taken, and what to use in place of another."""
BARE: Final[dict[str, Any]] = {
    "match.hubs": "none", "model.encoder": (2048, 1024), "train.batch_size": 2048, "train.epochs": 10,
}  # fmt: skip
"""What the published class takes where an argument is left out and the paper's default is another."""
FILTERS: Final = {"cohort.min_genes": 300, "cohort.min_cells": 10}
"""What it leaves out when it is asked to normalise."""
LATER: Final = {"effects.store": (), "match.neighbours": 1, "denoise.neighbours": 1, "match.bandwidth": 1.0}
"""What is asked for after training; before it is, matches are searched and no layer is stored."""


INSIDE_SAVE_PTH: Final = "preprocessed.h5ad in save_pth"
"""Stands for the default of an argument of which none means something else."""


@dataclass(frozen=True)
class Trained:
    """The trained model, as scripts for the published package reach into it.

    Attributes
    ----------
    path
        `adata.h5ad`, which `get_modifier_space` writes.
    """

    path: Path

    @cached_property
    def adata(self) -> AnnData:
        """Cells and modelled genes, with `obsm["X_effect_modifier_space"]`, its PCA and `obs["original_order"]`.

        Raises
        ------
        RunError
            `get_modifier_space` has not been called.
        """
        if not self.path.exists():
            msg = f"{self.path} is not there yet: call get_modifier_space() first"
            raise RunError(msg)
        return read_h5ad(self.path)


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
    require_batch
        False: `batch_key` is ignored. By default the batch is what `batch_key` names.
    save_preprocessed_adata_path
        Where `preprocessed.h5ad` is written, by default in `save_pth`; none: nowhere.
    library_size_normalize_adata
        True: `adata` holds counts; False: log-normalised values. By default this is looked at.
    settings
        Dotted settings of this package, `{"train.workers": 2}`; they win.
    **arguments
        `epochs`, `batch_size`, `encoder_hidden`, `decoder_hidden`, and any setting by its own name (`num_hvg`,
        `latent_noise`, `device`, ...). All arguments of the published quick start are taken (`z_dim`, `lr`, ...); the
        spellings `contorl_name` and `epoches` with a warning; what has no counterpart here at its published value alone.

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
        asked = arguments.pop("save_preprocessed_adata_path", INSIDE_SAVE_PTH)
        require_batch = arguments.pop("require_batch", None)
        normalise = arguments.pop("library_size_normalize_adata", None)
        self._preprocessed = _path_of(asked, self.save_pth / keys.PUBLISHED_PREPROCESSED)
        if require_batch and not batch_key:
            msg = "require_batch=True needs batch_key: the column, or columns, of obs that hold the batch"
            raise SettingsError(msg)
        named_columns = {"condition_key": condition_key, "batch_key": None if require_batch is False else batch_key}
        values = {} if normalise is None else {"normalise": normalise}
        given = _translated(_spelled({**named_columns, **values, **arguments}))
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

    @property
    def DL_model(self) -> Trained:  # noqa: N802 - the published name
        """What the published class keeps its AnnData in: `ndreamer.DL_model.adata`."""
        return Trained(self.save_pth / keys.PUBLISHED_ADATA)

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
            "effects.store": keys.LAYERS, "match.neighbours": neighbours, "denoise.neighbours": neighbours,
            "match.bandwidth": bandwidth,
        }  # fmt: skip

    def _finish(self, part: Any) -> list[Path]:
        """Do what is not done yet, and write a part of the layout."""
        settings = {**self._later, **self._settings}
        made = run(self.adata, out=self.run.url, settings=settings, redo=True, fresh=self._is_of_other_groups())
        written = export(made.results, out=self.save_pth, parts=[part])
        return [self._placed(path) for path in written if path.exists() and self._is_wanted(path)]

    def _is_wanted(self, path: Path) -> bool:
        """Return whether a file is to be kept; `preprocessed.h5ad` is deleted where it is not."""
        if path.name == keys.PUBLISHED_PREPROCESSED and self._preprocessed is None:
            path.unlink()
            return False
        return True

    def _placed(self, path: Path) -> Path:
        """Return where a file is, `preprocessed.h5ad` after it has gone where it was asked for."""
        if path.name != keys.PUBLISHED_PREPROCESSED or self._preprocessed in (None, path):
            return path
        target = Path(str(self._preprocessed))
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(path, target))

    def _is_of_other_groups(self) -> bool:
        """Return whether an earlier call in this folder named other columns: its run is then another cohort's."""
        directory = RunDirectory.at(self.run.url)
        if not directory.storage.exists(keys.RUN_JSON):
            return False
        now = Settings.build(overrides=self._settings).model_dump(mode="json")["cohort"]
        before = directory.read_run()["settings"]["cohort"]
        return any(before.get(name) != now[name] for name in ("condition_key", "batch_key", "layer", "gene_names"))

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


def _translated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return published arguments as this package's: those of another form changed, those without a counterpart checked.

    Raises
    ------
    SettingsError
        An argument has no counterpart and another value than the published one, or codebooks differ in size.
    """
    left = dict(arguments)
    for name, (published, instead) in FIXED.items():
        value = left.pop(name, published)
        if value != published and str(value).lower() != str(published).lower():
            msg = f"{name} is {published!r} here and cannot be {value!r}; {instead}"
            raise SettingsError(msg)
    sizes = left.get("codebooks")
    if isinstance(sizes, (list, tuple)):
        if len(set(sizes)) != 1:
            msg = f"codebooks is a list of one size for each, all the same; found {sorted(set(sizes))}"
            raise SettingsError(msg)
        left |= {"codebooks": len(sizes), "codes": sizes[0]}
    if (threshold := left.pop("reset_threshold", None)) is not None:
        # Here it is a multiple of an even share of the codes.
        left["reset_below"] = threshold * left.get("codes", ModelSettings().codes)
    if (width := left.pop("embedding_dim", None)) is not None:
        left["encoder_hidden"] = (*(left.get("encoder_hidden") or BARE["model.encoder"][:-1]), width)
    return left


def _path_of(asked: str | os.PathLike[str] | None, default: Path) -> Path | None:
    """Return where a file is to be written."""
    if asked is None:
        return None
    return default if asked == INSIDE_SAVE_PTH else Path(asked).expanduser().absolute()


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
