"""The public class `Results`: reads parts of a run's results, and computes statistics on them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import anndata
import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.effects.onto import warn_of
from ndreamer_dist.matching.between import StateSpace
from ndreamer_dist.results.annotations import Annotation, annotation_of, beside, read_annotations, write_annotations
from ndreamer_dist.results.cohort import Cohort
from ndreamer_dist.results.read import read_element
from ndreamer_dist.results.reader import PopulationLabels, ResultsReader, results_storage
from ndreamer_dist.stats.cate_table import (
    MIN_CELLS,
    CateQuestion,
    StatisticsInput,
    Whose,
    cate_parts,
    cate_table,
    column,
    conditions_of,
    donor_means,
    populations_of,
    replicates_of,
)
from ndreamer_dist.stats.diagnostics import Diagnostics, diagnose
from ndreamer_dist.stats.null import null_table
from ndreamer_dist.stats.populations import Replicates
from ndreamer_dist.stats.response import ResponseInput, response_table
from ndreamer_dist.stats.state_space import StateSource
from ndreamer_dist.storage.counted import counted
from ndreamer_dist.storage.files import Storage

DIAGNOSED_CELLS = 4000
"""Approximate size of the sample of cells for the mixing of batches."""


def open_results(address: str | os.PathLike[str] | Storage, *, embedding: str | None = None) -> Results:
    """Open the results of a run.

    Parameters
    ----------
    address
        A run directory, a results.zarr, or the URL of either (`s3://`, `https://`, ...).
    embedding
        The matching space, for a run directory with results of several spaces, e.g. `harmony`. By default the space
        that the run was started with.

    Raises
    ------
    StoreError
        There are no results, or none for this space, or the run has not finished.
    """
    return Results(results_storage(address, embedding))


class Results(ResultsReader):
    """The results of a run: reads parts by name (`ResultsReader`), and tests effects with donors as replicates.

    Create it with `open_results`.
    """

    def column(self, name: str) -> pd.Series:
        """Return one column of `obs` in input order, indexed by input row.

        Only this column is read, unless the results have labels or annotations that were added later: then all of `obs`
        is.

        Raises
        ------
        QueryError
            There is no such column.
        """
        folder, annotated = beside(self.storage)
        if self.labels is None and self.storage.node(f"obs/{name}") is not None and not folder.exists(annotated):
            values, rows = (read_element(self.storage, f"obs/{part}") for part in (name, keys.OBS_INPUT_ROW))
        else:
            values, rows = column(self._cells, name).array, self._cells[keys.OBS_INPUT_ROW].to_numpy()
        return pd.Series(values, index=rows, name=name).sort_index()

    def annotate(self, labels: pd.DataFrame | pd.Series | anndata.AnnData) -> Annotation:
        """Add columns to `obs` after the run, such as labels of cell types, in a file beside the results.

        All later queries, tables and figures see them in `obs`. Files that the run wrote do not change.

        Parameters
        ----------
        labels
            One row per cell, indexed by cell name: a DataFrame, a named Series, or an AnnData, from whose `obs` new and
            changed columns are taken.

        Returns
        -------
        The new and the changed columns, and the numbers of cells and of rows without a counterpart.

        Raises
        ------
        QueryError
            No row names a cell, a cell is named twice, or a column is written by the run (`ndreamer_...`) or is a
            condition or batch key.
        StoreError
            The results are read-only.
        """
        table, annotation = annotation_of(labels, self._cells, self.design)
        if len(table.columns):
            before = read_annotations(self.storage, self._cells.index)
            kept = pd.concat([before.drop(columns=table.columns, errors="ignore"), table], axis=1)
            write_annotations(self.storage, kept)
            for name in ("_cells", "_input_cells", "_all_cells"):
                self.__dict__.pop(name, None)
        return annotation

    @counted
    def cate(
        self,
        by: PopulationLabels = None,
        *,
        condition: str | None = None,
        baseline: str | None = None,
        genes: Sequence[str] | None = None,
        cohort: Cohort | None = None,
        donor_key: str | None = None,
        min_cells: int = MIN_CELLS,
        population: Whose = "all",
        covariates: Sequence[str] = (),
    ) -> pd.DataFrame:
        """Return the effect of the condition in every population, with donors as replicates (METHOD section 7).

        A donor's value is a mean through the matches: of the nearest neighbours, among the donor's cells, of all
        donors' cells in the population. The main p-value permutes the donors' labels; with fewer than 1000 possible
        labellings it is that of Welch's t-test. Donors seen in both conditions are tested as pairs and the others are
        left out. Fewer than three pairs allow no test: then the other donors are tested, if there are three per
        condition. `p_method` and `donors_left_out` report the choice.

        Parameters
        ----------
        by
            Column of `obs` that names populations, e.g. cell types, or a Series of labels by cell; by default all cells
            are one population.
        condition
            The condition to compare with the baseline; by default every condition.
        baseline
            The condition to compare with; by default the control. Matches between the two conditions are searched now
            if the run did not store them. Donors seen in both conditions are paired, whatever the control.
        genes, cohort
            Genes by name, by default the modelled ones; with the input cohort, any of its genes.
        donor_key
            Column of `obs` that names the donor; by default the batch.
        min_cells
            Cells that a donor needs in a population to enter its test; other donors are listed in `donors_left_out`.
        population
            Donors whose cells are matched with every donor: all (then the values do not depend on the condition
            labels), or only the treated.
        covariates
            Columns of `obs`, constant within donors, for a linear model instead of the permutation.

        Returns
        -------
        table
            A row per population, condition and gene. Columns:

            - Over cells, descriptive: `cells`, `mean_ite`, `sd_ite`, `sd_placebo` (spread of one half of the control
              donors against the other), `log2_fold_change`, `mean_counts` (normalised, mean of both conditions),
              `expressing`, `expressing_control` (shares of cells), and the sign test, `sign_z` and `sign_p`.
            - Over donors: `effect`, `statistic`, `p`, `p_method`, `p_floor` (smallest possible p), `p_permutation`,
              `p_parametric`, `few_donors`, `treated_donors`, `control_donors`, `donors_left_out`; the same test on
              plain means, `pseudobulk_effect` and `pseudobulk_p`. `p_adjusted` is Benjamini-Hochberg over the genes of
              one population and condition, `p_adjusted_all` over the whole table.
            - The decomposition (METHOD section 10), whatever the matching space: `total` (of plain means) =
              `within_state` (between cells of the same state) + `state_shift` (because cells are in other states). Each
              has `..._p`, `..._p_adjusted` and its leave-one-donor-out range, `..._loo_low` to `..._loo_high`.
              `reading` names the parts with adjusted p <= 0.05: `within`, `state`, `both` or `neither`. `cells_a_donor`
              is the median over tested donors; `few_cells` marks values below 20, where p-values of the parts are too
              small. `state_reliability` is the share of a cell's state coordinates that is signal. All but `total` are
              NaN where a population has fewer than 100 control cells.
            - Quality of the matches: `match_purity` (share inside the population; `impure` marks values below 0.7),
              `effective_control_cells`, `without_overlap` (share of cells without a near control match) and
              `mean_ite_overlap` (`mean_ite` of the cells with one).

            With a baseline other than the control, `control` in a column's name means the baseline, `mean_ite` and the
            sign test compare the condition's cells with it, and `without_overlap` and `mean_ite_overlap` are NaN.

        Raises
        ------
        QueryError
            A name is unknown, or there is neither a donor column nor a batch key.
        """
        results, by = self.labelled(by)
        question = CateQuestion(by, condition, donor_key, min_cells, population, covariates)
        warn_of(self.mapped, "cate")
        return cate_table(results._statistics_input(genes, cohort, baseline), question)

    def cate_parts(
        self,
        by: PopulationLabels = None,
        *,
        baseline: str | None = None,
        genes: Sequence[str] | None = None,
        cohort: Cohort | None = None,
        **options: Any,
    ) -> Iterator[pd.DataFrame]:
        """Yield the rows of `cate` per condition and population, for screens of many conditions.

        Arguments, columns and errors are those of `cate`, without the column `p_adjusted_all`, which needs all rows.
        """
        results, by = self.labelled(by)
        question = CateQuestion(by, **options)
        warn_of(self.mapped, "cate")
        yield from (part for _, part in cate_parts(results._statistics_input(genes, cohort, baseline), question))

    @counted
    def donor_means(
        self,
        by: str | pd.Series,
        *,
        condition: str | None = None,
        baseline: str | None = None,
        genes: Sequence[str] | None = None,
        cohort: Cohort | None = None,
        donor_key: str | None = None,
        min_cells: int = MIN_CELLS,
    ) -> anndata.AnnData:
        """Return donors' means per population, as input of other models (limma, dreamlet); arguments as in `cate`.

        Returns
        -------
        An AnnData with a row per population, donor and condition. `X` holds the means that `cate` tests,
        `layers["pseudobulk"]` plain means. `obs` names population, contrast, donor and condition, and has every column
        of the cohort that is constant within donors. With several conditions, each contrast has its own control rows.
        """
        results, name = self.labelled(by)
        question = CateQuestion(name, condition, donor_key, min_cells)
        return donor_means(results._statistics_input(genes, cohort, baseline), question)

    @counted
    def null(
        self,
        by: PopulationLabels = None,
        *,
        condition: str | None = None,
        genes: Sequence[str] | None = None,
        cohort: Cohort | None = None,
        donor_key: str | None = None,
        min_cells: int = MIN_CELLS,
        labellings: int = 10,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return p-values of the tests under permuted donor labels, where there is no effect.

        Every test is run with each labelling as the truth. The permutation test holds its level here by construction;
        the table shows how far the other tests are off on these cells. The embedding is not retrained: it was trained
        with the true labels. Other arguments are those of `cate`.

        Parameters
        ----------
        labellings
            Number of labellings; fewer if the donors allow only fewer. For paired donors, labels are exchanged within
            pairs.
        seed
            Seed of the labellings.

        Returns
        -------
        A DataFrame with a row per population, condition, labelling, test and level, for populations with enough donors:
        `population`, `condition`, `treated_donors`, `control_donors`, `labelling`, `test`, `level`, `below` (number of
        p-values at or below the level), `tests` (number of p-values), `share` (`below / tests`; a calibrated test has
        `level`). Tests: `main` (`p` of `cate`), `permutation`, `welch` (or paired t), `pseudobulk` (`main` on plain
        means), `within_state`, `state_shift`, and `sign` (on about 2000 cells of a population at most).
        `stats.null.rates` pools the rows.

        Raises
        ------
        QueryError
            A name is unknown, or no population has three donors per condition with enough cells each.
        """
        results, by = self.labelled(by)
        question = CateQuestion(by, condition, donor_key, min_cells)
        return null_table(results._statistics_input(genes, cohort), question, count=labellings, seed=seed)

    @counted
    def response(
        self, by: PopulationLabels = None, *, condition: str | None = None, donor_key: str | None = None
    ) -> pd.DataFrame:
        """Return a response score per treated cell: how strongly the cell shows the effect on its population.

        A cell's effect, its expression minus that of its control matches, is projected on the mean effect on the cells
        of the *other* donors (with a single donor: on the other half of its cells), with each gene divided by its
        placebo variance. The unit is the standard deviation of the placebo: the same score of control cells, against
        their matches in other control groups.

        Parameters
        ----------
        by, condition, donor_key
            As in `cate`; without donor column and batch key, each condition counts as one donor.

        Returns
        -------
        A DataFrame with a row per treated cell: `cell`, `population`, `condition`, `response`, and `within_placebo`,
        whether the response is at or below the 95 % quantile of the placebo. Rows with `placebo` True are control
        cells, at most about 2000 per population. Single cells are noisy: where the mean effect is weak, responders are
        within the placebo, too.

        Raises
        ------
        QueryError
            A name is unknown.
        """
        results, by = self.labelled(by)
        sample = results._statistics_input(None, None)
        names, codes = populations_of(sample.cells, by)
        has_donors = donor_key is not None or bool(self.design.batch_keys)
        one_donor = pd.Series("one", index=sample.cells.index)
        replicates = replicates_of(sample, donor_key) if has_donors else Replicates.of(one_donor, self.design)
        return response_table(ResponseInput(sample, replicates, codes, names), conditions_of(self.design, condition))

    @counted
    def diagnostics(
        self, by: PopulationLabels = None, *, donor_key: str | None = None, cells: int = DIAGNOSED_CELLS
    ) -> Diagnostics:
        """Return diagnostics of the results: small tables, none of which is a statistical test.

        Parameters
        ----------
        by
            Column of `obs` that names populations, e.g. cell types, or a Series of labels by cell; by default all cells
            are one population.
        donor_key
            Column of `obs` that names the donor; by default the batch.
        cells
            Approximate size of the sample for `mixing`, which takes the same share of every group.

        Returns
        -------
        diagnostics
            A `Diagnostics` with `layout` (`"nested"`, `"crossed"`, `"partly crossed"` or `"no donors"`), `donors` (the
            layout as a sentence), and:

            - `groups`, a row per batch and condition. Overlap: `overlap`, the share of cells with a near control match
              (`obs["ndreamer_overlap"]`); the medians `match_distance`, to the control matches, and `own_distance`, to
              the nearest other cell of the group. Reuse of its cells as matches: `times_matched_mean`,
              `times_matched_max`, `never_matched` (share of cells), `effective_cells` ((sum w)^2 / sum w^2, w the times
              matched). For treated groups `effective_controls`, the same number of the control cells that they are
              matched with. Distortion, on `distortion_cells` cells (in a screen, only of some groups): `correlation`
              (mean over cells) and mean `squared_difference` of denoised and measured expression.
            - `populations`, a row per population and condition: `cells`, `overlap`, `match_distance`.
            - `mixing`, a row per condition: the share of a cell's 15 nearest neighbours within its condition and
              population that come from other batches, in principal components of the `input` and in the `embedding`,
              with the share `expected` for batches mixed at random; the numbers of `cells` and `batches` in the sample.
            - `notes`: settings that average more neighbours than 4 % of a donor's cells in a population (METHOD section
              9).

            Values are NaN where there is nothing to compare with: no other control group, or one batch.

        Raises
        ------
        QueryError
            A name is unknown.
        StoreError
            `denoised` is not stored, and the matches that it is computed from are not there.
        """
        stored = keys.LAYER_DENOISED in self.layers and self.stored is None
        results, by = self.labelled(by)
        sample = results._statistics_input(None, None)
        return diagnose(sample, by=by, donor_key=donor_key, cells=cells, stored_denoised=stored)

    def _statistics_input(
        self, genes: Sequence[str] | None, cohort: Cohort | None, baseline: str | None = None
    ) -> StatisticsInput:
        """Return the input of the tables of statistics."""
        expression, table = self._expression(cohort)
        columns = self._columns(genes, table)
        stored = cohort is None and keys.LAYER_ITE in self.layers and self.stored is None
        return StatisticsInput(
            self.storage, self.design, self._all_cells, self.counterparts, expression, columns, table.index[columns],
            stored_ite=stored, seed=int(self.uns.get("seed", 0)), embedding=self.embedding_key, state=self._state_source,
            spaces=self._state_spaces, baseline=self.design.condition_code(baseline or self.control),
        )  # fmt: skip

    @cached_property
    def _state_source(self) -> StateSource:
        """The input of the state coordinates: modelled genes, and total counts per cell if the input was counts."""
        expression, genes = self._expression(None)
        modelled = genes.get(keys.VAR_MODELLED, pd.Series(True, index=genes.index)).to_numpy(dtype=bool)
        totals = self._all_cells.get(keys.OBS_TOTAL)
        scaled = any(of is not None and of.uns.get(keys.UNS_SCALED) for of in (self, self.stored))
        counts = None if totals is None or scaled else totals.to_numpy(dtype=np.float64)
        return StateSource(expression, np.flatnonzero(modelled), counts, int(self.uns.get("seed", 0)))

    @cached_property
    def _state_spaces(self) -> dict[tuple[str | None, str | None, int], StateSpace]:
        """The cache of state coordinates, shared by all tables of these results."""
        return {}
