"""The published quick start runs as it stands, and every keyword of it means what it says or is refused by name."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from ndreamer_dist import NDreamer
from ndreamer_dist.commands import ndreamer as module
from ndreamer_dist.errors import CohortError, RunError, SettingsError
from ndreamer_dist.pipeline import run
from tests.cohort.inputs import counts
from tests.tiny import SETTINGS

TEXT = (Path(__file__).parent / "quick_start.txt").read_text()
IMPORTS, LOAD, WITHOUT, WITH = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
KEYWORDS = re.search(r"NDreamer\(adata, (.*)\)", WITHOUT)
SMALL = {**SETTINGS, "hvg.num_hvg": 60, "train.epochs": 2, "cohort.min_group_cells": 10}


def prepared(cells: int = 300) -> ad.AnnData:
    """Return a cohort as the text expects it: log-normalised, with a condition, its control and patients."""
    adata = counts(cells, 80, conditions=("control", "stimulated"))
    adata.obs["patient_id"] = adata.obs.pop("donor")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


@pytest.fixture(scope="module", params=["without_batch", "with_batch"])
def done(request, tmp_path_factory):
    """What a block leaves: the folder, the model, and what the class asked `run` for."""
    folder, asked = tmp_path_factory.mktemp(request.param), []

    def small(adata, *, settings, **how):
        asked.append(settings)
        return run(adata, settings={**settings, **SMALL}, **how)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        patch.chdir(folder)
        patch.setattr(module, "run", small)
        (folder / "data").mkdir()
        prepared().write_h5ad("data/xxx.h5ad")
        names: dict[str, object] = {}
        for block in (IMPORTS.replace("from ndreamer import", "from ndreamer_dist import"), LOAD):
            exec(block, names)
        exec(WITHOUT if request.param == "without_batch" else WITH, names)
    return SimpleNamespace(
        folder=folder / "PBMC", model=names["model"], settings=asked[0], batched=request.param == "with_batch"
    )


def test_the_eight_kinds_of_files_are_there(done) -> None:
    pairs = [(b, c) for b in range(2 if done.batched else 1) for c in range(2)]
    wanted = {"adata.h5ad", "batch2num_mapping.pth", "ndreamer.pth", "condition2num_mapping.pth", "preprocessed.h5ad"}
    wanted |= {f"b-{b}--c-{c}__ITE.h5ad" for b, c in pairs if c}
    wanted |= {f"c-{c}--b-{b}__{what}.h5ad" for b, c in pairs for what in ("expression", "batch")}
    ours = {"run", "mappings.json", "model.json", "weights.safetensors"}
    assert {path.name for path in done.folder.iterdir()} == wanted | ours
    assert json.loads((done.folder / "condition2num_mapping.pth").read_text()) == {"control": 0, "stimulated": 1}
    assert set(json.loads((done.folder / "batch2num_mapping.pth").read_text()).values()) == set(range(len(pairs) // 2))
    pointer = json.loads((done.folder / "ndreamer.pth").read_text())
    assert (done.folder / pointer["weights"]).exists()


def test_the_embedding_is_where_the_text_says(done) -> None:
    adata = done.model.DL_model.adata
    assert isinstance(adata, ad.AnnData)
    assert adata.copy().obsm["X_effect_modifier_space"].shape[0] == 300
    assert adata.obsm["X_effect_modifier_space_PCA"].shape[1] <= 50
    assert sorted(adata.obs["original_order"]) == list(range(300))


def test_without_batches_all_cells_are_of_one(done) -> None:
    assert len(done.model.run.results.design.batches) == (2 if done.batched else 1)


def test_what_is_log_normalised_is_used_as_it_is(done) -> None:
    part = ad.read_h5ad(done.folder / "preprocessed.h5ad")
    part = part[np.argsort(part.obs["original_order"])]
    np.testing.assert_allclose(part.X.toarray(), prepared()[:, part.var_names].X.toarray(), rtol=1e-6)


def test_every_keyword_says_what_it_says(done) -> None:
    expected = {
        "cohort.condition_key": "condition", "cohort.control": "control", "cohort.normalise": "none", "hvg.num_hvg": 2000,
        "clusters.low_resolution": 0.5, "clusters.high_resolution": 7, "model.encoder": (1024, 512, 512),
        "model.decoder": [512, 1024], "model.codebooks": 32, "model.codes": 1024, "model.code_dim": 8, "model.latent": 256,
        "model.temperature": 0.01, "loss.cosine": 20, "seed": 123, "train.batch_size": 1024, "train.epochs": 100,
        "train.learning_rate": 1e-3, "loss.margin": 5, "loss.independence": 1000, "loss.kl": 5e-3, "loss.reconstruction": 1,
        "loss.triplet": 5, "loss.triplet_pairs": 15, "loss.commitment": 1, "loss.dependence": 50, "train.reset_below": 1.0,
        "train.reset_every": 30, "loss.neighbourhood": 1, "loss.sigma": 1, "loss.neighbours": 20, "loss.across": 20,
        "match.hubs": "none",
    }  # fmt: skip
    if done.batched:
        expected["cohort.batch_key"] = "patient_id"
    assert {name: value for name, value in done.settings.items() if name not in module.LATER} == expected


def model_of(tmp_path: Path, **arguments: object) -> NDreamer:
    return NDreamer(
        prepared(), condition_key="condition", control_name="control", **{"save_pth": tmp_path / "out", **arguments}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"developer_test_mode": True}, "developer_test_mode is False here and cannot be True; .*preset='small'"),
        (
            {"try_identify_cb_specific_subtypes": True},
            "try_identify_cb_specific_subtypes is False here.*ndreamer_overlap",
        ),
        ({"try_identify_perturb_escaped_cell": True}, "try_identify_perturb_escaped_cell is False here.*layers"),
        ({"cluster_method": "Louvain"}, "cluster_method is 'Leiden' here and cannot be 'Louvain'"),
        ({"codebooks": [16, 32]}, r"codebooks is a list of one size for each, all the same; found \[16, 32\]"),
        ({"require_batch": True}, "require_batch=True needs batch_key"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        model_of(tmp_path, **arguments)


def test_counts_that_are_said_to_be_normalised_are_refused(tmp_path: Path) -> None:
    model = NDreamer(
        counts(200, 60, conditions=("control", "stimulated")), condition_key="condition", control_name="control",
        library_size_normalize_adata=False, save_pth=tmp_path, settings=SMALL,
    )  # fmt: skip
    with pytest.raises(CohortError, match="look like counts"):
        model.train_model()


def test_settings_that_depend_on_each_other(tmp_path: Path) -> None:
    made = model_of(tmp_path, embedding_dim=64, codebooks=[128] * 4, reset_threshold=1 / 256)._settings
    assert made["model.encoder"] == (2048, 64)
    assert (made["model.codebooks"], made["model.codes"], made["train.reset_below"]) == (4, 128, 0.5)
    asked = model_of(tmp_path, library_size_normalize_adata=True)._settings
    assert (asked["cohort.normalise"], asked["cohort.min_genes"], asked["cohort.min_cells"]) == ("counts", 300, 10)
    assert "cohort.batch_key" not in model_of(tmp_path, require_batch=False, batch_key="patient_id")._settings
    assert model_of(tmp_path, require_batch=True, batch_key="patient_id")._settings["cohort.batch_key"] == "patient_id"


def test_the_folder_may_lack_its_parent_and_the_preprocessed_file_goes_where_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"settings": SMALL, "save_pth": "new/parent/out"}
    with pytest.raises(RunError, match="call get_modifier_space"):
        _ = model_of(tmp_path, **small).DL_model.adata
    written = model_of(tmp_path, **small, save_preprocessed_adata_path="elsewhere/first.h5ad").train_model()
    assert tmp_path / "elsewhere/first.h5ad" in written
    assert ad.read_h5ad("elsewhere/first.h5ad").n_obs == 300
    assert not (tmp_path / "new/parent/out/preprocessed.h5ad").exists()
    written = model_of(tmp_path, **small, save_preprocessed_adata_path=None).train_model()
    assert "preprocessed.h5ad" not in {path.name for path in written}
    assert not (tmp_path / "new/parent/out/preprocessed.h5ad").exists()
    # The same folder, now with batches: the run that lies there is another's and starts over.
    model_of(tmp_path, **small, batch_key="patient_id").train_model()
    assert len(model_of(tmp_path, **small, batch_key="patient_id").run.results.design.batches) == 2


def test_the_text_is_the_published_one() -> None:
    assert KEYWORDS is not None
    names = re.findall(r"(\w+)=", re.sub(r"\[.*?\]", "", KEYWORDS[1]))
    assert len(names) > 35
    assert pd.Index(names).is_unique
