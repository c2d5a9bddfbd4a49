"""Settings: one frozen, validated class per stage, read from and written to YAML.

Every default is that of METHOD (section numbers are in the class docstrings). Each field is marked `result` or `how`. A
`result` field affects the numbers: a change invalidates its stage and later ones. A `how` field (workers, threads,
device) does not: after a change the run continues. A preset is a set of overrides; explicit values override the preset.
"""

from __future__ import annotations

import json
import reprlib
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ndreamer_dist import keys
from ndreamer_dist.errors import SettingsError, quoted, suggest

RUN_ROWS = 32
"""Rows of one contiguous run in the sampling plan."""
NOISE_ROWS = 64
"""Cells of one block of a mini-batch: it has one noise generator and one owner."""
LARGEST_NUMBER = 2**31 - 1
"""No whole number among the settings may be larger."""
Width = Annotated[int, Field(ge=1)]
"""Units of a layer of the network."""


def result(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a setting that bears on the result."""
    return Field(default, description=description, json_schema_extra={"role": "result"}, **bounds)


def how(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a setting that only says how the work is done."""
    return Field(default, description=description, json_schema_extra={"role": "how"}, **bounds)


class StageSettings(BaseModel):
    """Base of the per-stage classes: immutable, unknown names refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _not_too_large(cls, value: Any) -> Any:
        if any(
            isinstance(number, int) and number > LARGEST_NUMBER
            for number in (value if type(value) is tuple else (value,))
        ):
            msg = f"must be at most {LARGEST_NUMBER}"
            raise ValueError(msg)
        return value

    def bearing(self) -> dict[str, Any]:
        """Return the fields that bear on the result, as plain JSON values."""
        dumped = self.model_dump(mode="json")
        return {
            name: dumped[name]
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["role"] == "result"
        }

    def described(self) -> list[str]:
        """Return a line of YAML for every field, with what it means."""
        dumped, bearing = self.model_dump(mode="json"), self.bearing()
        return [
            _yaml_line(name, dumped[name], f"{'* ' if name in bearing else ''}{field.description}")
            for name, field in type(self).model_fields.items()
        ]


def _yaml_line(name: str, value: object, comment: str) -> str:
    """Return `name: value  # comment`; a value that takes several lines has no comment."""
    text = yaml.safe_dump({name: value}, default_flow_style=True, width=LARGEST_NUMBER).strip()[1:-1]
    return text if "\n" in text else f"{text}  # {comment}"


class CohortSettings(StageSettings):
    """What the cohort is and which cells are kept (METHOD section 1.1)."""

    condition_key: str | tuple[str, ...] | None = result(
        None, "column of obs that holds the condition; of several, a cell's condition is their values joined by ':'"
    )
    control: str | None = result(None, "name of the control condition; of several columns: 'none:wt'")
    batch_key: tuple[str, ...] = result((), "columns of obs that hold the batch covariates; none for one batch")
    layer: str | None = result(None, "layer to read instead of X; raw: the counts in .raw, with its own genes")
    gene_names: str | None = result(None, "column of var to name genes by: feature_name, say, for their symbols")
    normalise: Literal["auto", "counts", "none"] = result("auto", "counts: to 10 000 per cell, log1p; none: as is")
    log_base: float | None = result(None, "base of the logarithm of log-normalised values; by default looked for", gt=1)
    exclude_conditions: tuple[str, ...] = result((), "conditions whose cells are left out")
    min_genes: int = result(0, "fewest genes a kept cell expresses", ge=0)
    min_cells: int = result(0, "fewest cells a kept gene is expressed in", ge=0)
    min_group_cells: int = result(100, "fewest cells of a (batch, condition) group; in a screen, of a condition", ge=1)
    small_groups: Literal["auto", "drop", "merge", "keep", "error"] = result(
        "auto",
        "what to do with smaller groups; merge: ask the number of a condition, and merge its batches that have few; auto: "
        "merge in a screen (20 conditions and more), else drop",
    )
    rare_conditions: Literal["error", "drop"] = result("error", "what to do with conditions that this would empty")
    chunk_rows: int = how(4096, "rows read at a time", ge=1)

    @field_validator("control", "layer", "gene_names", mode="before")
    @classmethod
    def _name(cls, value: object) -> object:
        return _as_name(value)

    @field_validator("condition_key", mode="before")
    @classmethod
    def _name_or_names(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)):
            return _as_name(value)
        names = tuple(_as_name(name) for name in value)
        return names[0] if len(names) == 1 else names or None

    @property
    def factors(self) -> tuple[str, ...]:
        """Columns whose combinations are the conditions, where there are several; else empty."""
        return self.condition_key if isinstance(self.condition_key, tuple) else ()

    @property
    def condition_column(self) -> str | None:
        """Name of the column of conditions; of several columns that of their combinations, `drug:genotype`."""
        return ":".join(self.factors) if self.factors else self.condition_key  # type: ignore[return-value]

    @field_validator("batch_key", "exclude_conditions", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if value is None:
            return ()
        if isinstance(value, (list, tuple)):
            return tuple(_as_name(name) for name in value)
        return (_as_name(value),)


def _as_name(value: object) -> object:
    """Return a name as text; a number is one too, yes and no are refused with what to do."""
    if isinstance(value, bool):
        msg = "expected a name, and YAML reads true and false (some readers also yes, no, on and off) as something else: quote it"
        raise ValueError(msg)  # noqa: TRY004 - pydantic takes this one
    return str(value) if isinstance(value, (int, float)) else value


class HvgSettings(StageSettings):
    """Which genes are modelled (METHOD section 1.2)."""

    num_hvg: int = result(2000, "most variable genes kept", ge=1)
    by: Literal["group", "batch", "none"] = result("group", "inside what variability is looked at; none: all cells")
    keep: tuple[str, ...] = result((), "genes that are modelled whatever their variability, among the num_hvg")

    @field_validator("keep", mode="before")
    @classmethod
    def _each_once(cls, value: object) -> object:
        value = None if value == "none" else value
        names = value.split(",") if isinstance(value, str) else value or ()
        if not isinstance(names, (list, tuple)):
            return names
        return tuple(sorted({str(name).strip() for name in names} - {""}))

    @model_validator(mode="after")
    def _room_for_kept(self) -> Self:
        if len(self.keep) > self.num_hvg:
            msg = f"keep names {len(self.keep)} genes, more than num_hvg ({self.num_hvg})"
            raise ValueError(msg)
        return self


class PackSettings(StageSettings):
    """The layout of packed.zarr."""

    block_rows: int = result(4096, "rows of a block, which is the unit of work of most stages", ge=64)


class ClustersSettings(StageSettings):
    """The two Leiden clusterings (METHOD section 1.3)."""

    low_resolution: float = result(0.5, "resolution of the low clustering", gt=0)
    high_resolution: float = result(7.0, "resolution of the high clustering", gt=0)
    n_pcs: int = result(50, "principal components", ge=1)
    n_neighbors: int = result(15, "neighbours of the graph, the cell itself counted", ge=2)
    flavor: Literal["leidenalg", "igraph"] = result("leidenalg", "whose Leiden; igraph's is several times faster")
    iterations: int = result(-1, "Leiden iterations; -1: until nothing moves", ge=-1)
    within: Literal["auto", "group", "all", "sketch"] = result(
        "auto", "cluster inside each group, all cells together, or all by way of a sketch of them"
    )
    group_mean_cells: int = result(2000, "auto: mean group size from which groups are clustered apart", ge=1)
    max_cells: int = result(200_000, "auto: most cells in one graph; beyond it a sketch is clustered", ge=1)
    sketch_cells: int = result(100_000, "cells of the sketch, the same share of every group", ge=1)


class ModelSettings(StageSettings):
    """Widths of the network (METHOD section 2)."""

    encoder: tuple[Width, ...] = result((1024, 512, 512), "widths of the encoder; the last is h", min_length=1)
    codebooks: int = result(32, "codebooks", ge=1)
    codes: int = result(1024, "codes per codebook", ge=2)
    code_dim: int = result(8, "dimension of a code", ge=1)
    latent: int = result(256, "dimension z of the effect modifier", ge=2)
    decoder: tuple[Width, ...] = result(
        (512, 1024), "widths of the decoder; the first is the embeddings'", min_length=1
    )
    temperature: float = result(0.01, "Gumbel-softmax temperature", gt=0)
    latent_noise: float = result(1.0, "standard deviation of the extra noise eta on the latent sample", ge=0)


class LossSettings(StageSettings):
    """Weights and shapes of the losses (METHOD section 3)."""

    reconstruction: float = result(1.0, "weight of the mean squared error", ge=0)
    cosine: float = result(20.0, "weight of 1 - cosine similarity", ge=0)
    kl: float = result(0.005, "weight of the KL and correlation term", ge=0)
    independence: float = result(
        1000.0,
        "weight of the information about the condition, and about the batch, where they have none of their own",
        ge=0,
    )
    independence_condition: float | None = result(
        None, "weight of the information about the condition; null: loss.independence", ge=0
    )
    independence_batch: float | None = result(
        None, "weight of the information about each batch covariate; null: loss.independence", ge=0
    )
    independence_batch_within: float = result(
        0.0, "weight of the information about each batch covariate among the cells of one condition", ge=0
    )
    dependence: float = result(
        50.0, "weight of the information about the clusters, over the number of conditions", ge=0
    )
    triplet: float = result(5.0, "weight of the triplet term", ge=0)
    margin: float = result(5.0, "triplet margin", ge=0)
    triplet_pairs: int = result(15, "positives, and negatives, per anchor at most", ge=1)
    neighbourhood: float = result(1.0, "weight of the neighbourhood term", ge=0)
    neighbours: int = result(20, "neighbours k of the neighbourhood term", ge=1)
    sigma: float = result(1.0, "scale of the expression distances", gt=0)
    across: float = result(20.0, "extra weight of pairs that cross clusters", ge=0)
    cross_cluster: Literal["published", "clusters"] = result("published", "what counts as crossing (section 8)")
    commitment: float = result(1.0, "weight of the commitment and codebook term", ge=0)
    ceiling: float = result(1e5, "weighted terms and their sum are clamped to this from above", gt=0)

    @property
    def condition_weight(self) -> float:
        """Weight of the information about the condition."""
        return self.independence if self.independence_condition is None else self.independence_condition

    @property
    def batch_weight(self) -> float:
        """Weight of the information about each batch covariate."""
        return self.independence if self.independence_batch is None else self.independence_batch


class TrainSettings(StageSettings):
    """Sampling and schedule (METHOD section 4)."""

    batch_size: int = result(1024, "cells drawn per group and epoch; a mini-batch holds twice as many", ge=NOISE_ROWS)
    epochs: int = result(10, "epochs asked for; more are run where the cohort is large", ge=1)
    passes: int = result(15, "times an average cell is seen", ge=1)
    learning_rate: float = result(1e-3, "of AdamW", gt=0)
    weight_decay: float = result(0.01, "of AdamW, on all parameters", ge=0)
    reset_every: int = result(30, "steps between resets of unused codes; 0: never", ge=0)
    reset_below: float = result(1.0, "codes used less than this multiple of 1/codes are re-initialised", ge=0)
    precision: Literal["float32", "bf16"] = result("float32", "of the products after the codebooks; bf16 is for GPUs")
    workers: int = how(1, "training workers: they share the cells, or on GPUs the codebooks", ge=1)
    threads: int = how(2, "threads of one training worker", ge=1)
    device: Literal["auto", "cpu", "cuda"] = how("auto", "where to train; auto: on GPUs where they work")
    graphs: bool = how(True, "one worker on a GPU takes its steps as CUDA graphs, recorded once")
    resident: bool = how(
        True, "a GPU keeps the packed matrix where half of its free memory holds it; else it is streamed"
    )
    checkpoint_steps: int | None = how(None, "steps between checkpoints, if sooner; null: by time alone", ge=1)
    checkpoint_minutes: float | None = how(5.0, "minutes between checkpoints; null: by steps alone", gt=0)
    max_failures: int = how(3, "worker failures survived before giving up", ge=0)

    @model_validator(mode="after")
    def _some_checkpoints(self) -> Self:
        if self.checkpoint_steps is None and self.checkpoint_minutes is None:
            msg = "checkpoint_steps and checkpoint_minutes are both null; give one of them"
            raise ValueError(msg)
        return self

    @field_validator("batch_size")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % NOISE_ROWS:
            msg = f"must be a multiple of {NOISE_ROWS}"
            raise ValueError(msg)
        return value


CodeChoice = Literal["probable", "expected", "sampled"]
"""Of a cell's codes at inference. The published implementation samples (METHOD section 8)."""


class EmbedSettings(StageSettings):
    """The matching space: the trained embedding and its PCA (METHOD section 5), or another (section 9)."""

    method: str = result(
        keys.NDREAMER, "space that cells are matched in: ndreamer, pca, harmony, state, ndreamer+state, or obsm:KEY"
    )
    codes: CodeChoice = result(
        "probable", "what stands for a cell: its most probable codes, their expectation, or codes drawn as in training"
    )
    tile_rows: int = result(1024, "cells encoded at once", ge=1)
    device: Literal["auto", "cpu", "cuda"] = how("auto", "where to encode cells; auto: on GPUs where they work")
    dimensions: int = result(50, "principal components, of the embedding or of the genes", ge=1)
    harmony_keys: tuple[str, ...] = result((), "harmony: columns of obs to correct for; by default the group")
    signal_share: float = result(
        0.1,
        "harmony: least share of a component's variance that is signal and no noise of counts; 0: all components are taken",
        ge=0,
        lt=1,
    )
    state_weight: float | None = result(
        None,
        "ndreamer+state: what state coordinates are multiplied by; by default both spread alike inside groups",
        gt=0,
    )

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        named = value.startswith(keys.OBSM_PREFIX) and value != keys.OBSM_PREFIX
        if not named and (value not in keys.SPACES or value == keys.OBSM_PREFIX):
            names = [*keys.SPACES][:-1]
            msg = f"there is no such space; there are {', '.join(names)} and obsm:KEY.{suggest(value, names)}"
            raise ValueError(msg)
        return value

    @field_validator("harmony_keys", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value or ()


class StateSettings(StageSettings):
    """The state space: what varies inside a donor (METHOD section 10)."""

    by: str | None = result(
        None,
        "column of obs whose populations have a state space each; ndreamer_cluster_low: the low clusters; null: one",
    )
    k: int | None = result(None, "dimensions of a population; by default those that a permutation confirms", ge=1)
    shrink: Literal["fitted", "own", "none"] = result(
        "fitted",
        "regress noisy coordinates to where the cell's own group stands, found by a fit over genes (fitted) or as the "
        "group's mean (own); none: plain projections",
    )

    @field_validator("shrink", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        return {True: "fitted", False: "none"}.get(value, value) if isinstance(value, bool) else value


class MatchSettings(StageSettings):
    """Counterfactual matching (METHOD section 6)."""

    neighbours: int = result(1, "nearest neighbours k per target group, for effects and tests", ge=1)
    hubs: Literal["csls", "none"] = result("none", "csls: distances corrected for hubs (section 9); none: as published")
    groups: int | None = result(
        None,
        "groups of a condition, besides its own, that a group's cells are matched in: a sample of so many; null: all of them",
        ge=1,
    )
    within: str | None = result(
        None,
        "column of obs with labels (cell types) that cells are matched inside; ndreamer_cluster_low: the low clusters; null: "
        "among all cells of the group",
    )
    within_cells: int = result(
        10, "fewest cells of a label in a target group for a match inside it; with fewer, among all its cells", ge=1
    )
    bandwidth: float = result(1.0, "kernel bandwidth where k > 1", gt=0)
    edges: Literal["needed", "all"] = result("needed", "own and control condition, or every pair of groups")
    query_rows: int = result(65_536, "query cells of one unit of work", ge=1)
    device: Literal["auto", "cpu", "cuda"] = how("auto", "where to match; auto: on GPUs where they work")

    @field_validator("groups", mode="before")
    @classmethod
    def _all(cls, value: object) -> object:
        return None if value in ("all", "none", "null", "") else value

    @field_validator("within", mode="before")
    @classmethod
    def _name(cls, value: object) -> object:
        return None if value in ("none", "null", "") else _as_name(value)


DENOISING_CELLS, MOST_DENOISING = 120, 15
"""Cells that `denoised` averages in a condition's groups, about, and in one group at most."""


class DenoiseSettings(StageSettings):
    """Which matches the denoised expression is an average of (METHOD section 9)."""

    neighbours: int | None = result(
        None,
        "nearest neighbours k per group of the own condition, for denoised; null: as many as make 120 cells of a condition's "
        "groups, 15 at most",
        ge=1,
    )

    def counted(self, groups: int) -> int:
        """Return k where a condition has so many groups: beyond 120 cells the error of `denoised` hardly falls."""
        return self.neighbours or min(MOST_DENOISING, -(-DENOISING_CELLS // max(groups, 1)))


class EffectsSettings(StageSettings):
    """What is stored per cell and gene (METHOD section 6)."""

    store: tuple[Literal["denoised", "batch_effect", "ite"], ...] = result(
        ("denoised", "batch_effect", "ite"), "layers written to results.zarr"
    )
    chunk_genes: int = result(32, "genes of a chunk of a layer", ge=1)
    keep_bits: int | None = result(None, "bits of the values' mantissa that are kept; by default all", ge=1, le=23)
    near_quantile: float = result(
        0.99, "a control match is near within this quantile of the distances inside groups", gt=0, le=1
    )

    @field_validator("store", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if value == "none":
            return ()
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("store")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))


class RunSettings(StageSettings):
    """How the job is run; nothing here bears on the result."""

    address: str | None = how(None, "Ray address; by default the cluster of the environment, else a local Ray")
    cpus: int | None = how(
        None, "processors given to a local Ray, or that a cluster may grow to; by default all there are", ge=1
    )
    gpus: int | None = how(None, "GPUs that a cluster may grow to; by default those there are", ge=1)
    object_store_gb: float | None = how(
        None, "size of a local Ray's object store; by default chosen from the memory", gt=0
    )
    task_threads: int = how(1, "threads of one task outside training", ge=1)
    progress: bool | None = how(None, "progress bars; by default on a terminal and in notebooks")
    log_format: Literal["text", "json"] = how("text", "lines of the log: text, or JSON objects")
    serial: bool | None = how(
        None,
        "run everything in this process, without Ray; by default (auto) chosen by the number of cells and processors",
    )
    memory_gb: float | None = how(None, "memory the job may use; by default the container's", gt=0)

    @field_validator("serial", mode="before")
    @classmethod
    def _auto_serial(cls, value: object) -> object:
        return None if value == "auto" else value

    @property
    def bars(self) -> bool | None:
        """Whether bars are shown; by default in notebooks and on a terminal. They would spoil a log of JSON lines."""
        if self.progress is not None:
            return self.progress
        if self.log_format == "json":
            return False
        return True if "ipykernel" in sys.modules else None


class Settings(BaseModel):
    """All settings of a run.

    `Settings.build(preset="small", overrides={"match.neighbours": 5})` is the usual way to make one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    seed: int = Field(0, description="seed of everything random", ge=0, le=LARGEST_NUMBER)
    cohort: CohortSettings = CohortSettings()
    hvg: HvgSettings = HvgSettings()
    pack: PackSettings = PackSettings()
    clusters: ClustersSettings = ClustersSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    embed: EmbedSettings = EmbedSettings()
    state: StateSettings = StateSettings()
    match: MatchSettings = MatchSettings()
    denoise: DenoiseSettings = DenoiseSettings()
    effects: EffectsSettings = EffectsSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _tiles_fit_blocks(self) -> Self:
        if self.embed.tile_rows > self.pack.block_rows:
            msg = f"embed.tile_rows ({self.embed.tile_rows}) exceeds pack.block_rows ({self.pack.block_rows})"
            raise ValueError(msg)
        return self

    @classmethod
    def build(
        cls,
        *,
        preset: str = "paper",
        config: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Settings:
        """Return the settings of a preset, changed by a configuration and then by dotted overrides.

        Parameters
        ----------
        preset
            `paper` or `small`.
        config
            Nested values, as a YAML file holds them: `{"train": {"epochs": 50}}`.
        overrides
            Dotted names, as `--set` takes them: `{"train.epochs": 50}`. Strings are read as YAML.

        Raises
        ------
        SettingsError
            A name is unknown or a value is out of range; the message says which and what is accepted.
        """
        if preset not in PRESETS:
            msg = f"preset {preset!r} is unknown; there are {', '.join(PRESETS)}.{suggest(preset, PRESETS)}"
            raise SettingsError(msg)
        values: dict[str, Any] = {stage: dict(fields) for stage, fields in PRESETS[preset].items()}
        for stage, fields in (config or {}).items():
            _check_name(cls, stage)
            fields = {} if fields is None else fields  # a heading in YAML with nothing below it
            if isinstance(fields, Mapping):
                for field in fields:
                    _refuse_removed(f"{stage}.{field}")
            values[stage] = {**values.get(stage, {}), **fields} if isinstance(fields, Mapping) else fields
        for name, value in (overrides or {}).items():
            stage, _, field = name.partition(".")
            _check_name(cls, stage, field)
            if field:
                if isinstance(inner := values.setdefault(stage, {}), dict):  # else validation says what it is
                    inner[field] = value
            else:
                values[stage] = value
        return _validated(cls, values)

    def to_yaml(self) -> str:
        """Return the settings as YAML that `build(config=...)` reads back, with a comment on each."""
        lines = ["# Settings marked * bear on the results; the others only say how the work is done."]
        for stage, field in type(self).model_fields.items():
            part = getattr(self, stage)
            if isinstance(part, StageSettings):
                lines += ["", f"{stage}:  # {(type(part).__doc__ or '').splitlines()[0].rstrip('.')}"]
                lines += [textwrap.indent(line, "  ") for line in part.described()]
            else:
                lines.append(_yaml_line(stage, part, f"* {field.description}"))
        return "\n".join(lines) + "\n"


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"train": {"epochs": 100}},
    # As many genes as the method's: with 1000, ISG15, which interferon raises most in every cell type of Kang's cohort, is not modelled.
    "small": {
        "clusters": {"iterations": 2},
        "model": {
            "encoder": (256, 128, 128), "codebooks": 8, "codes": 256, "latent": 64, "decoder": (128, 256),
        },
        "train": {"epochs": 100, "passes": 3, "batch_size": 512},
    },
}  # fmt: skip


REMOVED = {
    "match.search": "search is always exact",
    "match.probes": "search is always exact",
    "train.compile": "it was no faster; train without it",
    "effects.dtype": "use effects.keep_bits=10, which saves most of the space in float32",
}
"""Settings of earlier versions, and what to do without them."""


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn `["train.epochs=50"]`, as the command line gives them, into overrides; values are read as YAML."""
    overrides: dict[str, Any] = {}
    for text in assignments:
        name, separator, value = text.partition("=")
        if not separator or not name:
            msg = f"--set takes stage.name=value, found {text!r}"
            raise SettingsError(msg)
        overrides[name.strip()] = read_yaml(value, f"--set {quoted(text)}")
    return overrides


class _Words(yaml.SafeLoader):
    """YAML in which names stay names: `no`, `on`, `001`, `0.10`, `12:30` and dates are what is written.

    Only `true`, `false` and numbers that read as they are written become something else. Settings that are numbers, or yes
    or no, take the rest too: pydantic knows what they mean.
    """


def _as_written(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return what makes a value of a word where the value reads like the word, and leaves the word otherwise."""

    def made(loader: Any, node: Any) -> Any:
        value = construct(loader, node)
        return value if str(value).lower() == str(node.value).lower() else node.value

    return made


for _kind in ("bool", "int", "float"):
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Words.add_constructor(_tag, _as_written(yaml.SafeLoader.yaml_constructors[_tag]))
_Words.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)


def read_yaml(text: str | bytes, where: str) -> Any:
    """Return the plain values of a YAML text; `SettingsError` begins with `where` and says why it is none.

    Nothing in it is called: a tag that asks for a Python object is an error.
    """
    try:
        loader = _Words(text)
        return loader.get_single_data()
    except Exception as error:
        # PyYAML lets the errors of int(), of dates and of recursion through as they are.
        msg = f"{where} cannot be read as plain YAML ({' '.join(str(error).split())[:200] or type(error).__name__})"
        raise SettingsError(msg) from error


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _check_name(cls: type[BaseModel], stage: str, field: str = "") -> None:
    if stage not in cls.model_fields:
        msg = f"there is no setting {quoted(stage)}.{suggest(stage, cls.model_fields)}"
        raise SettingsError(msg)
    inner = cls.model_fields[stage].annotation
    fields = inner.model_fields if isinstance(inner, type) and issubclass(inner, BaseModel) else {}
    _refuse_removed(f"{stage}.{field}")
    if field and field not in fields:
        names = [f"{stage}.{name}" for name in fields]
        msg = f"there is no setting {quoted(f'{stage}.{field}')}.{suggest(f'{stage}.{field}', names)}"
        raise SettingsError(msg)


def _refuse_removed(name: str) -> None:
    if name in REMOVED:
        msg = f"setting '{name}' was removed: {REMOVED[name]}"
        raise SettingsError(msg)


def _validated(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        # What YAML makes of a few nested aliases can be too long to write out.
        found = "" if not first["loc"] else f" (found {reprlib.repr(first['input'])})"
        msg = f"setting '{name}': {first['msg'].removeprefix('Value error, ')}{found}"
        raise SettingsError(msg) from None


TRAINING = ("model", "loss", "train")
"""Parts of the settings that bear on trained spaces alone."""


def bearing_settings(told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that bear on results, by part.

    Settings of training and of clusters are left out where the matching space is made without them.

    Parameters
    ----------
    told
        `uns["ndreamer"]` of the results.
    """
    settings: dict[str, dict[str, Any]] = json.loads(told["settings"])
    space = settings.get("embed", {}).get("method", keys.NDREAMER)
    unused = set() if keys.is_trained(space) else set(TRAINING)
    within = settings.get("match", {}).get("within")
    if not keys.is_clustered(space, settings.get("state", {}).get("by")) and within != keys.OBS_LOW:
        unused.add("clusters")
    return {part: values for part, values in settings.items() if part not in unused}
