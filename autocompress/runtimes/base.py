"""What a runtime is: it builds a plan's artefact, loads it, and runs it.

Call order: `Runtime.check` before any work, `convert` once per depth of a model, `template` once per process for each
of these that it needs, `stitch` once per candidate, then `load` for a `Session` per process. Every implementation
passes the contract suite in ``tests/test_runtimes.py``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from autocompress.anatomy import ModelShape
from autocompress.config import TargetConfig
from autocompress.errors import RuntimeBuildError
from autocompress.model import EncoderModel, Layout
from autocompress.pieces import Piece, linear_modules
from autocompress.plan import CompressionPlan
from autocompress.products import Product
from autocompress.task import Batch
from autocompress.transforms.quantize import Packed

ARTIFACT_SCHEMA = 1
ARTIFACT_FILE = "artefact.json"
TEMPLATE_INPUTS = "inputs.json"
"""Beside a converted model: its input names in order."""


@dataclass(frozen=True)
class Artifact:
    """A built model on disk.

    Args:
        folder: where it stands.
        runtime: name of the runtime that runs it.
        files: the model's files, relative to the folder; their bytes are its size.
        inputs: input names in order.
        plan: what was done to the model.
    """

    folder: Path
    runtime: str
    files: tuple[str, ...]
    inputs: tuple[str, ...]
    plan: CompressionPlan

    @property
    def size_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)

    def save(self) -> None:
        """Write the description beside the files."""
        about = {
            "schema": ARTIFACT_SCHEMA,
            "runtime": self.runtime,
            "files": list(self.files),
            "inputs": list(self.inputs),
            "plan": json.loads(self.plan.to_json()),
        }
        (self.folder / ARTIFACT_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Read the description of a built model.

        Raises:
            RuntimeBuildError: if ``folder`` holds none, or one of another version, or a file is missing.
        """
        file = folder / ARTIFACT_FILE
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RuntimeBuildError(
                f"{folder}: holds no {ARTIFACT_FILE}; give a folder that export wrote as openvino or onnx"
            ) from None
        except ValueError as error:
            raise RuntimeBuildError(f"{file}: not readable ({error})") from None
        if not isinstance(about, dict) or about.get("schema") != ARTIFACT_SCHEMA:
            found = about.get("schema") if isinstance(about, dict) else type(about).__name__
            raise RuntimeBuildError(f"{file}: schema must be {ARTIFACT_SCHEMA}, got {found!r}")
        try:
            plan = CompressionPlan.from_json(json.dumps(about["plan"]))
            artifact = cls(folder, str(about["runtime"]), tuple(about["files"]), tuple(about["inputs"]), plan)
        except (KeyError, TypeError) as error:
            raise RuntimeBuildError(f"{file}: not readable ({error!r})") from None
        for name in artifact.files:
            if Path(name).name != name or not (folder / name).is_file():
                raise RuntimeBuildError(f"{file}: names {name!r}, which is not a file beside it")
        return artifact


@dataclass(frozen=True)
class Template:
    """A converted model that pieces are put into.

    Args:
        graph: in the runtime's own form; never changed.
        inputs: input names in order.
        products: for each linear layer's path, the paths of its products: two where it was factorised before.
        layout: module paths by site.
        runs: times that each block is run in a row: what stands in one stands in the graph as often.
    """

    graph: Any
    inputs: tuple[str, ...]
    products: Mapping[str, tuple[str, ...]]
    layout: Layout
    runs: int = 1

    def uses(self, site: str) -> int:
        """Return how often the layers of ``site`` stand in the graph."""
        return self.runs if site.startswith("block.") else 1


