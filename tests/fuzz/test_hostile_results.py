"""Results come from anywhere: whatever their files claim, a command answers or refuses in one line, and nothing leaks.

No trace, no hang, no enormous allocation, no file outside read as part of them, and none written but the answer.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import zarr

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.storage.arrays import open_array, write_array
from ndreamer_dist.storage.files import open_storage
from tests.fuzz.helpers import command, files_of
from tests.tiny import NAMES, SETTINGS, tiny_cohort, write_into

pytestmark = pytest.mark.timeout(120)
ROOT = "results.zarr/zarr.json"
DESIGN, ITE, PCA, INDPTR = "uns/ndreamer/design", "layers/ite", "obsm/X_ndreamer_pca", "X/indptr"
MEMORY = 500_000
"""Kilobytes that no refusal may take."""
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    small = SETTINGS | {"hvg.num_hvg": 40, "train.epochs": 1, "cohort.min_group_cells": 5}
    cohort = tiny_cohort(folder, cells=240, genes=60)
    nd.run(cohort, out=folder / "run", **NAMES, preset="small", settings=small)
    return folder / "run"


def text(name: str, content: str | bytes) -> Damage:
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edited(name: str, change: Callable[[Any], object]) -> Damage:
    """Return a change of a JSON file's value."""

    def damage(run: Path) -> None:
        value = json.loads((run / name).read_text())
        change(value)
        (run / name).write_text(json.dumps(value))

    return damage


def nodes(root: dict[str, Any]) -> dict[str, Any]:
    return root["consolidated_metadata"]["metadata"]


def node(name: str, **claims: Any) -> Damage:
    """Return a change of what the store claims of an array."""
    return edited(ROOT, lambda root: nodes(root)[name].update(claims))


