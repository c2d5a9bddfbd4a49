"""Map cells of new donors, batches or conditions onto a finished run: `ndreamer-dist map`.

The stages are those of a run: cohort, pack, space, match, effects. Everything that a run learns from its cells comes from
the finished run: normalisation, genes, model or axes, and the distance that counts as near. New cells are matched only
with that run's groups, so the numbers of a cell do not depend on the other new cells.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
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
"""Settings of `cohort` that may differ from the run's: where to read the new values, and which cells to keep."""
MAPPING = (keys.STAGE_COHORT, keys.STAGE_PACK, keys.STAGE_SPACE, keys.STAGE_MATCH, keys.STAGE_EFFECTS)
"""The stages of a mapping."""


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

    New cells are normalised like the run's cells, placed in its matching space by its frozen model or axes, and matched with
    its groups of the control and of their own condition. `map(...).results` reads their denoised expression and effects;
    its `cate` includes the run's donors. An interrupted call continues, a finished one does nothing.

    Parameters
    ----------
    cohort
        (cells, genes) as for `run`, with the run's columns of `obs`. Batches and conditions may be new to the run.
    onto
        Directory of the finished run, or of cells that were mapped with `extend`.
    out
        Directory for the mapped cells, local or on object storage.
    embedding
        Matching space, if the run has several; by default the first.
    fill_missing_genes
        Largest share of the run's genes that the cohort may lack; missing genes count as zero. By default none may be
        missing.
    extend
        Match cells that are later mapped onto `out` with these cells, too. If these cells include new controls, match the
        other new cells with them.
    settings
        Dotted settings: those that say how to work (`{"run.address": "auto"}`), and those of the cohort that say where to
        read values and which cells to keep (`cohort.layer`, `cohort.gene_names`, `cohort.min_group_cells`, ...). All
        others are the run's.
    fresh
        Delete another mapping in `out` first.

    Raises
    ------
    NDreamerError
        The run or the cohort is not usable: genes are missing, cells or groups are already in the run, values are of
        another kind; or `out` holds something else.
    """
    use_writable_caches()
    reference, directory = Reference.open(onto, embedding), RunDirectory.at(out)
    if directory.url == reference.run.url:
        msg = f"{directory.url} is the run itself, which is never written to; choose another --out"
        raise RunError(msg)
    directory.refuse_unwritable()
    resolved = _settings(reference, settings or {})
    choose_format(resolved.run.log_format)
    source = open_cohort(cohort, resolved.cohort)
    check_tables(source.cells.sample(), source.var)
    values_of(source, reference, resolved.cohort)
    extend = extend or (not fresh and _is_extended(directory))
    job = MappingJob(reference, resolved, source, genes_of(source, reference.genes, fill_missing_genes), extend)
    refuse_known_cells(source, reference)
    placer_of(reference)  # refuses a space that cannot place new cells
    check_owner(directory, job.fingerprint, fresh=fresh)
    with directory.locked():
        stage_key = _claim(directory, job, fresh=fresh)
        choice = runtime_choice(resolved, source.n_cells)
        logger.info("works in %s", choice)
        with ray_failures(), choose_runtime(choice.applied(resolved).run) as runtime:
            job.run(replace(directory, onto=reference.places), runtime, stage_key)
    return Run(directory.url)


def _settings(reference: Reference, changes: Mapping[str, Any]) -> Settings:
    """Return the run's settings with changes; only those of `OWN` and of how to work are accepted."""
    before = reference.settings
    settings = Settings.build(config=before.model_dump(mode="json"), overrides=changes)
    differ = ["seed"] if settings.seed != before.seed else []
    differ += [
        f"{part}.{name}"
        for part in type(before).model_fields
        if part != "seed"
        for name, value in getattr(before, part).bearing().items()
        if getattr(settings, part).bearing()[name] != value and not (part == "cohort" and name in OWN)
    ]
    if differ:
        msg = (
            f"{', '.join(differ)}: cells are mapped with the settings of the run; only run.* and "
            f"{', '.join(f'cohort.{name}' for name in OWN)} can be given"
        )
        raise SettingsError(msg)
    return settings


