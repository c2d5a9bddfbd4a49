"""The class `NDreamer`, for scripts written for the published package: it takes its arguments and writes its files.

The class is a thin layer. Every call is a `run` in `save_pth/run`, an ordinary run directory, followed by an `export` of
the results to `save_pth` in the published layout. Omitted arguments have the defaults of the published class, which
differ from the sizes in the paper (METHOD sections 2 and 4).
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
"""Name of the run directory in `save_pth`."""
MISSPELT: Final = {
    "contorl_name": "control_name", "epoches": "epochs", "Estmiate_ITE_all": "Estimate_ITE_all",
}  # fmt: skip
"""Misspelt names of the published class, and their correct spellings."""
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
"""Settings for arguments of other names; any other argument is a setting by its own name, such as `num_hvg`."""
FIXED: Final[dict[str, tuple[Any, str]]] = {
    "developer_test_mode": (False, "`preset='small'` of ndreamer_dist.run is for trials"),
    "try_identify_cb_specific_subtypes": (
        False, "obs['ndreamer_overlap'] of the results says which cells have no counterpart under the control"
    ),
    "try_identify_perturb_escaped_cell": (False, "the effects of single cells are in layers['ite'] of the results"),
    "cluster_method": ("Leiden", "Leiden is the one clustering here (clusters.flavor says whose)"),
}  # fmt: skip
"""Arguments without a counterpart here: the only value they may have, the published one, and what to use instead."""
BARE: Final[dict[str, Any]] = {
    "match.hubs": "none", "model.encoder": (2048, 1024), "train.batch_size": 2048, "train.epochs": 10,
}  # fmt: skip
"""Defaults of the published class that differ from those of the preset `paper`."""
DEVICES: Final = ("train.device", "embed.device", "match.device")
"""Settings for the argument `device`."""
FILTERS: Final = {"cohort.min_genes": 300, "cohort.min_cells": 10}
"""Filters of the published class when it normalises counts."""
LATER: Final = {"effects.store": (), "match.neighbours": 1, "denoise.neighbours": 1, "match.bandwidth": 1.0}
"""Settings of matching and effects until a method after training sets them: no layer is stored."""
INSIDE_SAVE_PTH: Final = "preprocessed.h5ad in save_pth"
"""Default of `save_preprocessed_adata_path`; `None` means that the file is not kept."""


@dataclass(frozen=True)
class Trained:
    """The trained model, with the attribute that scripts for the published package use.

    Attributes
    ----------
    path
        `adata.h5ad`, written by `get_modifier_space`.
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
        Local folder for the files; the run directory is `run` in it. Stages that an earlier call finished there run again
        only if their arguments have changed.
    condition_key, control_name
        Column of `obs` that holds the condition, and the name of the control in it.
    batch_key
        Column or columns of `obs` that hold the batch; `None`: one batch.
    require_batch
        False: ignore `batch_key`. True: require it.
    save_preprocessed_adata_path
        Path of `preprocessed.h5ad`, by default in `save_pth`; `None`: do not keep the file.
    library_size_normalize_adata
        True: `adata` holds counts; False: log-normalised values. By default this is detected.
    settings
        Dotted settings of this package, such as `{"train.workers": 2}`; they override all arguments.
    **arguments
        Arguments of the published class (`epochs`, `batch_size`, `encoder_hidden`, `z_dim`, `lr`, ...), and any setting
        by its own name (`num_hvg`, `latent_noise`, `device`, ...). The spellings `contorl_name` and `epoches` give a
        warning. Arguments without a counterpart here must have their published value.

    Raises
    ------
    SettingsError
        An argument is unknown, out of range, or given in both spellings, or `save_pth` is a URL.
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
        path = arguments.pop("save_preprocessed_adata_path", INSIDE_SAVE_PTH)
        require_batch = arguments.pop("require_batch", None)
        device = arguments.pop("device", None)
        normalise = arguments.pop("library_size_normalize_adata", None)
        self._preprocessed = _path_of(path, self.save_pth / keys.PUBLISHED_PREPROCESSED)
        if require_batch and not batch_key:
            msg = "require_batch=True needs batch_key: the column, or columns, of obs that hold the batch"
            raise SettingsError(msg)
        columns = {"condition_key": condition_key, "batch_key": None if require_batch is False else batch_key}
        values = {} if normalise is None else {"normalise": normalise}
        translated = _translated(_spelled({**columns, **values, **arguments}))
        by_setting = {_setting(name): value for name, value in translated.items() if value is not None}
        by_setting |= {} if device is None else dict.fromkeys(DEVICES, device)
        if by_setting.get("cohort.normalise") == "counts":
            by_setting = {**FILTERS, **by_setting}
        self._settings = {**BARE, **by_setting, **(settings or {})}
        Settings.build(overrides=self._settings)  # refuse wrong values now, not when training starts
        self._later = self._earlier_choice()

    @property
    def run(self) -> Run:
        """The run; `ndreamer.run.results` reads its results in pieces."""
        return Run(str(self.save_pth / RUN))

    @property
    def DL_model(self) -> Trained:  # noqa: N802 - the published name
        """The object that holds the AnnData in the published class: `ndreamer.DL_model.adata`."""
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
            Number of matches per group that are averaged.
        bandwidth
            Kernel bandwidth of their weights, if there is more than one.

        Returns
        -------
        The files written.
        """
        self._store_all_layers(nearest_neighbor, bandwidth)
        return self._finish("decomposition")

    def Estimate_ITE_all(self, nearest_neighbor: int = 1, bandwidth: float = 1.0) -> list[Path]:  # noqa: N802
        """Write the effects, own condition minus control, of all groups but the control's (METHOD section 6).

        Parameters are those of `decompose_true_expression_batch_effect_all`.

        Returns
        -------
        The files written.
        """
        self._store_all_layers(nearest_neighbor, bandwidth)
        return self._finish("effects")

    def Estmiate_ITE_all(self, *args: Any, **kwargs: Any) -> list[Path]:  # noqa: N802
        """Call `Estimate_ITE_all`; this is the published spelling."""
        _warn("Estmiate_ITE_all", 3)
        return self.Estimate_ITE_all(*args, **kwargs)

    def _store_all_layers(self, neighbours: int, bandwidth: float) -> None:
        """Set the settings of matching and effects for the next run."""
        self._later = {
            "effects.store": keys.LAYERS, "match.neighbours": neighbours, "denoise.neighbours": neighbours,
            "match.bandwidth": bandwidth,
        }  # fmt: skip

    def _finish(self, part: Any) -> list[Path]:
        """Run the stages that are not finished, and write a part of the layout."""
        settings = {**self._later, **self._settings}
        finished = run(self.adata, out=self.run.url, settings=settings, redo=True, fresh=self._has_other_columns())
        written = export(finished.results, out=self.save_pth, parts=[part])
        return [place for path in written if (place := self._placed(path)) is not None]

    def _placed(self, path: Path) -> Path | None:
        """Move or delete `preprocessed.h5ad` as `save_preprocessed_adata_path` says; return the place of the file."""
        if path.name != keys.PUBLISHED_PREPROCESSED or self._preprocessed == path:
            return path
        if self._preprocessed is None:
            path.unlink()
            return None
        self._preprocessed.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(path, self._preprocessed))

    def _has_other_columns(self) -> bool:
        """Return whether the run of an earlier call in this folder read other columns or values of the cohort."""
        directory = RunDirectory.at(self.run.url)
        if not directory.storage.exists(keys.RUN_JSON):
            return False
        now = Settings.build(overrides=self._settings).model_dump(mode="json")["cohort"]
        before = directory.read_run()["settings"]["cohort"]
        return any(before.get(name) != now[name] for name in ("condition_key", "batch_key", "layer", "gene_names"))

    def _earlier_choice(self) -> dict[str, Any]:
        """Return the settings of matching and effects of an earlier call in this folder, so that they are not undone."""
        directory = RunDirectory.at(self.run.url)
        if not directory.storage.exists(keys.RUN_JSON):
            return dict(LATER)
        before = directory.read_run()["settings"]
        return {name: before[stage][field] for name in LATER for stage, field in [name.split(".")]}


def _spelled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments by their correct names.

    Raises
    ------
    SettingsError
        An argument is given in both spellings.
    """
    spelled: dict[str, Any] = {}
    for name, value in arguments.items():
        correct = MISSPELT.get(name, name)
        if correct != name:
            _warn(name, 4)
            if correct in arguments:
                msg = f"{correct} is given twice, also as {name}; give it once"
                raise SettingsError(msg)
        spelled[correct] = {True: "counts", False: "none"}.get(value, value) if correct == "normalise" else value
    return spelled


