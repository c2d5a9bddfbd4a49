"""Cells of new donors, batches or conditions on a finished run: `ndreamer-dist map`.

The stages are those of a run: the cohort and its packing, the coordinates, the matches, the effects. What a run learns from
its cells is taken from the finished one: values, genes, model or axes, and the distances that are called near. New cells
are matched with that run's groups alone, so each has the same numbers whatever is mapped with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from anndata import AnnData

from ndreamer_dist import keys
from ndreamer_dist.cohort.obsm import CellLabels, checksum, column_labels
from ndreamer_dist.cohort.pack import run_pack
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.cohort.source import Source, fingerprint, open_cohort
from ndreamer_dist.compute.events import choose_format
from ndreamer_dist.compute.executor import Runtime, choose_runtime, ray_failures, runtime_choice
from ndreamer_dist.compute.machine import use_writable_caches
from ndreamer_dist.compute.monitors import metered
from ndreamer_dist.effects.onto import Onto
from ndreamer_dist.effects.stage import run_effects
from ndreamer_dist.effects.tables import ROOT, check_tables
from ndreamer_dist.errors import RunError, SettingsError
from ndreamer_dist.mapping.cohort import Genes, NewCells, genes_of, refuse_known_cells, run_mapped_cohort, values_of
from ndreamer_dist.mapping.design import names_in
from ndreamer_dist.mapping.place import placer_of, run_place
from ndreamer_dist.mapping.reference import Reference
from ndreamer_dist.matching.stage import run_match
from ndreamer_dist.pipeline import Run, check_owner, delete_run
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings, canonical_json
from ndreamer_dist.storage.checksums import digest

logger = logging.getLogger(__name__)

OWN = ("layer", "gene_names", "log_base", "min_genes", "min_group_cells", "small_groups", "exclude_conditions")
"""Settings of `cohort` that may differ from the run's: they say where the new values lie, and which cells are kept."""
MAPPING = (keys.STAGE_COHORT, keys.STAGE_PACK, keys.STAGE_SPACE, keys.STAGE_MATCH, keys.STAGE_EFFECTS)