@dataclass(frozen=True)
class MappingJob:
    """A cohort that is mapped onto a run.

    Attributes
    ----------
    reference
        The finished run.
    settings
        The run's settings with those of the new cohort.
    source
        The new cohort.
    genes
        The run's genes in the new cohort.
    extend
        Whether later mappings may match cells with these.
    """

    reference: Reference
    settings: Settings
    source: Source
    genes: Genes
    extend: bool

    @property
    def controls_first(self) -> bool:
        """Whether new controls serve as matches of the other new cells: with `extend`, if the cohort holds both."""
        if not self.extend:
            return False
        design = self.reference.design
        is_control = names_in(self.source.cells, design.condition_key) == design.control
        return bool(is_control.any() and not is_control.all())

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the cohort, which identifies it in run.json."""
        cohort = self.settings.cohort
        return fingerprint(self.source, cohort.condition_column, cohort.batch_key)

    @cached_property
    def labels(self) -> CellLabels | None:
        """Labels that limit the matches of the new cells, in input order, with the run's codes; `None` without labels."""
        within, inside = self.settings.match.within, self.reference.results.matched_inside
        if within is None or inside is None:
            return None
        if within == keys.OBS_LOW:  # new cells have no cluster
            return CellLabels(np.full(self.source.n_cells, -1, dtype=np.int32), inside.labels)
        own = column_labels(self.source, within, keys.MATCH_WITHIN)
        names = tuple(dict.fromkeys((*inside.labels, *own.names)))
        codes = np.array([*(names.index(name) for name in own.names), -1], dtype=np.int32)
        return CellLabels(codes[own.codes], names)

    def stage_keys(self) -> dict[str, str]:
        """Return the key of every stage: a hash of its settings, its inputs of the run and cohort, and the earlier keys."""
        labels = self.labels
        settings = {
            name: getattr(self.settings, name).bearing() for name in ("cohort", "pack", "embed", "match", "effects")
        }
        inputs: dict[str, Any] = {
            keys.STAGE_COHORT: [
                self.fingerprint,
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
        stage_key: dict[str, str] = {}
        for name in MAPPING:
            content = {"format": keys.FORMAT_VERSION, "stage": f"map {name}", "takes": inputs[name], "reads": stage_key}
            stage_key = {**stage_key, name: digest(canonical_json(content).encode())}
        return stage_key

    def run(self, run: RunDirectory, runtime: Runtime, key: Mapping[str, str]) -> None:
        """Run the stages; each skips its finished shards."""
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
        """Return the labels of the run's cells and of the new ones, in row order."""
        labels, stored = self.labels, self.reference.results.counterparts.labels
        if labels is None or stored is None:
            return None
        return CellLabels(np.concatenate([stored, labels.codes[packed.input_row]]), labels.names)

    def _summary(self, run: RunDirectory, packed: Packed, runtime: Runtime) -> dict[str, Any]:
        """Return the facts for `uns` of the results."""
        facts: dict[str, Any] = run.read_json(keys.COHORT_SUMMARY) | {"input": self.fingerprint}
        if self.settings.match.within is not None:
            facts[keys.UNS_WITHIN] = run.read_json(keys.MATCH_SUMMARY)["within"]
        finished = run.storage.exists(f"{keys.RESULTS}/{ROOT}")
        return facts if finished else facts | {keys.UNS_ONTO: self.reference.onto(run, packed, runtime)}


def _is_extended(run: RunDirectory) -> bool:
    """Return whether the directory's cells were mapped with `extend`."""
    run_json = run.read_run() if run.storage.exists(keys.RUN_JSON) else {}
    return bool(run_json.get(keys.UNS_ONTO, {}).get("extend"))


def _claim(run: RunDirectory, job: MappingJob, *, fresh: bool) -> dict[str, str]:
    """Write run.json and return the stage keys; raise `RunError` if finished stages belong to another mapping."""
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
            "format": keys.FORMAT_VERSION, "input": job.fingerprint, "settings": job.settings.model_dump(mode="json"),
            "keys": stage_key, keys.UNS_ONTO: onto | {"extend": job.extend},
        },
    )  # fmt: skip
    return stage_key
