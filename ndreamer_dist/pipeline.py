"""Run the whole job: check cohort, settings and machine, then run the stages in order.

Follow a cell. `cohort` assigns its group and selects the genes, `pack` assigns its row, `clusters` assigns two labels,
`train` learns from it, `embed` and `pca` (or `space`, in another matching space) compute its coordinates, `match` finds
its matches, and `effects` writes its denoised expression, batch effect and treatment effect to results.zarr. Each stage is
a function of the settings and of earlier stores, and skips its finished shards.
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
        Columns that this call added from the cohort's `obs` to results that were finished before; `None` if none differ.
    """

    url: str
    annotation: Annotation | None = None

    @property
    def results(self) -> Results:
        """The results, read on demand."""
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
    """Remove batch effects and estimate the effect of the condition on every cell (the whole of METHOD).

    An interrupted run continues; a finished one does nothing. `run(...).results` reads the results.

    Parameters
    ----------
    cohort
        (cells, genes): an AnnData, or the path or URL of an h5ad file or a zarr store. Never modified.
    out
        Run directory, local or on object storage.
    condition_key, control
        Column of `obs` that holds the condition, and the name of the control in it. For several columns (`["drug",
        "genotype"]`) the conditions are the combinations that occur, with values joined by `:`, and the control is named
        likewise (`"none:wt"`).
    batch_key
        Column or columns of `obs` that hold the batch (donor, site, platform); `None`: one batch.
    embedding
        Space to match cells in (METHOD section 9): `ndreamer` (the default, trained), `pca`, `harmony`, `state`,
        `ndreamer+state`, or `obsm:KEY`, coordinates in the cohort. If `out` holds a finished run in another space, this
        one is added: `open_results(out, embedding="harmony")`.
    preset
        `paper` (the method's defaults) or `small` (for laptops).
    config, settings
        Nested settings, as in a YAML file, and dotted ones, `{"train.workers": 2}`, which win. Or, as `settings` alone, a
        complete `Settings`.
    redo
        Run stages whose settings have changed again, and those after them.
    fresh
        Delete another run in `out` first.
    stage
        Run only this stage (`keys.FLOW`); those before it must be finished.

    Raises
    ------
    NDreamerError
        The settings, the cohort, the directory or the machine is not usable, or a stage before `stage` is not finished.
    """
    use_writable_caches()
    requested = _settings(preset, config, settings, _names(condition_key, control, batch_key, embedding))
    _check_stage(stage, requested)
    choose_format(requested.run.log_format)
    directory = RunDirectory.at(out)
    directory.refuse_unwritable()
    source, _, size = _checked(cohort, requested)
    choice = runtime_choice(requested, size.cells)
    resolved = choice.applied(requested)
    decide_values(source, resolved.cohort.normalise, resolved.cohort.log_base)  # refuses values that cannot be used
    _check_machine(directory, resolved, size)
    from_input = SpaceInput.of(source, resolved)
    identity = fingerprint(source, resolved.cohort.condition_column, resolved.cohort.batch_key)
    check_owner(directory, identity, fresh=fresh)
    with directory.locked():
        finished = directory.storage.exists(f"{keys.RESULTS}/{ROOT}")
        claimed = _claim(directory, requested, identity, from_input.checksums(), redo=redo, fresh=fresh)
        logger.info("works in %s", choice)
        with ray_failures(), choose_runtime(resolved.run, memory.largest_task(size, resolved)) as runtime:
            promised = None if on_a_cluster(resolved.run) else memory.stage_memory(size, resolved, **_machine(resolved))
            run_stages(Job(directory, resolved, source, runtime, from_input), claimed, only=stage, promised=promised)
        annotation = _add_columns(directory, source) if finished and stage is None else None
    return Run(claimed.space.url, annotation)