def values(store: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """Return a change of an array's values, with checksums that are right."""

    def damage(run: Path) -> None:
        storage = open_storage(run / store)
        array = open_array(storage, name)
        # Matches are sealed by their attributes, and read by their chunks.
        kept: dict[str, Any] = {"attributes": dict(array.attrs)} if store == keys.RESULTS else {"chunks": array.chunks}
        write_array(storage, name, change(np.asarray(array[...])), **kept)
        consolidate(run / store)

    return damage


def consolidate(store: Path) -> None:
    if store.name == keys.RESULTS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(str(store))


def told(name: str, change: Callable[[Any], object]) -> Damage:
    """Return a change of a JSON text in `uns`."""

    def damage(run: Path) -> None:
        root = zarr.open_group(str(run / keys.RESULTS), mode="r+", use_consolidated=False)
        value = json.loads(str(ad.io.read_elem(root[name])))
        changed = change(value)
        write_into(root, name, changed if isinstance(changed, str) else json.dumps(value))
        consolidate(run / keys.RESULTS)

    return damage


def fact(name: str, value: object) -> Damage:
    """Return a change of an entry of `uns["ndreamer"]` to a value of another kind."""

    def damage(run: Path) -> None:
        root = zarr.open_group(str(run / keys.RESULTS), mode="r+", use_consolidated=False)
        write_into(root, f"uns/ndreamer/{name}", value)
        consolidate(run / keys.RESULTS)

    return damage


def silent(root: dict[str, Any]) -> None:
    """Leave out what the run says of itself."""
    for name in [name for name in nodes(root) if name.startswith("uns/ndreamer")]:
        del nodes(root)[name]


def every_edge(change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    def damage(run: Path) -> None:
        for path in sorted((run / keys.MATCHES).rglob(f"{keys.MATCH_ROW}/zarr.json")):
            values(keys.MATCHES, str(path.parent.relative_to(run / keys.MATCHES)), change)(run)
        shutil.rmtree(run / keys.RESULTS / "obsm" / keys.OBSM_MATCH)
        consolidate(run / keys.RESULTS)

    return damage


def linked(name: str, target: str) -> Damage:
    def damage(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)

    return damage


def grid(*shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


def escaping(root: dict[str, Any]) -> None:
    """Name a column that lies outside the store."""
    nodes(root)["obs/../../../secret"] = nodes(root)["obs/ndreamer_input_row"]
    nodes(root)["obs"]["attributes"]["column-order"].append("../../../secret")


TEXTS = {"empty": "", "cut": '{"a": ', "list": "[]", "null": "null", "deep": "[" * 100_000, "binary": bytes(range(256))}
CASES: dict[str, tuple[Damage, str, str]] = {
    **{f"root_{name}": (text(ROOT, content), "info", "zarr.json") for name, content in TEXTS.items()},
    **{f"design_{name}": (told(DESIGN, lambda _, t=content: t), "info", "design is damaged|the entry 'design' of")
       for name, content in TEXTS.items() if isinstance(content, str) and content},
    "nodes_are_a_list": (edited(ROOT, lambda r: r["consolidated_metadata"].update(metadata=[1])), "get", "is damaged"),
    "nodes_are_numbers": (edited(ROOT, lambda r: nodes(r).update(obs=3)), "get", "an object is expected, found int"),
    "attributes_are_text": (edited(ROOT, lambda r: r.update(attributes="x")), "cate", "an object is expected, found str"),
    "a_layer_of_negative_size": (node(ITE, shape=[-1, 40]), "get", "cannot be opened"),
    "a_layer_that_claims_to_be_huge": (node(ITE, shape=[2**60, 2**60]), "get", "claims"),
    "a_layer_of_no_chunks": (node(ITE, chunk_grid=grid(0, 0)), "get", "cannot be opened|is missing|is damaged"),
    "a_layer_that_is_too_small": (values(keys.RESULTS, ITE, lambda v: v[:7]), "get", "too small for the cells"),
    "a_layer_of_one_dimension": (values(keys.RESULTS, ITE, np.ravel), "get", "too small for the cells"),
    "a_layer_that_unpickles": (node(ITE, codecs=[{"name": "numcodecs.pickle", "configuration": {}}]), "get", "pickle"),
    "a_codec_of_objects": (node(ITE, data_type="object"), "get", "cannot be opened"),
    "pointers_that_claim_to_be_large": (node(INDPTR, shape=[2**36]), "expression", "damaged"),
    "pointers_that_go_back": (values(keys.RESULTS, INDPTR, lambda v: v[::-1].copy()), "expression", "does not fit"),
    "pointers_beyond_the_values": (values(keys.RESULTS, INDPTR, lambda v: v * 10**9), "expression", "too small"),
    "genes_that_are_not_there": (values(keys.RESULTS, "X/indices", lambda v: v + 10**6), "expression", "names genes"),
    "genes_below_zero": (values(keys.RESULTS, "X/indices", lambda v: v - 10**6), "effect", "names genes"),
    "matches_that_are_not_there": (values(keys.RESULTS, "obsm/ndreamer_match", lambda v: v + 10**6), "effect", "no such"),
    "matches_below_zero": (values(keys.RESULTS, "obsm/ndreamer_match", lambda v: v - 10**6), "effect", "does not belong to"),
    "edges_that_are_not_there": (every_edge(lambda v: v + 10**6), "effect", "no such cells"),
    "a_table_of_endless_chunks": (
        node("obs/ndreamer_input_row", shape=[2**45], chunk_grid=grid(1)), "info", "claims"
    ),
    "a_column_outside": (edited(ROOT, escaping), "info", ""),
    "a_table_that_is_none": (edited(ROOT, lambda r: nodes(r)["obs"]["attributes"].update({"encoding-type": "dict"})),
                             "info", "obs"),
    "groups_that_overlap": (told(DESIGN, lambda d: d["groups"][1].update(start=0)), "info", "do not fit together"),
    "groups_beyond_the_cells": (told(DESIGN, lambda d: d["groups"][-1].update(stop=2**50)), "effect", "damaged"),
    "a_group_of_no_condition": (told(DESIGN, lambda d: d["groups"][0].update(condition=99)), "effect", "do not fit"),
    "a_group_with_more": (told(DESIGN, lambda d: d["groups"][0].update(evil=1)), "cate", "design is damaged"),
    "settings_that_are_none": (told("uns/ndreamer/settings", lambda _: "[1]"), "effect", "the entry 'settings' of"),
    "neighbours_below_zero": (
        told("uns/ndreamer/settings", lambda s: s["match"].update(neighbours=-3)), "effect", "settings of the matches",
    ),
    "settings_of_numbers": (told("uns/ndreamer/settings", lambda s: s.update(cohort=3)), "report", "the entry 'settings' of"),
    "settings_of_lists": (told("uns/ndreamer/settings", lambda s: s.update(effects=[1])), "all-genes", "the entry 'settings' of"),
    "a_layer_of_the_cohort_that_is_a_number": (
        told("uns/ndreamer/settings", lambda s: s["cohort"].update(layer=3)), "all-genes", "has no layer '3'",
    ),
    "a_condition_of_no_column": (
        told("uns/ndreamer/settings", lambda s: s["cohort"].update(condition_key="x")), "all-genes", "obs has no 'x'",
    ),
    "a_seed_of_letters": (fact("seed", "x"), "null", "the entry 'seed' of"),
    "a_normalisation_of_two": (fact("normalise", np.array(["a", "b"])), "all-genes", "the entry 'normalise' of"),
    "versions_that_are_none": (fact("versions", "1"), "report", "the entry 'versions' of"),
    "cells_dropped_by_lists": (told("uns/ndreamer/dropped", lambda d: d.update(x=[1])), "report", "the entry 'dropped' of"),
    "results_of_nobody": (edited(ROOT, silent), "cate", "it is not a results.zarr"),
    "an_export_of_no_design": (told(DESIGN, lambda _: "null"), "export", "the entry 'design' of"),
    "all_genes_of_no_design": (told(DESIGN, lambda _: "null"), "all-genes", "the entry 'design' of"),
    "more_matches_of_another_run": (text(keys.RUN_JSON, "{}"), "match", "run.json is damaged"),
    "a_root_that_is_another_file": (linked(ROOT, "/etc/passwd"), "get", "is damaged"),
    "results_that_are_themselves": (linked(keys.RESULTS, keys.RESULTS), "info", ""),
}  # fmt: skip


def words_of(what: str, run: Path, out: Path) -> list[str]:
    """Return the words of a command that reads results."""
    get = ["get", str(run), "--out", str(out / "part.csv"), "--layer"]
    serial = ["--set", "run.serial=true", "--set", "run.progress=false"]
    return {
        "info": ["info", str(run)],
        "get": [*get, "ite"],
        "expression": [*get, "expression"],
        "effect": [*get, "effect", "--condition", "treated", "--cells", "condition == 'treated'"],
        "cate": ["cate", str(run), "--by", "cell_type", "--out", str(out / "table.csv")],
        "null": ["null", str(run), "--labellings", "2", "--out", str(out / "null.csv")],
        "report": ["report", str(run), "--by", "cell_type", "--out", str(out / "report.html")],
        "export": ["export", str(run), "--out", str(out / "published")],
        "match": ["match", str(run), "--edges", "all", *serial],
        "all-genes": ["all-genes", str(run), str(run.parent / "cohort.zarr"), "--out", str(out / "wide"), *serial],
    }[what]


@pytest.mark.parametrize("case", CASES)
def test_hostile_results_are_refused_in_one_line(case: str, finished: Path, tmp_path: Path) -> None:
    damage, what, message = CASES[case]
    run, out = tmp_path / "run", tmp_path / "out"
    copy = functools.partial(shutil.copytree, finished)
    copy(run, copy_function=shutil.copy)
    (tmp_path / "cohort.zarr").symlink_to(finished.parent / "cohort.zarr")
    out.mkdir()
    damage(run)
    before, memory = files_of(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = command(words_of(what, run, out))
    if ended.code or message:
        assert not message or any(part in ended.refusal for part in message.split("|")), ended.refusal
        assert not files_of(out)
    assert {name: seen for name, seen in files_of(tmp_path).items() if not name.startswith("out")} == {
        name: seen for name, seen in before.items() if not name.startswith("out")
    }
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "null", "{}", '{"stage": "pack", "seconds": "x"}', "[" * 100_000])
def test_a_log_that_cannot_be_read_hides_no_results(line: str, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    with (run / keys.STAGES_LOG).open("a") as file:
        file.write(line + "\n")
    told = command(["info", str(run)])
    assert told.code == 0, told.err
    assert "240 cells x 40 genes" in told.out


def test_names_that_steer_a_terminal_are_shown_escaped(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    hostile = "\x1b]0;title\x07\x1b[2J"
    told(DESIGN, lambda d: d.update(condition_key=hostile, batch_keys=[hostile], conditions=[hostile, "b\u202e"]))(run)
    out = command(["info", str(run)]).out
    assert all(line.isprintable() for line in out.splitlines())
    assert os.linesep.join(out.splitlines()) == out.rstrip()
