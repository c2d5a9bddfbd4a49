"""The public `Results`: the output of a run, read in pieces, and the statistics on it."""

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
"""Cells that the mixing of batches is measured on, about."""


def open_results(address: str | os.PathLike[str] | Storage, *, embedding: str | None = None) -> Results:
    """Open the results of a run.

    Parameters
    ----------
    address
        A run directory, a results.zarr, or the URL of either (`s3://`, `https://`, ...).
    embedding
        The matching space whose results are wanted, where a run directory holds several: `harmony`, say. By default
        those of the space that the run was begun with.

    Raises
    ------
    StoreError
        There are no results, or none of that space, or the run that makes them has not finished.
    """
    return Results(results_storage(address, embedding))


class Results(ResultsReader):
    """The results of a run: parts of them by name (`ResultsReader`), and tests with donors as the replicates.

    Make one with `open_results`.
    """

    def column(self, name: str) -> pd.Series:
        """Return one column of `obs` by input row, in input order; of a table too large to hold, the others are not read.

        Columns that were annotated later are found among all others, which are read then.

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
        """Keep columns of `obs` that were made after the run, labels of cell types say, beside the results.

        They then are what every question, table and figure finds in `obs`; nothing that the run wrote is changed.

        Parameters
        ----------
        labels
            A row per cell, by its name: a table, a Series with a name, or an AnnData, of whose `obs` those columns are
            taken that are new or differ.

        Returns
        -------
        Which columns were new and which have changed, and how many cells and rows had no counterpart.

        Raises
        ------
        QueryError
            No cell is named, a cell stands twice, or a column is the run's own or says what was compared.
        StoreError
            The results can only be read.
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
        """Return the effect of the condition in every population, with donors as the replicates (METHOD section 7).

        A population's donors are compared by what its cells find in them: the mean, over the cells of every donor, of
        the expression of each cell's nearest neighbour among one donor's cells. The main p-value permutes the donors'
        labels; where there are fewer than 1000 labellings it is Welch's. Donors seen in both conditions are paired and
        the others left out; where these are fewer than three, who allow no test, the others are tested if there are three a
        condition. `p_method` and `donors_left_out` say so.

        Parameters
        ----------
        by
            Column of `obs` that names populations, a cell type say, or a Series of labels by cell; by default all cells
            are one population.
        condition
            The one to compare with the baseline; by default every one.
        baseline
            The condition to compare with; by default the control. Where the run did not match the two with each other,
            the matches are searched now. Donors seen under both are paired, whatever the control.
        genes, cohort
            As elsewhere; genes that were not modelled are found in the input cohort, if given.
        donor_key
            Column of `obs` that names the donor; by default the batch.
        min_cells
            Own cells that a donor needs in a population to enter its test; the others are listed.
        population
            Whose cells ask: all donors' (then nothing depends on the labels), or the treated donors' alone.
        covariates
            Columns of `obs`, constant in every donor, for a linear model in place of the permutation.

        Returns
        -------
        A row per population, condition and gene. From the cells, which only describe: `cells`, `mean_ite`, `sd_ite`
        beside `sd_placebo` (one half of the control donors against the other), `log2_fold_change`, `mean_counts`
        (normalised, of both conditions), `expressing`, `expressing_control`, the sign test `sign_z` and `sign_p`. From the donors: `effect`, `statistic`, `p`,
        `p_method`, `p_floor` (the smallest possible), `p_permutation`, `p_parametric`, `few_donors`, `treated_donors`,
        `control_donors`, `donors_left_out`, and the same test on plain means, `pseudobulk_effect` and `pseudobulk_p`.
        The effect in two parts, whatever space cells were matched in (METHOD section 10): `total`, of plain means,
        is `within_state`, between cells of the same state, plus `state_shift`, what comes of the condition's cells being in
        other states; each with `..._p`, `..._p_adjusted` and the range that it has without any one donor, `..._loo_low` and
        `..._loo_high`. `reading` says which parts stand at an adjusted p of 0.05: `within`, `state`, `both` or `neither`;
        `cells_a_donor` is the median of those tested (`few_cells` below 20, where the parts' p-values are too small), and `state_reliability` the share of a cell's state that is signal. NaN
        where a population has fewer than 100 control cells.
        `p_adjusted` is Benjamini-Hochberg's over the genes of one population and condition, `p_adjusted_all` over the
        whole table. Of the matches: `match_purity` (share inside the population; `impure` below 0.7),
        `effective_control_cells`, `without_overlap` (share of cells without a near control match) and
        `mean_ite_overlap` (the mean without those). With another baseline than the control, `control` in a column's name
        means the baseline, `mean_ite` and the sign test are of the condition's cells against it, and the last two are NaN.

        Raises
        ------
        QueryError
            A name is unknown, or nothing says who the donors are.
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
        """Give the rows of `cate` in parts, one condition and population after the other, for screens of many conditions.

        Arguments, columns and errors are those of `cate`; there is no `p_adjusted_all`, which takes all rows.
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
        """Return donors x genes per population, for a model of your own (limma, dreamlet); arguments as in `cate`.

        Returns
        -------
        `X` (population, donor and condition; genes) are the means that `cate` tests, `layers["pseudobulk"]` plain
        ones; `obs` says of what, with every column of the cohort that is constant in each donor. Where there are
        several conditions, the control donors are there once for each contrast.
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
        """Return what the tests say under permuted labels of donors, where nothing is to be found.

        Each labelling is taken for the truth and every test is run on it. The permutation test holds its level here by
        construction; the table shows how far the others are off on these cells. The labels that the embedding was
        trained with stay as they are. Arguments not listed are those of `cate`.

        Parameters
        ----------
        labellings
            How many; fewer where the donors have fewer. Pairs of one donor's cells are permuted inside.
        seed
            Of the labellings.

        Returns
        -------
        A row per population, condition, labelling, test and level, for which there are donors enough: `population`,
        `condition`, `treated_donors`, `control_donors`, `labelling`, `test`, `level`, `below` (p-values at or below
        it), `tests` (p-values), `share` (one by the other; `level` is what it should be). Tests: `main`, what `cate`
        calls p, `permutation`, `welch` (paired: the paired t), `pseudobulk` (`main` on plain means), `within_state` and
        `state_shift`, and `sign`, on at most about 2000 cells of a population. `stats.null.rates` pools them.

        Raises
        ------
        QueryError
            A name is unknown, or no population has three donors a condition with enough cells each.
        """
        results, by = self.labelled(by)
        question = CateQuestion(by, condition, donor_key, min_cells)
        return null_table(results._statistics_input(genes, cohort), question, count=labellings, seed=seed)

    @counted
    def response(
        self, by: PopulationLabels = None, *, condition: str | None = None, donor_key: str | None = None
    ) -> pd.DataFrame:
        """Return how far every treated cell goes along the effect on its population: which cells responded.

        A cell's own effect, its expression minus that of its control matches, is projected on the mean effect on the cells
        of the *other* donors (the other half of its donor's cells where it is the only one), genes weighted by the noise of
        the placebo. The unit is the spread of the placebo: control cells minus their matches in other control groups.

        Parameters
        ----------
        by, condition, donor_key
            As for `cate`; without donors all cells of a condition are one's.

        Returns
        -------
        A row per treated cell: `cell`, `population`, `condition`, `response`, and `within_placebo`, whether it is below
        the 95 % point of the placebo. With `placebo` True, control cells under the same yardstick, at most about 2000 a
        population. A single cell is noisy: where the mean effect itself is weak, responders are within the placebo, too.

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
        """Return how far the results can be trusted: small tables, none of which is a test.

        Parameters
        ----------
        by
            Column of `obs` that names populations, a cell type say, or a Series of labels by cell; by default all cells
            are one population.
        donor_key
            Column of `obs` that names the donor; by default the batch.
        cells
            About how many cells `mixing` looks at, as large a share of each group.

        Returns
        -------
        `layout` (`"nested"`, `"crossed"`, `"partly crossed"` or `"no donors"`) and `donors`, which says it in words; and:

        - `groups`, a row per batch and condition. Overlap: `overlap`, the share of cells with a near control match
            (`obs["ndreamer_overlap"]`), the median `match_distance` to the control and `own_distance` to the nearest other
            cell of the group. Reuse, as any cell's match: `times_matched_mean`, `times_matched_max`, `never_matched` (share
            of cells), `effective_cells` ((sum w)^2 / sum w^2). `effective_controls`: the same of the control cells that a
            treated group's cells match. Distortion, on `distortion_cells` cells (in a screen of some groups): `correlation` (mean
            over cells) and mean `squared_difference` of denoised and measured expression.
        - `notes`: where more neighbours are averaged than 4 % of a donor's cells in a population (METHOD section 9).
        - `populations`, a row per population and condition: `cells`, `overlap`, `match_distance`.
        - `mixing`, a row per condition: the share of a cell's 15 nearest neighbours, within condition and population,
            that are of other batches, in principal components of the `input` and in the `embedding`, beside what is
            `expected` of batches mixed at random; `cells` and `batches` looked at.

        NaN stands where there is nothing to compare with: no other control group, one batch.

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
        """Return what the tables of statistics are made from."""
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
        """What coordinates of state are made from: the modelled genes, and the cells' counts where the input was counts."""
        expression, genes = self._expression(None)
        modelled = genes.get(keys.VAR_MODELLED, pd.Series(True, index=genes.index)).to_numpy(dtype=bool)
        totals = self._all_cells.get(keys.OBS_TOTAL)
        scaled = any(of is not None and of.uns.get(keys.UNS_SCALED) for of in (self, self.stored))
        counts = None if totals is None or scaled else totals.to_numpy(dtype=np.float64)
        return StateSource(expression, np.flatnonzero(modelled), counts, int(self.uns.get("seed", 0)))

    @cached_property
    def _state_spaces(self) -> dict[tuple[str | None, str | None, int], StateSpace]:
        """Coordinates of state that were made, so that tables after the first need not make them again."""
        return {}