def _add_columns(run: RunDirectory, source: Source) -> Annotation | None:
    """Add the columns of the cohort's `obs` that are new, or have changed since the results were written."""
    results = open_results(run.url)
    now = source.obs.set_axis(pd.Index(source.cell_names))
    stored = read_element(results.storage, "obs")
    changed = changed_columns(stored, results.packed_obs, now, results.design)
    if not changed:
        return None
    annotation = results.annotate(now[changed])
    return replace(annotation, unknown=0)  # labels of dropped cells are expected


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
    """Return what `run` would do and need with the same arguments. Nothing is run or written.

    The cohort is checked as in `run`. Memory and processors are those of this machine, or `run.memory_gb` and `run.cpus`.

    Parameters are those of `run`; `out` adds the free disk, and the times of the stages that a run there has finished.

    Returns
    -------
    Groups, edges, steps, and per stage the memory and the workers that it can use; it prints as tables.

    Raises
    ------
    NDreamerError
        The settings or the cohort are not usable.
    """
    requested = _settings(preset, config, settings, _names(condition_key, control, batch_key, embedding))
    directory = None if out is None else RunDirectory.at(out)
    if directory is not None:
        directory.refuse_unwritable()
    source, design, size = _checked(cohort, requested)
    choice = runtime_choice(requested, size.cells)
    resolved = choice.applied(requested)
    seen = decide_values(source, resolved.cohort.normalise, resolved.cohort.log_base).seen
    limit, groups = _memory(resolved), input_groups(source, resolved.cohort)
    planned = plan_of(design, resolved, size, input_groups=groups.sizes, **_machine(resolved))
    by_condition = groups.notes() if groups.rule == "merge" else []  # the plan itself names groups that are dropped
    notes = tuple(note for note in (seen, *source.notes, *by_condition) if note)
    return replace(
        planned, notes=notes, engines=engines_here(), runtime=str(choice), cpus_source=_processors(resolved).source,
        memory_free=limit.amount, memory_source=limit.source,
        disk_free=directory.free_disk() if directory is not None and directory.storage.is_local else None,
        took=tuple(_times(directory).items()) if directory is not None else (),
    )  # fmt: skip


def _times(run: RunDirectory) -> dict[str, float]:
    """Return the seconds per stage of a run directory: measured, or for training under way projected from its speed."""
    table = stage_costs(run.storage)
    done = {name.split("/")[1] for name in run.storage.list(keys.DONE)}
    took = {row["stage"]: float(row["seconds"]) for row in table.to_dict("records") if row["stage"] in done}
    progress = progress_of(run.storage)
    if progress.get("stage") == keys.STAGE_TRAIN and keys.STAGE_TRAIN not in took:
        step_seconds = progress.get("measures", {}).get("seconds")
        if step_seconds:
            took[keys.STAGE_TRAIN] = float(step_seconds) * progress["steps"]
    return took


def _checked(cohort: str | os.PathLike[str] | AnnData, settings: Settings) -> tuple[Source, Design, CohortSize]:
    """Open a cohort, refuse it if it does not fit the settings, and return it with its design and sizes."""
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
    """Refuse clusters as populations if each group is clustered by itself: its labels mean nothing in other groups."""
    stateful = settings.embed.method in (keys.STATE, keys.NDREAMER_STATE)
    columns = {"state.by": settings.state.by if stateful else None, keys.MATCH_WITHIN: settings.match.within}
    by_cluster = [name for name, column in columns.items() if column == keys.OBS_LOW]
    if by_cluster and clustered_by(settings.clusters, design.n_cells, len(design.groups)) == "group":
        msg = (
            f"{by_cluster[0]} is {keys.OBS_LOW}, but this cohort would be clustered inside each group, where labels mean nothing "
            "elsewhere; set clusters.within=all (or sketch), or name a column of obs"
        )
        raise SettingsError(msg)


