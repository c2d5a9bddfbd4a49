"""Any small cohort that is valid by construction is taken; with any one fault put into it, anywhere, it is refused.

What a refusal names is compared with brute force: the first cell, how many, which groups. Nothing is written for it, and
the caller's AnnData stays what it was.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata.tests.helpers import assert_equal
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy import sparse

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import CohortError
from tests.fuzz.helpers import SECONDS, said

pytestmark = [pytest.mark.timeout(SECONDS), pytest.mark.filterwarnings("ignore:.* names are not unique")]

COLUMNS = ("disease", "treatment", "donor_id", "sequencing run", "Größe", "status", "perturbation")
LEVELS = ("control", "normal", "IFN-β", "stimulated", "drug 10 µM", "a|b", "2020", "+", "healthy donor")
KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray, "csr_array": sparse.csr_array,
}  # fmt: skip
LEAST = 4
"""Cells that a group of a valid cohort has at least."""
few = settings(max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink])
fewer = settings(few, max_examples=5)


@dataclass
class Cohort:
    """A cohort in memory and the names that a run of it is given."""

    adata: ad.AnnData
    condition: str
    batch: str
    control: str
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> pd.Series:
        """Cells of every (batch, condition) pair, by pair."""
        return self.adata.obs.groupby([self.batch, self.condition], observed=True).size()

    def options(self) -> dict[str, Any]:
        return {
            "condition_key": self.condition, "control": self.control, "batch_key": self.batch, "preset": "small",
            "settings": {"cohort.min_group_cells": LEAST, "run.serial": True, "run.progress": False, **self.more},
        }  # fmt: skip

    def run(self, out: Path) -> None:
        nd.run(self.adata, out=out, stage="cohort", **self.options())

    def refusal(self, *parts: str, begun: bool = False) -> None:
        """Check that the cohort is refused in one line that names these, that nothing is written and nothing changed."""
        before, raised = self.adata.copy(), []

        def work() -> None:
            try:
                self.run(out)
            except Exception as error:
                raised.append(error)
                raise

        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            line = said(work).refusal
            files = {path.relative_to(out).parts[0] for path in out.rglob("*") if path.is_file()}
            assert files <= ({keys.RUN_JSON, keys.LOCK, "logs"} if begun else set())
            assert begun or not out.exists()  # what the sample shows is refused before a directory is made
        assert [type(error) for error in raised] == [CohortError]
        assert all(part in line for part in parts), (line, parts)
        assert_equal(self.adata, before)


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Return a valid cohort of counts: every condition with a large enough group, no cell empty."""
    condition, batch = draw(st.lists(st.sampled_from(COLUMNS), min_size=2, max_size=2, unique=True))
    levels = draw(st.lists(st.sampled_from(LEVELS), min_size=2, max_size=3, unique=True))
    donors = [f"D{i}" for i in range(draw(st.integers(1, 3)))]
    sizes = {pair: draw(st.sampled_from([0, LEAST, LEAST + 2])) for pair in product(donors, levels)}
    for level in levels:
        sizes[donors[0], level] = max(LEAST, sizes[donors[0], level])
    pairs = [pair for pair, cells in sizes.items() for _ in range(cells)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.poisson(1.0, (len(pairs), draw(st.integers(4, 9)))).astype(np.float32)
    x[:, 0] += 2
    obs = pd.DataFrame([pairs[i] for i in rng.permutation(len(pairs))], columns=[batch, condition])
    if draw(st.booleans()):
        obs = obs.astype("category")
    obs.index, genes = [f"cell {i}" for i in range(len(obs))], [f"G{i}" for i in range(x.shape[1])]
    values = KINDS[draw(st.sampled_from(list(KINDS)))](x)
    adata = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=genes))
    return Cohort(adata, condition, batch, draw(st.sampled_from(levels)))


def some(number: int) -> st.SearchStrategy[list[int]]:
    """Return some of so many places, at least one, in order."""
    return st.lists(st.integers(0, number - 1), min_size=1, max_size=3, unique=True).map(sorted)


def misspelt(draw: st.DrawFn, name: str) -> str:
    """Return a name with a letter less, doubled or changed."""
    place = draw(st.integers(0, len(name) - 1))
    return name[:place] + draw(st.sampled_from(["", name[place] * 2, "_"])) + name[place + 1 :]


def dense(adata: ad.AnnData) -> np.ndarray:
    return adata.X.toarray() if sparse.issparse(adata.X) else np.array(adata.X)


def put(cohort: Cohort, x: np.ndarray) -> None:
    """Put other values in the matrix, in the layout it has."""
    kind = type(cohort.adata.X)
    cohort.adata.X = kind(x) if kind is not np.ndarray else x


