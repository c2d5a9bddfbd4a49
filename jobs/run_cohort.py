"""Run the whole job on a Ray cluster, as a YAML file describes it; the same submission continues a stopped job.

    ray job submit --address http://127.0.0.1:8265 --working-dir jobs -- python run_cohort.py cohort.yaml

The nodes need the package (`cluster/Dockerfile`). You need `ndreamer-dist[cluster]`, the token of the cluster
(`RAY_AUTH_MODE=token` and `RAY_AUTH_TOKEN_PATH=FILE`), and the YAML file: in the working directory (`jobs/`, as above), on a
disk that the head sees, or at a URL (`s3://bucket/cohort.yaml`). It holds:

    input: s3://bucket/cohort.h5ad     # h5ad file or zarr store, seen by every node
    out: s3://bucket/run               # run directory, seen by every node
    condition_key: disease             # column of obs, and the name of the control in it
    control: normal
    batch_key: [donor_id]              # optional, like everything below
    embedding: ndreamer                # or pca, harmony, state, ndreamer+state, obsm:KEY
    preset: paper
    normalise: auto
    redo: false                        # true: run stages whose settings have changed again
    settings:                          # any setting, by stage, as in `ndreamer-dist settings`
      train: {device: cuda}
      run: {cpus: 32, gpus: 4}         # maximum size of an autoscaled cluster

The driver runs on the head and requests no processor (no `--entrypoint-num-cpus`), so it also runs on a head without any
(`ray start --head --num-cpus 0`). It holds some values per cell, never the matrix. If the job is refused, its log ends with
one line that says why, the exit code is 2 and the job FAILED. After `ray job stop` the same submission continues the run.

`python run_cohort.py --stage train cohort.yaml` runs only one stage (`keys.FLOW`). It skips finished shards. If an earlier
stage is not finished, the job fails with one line that names it.
"""

from __future__ import annotations

import argparse
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ndreamer_dist.cli import Normalise, Preset, run_program
from ndreamer_dist.errors import SettingsError, suggest
from ndreamer_dist.settings import read_yaml
from ndreamer_dist.storage.files import open_storage


class Job(BaseModel):
    """The content of a job file."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    input: str
    out: str
    condition_key: str | tuple[str, ...]
    control: str
    batch_key: tuple[str, ...] = ()
    embedding: str | None = None
    preset: Preset = "paper"
    normalise: Normalise = "auto"
    redo: bool = False
    settings: dict[str, Any] = {}

    @field_validator("batch_key", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value or ()

    @field_validator("input", "out")
    @classmethod
    def _the_same_on_every_node(cls, value: str) -> str:
        if "://" not in value and not value.startswith("/"):
            msg = "must be an absolute path on storage that all nodes share, or a URL"
            raise ValueError(msg)
        return value

    def overrides(self) -> dict[str, Any]:
        """Return the settings by dotted name: `{"train.workers": 4}`."""
        overrides: dict[str, Any] = {"cohort.normalise": self.normalise} if self.normalise != "auto" else {}
        for stage, value in self.settings.items():
            nested = isinstance(value, Mapping)
            overrides |= {f"{stage}.{name}": each for name, each in value.items()} if nested else {stage: value}
        return overrides


def main(arguments: list[str] | None = None) -> None:
    """Run the job of a job file, or one stage of it; exit codes are those of `ndreamer-dist run`."""
    parser = argparse.ArgumentParser(description="Run the job that a YAML file describes, or a stage of it.")
    parser.add_argument("job", metavar="JOB.yaml", help="path or URL of the job file")
    parser.add_argument("--stage", help="run only this stage, e.g. train; those before it must be finished")
    options = parser.parse_args(arguments)
    run_program(lambda: run_job(read_job(options.job), options.stage))


def read_job(address: str) -> Job:
    """Read a job file.

    Raises
    ------
    SettingsError
        The file does not exist, is not YAML, or has an unknown key or a wrong value.
    """
    address = address if "://" in address else str(Path(address).absolute())
    folder, _, name = address.rpartition("/")
    try:
        data = open_storage(folder or "/").read_if_there(name)
    except OSError as error:
        msg = f"job file {address} cannot be read: {error}"
        raise SettingsError(msg) from None
    if data is None:
        msg = f"job file {address} does not exist"
        raise SettingsError(msg)
    values = read_yaml(data, f"job file {address}")
    if not isinstance(values, dict):
        msg = f"job file {address} holds {type(values).__name__}, expected keys and values: input, out, condition_key, ..."
        raise SettingsError(msg)
    return checked_job(values, address)


def checked_job(values: Mapping[str, Any], address: str) -> Job:
    """Validate the values of a job file; a `SettingsError` names the first wrong one."""
    for name in values:
        if name not in Job.model_fields:
            known = ", ".join(Job.model_fields)
            msg = f"job file {address}: there is no key {name!r}; there are {known}.{suggest(str(name), Job.model_fields)}"
            raise SettingsError(msg)
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        value = "" if first["type"] == "missing" else f" (found {reprlib.repr(first['input'])})"
        msg = f"job file {address}: {first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}{value}"
        raise SettingsError(msg) from None


def run_job(job: Job, stage: str | None = None) -> None:
    """Run a job, or one stage of it, and print the address of the run directory."""
    import ndreamer_dist as nd

    finished = nd.run(
        job.input,
        out=job.out,
        condition_key=job.condition_key,
        control=job.control,
        batch_key=job.batch_key,
        embedding=job.embedding,
        preset=job.preset,
        settings=job.overrides(),
        redo=job.redo,
        stage=stage,
    )
    print(f"done: {stage or 'the whole job'}: {finished.url}")


if __name__ == "__main__":
    main()
