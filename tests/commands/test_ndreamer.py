"""The published quick start runs as it stands, and the files it leaves hold what results.zarr holds."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
from safetensors.numpy import load_file

from ndreamer_dist import NDreamer, keys
from ndreamer_dist.errors import SettingsError
from tests.tiny import SETTINGS, as_memory, assert_same_bits, dense, layer_names

SMALL = {name: value for name, value in SETTINGS.items() if name not in ("train.epochs", "train.batch_size")}
PATTERNS = {"ite": keys.PUBLISHED_ITE, "denoised": keys.PUBLISHED_EXPRESSION, "batch_effect": keys.PUBLISHED_BATCH}
CODED = {"batch": "*", "condition": "*"}


def ours(warned: pytest.WarningsRecorder) -> list[warnings.WarningMessage]:
    """Return the warnings of misspelt names; the newest anndata and pandas have some of their own."""
    return [each for each in warned if "write " in str(each.message)]


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


@pytest.fixture(scope="module", params=["published", "ours"])
def made(request, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Either spelling: the published one on an AnnData with two batch keys, ours on a file without batch and k = 5."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "published":
        adata = as_memory(cohort)
        adata.obs["site"] = np.where(adata.obs["donor"] == "donor_01", "here", "there")
        before = adata.copy()
        with pytest.warns(DeprecationWarning, match=r"write (control_name|epochs)") as told:
            ndreamer = NDreamer(
                adata, condition_key="condition", contorl_name="control", batch_key=["donor", "site"], epoches=6,
                batch_size=64, save_pth=folder, settings=SMALL,
            )  # fmt: skip
        assert {str(w.message).split()[-1] for w in ours(told)} == {"control_name", "epochs"}
        assert {w.filename for w in ours(told)} == {__file__}
        ndreamer.train_model()
        ndreamer.get_modifier_space()
        ndreamer.decompose_true_expression_batch_effect_all(nearest_neighbor=1, bandwidth=1)
        with pytest.warns(DeprecationWarning, match="write Estimate_ITE_all") as told:
            ndreamer.Estmiate_ITE_all()
        assert [w.filename for w in ours(told)] == [__file__]
        assert before.obs.equals(adata.obs)
        assert (before.X != adata.X).nnz == 0
        assert not adata.obsm
    else:
        ndreamer = NDreamer(
            cohort, condition_key="condition", control_name="control", epochs=6, batch_size=64, num_hvg=150,
            save_pth=f"{folder}/", settings={n: v for n, v in SMALL.items() if n != "hvg.num_hvg"},
        )  # fmt: skip
        for step in (ndreamer.train_model, ndreamer.get_modifier_space):
            step()
        ndreamer.decompose_true_expression_batch_effect_all(nearest_neighbor=5, bandwidth=0.3)
        ndreamer.Estimate_ITE_all(nearest_neighbor=5, bandwidth=0.3)
    return SimpleNamespace(folder=folder, ndreamer=ndreamer, spelling=request.param, cohort=cohort)


def stored(made: SimpleNamespace) -> anndata.AnnData:
    """Return results.zarr, by anndata alone."""
    return anndata.read_zarr(made.folder / "run" / keys.RESULTS)


def test_the_layout_is_the_published_one(made):
    design = made.ndreamer.run.results.design
    pairs = {(group.batch, group.condition) for group in design.groups}
    assert len(pairs) == (6 if made.spelling == "published" else 2)
    wanted = {f"c-{c}--b-{b}__{what}.h5ad" for b, c in pairs for what in ("expression", "batch")}
    wanted |= {f"b-{b}--c-{c}__ITE.h5ad" for b, c in pairs if c}
    wanted |= {"adata.h5ad", "preprocessed.h5ad", "mappings.json", "model.json", "weights.safetensors", "run"}
    wanted |= {"condition2num_mapping.pth", "batch2num_mapping.pth", "ndreamer.pth"}
    assert {path.name for path in made.folder.iterdir()} == wanted


@pytest.mark.parametrize("layer", list(PATTERNS))
def test_every_group_holds_what_results_hold(made, layer):
    whole, seen = stored(made), []
    for path in made.folder.glob(PATTERNS[layer].format(**CODED)):
        part = anndata.read_h5ad(path)
        here = whole[part.obs_names]
        np.testing.assert_array_equal(part.X, here.layers[layer])
        assert np.isfinite(part.X).all()
        assert list(part.var_names) == list(whole.var_names)
        assert (part.obs["condition"].astype(str) == here.obs["condition"].astype(str)).all()
        assert part.obs[keys.OBS_GROUP].nunique() == 1
        seen += list(part.obs_names)
    expected = whole.obs_names[whole.obs["condition"] != "control"] if layer == "ite" else whole.obs_names
    assert sorted(seen) == sorted(expected)


def test_without_batches_nothing_is_taken_away(made):
    removed = [anndata.read_h5ad(path).X for path in made.folder.glob("*__batch.h5ad")]
    assert any(part.any() for part in removed) == (made.spelling == "published")


def test_the_modifier_space_and_the_expression_come_with_the_original_order(made):
    adata = anndata.read_h5ad(made.folder / "adata.h5ad")
    prepared, whole = anndata.read_h5ad(made.folder / "preprocessed.h5ad"), stored(made)
    assert set(adata.obsm) == {"X_effect_modifier_space", "X_effect_modifier_space_PCA"}
    assert not prepared.obsm
    whole = whole[adata.obs_names]
    np.testing.assert_array_equal(adata.obsm["X_effect_modifier_space"], whole.obsm["X_ndreamer"])
    np.testing.assert_array_equal(adata.obsm["X_effect_modifier_space_PCA"], whole.obsm["X_ndreamer_pca"])
    for one in (adata, prepared):
        np.testing.assert_array_equal(dense(one.X), dense(whole.X))
        assert one.X.indptr.dtype == one.X.indices.dtype
        again = one[np.argsort(one.obs["original_order"])]
        assert list(again.obs_names) == list(as_memory(made.cohort).obs_names)


def test_mappings_and_weights_are_readable(made):
    told = json.loads((made.folder / "mappings.json").read_text())
    assert told["conditions"] == {"control": 0, "treated": 1}
    for group in told["groups"]:
        part = anndata.read_h5ad(made.folder / group["expression"], backed="r")
        assert set(part.obs["condition"]) == {group["condition"]}
        assert part.n_obs == group["cells"]
        assert set(part.obs[keys.OBS_BATCH].astype(str)) == {group["batch"]}
        assert (group["ITE"] is None) == (group["condition"] == "control")
    network = json.loads((made.folder / "model.json").read_text())
    assert network["genes"] == told["genes"]
    weights = load_file(made.folder / "weights.safetensors")
    assert any(value.shape == (32, 150) for value in weights.values())


def test_a_script_run_again_does_nothing_again(made):
    results = made.folder / "run" / keys.RESULTS / "zarr.json"
    before = results.stat().st_mtime_ns
    made.ndreamer._later = made.ndreamer._earlier_choice()  # as in a new process
    made.ndreamer.train_model()
    made.ndreamer.get_modifier_space()
    assert results.stat().st_mtime_ns == before
    assert set(layer_names(stored(made))) == set(keys.LAYERS)


def test_an_export_of_the_run_is_the_same(made, tmp_path):
    from ndreamer_dist import export

    written = export(made.folder / "run", out=tmp_path / "again")
    assert {path.name for path in written} == {path.name for path in made.folder.iterdir()} - {"run"}
    for path in written:
        if path.suffix == ".h5ad":
            one, other = anndata.read_h5ad(path), anndata.read_h5ad(made.folder / path.name)
            np.testing.assert_array_equal(dense(one.X), dense(other.X))
            assert one.obs.equals(other.obs)


def test_what_is_left_out_is_what_the_published_class_takes(cohort, tmp_path):
    bare = NDreamer(cohort, condition_key="condition", control_name="control", save_pth=tmp_path)._settings
    assert bare["model.encoder"] == (2048, 1024)
    assert (bare["train.batch_size"], bare["train.epochs"]) == (2048, 10)
    asked = NDreamer(
        cohort, condition_key="condition", control_name="control", save_pth=tmp_path, normalise=True, min_cells=3,
        latent_noise=0.5, decoder_hidden=[64, 32], seed=4, device="cpu",
    )._settings  # fmt: skip
    assert (asked["cohort.min_genes"], asked["cohort.min_cells"], asked["cohort.normalise"]) == (300, 3, "counts")
    assert (asked["model.latent_noise"], asked["model.decoder"], asked["seed"]) == (0.5, [64, 32], 4)
    assert {asked[f"{stage}.device"] for stage in ("train", "embed", "match")} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"epochz": 3}, "epochz is no argument of NDreamer. Did you mean 'epochs'", id="unknown"),
        pytest.param({"epoches": 3, "epochs": 3}, "epochs is given twice, also as epoches", id="twice"),
        pytest.param({"neighbours": 3}, "means loss.neighbours or match.neighbours", id="two_meanings"),
        pytest.param({"epochs": 0}, "setting 'train.epochs'", id="value"),
        pytest.param({"save_pth": "s3://bucket/x"}, "a folder on this machine, found s3://bucket/x", id="url"),
    ],
)
def test_wrong_arguments_are_refused_at_once(cohort, tmp_path, arguments, message):
    with pytest.raises(SettingsError, match=message):
        NDreamer(cohort, condition_key="condition", control_name="control", **{"save_pth": tmp_path, **arguments})


def test_the_class_gives_the_bits_of_run(made, cohort, tmp_path):
    if made.spelling == "ours":
        import ndreamer_dist as nd

        matching = {"match.neighbours": 5, "match.bandwidth": 0.3, "match.hubs": "none", "denoise.neighbours": 5}
        nd.run(cohort, out=tmp_path, condition_key="condition", control="control", settings={**SETTINGS, **matching})
        assert_same_bits(tmp_path, made.folder / "run", stores=(keys.RESULTS,))
