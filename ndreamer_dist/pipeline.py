"""The job: the sequence of the stages, and the checks before the first of them.

Follow a cell. `cohort` assigns its group and selects the genes, `pack` assigns its row, `clusters` assigns two labels,
`train` learns from it, `embed` and `pca` compute its coordinates (or `space` does, in a space that needs no network),
`match` finds its counterparts, and `effects` writes its denoised expression, batch effect and treatment effect to
results.zarr. Each stage is a function of the settings and of earlier stores, and skips what is already there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from anndata import AnnData

from ndreamer_dist import keys
from ndreamer_dist.cohort.clusters import clustered_by
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.genes import check_cohort, check_genes, input_groups
from ndreamer_dist.cohort.obsm import column_labels
from ndreamer_dist.cohort.source import Source, fingerprint, open_cohort
from ndreamer_dist.cohort.values import decide_values
from ndreamer_dist.compute.engines import engines_here, require_faiss
from ndreamer_dist.compute.events import choose_format
from ndreamer_dist.compute.executor import check_layout, choose_runtime, ray_failures, runtime_choice
from ndreamer_dist.compute.local_ray import object_store_bytes, on_a_cluster
from ndreamer_dist.compute.machine import (
    Allowance,
    Needs,
    check_resources,
    cpu_allowance,
    cpu_count,
    memory_allowance,
    use_writable_caches,
)
from ndreamer_dist.compute.monitors import metered, progress_of, stage_costs
from ndreamer_dist.effects.tables import ROOT, check_tables
from ndreamer_dist.embedding.space import SpaceInput
from ndreamer_dist.errors import CohortError, DamagedError, RunError, SettingsError, suggest
from ndreamer_dist.matching.stage import add_edges
from ndreamer_dist.planning import memory
from ndreamer_dist.planning.plan import Plan, plan_of
from ndreamer_dist.planning.sizes import CohortSize
from ndreamer_dist.planning.stages import SHARED, Job, stage_keys, stages_of
from ndreamer_dist.results.annotations import Annotation, changed_columns
from ndreamer_dist.results.read import read_element
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.stats.results import Results, open_results

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (".h5ad", ".h5", ".csv", ".tsv", ".parquet", ".html")
"""No run directory is named like these."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    url
        Address of the run directory.
    annotation
        Columns of the cohort's `obs` that were taken over into results that were finished before; none if there are none.
    """

    url: str
    annotation: Annotation | None = None

    @property
    def results(self) -> Results:
        """The results, read in pieces."""
        return open_results(self.url)


def run(
    cohort: str | os.PathLike[str] | AnnData,
    *,
    out: str | os.PathLike[str],
    condition_key: str | Sequence[str] | None = None,
    control: str | None = None,
    batch_key: str | Sequence[str] | None = None,
    embedding: str | None = None,
    preset: str = "paper",
    config: Mapping[str, Any] | None = None,
    settings: Settings | Mapping[str, Any] | None = None,
    redo: bool = False,
    fresh: bool = False,
    stage: str | None = None,
) -> Run:
    """Remove batch effects and estimate what the condition does to every cell (the whole of METHOD).

    A run that was interrupted goes on; a finished one does nothing. `run(...).results` reads what it wrote.

    Parameters
    ----------
    cohort
        (cells, genes): an AnnData, or the path or URL of an h5ad file or a zarr store. Never modified.
    out
        Run directory, local or on object storage.
    condition_key, control
        Column of `obs` that holds the condition, and the name of the control in it. Of several columns (`["drug",
        "genotype"]`) the conditions are the combinations that occur, values joined by `:`, and so is the control's name
        (`"none:wt"`).
    batch_key
        Column or columns of `obs` that hold the batch (donor, site, platform); none for one batch.
    embedding
        Space that cells are matched in (METHOD section 9): `ndreamer` (the default, trained), `pca`, `harmony`, `state`,
        `ndreamer+state`, or `obsm:KEY`, coordinates of the cohort's own. On the directory of a finished run another
        space is added to it: `open_results(out, embedding="harmony")`.
    preset
        `paper` (the method's defaults) or `small` (for laptops).
    config, settings
        Nested settings, as a YAML file holds them; dotted ones, `{"train.workers": 2}`, or complete `Settings`.
    redo
        Run again the stages whose settings have changed, and those after them.
    fresh
        Delete what `out` holds of another run first.
    stage
        Run this stage alone (`keys.FLOW`); those before it must be finished.

    Raises
    ------
    NDreamerError
        The settings, the cohort, the directory or the machine will not do, or a stage before `stage` is not finished.
    """
    use_writable_caches()
    asked = _settings(preset, config, settings, _names(condition_key, control, batch_key, embedding))
    _check_stage(stage, asked)
    choose_format(asked.run.log_format)
    directory = RunDirectory.at(out)
    directory.refuse_unwritable()
    source, _, size = _checked(cohort, asked)
    choice = runtime_choice(asked, size.cells)
    made = choice.applied(asked)
    decide_values(source, made.cohort.normalise, made.cohort.log_base)
    _check_machine(directory, made, size)
    from_input = SpaceInput.of(source, made)
    told = fingerprint(source, made.cohort.condition_column, made.cohort.batch_key)
    check_owner(directory, told, fresh=fresh)
    with directory.locked():
        finished = directory.storage.exists(f"{keys.RESULTS}/{ROOT}")
        claimed = _claim(directory, asked, told, from_input.checksums(), redo=redo, fresh=fresh)
        logger.info("works in %s", choice)
        with ray_failures(), choose_runtime(made.run, memory.largest_task(size, made)) as runtime:
            promised = None if on_a_cluster(made.run) else memory.stage_memory(size, made, **_machine(made))
            run_stages(Job(directory, made, source, runtime, from_input), claimed, only=stage, promised=promised)
        annotation = _take_over(directory, source) if finished and stage is None else None
    return Run(claimed.space.url, annotation)


def _take_over(run: RunDirectory, source: Source) -> Annotation | None:
    """Keep those columns of a cohort's `obs` that are new or differ since the results were made."""
    results = open_results(run.url)
    now = source.obs.set_axis(pd.Index(source.cell_names))
    stored = read_element(results.storage, "obs")
    changed = changed_columns(stored, results.packed_obs, now, results.design)
    if not changed:
        return None
    annotation = results.annotate(now[changed])
    return replace(annotation, unknown=0)  # cells that were dropped are no news


def plan(
    cohort: str | os.PathLike[str] | AnnData,
    *,
    out: str | os.PathLike[str] | None = None,
    condition_key: str | Sequence[str] | None = None,
    control: str | None = None,
    batch_key: str | Sequence[str] | None = None,
    embedding: str | None = None,
    preset: str = "paper",
    config: Mapping[str, Any] | None = None,
    settings: Settings | Mapping[str, Any] | None = None,
) -> Plan:
    """Tell what `run` would do with the same arguments, and what it would need; nothing is run and nothing written.

    The cohort is checked as `run` checks it. Memory and processors are those of this machine, or of `run.cpus`.

    Returns
    -------
    Groups, edges, steps, and per stage the memory and the workers it can use; it prints as tables.

    Raises
    ------
    NDreamerError
        The settings or the cohort will not do.
    """
    asked = _settings(preset, config, settings, _names(condition_key, control, batch_key, embedding))
    directory = None if out is None else RunDirectory.at(out)
    if directory is not None:
        directory.refuse_unwritable()
    source, design, size = _checked(cohort, asked)
    choice = runtime_choice(asked, size.cells)
    made = choice.applied(asked)
    seen = decide_values(source, made.cohort.normalise, made.cohort.log_base).seen
    limit, groups = _memory(made), input_groups(source, made.cohort)
    planned = plan_of(design, made, size, input_groups=groups.sizes, **_machine(made))
    by_condition = groups.notes() if groups.rule == "merge" else []  # else the plan names the groups that are left out
    notes = tuple(note for note in (seen, *source.notes, *by_condition) if note)
    return replace(
        planned, notes=notes, engines=engines_here(), runtime=str(choice), cpus_source=_processors(made).source,
        memory_free=limit.amount, memory_source=limit.source,
        disk_free=directory.free_disk() if directory is not None and directory.storage.is_local else None,
        took=tuple(_times(directory).items()) if directory is not None else (),
    )  # fmt: skip


def _times(run: RunDirectory) -> dict[str, float]:
    """Return the seconds that stages took in a run directory; of a training under way, what its speed makes of it."""
    table = stage_costs(run.storage)
    done = {name.split("/")[1] for name in run.storage.list(keys.DONE)}
    took = {row["stage"]: float(row["seconds"]) for row in table.to_dict("records") if row["stage"] in done}
    told = progress_of(run.storage)
    if (
        told.get("stage") == keys.STAGE_TRAIN
        and keys.STAGE_TRAIN not in took
        and told.get("measures", {}).get("seconds")
    ):
        took[keys.STAGE_TRAIN] = float(told["measures"]["seconds"]) * told["steps"]
    return took


def _checked(cohort: str | os.PathLike[str] | AnnData, settings: Settings) -> tuple[Source, Design, CohortSize]:
    """Open a cohort and refuse what cannot be; return it with its design and sizes."""
    require_faiss()
    source = open_cohort(cohort, settings.cohort)
    design = check_cohort(source, settings.cohort).sampling(settings.match.groups)
    check_genes(source, settings.hvg)
    check_tables(source.cells.sample(), source.var)
    _check_populations(settings, design)
    _check_labels(source, settings.match.within)
    if settings.match.edges == "all":
        design.refuse_all_edges()
    return source, design, CohortSize.of(design, settings, genes=source.n_genes, stored_values=source.nnz)


def _check_populations(settings: Settings, design: Design) -> None:
    """Refuse clusters as populations where they are made inside each group: their labels mean nothing in another."""
    stateful = settings.embed.method in (keys.STATE, keys.NDREAMER_STATE)
    asked = {"state.by": settings.state.by if stateful else None, keys.MATCH_WITHIN: settings.match.within}
    by_cluster = [name for name, column in asked.items() if column == keys.OBS_LOW]
    if by_cluster and clustered_by(settings.clusters, design.n_cells, len(design.groups)) == "group":
        msg = (
            f"{by_cluster[0]} is {keys.OBS_LOW}, but this cohort would be clustered inside each group, where labels mean nothing "
            "elsewhere; set clusters.within=all (or sketch), or name a column of obs"
        )
        raise SettingsError(msg)


def _check_labels(source: Source, within: str | None) -> None:
    """Refuse a column of labels that is not there, or holds none."""
    if within in (None, keys.OBS_LOW):
        return
    if not column_labels(source, within, keys.MATCH_WITHIN).names:
        msg = f"{keys.MATCH_WITHIN}: obs column {within!r} holds no label; name a column of cell types"
        raise CohortError(msg)


def add_matches(
    out: str | os.PathLike[str],
    *,
    edges: str = "all",
    embedding: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Search more edges of a finished run into its matches.zarr; results.zarr stays as it is (METHOD section 6).

    Parameters
    ----------
    out
        Run directory.
    edges
        `all`: from every group to every group; or a condition: from every group to the groups of that condition.
    embedding
        The matching space whose matches are added to; by default the one that the run was begun with.
    settings
        Dotted settings that say how to work: `{"run.address": "auto"}`.

    Returns
    -------
    added
        Number of (group, group) edges searched now; what was there is not searched again.

    Raises
    ------
    RunError
        There is no run, it has not got that far, it is being worked on, or the settings given bear on its results.
    QueryError
        There is no such condition.
    """
    directory = RunDirectory.at(out)
    if not directory.storage.exists(keys.RUN_JSON):
        msg = f"{directory.url} holds no run"
        raise RunError(msg)
    if keys.UNS_ONTO in directory.read_run():
        msg = f"{directory.url} is of cells that were mapped onto a run, and are matched with its groups as `map` needs it"
        raise RunError(msg)
    spaces = directory.spaces()
    if embedding is not None and embedding not in spaces:
        msg = f"{directory.url} has no space {embedding!r}; it has {', '.join(spaces)}.{suggest(embedding, spaces)}"
        raise RunError(msg)
    space = directory if embedding is None else spaces[embedding]
    before = space.read_run()
    made = Settings.build(config=before["settings"], overrides=settings)
    if stage_keys(made, before["input"], before.get("from_input")) != before["keys"]:
        msg = (
            f"{space.url} was made with other settings or by another version: only settings that say how to work "
            "(--set run.name=value) can be given here"
        )
        raise RunError(msg)
    with directory.locked():
        design = Design.from_json(directory.read_json(keys.DESIGN_JSON)).sampling(made.match.groups)
        made = runtime_choice(made, design.n_cells).applied(made)
        with choose_runtime(made.run) as runtime, metered(space.storage, keys.STAGE_MATCH, design.n_cells):
            return add_edges(space, made, design, runtime, before["keys"][keys.STAGE_MATCH], edges)


def run_stages(job: Job, claimed: Claim, *, only: str | None = None, promised: Mapping[str, int] | None = None) -> None:
    """Run all stages that the matching space needs, each with its key; every one skips what it has already done.

    With `only`, the stages before that one must be finished, and the later ones are left alone. What spaces share is
    done in the directory of the run, the rest in that of the space, which is another for a space that was added.
    What each stage was promised to stay under, in bytes, is logged beside what it took.
    """
    # torch is loaded before Ray is there: a second raylet on one machine replaces a job's working directory, and in one
    # that is gone MKL cannot be loaded.
    import torch  # noqa: F401

    stages = stages_of(job.settings)
    for number, (name, stage) in enumerate(stages.items(), start=1):
        where, key = job.home if stage.shared else claimed.space, claimed.stage_key[name]
        if only not in (None, name):
            stage.run(job, replace(where, before=only), key)
            continue
        bytes_, place = (promised or {}).get(name), f"{number}/{len(stages)}"
        with metered(where.storage, name, job.source.n_cells, bytes_, place) as facts:
            facts["input"] = job.source.name
            stage.run(job, where, key)
        if name == only:
            return


def _check_stage(stage: str | None, settings: Settings) -> None:
    stages = tuple(stages_of(settings))
    if stage is not None and stage not in stages:
        where = "" if settings.embed.method == keys.NDREAMER else f" in the space {settings.embed.method!r}"
        msg = f"there is no stage {stage!r}{where}; there are {', '.join(stages)}.{suggest(stage, stages)}"
        raise SettingsError(msg)


def _names(
    condition_key: str | Sequence[str] | None,
    control: str | None,
    batch_key: str | Sequence[str] | None,
    embedding: str | None,
) -> dict[str, Any]:
    for name, value in (("condition_key", condition_key), ("control", control), ("batch_key", batch_key)):
        yes_or_no = [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, bool)]
        if yes_or_no:
            msg = f"{name} is {value!r}; expected a name as text: {str(yes_or_no[0])!r} where that is one"
            raise SettingsError(msg)
    return {
        "cohort.condition_key": condition_key, "cohort.control": control, "cohort.batch_key": batch_key,
        "embed.method": embedding,
    }  # fmt: skip


def _settings(
    preset: str,
    config: Mapping[str, Any] | None,
    settings: Settings | Mapping[str, Any] | None,
    given: Mapping[str, Any],
) -> Settings:
    """Return the settings, the cohort's names and the matching space among them."""
    named = {name: value for name, value in given.items() if value is not None}
    if isinstance(settings, Settings):
        config, settings = settings.model_dump(), {}
    return Settings.build(preset=preset, config=config, overrides={**(settings or {}), **named})


def _check_machine(run: RunDirectory, settings: Settings, size: CohortSize) -> None:
    """Refuse what this machine cannot hold; where tasks run on a cluster, the driver alone (see `executor.check_nodes`)."""
    if on_a_cluster(settings.run):
        needs = Needs(memory.driver_memory(size), memory.disk_bytes(size, settings))
        check_resources(needs, memory=memory_allowance(), disk=run.free_disk(), where=run.url)
        return
    alone = settings.run.serial  # one process trains and reads in turn, so no processor need be left to readers
    cpus = 2**20 if alone else settings.run.cpus or cpu_count()
    if keys.STAGE_TRAIN in stages_of(settings):
        check_layout(settings.train, cpus, gpus=lambda: 0 if alone else _gpu_count())
    needs = memory.needs(size, settings, **_machine(settings))
    check_resources(needs, memory=_memory(settings), disk=run.free_disk(), where=run.url)
    own, limit = _processors(settings), _memory(settings)
    logger.info(
        "this run may use: %d processor%s (%s), %.1f GB of memory (%s)",
        own.amount, "" if own.amount == 1 else "s", own.source, limit.amount / 1e9, limit.source,
    )  # fmt: skip


def _gpu_count() -> int:
    import torch

    return int(torch.cuda.device_count())


def _machine(settings: Settings) -> dict[str, int]:
    """Return the tasks that run at once on this machine, and the bytes of its object store."""
    store = 0 if settings.run.serial else object_store_bytes(settings.run)
    return {"cpus": _processors(settings).amount, "object_store": store}


def _processors(settings: Settings) -> Allowance:
    """Return how many tasks run at once on this machine, and why so many."""
    if settings.run.serial:
        return Allowance(1, "without Ray")
    return Allowance(settings.run.cpus, "run.cpus") if settings.run.cpus else cpu_allowance()


def _memory(settings: Settings) -> Allowance:
    """Return the bytes of memory the job may use on this machine, and why so many."""
    own = settings.run.memory_gb
    return Allowance(int(own * 1e9), "run.memory_gb") if own else memory_allowance()


def check_owner(run: RunDirectory, told: Mapping[str, Any], *, fresh: bool) -> None:
    """Refuse a directory that is named like a file, or holds something else: files that are no run's, or another input's run."""
    if run.url.lower().endswith(FILE_SUFFIXES):
        msg = f"{run.url} would be a run directory, but is named like a file; name a folder, as in --out my_run"
        raise RunError(msg)
    if not run.storage.exists():
        return
    if not run.storage.exists(keys.RUN_JSON):
        if any(not name.startswith(keys.LOCK) for name in run.storage.list()):
            msg = f"{run.url} holds files that are not a run's; choose another --out"
            raise RunError(msg)
        return
    if fresh:
        return
    before = _before(run)
    if before is not None and before["input"] != dict(told) and run.storage.list(keys.DONE):
        msg = f"{run.url} holds a run of another input; choose another --out, or start over there with --fresh"
        raise RunError(msg)


@dataclass(frozen=True)
class Claim:
    """Where a run works: the directory of its matching space, and the keys of its stages."""

    space: RunDirectory
    stage_key: dict[str, str]


def _claim(
    run: RunDirectory,
    settings: Settings,
    told: Mapping[str, Any],
    from_input: Mapping[str, str],
    *,
    redo: bool,
    fresh: bool,
) -> Claim:
    """Write run.json and return the stage keys; refuse where finished stages would have to be run again.

    Raises
    ------
    RunError
        The settings differ from those of finished stages; the message lists the stages and the settings.
    """
    if fresh:
        delete_run(run)
    stage_key = stage_keys(settings, told, from_input)
    first = _before(run, redo=redo)
    space = _space_of(run, first, settings, stage_key)
    before = first if space == run else _before(space, redo=redo)
    if before is not None:
        changed = [stage for stage, key in stage_key.items() if before["keys"].get(stage) != key]
        stale = [stage for stage in changed if space.storage.list(f"{keys.DONE}/{stage}")]
        if stale and not redo:
            differ = _differences(before["settings"], settings.model_dump(mode="json"), stale)
            differ += [
                f"{name}: other values in the input"
                for name, checksum in before.get("from_input", {}).items()
                if from_input.get(name, checksum) != checksum
            ]
            which = ", ".join(differ)
            msg = (
                f"{space.url} was made with other settings ({which or 'another version'}); --redo runs these stages "
                f"again: {', '.join(stale)}; --fresh starts over"
            )
            raise RunError(msg)
    kept = _kept_spaces(run, first, stage_key) if space == run else []
    told = {
        "format": keys.FORMAT_VERSION,
        "input": dict(told),
        "settings": settings.model_dump(mode="json"),
        "keys": stage_key,
        "from_input": dict(from_input),
    }
    space.write_json(keys.RUN_JSON, told | ({"spaces": kept} if kept else {}))
    if space != run and first is not None:
        names = sorted({*first.get("spaces", ()), settings.embed.method})
        run.write_json(keys.RUN_JSON, first | {"spaces": names})
    return Claim(space, stage_key)


def _space_of(
    run: RunDirectory, first: Mapping[str, Any] | None, settings: Settings, stage_key: Mapping[str, str]
) -> RunDirectory:
    """Return the directory of the settings' space: the run's own for the space that it was begun with.

    Raises
    ------
    RunError
        Another space would be added, but the run is not finished, or what the two would share was made with other settings.
    """
    method = settings.embed.method
    begun = method if first is None else first["settings"].get("embed", {}).get("method", keys.NDREAMER)
    if begun == method:
        return run
    if not run.storage.exists(f"{keys.RESULTS}/{ROOT}"):
        msg = (
            f"{run.url} was begun in the space {begun!r} and is not finished; finish it with --embedding {begun} before "
            f"{method!r} is added, or start over in {method!r} with --fresh"
        )
        raise RunError(msg)
    shared = {stage: run.done_key(stage) for stage in SHARED if stage in stage_key}
    differ = [stage for stage, key in shared.items() if key not in (None, stage_key[stage])]
    if differ:
        now = settings.model_dump(mode="json")
        which = ", ".join(_differences((first or {})["settings"], now, differ)) or "another version"
        msg = (
            f"{run.url} was made with other settings ({which}); a space is added with the settings of the run "
            f"(its {', '.join(differ)} would have to be run again): give those, or choose another --out"
        )
        raise RunError(msg)
    return run.space(method)


def _kept_spaces(run: RunDirectory, first: Mapping[str, Any] | None, stage_key: Mapping[str, str]) -> list[str]:
    """Return the spaces that were added to a run; those that rest on a shared stage which is run again are deleted."""
    kept = []
    shared = [stage for stage in SHARED if stage in stage_key]
    for name in (first or {}).get("spaces", ()):
        before = _before(run.space(name)) or {"keys": {}}
        if all(before["keys"].get(stage) in (None, stage_key[stage]) for stage in shared):
            kept.append(name)
            continue
        logger.warning("the space %r rests on what is run again, and is deleted", name)
        run.storage.delete(keys.space_folder(name))
        for stage in SHARED:  # what the added space alone needed
            if stage not in stage_key:
                run.unmark(stage)
    return kept


def _before(run: RunDirectory, *, redo: bool = True) -> dict[str, Any] | None:
    """Return what run.json says; none where it is not there, or damaged and `redo` lets it be written anew."""
    if not run.storage.exists(keys.RUN_JSON):
        return None
    try:
        return run.read_run()
    except DamagedError as error:
        if redo:
            return None
        msg = f"{error.what}; --redo writes it anew, and runs again only what was made with other settings"
        raise RunError(msg) from error


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    """Return the changed settings that bear on the given stages, as `stage.name: old -> new`."""
    graph = stages_of(Settings.build(config=now))
    parts = {part for stage in stages if stage in graph for part in graph[stage].settings}
    found = [f"seed: {before['seed']} -> {now['seed']}"] if before.get("seed") != now["seed"] else []
    bearing = Settings()
    for part in sorted(parts):
        for name in getattr(bearing, part).bearing():
            old, new = before.get(part, {}).get(name), now[part][name]
            if old != new:
                found.append(f"{part}.{name}: {old} -> {new}")
    return found


def delete_run(run: RunDirectory) -> None:
    """Delete what a run wrote, and nothing else that may lie in the directory."""
    if not run.storage.exists(keys.RUN_JSON):
        return
    own = (
        keys.DONE, keys.RESULTS, keys.MATCHES, keys.EMBEDDING, keys.PACKED, keys.TRAIN_DIR, keys.MODEL_DIR,
        keys.COHORT_DIR, keys.LOGS, keys.REPORT, keys.DROPPED, keys.MATCH_SUMMARY, keys.SPACES_DIR, keys.RUN_JSON,
        keys.COMPARISON, keys.COMPARISON_TABLE, keys.COMPARISON_PICTURE, f"results.{keys.ANNOTATIONS}",
    )  # fmt: skip
    for name in own:
        run.storage.delete(name)
