"""Describe a run directory: `ndreamer-dist info`."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import yaml

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.compute.events import duration
from ndreamer_dist.compute.monitors import stage_costs
from ndreamer_dist.errors import DamagedError, StoreError, printable, shown
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import bearing_settings
from ndreamer_dist.stats.results import Results, open_results
from ndreamer_dist.storage.checksums import unseal

SILENT_SECONDS = 60.0
"""A run whose last progress is older than this counts as stopped."""


def describe(address: str, *, as_json: bool = False) -> str:
    """Return the design and the results of a finished run, or the progress of an unfinished one.

    Parameters
    ----------
    address
        Run directory or results.zarr, by path or URL.
    as_json
        Return a JSON object instead of text.

    Raises
    ------
    StoreError
        There is no run, or its results are damaged.
    """
    run = RunDirectory.at(address)
    if not run.storage.exists():
        msg = f"{run.url} does not exist"
        raise StoreError(msg)
    results = _results(run, address)
    if as_json:
        return _as_json(run, results)
    return _progress(run) if results is None else _summary(results) + _spaces(run) + _costs(run)


def _results(run: RunDirectory, address: str) -> Results | None:
    """Return the results of a run, or `None` if it is not finished."""
    try:
        return open_results(address)
    except StoreError:
        if not run.storage.exists(keys.RUN_JSON):
            raise
        if not run.storage.exists(f"{keys.RESULTS}/zarr.json"):
            return None
        return open_results(address)  # the run has just finished, or the results are damaged and this raises


def _as_json(run: RunDirectory, results: Results | None) -> str:
    """Return state, stages and, for a finished run, design and layers as a JSON object; sizes in GB (10^9 bytes)."""
    costs = stage_costs(run.storage).to_json(orient="records")  # NaN becomes null
    answer: dict[str, Any] = {"url": run.url, "state": "finished", "costs": json.loads(costs)}
    if results is None:
        progress = RunProgress.of(run)
        state = "running" if progress.silent < SILENT_SECONDS else "stopped"
        answer |= {"state": state, "shards_done": progress.shards, "progress": progress.stage}
        answer |= {"damage": progress.damage} if progress.damage else {}
    else:
        answer |= _design(results)
    return json.dumps(answer, indent=2)


@dataclass(frozen=True)
class RunProgress:
    """The progress of an unfinished run. Reading it takes few requests, whatever the number of shards.

    Attributes
    ----------
    shards
        Number of finished shards of every stage.
    stage
        Values of logs/progress.json, about the current or last stage; empty if there are none.
    damage
        What is wrong with logs/progress.json; empty if nothing is.
    silent
        Seconds since logs/progress.json was written.
    """

    shards: dict[str, int]
    stage: dict[str, Any]
    damage: str
    silent: float

    @classmethod
    def of(cls, run: RunDirectory) -> RunProgress:
        """Read the progress of a run."""
        done = Counter(name.split("/")[1] for name in run.storage.list(keys.DONE))
        stage, damage = {}, ""
        try:
            stage = unseal(run.storage.read_if_there(keys.PROGRESS) or b"{}", f"{run.url}/{keys.PROGRESS}")
        except DamagedError as error:
            damage = f"{error.what}; the `run` command writes it anew"
        shards = {name: done[name] for name in _stages(run)}
        return cls(shards, stage, damage, time.time() - stage.get("seen", 0.0))


def _design(results: Results) -> dict[str, Any]:
    """Return the design and the layers of finished results, as plain JSON values."""
    design, cells = results.design, results.packed_obs
    distances = [_distances(cells, design, group).mean() for group in design.own_groups]  # NaN without a control group
    groups = [
        {"name": group.name, "cells": group.cells, "match_distance": None if pd.isna(mean) else float(mean)}
        for group, mean in zip(design.own_groups, distances, strict=True)
    ]
    return {
        "cells": design.own_cells, "genes": len(results.var_names), "layers": list(results.layers),
        "condition_key": design.condition_key, "control": design.control, "batch_keys": list(design.batch_keys),
        "groups": groups, "matched_inside": asdict(results.matched_inside) if results.matched_inside else None,
        "onto": results.mapped.to_json() if results.mapped else None,
    }  # fmt: skip


def _distances(cells: pd.DataFrame, design: Design, group: Group) -> pd.Series[float]:
    """Return the distances of a group's cells to their control matches."""
    first = design.first_row
    return cells[keys.OBS_MATCH_DISTANCE].iloc[group.start - first : group.stop - first]


def _progress(run: RunDirectory) -> str:
    progress = RunProgress.of(run)
    state = "under way" if progress.silent < SILENT_SECONDS else "not finished; the same `run` command goes on"
    lines = [f"{run.url}: {state}", "", f"{'stage':<12}{'shards done':>12}"]
    lines += [f"{stage:<12}{shards:>12}" for stage, shards in progress.shards.items()]
    lines += ["", progress.damage] if progress.damage else []
    lines += _stage_lines(progress.stage, progress.silent) if progress.stage else []
    return "\n".join(lines) + _costs(run)


