"""What the package's own code may not do: unpickle, load tensors by pickle, run text as code, write outside a run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted([*(ROOT / "ndreamer_dist").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pickle5"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "torch.package.PackageImporter",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.full_load_all", "pd.read_pickle",
    "pandas.read_pickle", "os.system", "os.popen", "safetensors.torch.load_model",
}  # fmt: skip
BY_NAME = {"torch", "yaml", "pandas"}
"""Modules from which nothing may be imported under one of these names."""
LOADERS = {"load", "load_all", "unsafe_load", "full_load", "read_pickle"}


def dotted(node: ast.expr) -> str:
    """Return a name with its dots, as it is written; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '?'}.{node.attr}"
    return ""


def offences(source: str) -> Iterator[str]:
    """Yield what a module does that it may not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        else:
            names = []
        yield from (name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS)
        if isinstance(node, ast.ImportFrom) and node.module in BY_NAME:
            yield from (alias.name for alias in node.names if alias.name in LOADERS)
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in FORBIDDEN_CALLS:
                yield called
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not allowed:
                    yield f"{called}(allow_pickle)"
                if keyword.arg == "shell" and not allowed:
                    yield f"{called}(shell)"
                if keyword.arg == "weights_only":
                    yield f"{called}(weights_only)"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_runs_nothing_that_a_file_says(module: Path) -> None:
    assert list(offences(module.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(f)", "eval('1')", "exec('1')",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)", "from torch import load", "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(f)", "import cloudpickle", "subprocess.run('ls', shell=True)",
    ],
)  # fmt: skip
def test_the_walk_finds_what_it_looks_for(source: str) -> None:
    assert list(offences(source))
