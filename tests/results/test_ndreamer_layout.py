"""Results of any run are exported in the published layout, group by group; other files are kept."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest

from ndreamer_dist import cli, keys
from ndreamer_dist.commands import ndreamer_layout
from ndreamer_dist.commands.ndreamer_layout import export
from ndreamer_dist.errors import QueryError, StoreError
from ndreamer_dist.stats.results import open_results


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    (folder / "b-7--c-7__ITE.h5ad").write_text("of an earlier export")
    (folder / "my b-7--c-7__ITE.h5ad").write_text("someone's")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", finished.run.url, "--format", "ndreamer", "--out", str(folder)])
    assert not ended.value.code
    return folder


def test_a_group_that_is_not_there_has_no_file_and_an_old_one_goes(written):
    names = {path.name for path in written.iterdir()}
    groups = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    wanted = {f"c-{c}--b-{b}__{what}.h5ad" for b, c in groups for what in ("expression", "batch")}
    wanted |= {f"b-{b}--c-{c}__ITE.h5ad" for b, c in groups if c} | {"my b-7--c-7__ITE.h5ad"}
    assert names == wanted | {"adata.h5ad", "preprocessed.h5ad", "mappings.json"} | {
        "batch2num_mapping.pth", "condition2num_mapping.pth", "ndreamer.pth",
    }  # fmt: skip


def test_files_hold_every_column_and_value(written, finished):
    results = open_results(finished.run.url)
    codes = json.loads((written / "mappings.json").read_text())["batches"]
    assert codes == {"a": 0, r"b\+c": 1}
    for name, read, batch in (("b-1--c-2__ITE", results.ite, 1), ("c-0--b-0__expression", results.denoised, 0)):
        part = anndata.read_h5ad(written / f"{name}.h5ad")
        expected = read(cells=list(part.obs_names))
        np.testing.assert_array_equal(part.X, expected.X)
        pd.testing.assert_frame_equal(part.obs.drop(columns="original_order"), expected.obs)
        assert set(part.obs[keys.OBS_BATCH]) == {list(codes)[batch]}


def test_only_one_group_is_read_at_a_time(finished, tmp_path, monkeypatch):
    asked = []
    read = ndreamer_layout.Results.layer
    monkeypatch.setattr(
        ndreamer_layout.Results,
        "layer",
        lambda self, name, cells, **more: asked.append(len(cells)) or read(self, name, cells, **more),
    )
    export(finished.run.url, out=tmp_path, parts=["decomposition"])
    assert sorted(asked) == sorted(2 * [group.cells for group in finished.design.groups])
    assert not (tmp_path / "adata.h5ad").exists()


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        pytest.param({"out": "s3://bucket/x"}, QueryError, "no folder on this machine", id="bucket"),
        pytest.param({"format": "ndreamr"}, QueryError, "Did you mean 'ndreamer'", id="format"),
        pytest.param({"parts": ["effect"]}, QueryError, "no part 'effect'.*Did you mean 'effects'", id="part"),
        pytest.param({"run": "nowhere"}, StoreError, "holds no results", id="no_run"),
    ],
)
def test_refusals(finished, tmp_path, what, error, message):
    arguments = {"run": finished.run.url, "out": tmp_path, **what}
    with pytest.raises(error, match=message):
        export(arguments.pop("run"), **arguments)
