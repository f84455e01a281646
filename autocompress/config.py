"""The run file: everything that defines a search, as frozen pydantic models.

A run file is read with `strict_yaml`, overridden by dotted keys from the command line, and saved resolved beside
its results. What a key means is said once, in its ``description``: the JSON Schema and the docs take it from there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from autocompress import strict_yaml
from autocompress.errors import ConfigError

RUN_SCHEMA = 1

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Objective = Literal["accuracy", "loss", "divergence", "size_bytes", "latency", "peak_memory"]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no infinities or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class FinetuneConfig(Section):
    epochs: float = Field(2.0, gt=0, le=100, description="passes over the training rows")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak of AdamW's linear schedule")
    batch_size: int = Field(32, ge=1, le=4096, description="rows of a training step")


class ModelConfig(Section):
    id: str = Field("demo/minilm", min_length=1, description="demo/minilm, a local folder, or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    finetune: FinetuneConfig = Field(
        default_factory=FinetuneConfig, description="used when the model has no head for the task"
    )


class DataConfig(Section):
    source: str = Field(
        "demo/movies",
        min_length=1,
        description="demo/movies, demo/tweets, a csv, tsv, jsonl or parquet file, a datasets id",
    )
    subset: str | None = Field(None, description="configuration of a datasets id, such as sst2 of nyu-mll/glue")
    revision: str | None = Field(None, description="branch, tag or commit of a datasets id")
    text: str = Field("text", description="column of the text")
    text_pair: str | None = Field(None, description="column of the second text, for tasks on pairs")
    label: str = Field("label", description="column of the class")
    split: str = Field(
        "split",
        description="column whose values mark held-out rows, if there is one: by one of the words test, testing, "
        "validation, valid, val, eval, evaluation, dev, development, holdout and without train; others are trained on",
    )
    test_fraction: float = Field(0.2, gt=0, lt=1, description="held-out share when the data bring no test split")
    search_rows: int = Field(1000, ge=10, description="rows cut from the training rows to score candidates on")
    reconstruction_rows: int = Field(
        1024, ge=1, description="training rows that the weights of pruned models are fitted on, where they are"
    )
    calibration_rows: int = Field(1024, ge=4, le=8192, description="training rows for importance and activation ranges")
    max_tokens: int = Field(64, ge=4, le=8192, description="longer texts are truncated")
    max_train_rows: int | None = Field(None, ge=20, description="use only so many training rows")
    allow_shared_rows: bool = Field(False, description="accept texts that stand in two splits; printed in the report")

    @property
    def called(self) -> str:
        """What the rows are called: their source, and which configuration of it."""
        return self.source if self.subset is None else f"{self.source} {self.subset}"


class TargetConfig(Section):
    runtime: Literal["openvino", "onnxruntime"] = Field("openvino", description="what executes the shipped artefact")
    device: Literal["cpu"] = Field("cpu", description="what the runtime runs on")
    threads: int = Field(1, ge=1, le=1024, description="1 is timed by process CPU time, more by wall clock")
    batch_size: int = Field(1, ge=1, le=1024, description="rows of an input when timing")
    tokens: int = Field(64, ge=1, le=8192, description="inputs of exactly this length when timing")
    precision: Literal["f32"] = Field("f32", description="inference precision hint given to the runtime")


class ConstraintsConfig(Section):
    max_accuracy_drop: float | None = Field(
        None, ge=0, lt=1, description="against the reference, as a fraction: 0.01 is one percentage point"
    )
    max_size_mb: float | None = Field(None, gt=0, description="megabytes (1e6 bytes)")
    max_latency_ms: float | None = Field(None, gt=0, description="median, milliseconds")
    max_latency_ratio: float | None = Field(None, gt=0, description="candidate over reference")
    max_memory_mb: float | None = Field(None, gt=0, description="peak memory of running it, megabytes (1e6 bytes)")


class SearchConfig(Section):
    trials: int = Field(100, ge=1, le=100_000, description="candidates to evaluate; a larger number continues a study")
    sampler: Literal["tpe", "nsga2", "nsga3", "random"] = Field("tpe", description="what proposes candidates")
    mutation_share: float = Field(
        0.3, ge=0, le=1, description="share of tpe's proposals that change a few parameters of a point on the front"
    )
    guide: Literal["accuracy", "loss", "divergence"] = Field(
        "accuracy", description="what stands for accuracy while searching; the front is judged by the objectives"
    )
    seed: int | None = Field(None, ge=0, lt=2**32, description="of the proposals; default: the run's seed")
    seeds: bool = Field(True, description="start with uniform plans and plans made from measured sensitivities")
    skip_behind: bool = Field(True, description="pass over plans that are predicted far behind the front")
    stop_early: bool = Field(True, description="end an accuracy pass once the candidate cannot reach the front")
    workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="parallel candidates; default: as many as there are cores, on a cluster as its nodes have places "
        "for. With several target.threads a machine that is no cluster has one, whatever is given",
    )
    resources: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict,
        description="what a worker takes of a cluster's node beside its cores, by Ray's names, such as {big_node: 1}",
    )
    device: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict,
        description="what a cluster's node offers that latency is measured on, by Ray's names, such as "
        "{device_pi5: 1}; default: the nodes of the workers",
    )
    device_wait: float = Field(
        60, ge=0, le=86_400, description="seconds in which a device that went may come back before the search ends"
    )
    max_retries: int = Field(2, ge=0, le=10, description="new attempts after a worker died")
    latency_pairs: int = Field(
        4, ge=2, le=10_000, description="blocks of runs of the candidate and of the reference, alternating"
    )
    confirm_pairs: int = Field(
        6, ge=0, le=10_000, description="such blocks that time each point of the front anew at the end; 0 for none"
    )
    reconstruct: bool = Field(
        False,
        description="at the end, fit the weights of the front's pruned points to what the model or student was before "
        "it was pruned, by least squares on data.reconstruction_rows; what that leads to is added",
    )
    recover: int = Field(
        0, ge=0, le=1000, description="points that are trained at the end, those that promise most first"
    )
    keep_artefacts: Literal["front", "all"] = Field("front", description="candidates whose files stay")


Epochs = Annotated[float, Field(ge=0, le=100)] | Literal["auto"]


class RecoveryConfig(Section):
    epochs: Epochs = Field(
        1.0,
        description="distillation passes for a picked point; auto for as many as cost no more arithmetic than one "
        "fine-tuning of the uncompressed model, which is model.finetune.epochs, or 3 where it came with a head; "
        "0, with reconstruct, trains nothing",
    )
    learning_rate: float = Field(3e-4, gt=0, le=1, description="peak of AdamW's linear schedule")
    batch_size: int = Field(32, ge=1, le=4096, description="rows of a training step")
    temperature: float = Field(2.0, gt=0, le=100, description="that teacher's and student's logits are divided by")
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the distillation loss; the rest is the labels'. With 0 here, in hidden and in relations "
        "a picked point is fine-tuned, and no teacher is run",
    )
    hidden: float = Field(
        30.0, ge=0, le=1e6, description="weight of what differs from the teacher between the blocks of a picked point"
    )
    relations: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of what differs from the teacher in how tokens relate to each other by the queries, keys "
        "and values of a picked point",
    )
    l1: float = Field(
        0.0, ge=0, le=1e6, description="weight of the sum of magnitudes of the matrices in a picked point's blocks"
    )
    l2: float = Field(
        0.0, ge=0, le=1e6, description="weight of the sum of squares of the matrices in a picked point's blocks"
    )
    patience: float = Field(
        0.0,
        ge=0,
        le=100,
        description="passes without a smaller loss on held rows after which a picked point's training ends; the state "
        "with the smallest is kept. The held rows are the last tenth of the training rows: search rows would make the "
        "score that candidates are compared by better than it is. 0 trains on all rows to the end",
    )
    seeds: int = Field(
        1,
        ge=1,
        le=32,
        description="trainings of a picked point, one after the other, whose weights are averaged; with patience, "
        "without those that raise the loss of the mean on held rows",
    )
    quantized: bool = Field(
        False,
        description="train a picked point with its weights rounded as they are stored, where these have 8 bits or "
        "fewer: quantisation-aware training. Goes with 1 in seeds",
    )
    reconstruct: bool = Field(
        False,
        description="before a picked point is trained, or in place of it, fit the layers that add to what runs through "
        "the model to the sums of the model or student that was pruned, block by block, by least squares",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="training arithmetic; auto takes bfloat16 where the CPU has instructions for it"
    )

    @field_validator("epochs", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: object, handler: ValidatorFunctionWrapHandler) -> Epochs:
        try:
            found: Epochs = handler(value)
        except ValidationError:  # one for each kind of value that is allowed
            raise ValueError(f"must be auto, or >= 0 and <= 100, got {_short(value)}") from None
        return found

    @field_validator("quantized")
    @classmethod
    def _of_one_seed(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("seeds", 1) > 1:
            raise ValueError(
                f"needs 1 in recovery.seeds, got {info.data['seeds']}: the mean of several is not rounded any more"
            )
        return value


class StorageConfig(Section):
    study: str | None = Field(
        None,
        description="PostgreSQL database for the study, such as postgresql://me@host/searches; default: a journal file "
        "in the results folder. Its password belongs in ~/.pgpass or PGPASSWORD",
    )
    bank: str | None = Field(None, description="folder of reusable pieces; default: the user's cache folder")
    bank_gb: float = Field(
        20.0, gt=0, le=1e6, description="size (1e9 bytes) above which those are deleted that were not used for longest"
    )
    shared: str | None = Field(
        None,
        description="URL that fsspec reads and writes, such as s3://bucket/folder: machines without a common folder "
        "exchange reusable pieces and artefacts over it. Credentials belong where its implementation looks for them",
    )

    @field_validator("study")
    @classmethod
    def _a_database(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme != "postgresql" or not parts.path.strip("/"):
            raise ValueError("must read postgresql://USER@HOST/DATABASE")  # not shown: it may hold a password
        if parts.password is not None or any("password" in name.lower() for name in parse_qs(parts.query)):
            raise ValueError("holds a password, which would be copied with the run file; use ~/.pgpass or PGPASSWORD")
        return url

    @field_validator("shared")
    @classmethod
    def _a_place(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if not parts.scheme or not (parts.netloc + parts.path).strip("/"):
            raise ValueError("must read PROTOCOL://PLACE/FOLDER")  # not shown: it may hold a password
        if parts.password is not None:
            raise ValueError("holds a password, which would be copied with the run file; leave it to the environment")
        return url


OF_PICKED_POINTS = frozenset({"hidden", "relations", "l1", "l2", "patience", "seeds", "quantized", "reconstruct"})
"""Options of recovery that no student of a search depends on; they are part of the plan of a point, not of a study."""


class RunConfig(Section):
    """One search, complete.

    Example:
        ``RunConfig.from_file("run.yaml", overrides=["search.trials=60"])``
    """

    schema_version: Literal[1] = Field(1, alias="schema", description="version of this format")
    name: Name = Field("demo", description="results go to results/<name> unless --out says otherwise")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    target: TargetConfig = Field(default_factory=TargetConfig)
    space: str = Field("encoder-joint", min_length=1, description="a shipped search space or a YAML file")
    objectives: tuple[Objective, ...] = Field(
        ("accuracy", "size_bytes", "latency"), min_length=2, max_length=5, description="what the front is judged by"
    )
    constraints: ConstraintsConfig = Field(default_factory=ConstraintsConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    baselines: tuple[Literal["random"], ...] = Field((), description="searches to hold the result against")
    recovery: RecoveryConfig = Field(default_factory=RecoveryConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    trackers: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        (),
        description="what scored candidates are logged for, too: TensorBoard's HParams in tensorboard/ of the results "
        "folder, MLflow where MLFLOW_TRACKING_URI says or in mlflow.db there",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of all that is drawn: students depend on it")

    model_config = ConfigDict(populate_by_name=True)

    @property
    def told(self) -> list[str]:
        """The objectives as a sampler is told them: with the guide in place of accuracy."""
        return [self.search.guide if name == "accuracy" else name for name in self.objectives]

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if len(set(self.objectives)) != len(self.objectives):
            raise ValueError("objectives: each may be named once")
        if not self.recovery.epochs and not self.recovery.reconstruct:
            raise ValueError("recovery.epochs: 0 trains nothing; set recovery.reconstruct to true, or give more epochs")
        if self.data.max_tokens < self.target.tokens:
            raise ValueError(
                f"target.tokens: must be <= data.max_tokens ({self.data.max_tokens}), got {self.target.tokens}"
            )
        return self

    @classmethod
    def from_mapping(cls, data: object, *, source: str = "run", overrides: Sequence[str] = ()) -> RunConfig:
        """Validate a parsed run file; ``source`` names it in messages.

        Raises:
            ConfigError: one line for the first thing that is wrong, with what is allowed.
        """
        if not isinstance(data, dict):
            found = "it is empty" if data is None else f"got {type(data).__name__}"
            raise ConfigError(f"{source}: must hold keys and values, {found}")
        merged = json.loads(json.dumps(data, default=str))
        for override in overrides:
            _apply_override(merged, override)
        return validated(cls, merged, source)

    @classmethod
    def from_file(cls, path: str | Path, *, overrides: Sequence[str] = ()) -> RunConfig:
        """Read a run file, or the shipped one for ``demo``; ``overrides`` are ``dotted.key=value``.

        Raises:
            ConfigError: if the file cannot be read or does not validate.
        """
        if str(path) == "demo":
            return cls.from_mapping(strict_yaml.parse(demo_run_text(), "demo"), source="demo", overrides=overrides)
        path = Path(path)
        return cls.from_mapping(strict_yaml.read(path), source=path.name, overrides=overrides)

    def timed_here(self) -> RunConfig:
        """Return the run with latency measured where the program runs."""
        return self.model_copy(update={"search": self.search.model_copy(update={"device": {}})})

    def with_files(self, found: Callable[[str], str]) -> RunConfig:
        """Return the run with what ``found`` makes of all that may name a file: the model, the data and the space."""
        model = self.model.model_copy(update={"id": found(self.model.id)})
        data = self.data.model_copy(update={"source": found(self.data.source)})
        return self.model_copy(update={"model": model, "data": data, "space": found(self.space)})

    def to_yaml(self) -> str:
        return strict_yaml.dump(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        return cls.model_json_schema(by_alias=True)


def demo_run_text() -> str:
    """Return the commented run file that ships with the package."""
    return resources.files("autocompress").joinpath("demo", "run.yaml").read_text(encoding="utf-8")


S = TypeVar("S", bound=BaseModel)


def validated(cls: type[S], data: Mapping[str, Any], source: str) -> S:
    """Build ``cls`` from ``data``, turning pydantic's report into one line of ours.

    Raises:
        ConfigError: naming source, key, what is allowed and what was received.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"]]
        where = ".".join(location)
        if first["type"] == "extra_forbidden":
            names = _sibling_names(cls, location[:-1])
            close = difflib.get_close_matches(location[-1], names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
            raise ConfigError(f"{source}: {where}: unknown key, {hint}") from None
        message = first["msg"].removeprefix("Value error, ")
        message = {
            "string_pattern_mismatch": "must be 1 to 64 letters, digits, ., _ or -, and begin with a letter or digit",
            "tuple_type": "must be a list, such as [a, b]",
        }.get(first["type"], message[0].lower() + message[1:])
        if first["type"] in ("value_error", "missing"):
            raise ConfigError(f"{source}: {where + ': ' if where else ''}{message}") from None
        raise ConfigError(f"{source}: {where}: {message}, got {_short(first['input'])}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sibling_names(cls: type[BaseModel], location: Iterable[str]) -> list[str]:
    for part in location:
        for name, field in cls.model_fields.items():
            if part == (field.alias or name):
                for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                    if isinstance(kind, type) and issubclass(kind, BaseModel):
                        cls = kind
    return [field.alias or name for name, field in cls.model_fields.items()]


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: must read dotted.key=value, such as search.trials=60")
    parts = key.strip().split(".")
    node = data
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {part} holds a value, not keys")
        node = child
    node[parts[-1]] = strict_yaml.parse(value, f"--set {key}")