def _check_labels(source: Source, within: str | None) -> None:
    """Refuse a column of labels that does not exist or is empty."""
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
    """Add matches of more pairs of groups to matches.zarr of a finished run (METHOD section 6).

    The results.zarr does not change; `Results` uses the added matches for other contrasts.

    Parameters
    ----------
    out
        Run directory.
    edges
        `all`: from every group to every group; or a condition: from every group to the groups of that condition.
    embedding
        Matching space, if the run has several; by default the first.
    settings
        Dotted settings that say how to work: `{"run.address": "auto"}`.

    Returns
    -------
    added
        Number of pairs of groups that were searched; pairs with stored matches are skipped.

    Raises
    ------
    RunError
        There is no run, its matches are not finished, another process is working on it, or a setting affects its results.
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
    resolved = Settings.build(config=before["settings"], overrides=settings)
    if stage_keys(resolved, before["input"], before.get("from_input")) != before["keys"]:
        msg = (
            f"{space.url} was made with other settings or by another version: only settings that say how to work "
            "(--set run.name=value) can be given here"
        )
        raise RunError(msg)
    with directory.locked():
        design = Design.from_json(directory.read_json(keys.DESIGN_JSON)).sampling(resolved.match.groups)
        resolved = runtime_choice(resolved, design.n_cells).applied(resolved)
        with choose_runtime(resolved.run) as runtime, metered(space.storage, keys.STAGE_MATCH, design.n_cells):
            return add_edges(space, resolved, design, runtime, before["keys"][keys.STAGE_MATCH], edges)


def run_stages(job: Job, claimed: Claim, *, only: str | None = None, promised: Mapping[str, int] | None = None) -> None:
    """Run all stages that the matching space needs; each skips its finished shards.

    Stages that spaces share work in the directory of the run, the others in that of the space.

    Parameters
    ----------
    only
        Run only this stage; those before it must be finished.
    promised
        Memory in bytes that the plan promises per stage, to be logged beside the measured peak.
    """
    # Import torch before Ray starts: a second raylet on one machine replaces the job's working directory, and MKL cannot
    # be loaded from a deleted directory.
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
    arguments: Mapping[str, Any],
) -> Settings:
    """Return the settings, with those that the arguments of `run` set."""
    if isinstance(settings, Settings):
        if config is not None:
            msg = "settings is a complete Settings, which leaves no place for config; give one of them"
            raise SettingsError(msg)
        config, settings = settings.model_dump(), {}
    named = {name: value for name, value in arguments.items() if value is not None}
    return Settings.build(preset=preset, config=config, overrides={**(settings or {}), **named})


def _check_machine(run: RunDirectory, settings: Settings, size: CohortSize) -> None:
    """Raise `ResourceError` if the job does not fit this machine; on a cluster only the driver must fit.

    The nodes of a cluster are checked by `executor.check_nodes`.
    """
    if on_a_cluster(settings.run):
        needs = Needs(memory.driver_memory(size), memory.disk_bytes(size, settings))
        check_resources(needs, memory=memory_allowance(), disk=run.free_disk(), where=run.url)
        return
    if keys.STAGE_TRAIN in stages_of(settings):
        serial = settings.run.serial  # one process trains and reads in turn, so any number of processors suffices
        cpus = 2**20 if serial else settings.run.cpus or cpu_count()
        check_layout(settings.train, cpus, gpus=lambda: 0 if serial else _gpu_count())
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
    """Return the number of tasks that run at once on this machine, and the bytes of its object store."""
    store = 0 if settings.run.serial else object_store_bytes(settings.run)
    return {"cpus": _processors(settings).amount, "object_store": store}


def _processors(settings: Settings) -> Allowance:
    """Return the number of tasks that run at once on this machine, and the source of this number."""
    if settings.run.serial:
        return Allowance(1, "without Ray")
    return Allowance(settings.run.cpus, "run.cpus") if settings.run.cpus else cpu_allowance()


def _memory(settings: Settings) -> Allowance:
    """Return the bytes of memory that the job may use on this machine, and the source of this number."""
    own = settings.run.memory_gb
    return Allowance(int(own * 1e9), "run.memory_gb") if own else memory_allowance()


def check_owner(run: RunDirectory, identity: Mapping[str, Any], *, fresh: bool) -> None:
    """Raise `RunError` if a directory is named like a file, or holds files that are not a run's, or a run of another input.

    Parameters
    ----------
    identity
        Fingerprint of the input.
    fresh
        Whether a run of another input is to be deleted, so that it may be there.
    """
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
    if before is not None and before["input"] != dict(identity) and run.storage.list(keys.DONE):
        msg = f"{run.url} holds a run of another input; choose another --out, or start over there with --fresh"
        raise RunError(msg)


@dataclass(frozen=True)
class Claim:
    """The directory of a run's matching space, and the keys of its stages."""

    space: RunDirectory
    stage_key: dict[str, str]