class Session(ABC):
    """A loaded artefact."""

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return logits (``batch x classes``, float32) for int64 arrays of ``batch x tokens`` by input name.

        Those of a row are the same in any batch, but for the order in which floats are added.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what it holds; it cannot run any more."""


class Runtime(ABC):
    """Builds and runs artefacts of one format."""

    name: ClassVar[str]
    arithmetic: ClassVar[str] = ""
    """What is different from how earlier versions computed with this runtime; scores of before are not for now."""

    most_parameters: ClassVar[int | None] = None
    """Of a model whose uncompressed artefact can be written."""

    def require_size(self, parameters: int) -> None:
        """Raise `RuntimeBuildError` for a model with more parameters than `most_parameters`."""
        if self.most_parameters is not None and parameters > self.most_parameters:
            raise RuntimeBuildError(
                f"{self.name}: its files hold up to {self.most_parameters / 1e6:.0f} million parameters, and the model "
                f"has {parameters / 1e6:.0f} million; use another runtime"
            )

    @abstractmethod
    def check(self, plan: CompressionPlan, shape: ModelShape) -> None:
        """Raise `PlanError` for a decision that this runtime cannot carry out; ``shape`` is the uncompressed one."""

    @abstractmethod
    def convert(self, model: EncoderModel, example: Batch, folder: Path) -> None:
        """Convert ``model`` into ``folder`` once; all candidates of its depth are stitched from the result."""

    @abstractmethod
    def template(self, model: EncoderModel, folder: Path) -> Template:
        """Return what `convert` wrote of ``model``."""

    @abstractmethod
    def version(self) -> str:
        """Return the version of the runtime's package, which a converted model depends on."""

    @abstractmethod
    def stitch(self, template: Template, pieces: Mapping[str, Piece], plan: CompressionPlan, folder: Path) -> Artifact:
        """Put ``pieces`` (by site) into a copy of ``template`` and write the artefact into the empty ``folder``.

        Raises:
            RuntimeBuildError: if a piece finds no place in the graph.
        """

    @abstractmethod
    def weight_bytes(self, product: Product) -> float:
        """Return the bytes that a matrix's weights and scales take in this runtime's files."""

    def rounded_together(self, weight: Packed) -> int:
        """Return how many columns of what ``weight`` multiplies are rounded to 8 bits together, at each call.

        0 where they are multiplied as the plan says.
        """
        return 0

    @abstractmethod
    def load(self, artifact: Artifact, target: TargetConfig) -> Session:
        """Load ``artifact`` with the target's threads and precision."""

    @abstractmethod
    def stand_in(self, artifact: Artifact, folder: Path) -> Artifact:
        """Write a copy of ``artifact`` with the same graph and shapes whose large weights are constants.

        It takes a few kilobytes and is as fast as the original, so that an exported folder can carry its reference.
        """

    @abstractmethod
    def settings(self, target: TargetConfig) -> dict[str, Any]:
        """Return the options that the artefact is run with, for the record."""


class LogitsOnly(nn.Module):
    """A classifier with positional inputs and the bare logits as output, which exporters can trace."""

    def __init__(self, module: nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self.m = module
        self.inputs = tuple(inputs)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return ``batch x classes``."""
        logits: torch.Tensor = self.m(**dict(zip(self.inputs, tensors, strict=True))).logits
        return logits


def example_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return small inputs to trace with: two rows of unequal length, so that masking is part of the graph."""
    tokens = min(8, batch.input_ids.shape[1])
    inputs = {name: value[:1, :tokens].repeat(2, 1) for name, value in batch.inputs().items()}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["attention_mask"][1, tokens // 2 :] = 0
    return inputs


def products(model: EncoderModel) -> dict[str, tuple[str, ...]]:
    """Return the paths of the products of every linear layer of ``model``."""
    sites = [site for site in model.shape.sites() if site != "embeddings"]
    paths = (path for site in sites for path in model.layout.linears(site))
    return {path: tuple(name for name, _ in linear_modules(model, path)) for path in paths}


def joined(values: np.ndarray, shifts: Sequence[int]) -> np.ndarray:
    """Return bytes of as many numbers each as there are ``shifts``, moved up by so many bits; uint8, 1-D."""
    padded = np.pad(values, (0, -len(values) % len(shifts))).reshape(-1, len(shifts))
    return np.asarray(np.bitwise_or.reduce(padded << np.array(shifts, dtype=np.uint8), axis=1))


def stand_in_value(number: int) -> float:
    """Return what fills the ``number``-th tensor of a stand-in; equal tensors would be merged, and run faster."""
    return 0.01 + 1e-5 * number