@given(cohorts())
@few
def test_a_valid_cohort_is_planned_as_brute_force_counts_it(cohort: Cohort) -> None:
    before = cohort.adata.copy()
    plan = nd.plan(cohort.adata, **cohort.options())
    assert (plan.cells, plan.dropped) == (cohort.adata.n_obs, 0)
    assert plan.genes == plan.modelled == cohort.adata.n_vars  # fewer than num_hvg is fine
    assert sorted(cells for _, cells in plan.groups) == sorted(cohort.groups)
    assert plan.conditions[0] == cohort.control
    assert set(plan.conditions) == set(cohort.adata.obs[cohort.condition])
    assert_equal(cohort.adata, before)


@given(cohorts(), st.data())
@few
def test_a_misspelt_key_is_refused_and_the_right_one_suggested(cohort: Cohort, data: st.DataObject) -> None:
    which = data.draw(st.sampled_from(["condition", "batch"]))
    right = getattr(cohort, which)
    setattr(cohort, which, wrong := misspelt(data.draw, right))
    cohort.refusal(f"{which} key {wrong!r} is no column", f"Did you mean {right!r}", *map(repr, cohort.adata.obs))


@given(cohorts(), st.data())
@few
def test_an_unknown_control_is_refused_and_the_conditions_listed(cohort: Cohort, data: st.DataObject) -> None:
    right = cohort.control
    cohort.control = wrong = misspelt(data.draw, right) + "x"
    near = [f"Did you mean {right!r}"] if len(right) > 5 else []
    cohort.refusal(f"no cell has the control {wrong!r}", *map(repr, cohort.adata.obs[cohort.condition].unique()), *near)


@given(cohorts())
@fewer
def test_one_condition_is_refused(cohort: Cohort) -> None:
    cohort.adata.obs[cohort.condition] = cohort.control
    cohort.refusal(f"holds one condition, {cohort.control!r}")


@given(cohorts(), st.data())
@few
def test_missing_values_are_counted_and_the_first_is_named(cohort: Cohort, data: st.DataObject) -> None:
    column = data.draw(st.sampled_from([cohort.condition, cohort.batch]))
    rows = data.draw(some(cohort.adata.n_obs))
    absent = data.draw(st.sampled_from([None, np.nan, pd.NA]))
    values = cohort.adata.obs[column].astype(data.draw(st.sampled_from(["object", "category"])))
    values.iloc[rows] = absent
    cohort.adata.obs[column] = values
    count = "1 missing value" if len(rows) == 1 else f"{len(rows)} missing values"
    cohort.refusal(f"column {column!r} has {count}, cell 'cell {rows[0]}' first")


@given(cohorts(), st.data())
@few
def test_a_condition_that_would_vanish_is_refused_by_name(cohort: Cohort, data: st.DataObject) -> None:
    levels = list(cohort.adata.obs[cohort.condition].unique())
    gone = data.draw(st.sampled_from(levels))
    of_it = np.flatnonzero(cohort.adata.obs[cohort.condition] == gone)
    first = cohort.adata.obs[cohort.batch].iloc[of_it]
    few_left = of_it[first.groupby(first.astype(str)).cumcount().to_numpy() < LEAST - 1]
    kept = np.sort(np.concatenate([np.setdiff1d(np.arange(cohort.adata.n_obs), of_it), few_left]))
    cohort.adata = cohort.adata[kept].copy()
    what = f"the control {gone!r}" if gone == cohort.control else f"condition {gone!r}"
    cohort.refusal(f"{what} would vanish", f"has {LEAST} cells")


@given(cohorts())
@few
def test_small_groups_are_named_with_their_sizes(cohort: Cohort) -> None:
    limit = int(cohort.groups.min()) + 1
    small = cohort.groups[cohort.groups < limit]
    cohort.more = {"cohort.min_group_cells": limit, "cohort.small_groups": "error"}
    noun = "1 group hold" if len(small) == 1 else f"{len(small)} groups hold"
    cohort.refusal(f"{noun} fewer than {limit} cells", *(f"({cells})" for cells in small))


@given(cohorts(), st.data())
@few
def test_columns_with_our_prefix_are_refused(cohort: Cohort, data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(["obs", "var"]))
    names = data.draw(st.lists(st.sampled_from(["ndreamer_", "ndreamer_group", "ndreamer_x"]), min_size=1, unique=True))
    for name in names:
        getattr(cohort.adata, table)[name] = 1
    cohort.refusal(f"{table} columns {', '.join(map(repr, names))} start with 'ndreamer_'")