def map(  # noqa: A001 - the command's name; nobody imports it bare
    cohort: str | os.PathLike[str] | AnnData,
    *,
    onto: str | os.PathLike[str],
    out: str | os.PathLike[str],
    embedding: str | None = None,
    fill_missing_genes: float = 0.0,
    extend: bool = False,
    settings: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> Run:
    """Map cells of new donors, batches or conditions onto a finished run, which is only read.

    They are normalised as the run's were, placed in its matching space by its frozen model or axes, and matched with its
    groups: the control's, and those of their own condition. `map(...).results` reads their denoised expression and effects;
    `cate` there takes the run's donors in. An interrupted call goes on, a finished one does nothing.

    Parameters
    ----------
    cohort
        (cells, genes) as for `run`, with the run's columns of `obs`. Batches and conditions may be new to the run.
    onto
        Directory of the finished run, or of cells that were mapped with `extend`.
    out
        Directory for the mapped cells, local or on object storage.
    embedding
        Which of the run's matching spaces, where it has several; by default the one that it was begun with.
    fill_missing_genes
        Share of the run's genes that the cohort may lack; they count as zeros. By default none may be missing.
    extend
        Let cells that are mapped onto `out` later be matched with these as well; and those of other conditions, which come
        with new controls, with these controls.
    settings
        Dotted settings: how to work (`{"run.address": "auto"}`), and of the cohort where the new values lie and which
        cells are kept (`cohort.layer`, `cohort.gene_names`, `cohort.min_group_cells`, ...); all else is the run's.
    fresh
        Delete what `out` holds of another mapping first.

    Raises
    ------
    NDreamerError
        The run or the cohort will not do: genes are missing, cells or groups are in the run already, values are of another
        kind; or `out` holds something else.
    """
    use_writable_caches()
    reference, directory = Reference.open(onto, embedding), RunDirectory.at(out)
    if directory.url == reference.run.url:
        msg = f"{directory.url} is the run itself, which is never written to; choose another --out"
        raise RunError(msg)
    directory.refuse_unwritable()
    asked = _settings(reference, settings or {})
    choose_format(asked.run.log_format)
    source = open_cohort(cohort, asked.cohort)
    check_tables(source.cells.sample(), source.var)
    values_of(source, reference, asked.cohort)
    extend = extend or (not fresh and _is_extended(directory))
    job = Mapped(reference, asked, source, genes_of(source, reference.genes, fill_missing_genes), extend)
    refuse_known_cells(source, reference)
    placer_of(reference)
    check_owner(directory, job.told, fresh=fresh)
    with directory.locked():
        stage_key = _claim(directory, job, fresh=fresh)
        with _runtime(asked, source.n_cells) as runtime:
            job.run(replace(directory, onto=reference.places), runtime, stage_key)
    return Run(directory.url)


@contextmanager
def _runtime(asked: Settings, cells: int) -> Iterator[Runtime]:
    """Give what the work is done by."""
    choice = runtime_choice(asked, cells)
    logger.info("works in %s", choice)
    with ray_failures(), choose_runtime(choice.applied(asked).run) as runtime:
        yield runtime


def _settings(reference: Reference, changes: Mapping[str, Any]) -> Settings:
    """Return the run's settings with how to work, and what may differ of the cohort."""
    before = reference.settings
    made = Settings.build(config=before.model_dump(mode="json"), overrides=changes)
    own = {name: getattr(made.cohort, name) for name in OWN}
    same = made.model_copy(
        update={"cohort": made.cohort.model_copy(update={n: getattr(before.cohort, n) for n in own})}
    )
    differ = [
        f"{part}.{name}"
        for part in type(before).model_fields
        if part != "seed"
        for name, value in getattr(before, part).bearing().items()
        if getattr(same, part).bearing()[name] != value
    ]
    if differ or made.seed != before.seed:
        msg = (
            f"{', '.join(differ) or 'seed'}: cells are mapped with the settings of the run; only run.* and "
            f"{', '.join(f'cohort.{name}' for name in OWN)} can be given"
        )
        raise SettingsError(msg)
    return made


@dataclass(frozen=True)
class Mapped:
    """A cohort that is mapped onto a run: what its stages work with."""

    reference: Reference
    settings: Settings
    source: Source
    genes: Genes
    extend: bool

    @property
    def controls_first(self) -> bool:
        """Whether cells of other conditions are matched with new controls as well: where both come, with `extend`."""
        if not self.extend:
            return False
        design = self.reference.design
        is_control = names_in(self.source.cells, design.condition_key) == design.control
        return bool(is_control.any() and not is_control.all())

    @property
    def told(self) -> dict[str, Any]:
        """What tells the cohort from others."""
        cohort = self.settings.cohort
        return fingerprint(self.source, cohort.condition_column, cohort.batch_key)

    @property
    def labels(self) -> CellLabels | None:
        """Labels of the new cells that they are matched inside, in input order, numbered as the run's; none without."""
        within, inside = self.settings.match.within, self.reference.results.matched_inside
        if within is None or inside is None:
            return None
        if within == keys.OBS_LOW:  # new cells have no cluster
            return CellLabels(np.full(self.source.n_cells, -1, dtype=np.int32), inside.labels)
        found = column_labels(self.source, within, keys.MATCH_WITHIN)
        names = tuple(dict.fromkeys((*inside.labels, *found.names)))
        places = np.array([*(names.index(name) for name in found.names), -1], dtype=np.int32)
        return CellLabels(places[found.codes], names)

    def stage_keys(self) -> dict[str, str]:
        """Return the key of every stage: of its settings, the stage before, and what it takes of the run and the input."""
        labels = self.labels
        settings = {
            name: getattr(self.settings, name).bearing() for name in ("cohort", "pack", "embed", "match", "effects")
        }
        taken: dict[str, Any] = {
            keys.STAGE_COHORT: [
                self.told,
                self.reference.key,
                list(self.genes.missing),
                settings["cohort"],
                *(["controls first"] if self.controls_first else []),
            ],
            keys.STAGE_PACK: [settings["pack"], self.settings.seed],
            keys.STAGE_SPACE: settings["embed"],
            keys.STAGE_MATCH: [settings["match"], None if labels is None else checksum(labels.codes)],
            keys.STAGE_EFFECTS: settings["effects"],
        }
        found: dict[str, str] = {}
        for name in MAPPING:
            content = {"format": keys.FORMAT_VERSION, "stage": f"map {name}", "takes": taken[name], "reads": found}
            found = {**found, name: digest(canonical_json(content).encode())}
        return found

    def run(self, run: RunDirectory, runtime: Runtime, key: Mapping[str, str]) -> None:
        """Run the stages; each skips what is there."""
        reference, settings, cells = self.reference, self.settings, self.source.n_cells
        with metered(run.storage, keys.STAGE_COHORT, cells, place="1/5"):
            stage = StageRun(run, keys.STAGE_COHORT, key[keys.STAGE_COHORT])
            new = NewCells(self.source, self.genes, self.controls_first)
            design = run_mapped_cohort(stage, settings.cohort, new, reference, runtime)
        packed = Packed(run, design, reference.genes, settings.pack.block_rows, before=reference.parts)
        with metered(run.storage, keys.STAGE_PACK, cells, place="2/5"):
            run_pack(run, settings, self.source, runtime, key[keys.STAGE_PACK], packed)
        with metered(run.storage, keys.STAGE_SPACE, cells, place="3/5"):
            run_place(StageRun(run, keys.STAGE_SPACE, key[keys.STAGE_SPACE]), settings, packed, reference, runtime)
        with metered(run.storage, keys.STAGE_MATCH, cells, place="4/5"):
            run_match(run, settings, design, runtime, key[keys.STAGE_MATCH], self._all_labels(packed))
        with metered(run.storage, keys.STAGE_EFFECTS, cells, place="5/5"):
            summary = self._summary(run, packed, runtime)
            run_effects(run, settings, packed, self.source, runtime, key[keys.STAGE_EFFECTS], summary)

    def _all_labels(self, packed: Packed) -> CellLabels | None:
        """Return the labels of all cells in the order of the rows, the stored ones first."""
        labels, stored = self.labels, self.reference.results.counterparts.labels
        if labels is None or stored is None:
            return None
        return CellLabels(np.concatenate([stored, labels.codes[packed.input_row]]), labels.names)

    def _summary(self, run: RunDirectory, packed: Packed, runtime: Runtime) -> dict[str, Any]:
        told: dict[str, Any] = run.read_json(keys.COHORT_SUMMARY) | {"input": self.told}
        if self.settings.match.within is not None:
            told[keys.UNS_WITHIN] = run.read_json(keys.MATCH_SUMMARY)["within"]
        finished = run.storage.exists(f"{keys.RESULTS}/{ROOT}")
        return told if finished else told | {keys.UNS_ONTO: self.reference.onto(run, packed, runtime)}


def _is_extended(run: RunDirectory) -> bool:
    """Return whether the directory's cells were mapped with `extend`."""
    told = run.read_run() if run.storage.exists(keys.RUN_JSON) else {}
    return bool(told.get(keys.UNS_ONTO, {}).get("extend"))


def _claim(run: RunDirectory, job: Mapped, *, fresh: bool) -> dict[str, str]:
    """Write run.json and return the stage keys; refuse a directory whose finished stages are of another mapping."""
    if fresh:
        delete_run(run)
    stage_key = job.stage_keys()
    before = run.read_run() if run.storage.exists(keys.RUN_JSON) else None
    stale = [
        stage
        for stage, key in stage_key.items()
        if before and before["keys"].get(stage) != key and run.storage.list(f"{keys.DONE}/{stage}")
    ]
    if stale:
        msg = (
            f"{run.url} was mapped in another way (onto another run or space, with other settings or genes, or without --extend); choose another "
            "--out, or start over there with --fresh"
        )
        raise RunError(msg)
    reference = job.reference
    onto = Onto(reference.run.url, reference.path_from(run), reference.method, reference.key).to_json()
    run.write_json(
        keys.RUN_JSON,
        {
            "format": keys.FORMAT_VERSION, "input": job.told, "settings": job.settings.model_dump(mode="json"),
            "keys": stage_key, keys.UNS_ONTO: onto | {"extend": job.extend},
        },
    )  # fmt: skip
    return stage_key
