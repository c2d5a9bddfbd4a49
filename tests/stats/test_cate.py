"""Population effects are described as METHOD section 7 says."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ndreamer_dist.stats.cate import benjamini_hochberg, describe_effects, sign_test

GOLDEN = Path(__file__).parent.parent / "golden" / "cate.npz"


def test_z_and_significant_genes_equal_the_reference_values():
    golden = np.load(GOLDEN)
    z, _, n = sign_test(golden["ite"])
    np.testing.assert_allclose(z, golden["z_scores"], rtol=1e-4, atol=1e-6)
    assert (n == len(golden["ite"])).all()
    table = describe_effects(golden["ite"], golden["genes"])
    assert set(table.loc[table["significant"], "gene"]) == set(golden["significant"])
    assert (np.diff(table["z"].abs()) <= 0).all()
    position = {gene: place for place, gene in enumerate(golden["genes"])}
    for _, tied in table.groupby(table["z"].abs()):
        assert [position[gene] for gene in tied["gene"]] == sorted(position[gene] for gene in tied["gene"])
    means = golden["ite"].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(table["mean_ite"], means[[position[gene] for gene in table["gene"]]], rtol=1e-6)


def test_cells_without_an_effect_are_not_counted():
    ite = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [0.0, np.nan]])
    z, p, n = sign_test(ite)
    np.testing.assert_array_equal(n, [3, 0])
    assert z[0] == (2.5 - 1.5) / np.sqrt(0.75)
    np.testing.assert_allclose(p[0], 2 * stats.norm.sf(abs(z[0])))
    assert np.isnan(z[1])
    assert np.isnan(p[1])
    table = describe_effects(ite, ["a", "b"])
    assert table["gene"].tolist() == ["a", "b"]
    assert not table["significant"][1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_adjusted_p_are_scipy_s(p):
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), stats.false_discovery_control(p), rtol=1e-12)
