"""Describe a run directory: `ndreamer-dist info`."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd
import yaml

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.commands.demo import SILENT_SECONDS
from ndreamer_dist.compute.events import duration
from ndreamer_dist.compute.monitors import stage_costs
from ndreamer_dist.errors import DamagedError, StoreError, printable, shown
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import bearing_settings
from ndreamer_dist.stats.results import Results, open_results
from ndreamer_dist.storage.checksums import unseal


def describe(address: str, *, as_json: bool = False) -> str:
    """Return what a run directory holds: the design and the results where it is finished, else how far it is.

    Parameters
    ----------
    as_json
        Return a JSON object for programs, instead of lines for people.
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
    """Return the results of a run, none where it has not got that far; `StoreError` where there is no run."""
    try:
        return open_results(address)
    except StoreError:
        if not run.storage.exists(keys.RUN_JSON):
            raise
        if not run.storage.exists(f"{keys.RESULTS}/zarr.json"):
            return None
        return open_results(address)  # finished meanwhile; or damaged, and the error says so


def _as_json(run: RunDirectory, results: Results | None) -> str:
    """Return state, stages and, of a finished run, design and layers as a JSON object; sizes in GB (10^9 bytes)."""
    costs = stage_costs(run.storage).to_json(orient="records")  # NaN becomes null
    answer: dict[str, Any] = {"url": run.url, "state": "finished", "costs": json.loads(costs)}
    if results is None:
        done = Counter(name.split("/")[1] for name in run.storage.list(keys.DONE))
        progress = unseal(run.storage.read_if_there(keys.PROGRESS) or b"{}", f"{run.url}/{keys.PROGRESS}")
        silent = time.time() - progress.get("seen", 0.0)
        state = "running" if silent < SILENT_SECONDS else "stopped"
        shards = {stage: done[stage] for stage in _stages(run)}
        answer |= {"state": state, "shards_done": shards, "progress": progress}
    else:
        answer |= _design(results)
    return json.dumps(answer, indent=2)


def _design(results: Results) -> dict[str, Any]:
    """Return what was compared, and what is stored of it."""
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
    """Return the distances of a group's cells to the control."""
    first = design.first_row
    return cells[keys.OBS_MATCH_DISTANCE].iloc[group.start - first : group.stop - first]


def _progress(run: RunDirectory) -> str:
    """Say how far an unfinished run is; two requests, whatever the number of shards."""
    done = Counter(name.split("/")[1] for name in run.storage.list(keys.DONE))
    written = run.storage.read_if_there(keys.PROGRESS)
    told: dict[str, Any] = {}
    damage = []
    try:
        told = unseal(written or b"{}", f"{run.url}/{keys.PROGRESS}")
    except DamagedError as error:
        damage = ["", f"{error.what}; the `run` command writes it anew"]
    silent = time.time() - told.get("seen", 0.0)
    state = "under way" if silent < SILENT_SECONDS else "not finished; the same `run` command goes on"
    lines = [f"{run.url}: {state}", "", f"{'stage':<12}{'shards done':>12}"]
    lines += [f"{stage:<12}{done[stage]:>12}" for stage in _stages(run)]
    return "\n".join([*lines, *damage, *(_stage_lines(told, silent) if told else [])]) + _costs(run)


def _stages(run: RunDirectory) -> list[str]:
    """Return the stages that a run's matching space needs, those of the trained one where run.json cannot be read."""
    try:
        known = run.read_run()["keys"]
    except DamagedError:
        known = keys.STAGES
    return [stage for stage in keys.FLOW if stage in known]


def _spaces(run: RunDirectory) -> str:
    """Return the matching spaces of a run directory and where their results are, a line each; nothing for one alone."""
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
    """Return what the finished stages took, as a table; nothing where there is no log of them."""
    table = stage_costs(run.storage)
    if table.empty:
        return ""
    columns = {"seconds": "s"} | {f"{name}_gb": f"{name} GB" for name in ("peak", "promised", "read", "written")}
    lines = [f"{'finished':<12}" + "".join(f"{name:>13}" for name in columns.values())]
    for row in table.to_dict("records"):
        told = ("-" if pd.isna(row[name]) else f"{row[name]:.1f}" for name in columns)
        engine = f"  on {printable(row['engine'])}" if row["engine"] else ""
        lines.append(f"{row['stage']:<12}" + "".join(f"{value:>13}" for value in told) + engine)
    return "\n\n" + "\n".join(lines)


def _stage_lines(told: Mapping[str, Any], silent: float) -> list[str]:
    """Say what logs/progress.json tells of the stage that a run is at, or ended in."""
    share, what = (told.get("done", 0), told.get("total", 0)), told.get("round", "")
    if "steps" in told:
        share, what = (told["step"], told["steps"]), "steps"
    lines = [
        "",
        f"{told['stage']}, on {told['host']}, {silent:,.0f} s ago, after {told['seen'] - told['started']:,.0f} s",
        f"  {share[0]:,} of {share[1]:,} {what} ({share[0] / max(share[1], 1):.0%}), {told['cells_per_second']:,.0f} cells/s",
        f"  memory {told['memory_bytes'] / 1e9:.1f} GB, at most {told['peak_bytes'] / 1e9:.1f} GB so far",
    ]
    if told.get("seconds_left"):
        lines.append(f"  about {duration(told['seconds_left'])} left in this stage, at its speed so far")
    if "worker_peak_bytes" in told:
        lines.append(f"  largest worker {told['worker_peak_bytes'] / 1e9:.1f} GB")
    if "total" in told.get("measures", {}):
        lines.append(f"  loss {told['measures']['total']:.4g}")
    return lines


def _summary(results: Results) -> str:
    design, told = results.design, results.uns
    cells = results.packed_obs
    lines = [
        f"{results.url}: {design.own_cells} cells x {len(results.var_names)} genes",
        f"effects are {printable(str(told.get('sign')))}; matched in {shown(results.space)} (obsm {results.embedding_key})",
        *([printable(str(results.matched_inside))] if results.matched_inside else []),
        *([f"mapped onto {shown(results.mapped.url)}: {printable(str(results.mapped))}"] if results.mapped else []),
        *([printable(str(told["values"]))] if "values" in told else []),
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
    return "\n".join([*lines, "", *_settings_lines(told)])


def _settings_lines(told: Mapping[str, Any]) -> list[str]:
    """Return the settings that bear on the result, as YAML that --config takes."""
    text = yaml.safe_dump({"seed": int(told["seed"]), **bearing_settings(told)}, sort_keys=False, width=120)
    return ["settings that bear on the result:", *(f"  {indented(line)}" for line in text.splitlines())]


def indented(line: str) -> str:
    """Return a line of YAML for a terminal; its indentation stays."""
    bare = line.lstrip()
    return " " * (len(line) - len(bare)) + printable(bare)
