"""The sign test and the adjusted p-values follow METHOD section 7."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ndreamer_dist.stats.sign_test import benjamini_hochberg, sign_test

GOLDEN = Path(__file__).parent.parent / "golden" / "cate.npz"


def test_z_and_significant_genes_equal_the_reference_values():
    golden = np.load(GOLDEN)
    ite = golden["ite"]
    z, p = sign_test((ite > 0).sum(axis=0), (ite == 0).sum(axis=0), len(ite))
    np.testing.assert_allclose(z, golden["z_scores"], rtol=1e-4, atol=1e-6)
    assert set(golden["genes"][benjamini_hochberg(p) < 0.05]) == set(golden["significant"])


def test_half_of_the_zeros_count_and_without_a_cell_there_is_no_test():
    z, p = sign_test(np.array([2, 0]), np.array([1, 0]), np.array([3, 0]))
    assert z[0] == (2.5 - 1.5) / np.sqrt(0.75)
    np.testing.assert_allclose(p[0], 2 * stats.norm.sf(abs(z[0])))
    assert np.isnan([z[1], p[1]]).all()


@given(st.lists(st.one_of(st.floats(0, 1), st.just(np.nan)), max_size=30))
def test_adjusted_p_are_the_smallest_rates_at_which_a_gene_is_called(p):
    tested = np.sort([value for value in p if not np.isnan(value)])
    found = benjamini_hochberg(np.array(p, dtype=np.float64))
    for value, adjusted in zip(p, found, strict=True):
        if np.isnan(value):
            assert np.isnan(adjusted)
            continue
        rates = [q * len(tested) / rank for rank, q in enumerate(tested, 1) if q >= value]
        np.testing.assert_allclose(adjusted, min(1, *rates), rtol=1e-12)