def _claim(
    run: RunDirectory,
    settings: Settings,
    identity: Mapping[str, Any],
    from_input: Mapping[str, str],
    *,
    redo: bool,
    fresh: bool,
) -> Claim:
    """Write run.json, and return the directory of the space and the stage keys.

    Raises
    ------
    RunError
        Finished stages have other settings and `redo` is not set; the message lists the stages and the settings.
    """
    if fresh:
        delete_run(run)
    stage_key = stage_keys(settings, identity, from_input)
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
    content = {
        "format": keys.FORMAT_VERSION,
        "input": dict(identity),
        "settings": settings.model_dump(mode="json"),
        "keys": stage_key,
        "from_input": dict(from_input),
    }
    space.write_json(keys.RUN_JSON, content | ({"spaces": kept} if kept else {}))
    if space != run and first is not None:
        names = sorted({*first.get("spaces", ()), settings.embed.method})
        run.write_json(keys.RUN_JSON, first | {"spaces": names})
    return Claim(space, stage_key)


def _space_of(
    run: RunDirectory, first: Mapping[str, Any] | None, settings: Settings, stage_key: Mapping[str, str]
) -> RunDirectory:
    """Return the directory of the matching space: that of the run for its first space, else one below `spaces/`.

    Raises
    ------
    RunError
        A space is to be added, but the run is not finished, or its shared stages have other settings.
    """
    method = settings.embed.method
    if first is None:
        return run
    begun = first["settings"].get("embed", {}).get("method", keys.NDREAMER)
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
        which = ", ".join(_differences(first["settings"], now, differ)) or "another version"
        msg = (
            f"{run.url} was made with other settings ({which}); a space is added with the settings of the run "
            f"(its {', '.join(differ)} would have to be run again): give those, or choose another --out"
        )
        raise RunError(msg)
    return run.space(method)


def _kept_spaces(run: RunDirectory, first: Mapping[str, Any] | None, stage_key: Mapping[str, str]) -> list[str]:
    """Return the names of a run's added spaces, and delete those whose shared stages must run again."""
    kept = []
    shared = [stage for stage in SHARED if stage in stage_key]
    for name in (first or {}).get("spaces", ()):
        before = _before(run.space(name)) or {"keys": {}}
        if all(before["keys"].get(stage) in (None, stage_key[stage]) for stage in shared):
            kept.append(name)
            continue
        logger.warning("the space %r is deleted, since stages that it needs run again", name)
        run.storage.delete(keys.space_folder(name))
        for stage in SHARED:  # shared stages that only the added space needed
            if stage not in stage_key:
                run.unmark(stage)
    return kept


def _before(run: RunDirectory, *, redo: bool = True) -> dict[str, Any] | None:
    """Return the values of run.json; `None` if it does not exist, or is damaged and `redo` allows to write it anew."""
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
    """Return the changed settings that affect some stages, as `stage.name: old -> new`."""
    settings = Settings.build(config=now)
    graph = stages_of(settings)
    parts = {part for stage in stages if stage in graph for part in graph[stage].settings}
    differences = [f"seed: {before['seed']} -> {now['seed']}"] if before.get("seed") != now["seed"] else []
    for part in sorted(parts):
        for name, new in getattr(settings, part).bearing().items():
            old = before.get(part, {}).get(name)
            if old != new:
                differences.append(f"{part}.{name}: {old} -> {new}")
    return differences


def delete_run(run: RunDirectory) -> None:
    """Delete the files of a run, and no other files in its directory."""
    if not run.storage.exists(keys.RUN_JSON):
        return
    own = (
        keys.DONE, keys.RESULTS, keys.MATCHES, keys.EMBEDDING, keys.PACKED, keys.TRAIN_DIR, keys.MODEL_DIR,
        keys.COHORT_DIR, keys.LOGS, keys.REPORT, keys.DROPPED, keys.MATCH_SUMMARY, keys.SPACES_DIR, keys.RUN_JSON,
        keys.COMPARISON, keys.COMPARISON_TABLE, keys.COMPARISON_PICTURE, f"results.{keys.ANNOTATIONS}",
    )  # fmt: skip
    for name in own:
        run.storage.delete(name)