def _translated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return published arguments in this package's form, and check those without a counterpart.

    Raises
    ------
    SettingsError
        An argument without a counterpart has another value than the published one, or codebooks differ in size.
    """
    translated = dict(arguments)
    for name, (published, instead) in FIXED.items():
        value = translated.pop(name, published)
        if value != published and str(value).lower() != str(published).lower():
            msg = f"{name} is {published!r} here and cannot be {value!r}; {instead}"
            raise SettingsError(msg)
    sizes = translated.get("codebooks")
    if isinstance(sizes, (list, tuple)):
        if len(set(sizes)) != 1:
            msg = f"codebooks is a list of one size for each, all the same; found {sorted(set(sizes))}"
            raise SettingsError(msg)
        translated |= {"codebooks": len(sizes), "codes": sizes[0]}
    if (threshold := translated.pop("reset_threshold", None)) is not None:
        # The published threshold is a share of uses; `reset_below` is a multiple of 1/codes.
        translated["reset_below"] = threshold * translated.get("codes", ModelSettings().codes)
    if (width := translated.pop("embedding_dim", None)) is not None:
        translated["encoder_hidden"] = (*(translated.get("encoder_hidden") or BARE["model.encoder"][:-1]), width)
    return translated


def _path_of(path: str | os.PathLike[str] | None, default: Path) -> Path | None:
    """Return the absolute path of `preprocessed.h5ad`; `None` if the file is not kept."""
    if path is None:
        return None
    return default if path == INSIDE_SAVE_PTH else Path(path).expanduser().absolute()


def _warn(name: str, stacklevel: int) -> None:
    msg = f"{name} is the published spelling; write {MISSPELT[name]}"
    warnings.warn(msg, DeprecationWarning, stacklevel=stacklevel)


def _setting(name: str) -> str:
    """Return the dotted name of the setting for an argument."""
    if name in NAMES:
        return NAMES[name]
    if name == "seed":
        return name
    stages = {stage: getattr(field.annotation, "model_fields", {}) for stage, field in Settings.model_fields.items()}
    candidates = [f"{stage}.{name}" for stage, names in stages.items() if name in names]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        msg = f"{name} means {' or '.join(candidates)}: say which by settings={{...}}."
        raise SettingsError(msg)
    known = {*NAMES, *MISSPELT, *(field for names in stages.values() for field in names)}
    msg = f"{name} is no argument of NDreamer.{suggest(name, sorted(known))}"
    raise SettingsError(msg)
