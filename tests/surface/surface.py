"""What users and their scripts rely on, as texts: names, signatures, help, settings, the files and keys of a run.

`python -m tests.surface.surface` writes the texts anew, for a change that is meant; its diff then shows what users meet.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from typer.main import get_command

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cli import app
from ndreamer_dist.settings import Settings
from tests.tiny import NAMES, SETTINGS, tiny_cohort

HERE = Path(__file__).parent


def commands() -> str:
    """Return every command with its options, their kinds and defaults, and its help."""
    lines = []
    for name, command in sorted(get_command(app).commands.items()):  # type: ignore[attr-defined]
        lines.append(f"{name}: {(command.help or '').strip()}")
        for option in command.params:
            if option.name == "help":
                continue
            words = "|".join([*option.opts, *option.secondary_opts])
            meaning = (getattr(option, "help", None) or "").strip()
            lines.append(f"    {words} (default {_plain(option.default)}): {meaning}")
    return "\n".join(lines) + "\n"


def names() -> str:
    """Return every public name, and the signatures of functions and of public methods."""
    lines = []
    for name in sorted(nd.__all__):
        thing = getattr(nd, name)
        if inspect.isclass(thing):
            lines.append(f"class {name}")
            for method, value in sorted(inspect.getmembers(thing)):
                if not method.startswith("_") and method not in dir(Exception):
                    lines.append(f"    {method}{_signature(value)}")
        else:
            lines.append(f"{name}{_signature(thing)}")
    return "\n".join(lines) + "\n"


def figures() -> str:
    """Return the figures of `nd.pl` with their signatures."""
    return "".join(f"{name}{_signature(getattr(nd.pl, name))}\n" for name in sorted(nd.pl.__all__))


def settings() -> str:
    """Return all settings with their defaults and meanings."""
    return Settings().to_yaml()


def run_files(run: Path) -> str:
    """Return the files of a finished run, numbers of chunks and shards as N."""
    found = {re.sub(r"\d+", "N", str(path.relative_to(run))) for path in run.rglob("*") if path.is_file()}
    return "\n".join(sorted(found)) + "\n"


def results_tree(run: Path) -> str:
    """Return every group and array of results.zarr: kinds of values, dimensions, and the names of attributes."""
    root = run / keys.RESULTS
    lines = []
    for metadata in sorted(root.rglob("zarr.json")):
        node = json.loads(metadata.read_text())
        name = str(metadata.parent.relative_to(root))
        attributes = {key: value for key, value in node.get("attributes", {}).items() if key.startswith("encoding")}
        what = f"{node['data_type']} {len(node['shape'])}d" if node["node_type"] == "array" else "group"
        lines.append(f"{name}: {what} {json.dumps(attributes, sort_keys=True)}")
    return "\n".join(lines) + "\n"


def texts(run: Path) -> dict[str, str]:
    """Return all texts by the name of their file; `run` is a finished run of the tiny cohort."""
    return {
        "commands.txt": commands(), "names.txt": names(), "figures.txt": figures(), "settings.yaml": settings(),
        "run_files.txt": run_files(run), "results_tree.txt": results_tree(run),
    }  # fmt: skip


def _plain(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _signature(thing: Any) -> str:
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))
    except (TypeError, ValueError):
        return ""


def main() -> None:
    """Write the texts of a fresh run beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        run = nd.run(tiny_cohort(Path(folder)), out=Path(folder) / "run", preset="small", settings=SETTINGS, **NAMES)
        for name, text in texts(Path(run.url)).items():
            (HERE / name).write_text(text)


if __name__ == "__main__":
    sys.exit(main())