@given(cohorts(), st.data())
@few
def test_names_used_twice_are_refused(cohort: Cohort, data: st.DataObject) -> None:
    what = data.draw(st.sampled_from(["cell", "gene"]))
    table = "obs" if what == "cell" else "var"
    names = list(getattr(cohort.adata, f"{table}_names"))
    first, *others = data.draw(some(len(names)).filter(lambda places: len(places) > 1))
    for place in others:
        names[place] = names[first]
    setattr(cohort.adata, f"{table}_names", names)
    cohort.refusal(f"{what} names are used more than once: {names[first]!r}", f"{table}_names_make_unique()")


@given(cohorts(), st.data())
@few
def test_a_value_that_cannot_be_is_refused_and_the_first_is_named(cohort: Cohort, data: st.DataObject) -> None:
    x = dense(cohort.adata)
    for row in data.draw(some(len(x))):
        for gene in data.draw(some(x.shape[1])):
            x[row, gene] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, -1.0, -1e-30]))
    put(cohort, x)
    row, gene = np.argwhere(~np.isfinite(x) | (x < 0))[0]
    value = x[row, gene]
    told = "NaN" if np.isnan(value) else "an infinite value" if np.isinf(value) else f"{value:g}, below zero"
    cohort.refusal(f"cell 'cell {row}', gene 'G{gene}' (row {row}) holds", told, begun=True)


def logged(x: np.ndarray) -> np.ndarray:
    return np.log1p(x / x.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "counts": lambda x: x, "logged": logged, "neither": lambda x: x * np.float32(13.37),
}  # fmt: skip
REFUSED = {
    ("counts", "none"): "look like counts",
    ("logged", "counts"): "look log-normalised",
    ("neither", "auto"): "log-normalised",
}


@pytest.mark.parametrize(
    ("kind", "asked"),
    # Scaled counts, asked for as log-normalised, are refused where a sample shows what they are, and else not.
    [(kind, asked) for kind in VALUES for asked in ("auto", "counts", "none") if (kind, asked) != ("neither", "none")],
)
@given(cohort=cohorts())
@fewer
def test_values_are_taken_for_what_they_are(kind: str, asked: str, cohort: Cohort) -> None:
    put(cohort, VALUES[kind](dense(cohort.adata)))
    cohort.more = {"cohort.normalise": asked}
    if (kind, asked) in REFUSED:
        largest = dense(cohort.adata).max()
        cohort.refusal(REFUSED[kind, asked], f"{largest:.0f}" if kind == "counts" else f"{largest:.2f}", "--normalise ")
    else:
        nd.plan(cohort.adata, **cohort.options())


@given(cohorts(), st.data())
@few
def test_what_is_left_out_is_said_as_brute_force_finds_it(cohort: Cohort, data: st.DataObject) -> None:
    """Empty cells, small groups and batches without a control are no refusal: they are told."""
    obs, x = cohort.adata.obs, dense(cohort.adata)
    spare = obs.groupby([cohort.batch, cohort.condition], observed=True).cumcount().to_numpy() >= LEAST
    empty = [row for row in np.flatnonzero(spare) if data.draw(st.booleans())]
    x[empty] = 0
    put(cohort, x)
    left = obs.drop(obs.index[empty])
    sizes = left.groupby([cohort.batch, cohort.condition], observed=True).size()
    most = min(sizes.groupby(level=1, observed=True).max())  # no condition may vanish
    limit = data.draw(st.integers(LEAST, int(most)))
    keep = data.draw(st.booleans())
    cohort.more = {"cohort.min_group_cells": limit, "cohort.small_groups": "keep" if keep else "drop"}
    groups = sizes if keep else sizes[sizes >= limit]
    with tempfile.TemporaryDirectory() as folder:
        told = said(lambda: cohort.run(Path(folder)))
        assert told.code == 0, told.err
        summary = json.loads((Path(folder) / keys.COHORT_SUMMARY).read_text())
    assert summary["cells"] == groups.sum()
    notes = "\n".join(summary["notes"])
    assert (
        f"{len(empty)} cells without a single count left out, 'cell {min(empty, default=0)}' first" in notes
    ) == bool(empty)
    small = sizes[sizes < limit]
    told_small = f"of fewer than {limit} cells {'kept' if keep else 'left out'}"
    assert (told_small in notes) == bool(len(small))
    assert all(f"({cells})" in notes for cells in small)
    batches = groups.unstack(fill_value=0)
    without = int((batches[cohort.control] == 0).sum())
    assert (f"{without} of {len(batches)} batches hold no control" in notes) == bool(without)