def _stages(run: RunDirectory) -> list[str]:
    """Return the stages of a run; those of the trained space if run.json is damaged."""
    try:
        stages = run.read_run()["keys"]
    except DamagedError:
        stages = keys.STAGES
    return [stage for stage in keys.FLOW if stage in stages]


def _spaces(run: RunDirectory) -> str:
    """Return one line per matching space with the place of its results; empty if the run has one space."""
    try:
        spaces = run.spaces() if run.storage.exists(keys.RUN_JSON) else {}
    except DamagedError:
        spaces = {}
    if len(spaces) < 2:
        return ""
    lines = [f"{'space':<24}results"]
    for name, place in spaces.items():
        finished = place.storage.exists(f"{keys.RESULTS}/zarr.json")
        which = "the default" if place == run else place.url.removeprefix(f"{run.url}/")
        lines.append(f"{shown(name):<24}{which}{'' if finished else ', not finished; the same `run` command goes on'}")
    return "\n\n" + "\n".join(lines)


def _costs(run: RunDirectory) -> str:
    """Return time, memory and traffic of the finished stages as a table; empty if there is no log of them."""
    table = stage_costs(run.storage)
    if table.empty:
        return ""
    columns = {"seconds": "s"} | {f"{name}_gb": f"{name} GB" for name in ("peak", "promised", "read", "written")}
    lines = [f"{'finished':<12}" + "".join(f"{name:>13}" for name in columns.values())]
    for row in table.to_dict("records"):
        values = ("-" if pd.isna(row[name]) else f"{row[name]:.1f}" for name in columns)
        engine = f"  on {printable(row['engine'])}" if row["engine"] else ""
        lines.append(f"{row['stage']:<12}" + "".join(f"{value:>13}" for value in values) + engine)
    return "\n\n" + "\n".join(lines)


def _stage_lines(progress: Mapping[str, Any], silent: float) -> list[str]:
    """Return the lines for the current or last stage, from the values of logs/progress.json."""
    done, total, what = progress.get("done", 0), progress.get("total", 0), progress.get("round", "")
    if "steps" in progress:
        done, total, what = progress["step"], progress["steps"], "steps"
    took, speed = progress["seen"] - progress["started"], progress["cells_per_second"]
    lines = [
        "",
        f"{progress['stage']}, on {progress['host']}, {silent:,.0f} s ago, after {took:,.0f} s",
        f"  {done:,} of {total:,} {what} ({done / max(total, 1):.0%}), {speed:,.0f} cells/s",
        f"  memory {progress['memory_bytes'] / 1e9:.1f} GB, at most {progress['peak_bytes'] / 1e9:.1f} GB so far",
    ]
    if progress.get("seconds_left"):
        lines.append(f"  about {duration(progress['seconds_left'])} left in this stage, at its speed so far")
    if "worker_peak_bytes" in progress:
        lines.append(f"  largest worker {progress['worker_peak_bytes'] / 1e9:.1f} GB")
    if "total" in progress.get("measures", {}):
        lines.append(f"  loss {progress['measures']['total']:.4g}")
    return lines


def _summary(results: Results) -> str:
    design, facts = results.design, results.uns
    cells = results.packed_obs
    lines = [
        f"{results.url}: {design.own_cells} cells x {len(results.var_names)} genes",
        f"effects are {printable(str(facts.get('sign')))}; matched in {shown(results.space)} (obsm {results.embedding_key})",
        *([printable(str(results.matched_inside))] if results.matched_inside else []),
        *([f"mapped onto {shown(results.mapped.url)}: {printable(str(results.mapped))}"] if results.mapped else []),
        *([printable(str(facts["values"]))] if "values" in facts else []),
        f"layers: {printable(', '.join(results.layers)) or 'none'}; columns: {printable(', '.join(map(str, cells.columns)))}",
        "",
        (
            f"{shown(design.condition_key)} (control: {shown(design.control)}); "
            f"{', '.join(map(shown, design.batch_keys)) or 'no batch key'}: {len(design.batches)} batches"
        ),
        f"{'group':<32}{'cells':>10}{'match distance':>16}",
    ]
    for group in design.own_groups:
        distance = _distances(cells, design, group)
        mean = f"{distance.mean():.2f}" if distance.notna().any() else "-"
        lines.append(f"{shown(group.name):<32}{group.cells:>10}{mean:>16}")
    return "\n".join([*lines, "", *_settings_lines(facts)])


def _settings_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the settings that affect the results, as YAML for --config."""
    text = yaml.safe_dump({"seed": int(facts["seed"]), **bearing_settings(facts)}, sort_keys=False, width=120)
    return ["settings that affect the results:", *(f"  {indented(line)}" for line in text.splitlines())]


def indented(line: str) -> str:
    """Return a line of YAML for a terminal with its indentation."""
    bare = line.lstrip()
    return " " * (len(line) - len(bare)) + printable(bare)
