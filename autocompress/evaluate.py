"""A plan becomes a measurement: build the artefact, run the rows, time it against the reference.

`Workshop` holds what all candidates of a search share: the teacher, the task, importance scores, students. The driver
prepares it once; each worker opens it from the bank.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from autocompress import machine, model, scoring, task, training
from autocompress.bank import Bank, default_bank
from autocompress.binding import BoundSpace, bind, students_of
from autocompress.config import RunConfig
from autocompress.errors import AutocompressError
from autocompress.model import EncoderModel
from autocompress.plan import MODEL_SITE, CompressionPlan, Recover, Student
from autocompress.records import Measurement
from autocompress.runtimes import Artifact, Runtime, Session, get_runtime
from autocompress.space import SearchSpace
from autocompress.task import Batch, Split
from autocompress.transforms import apply_plan, check_plan
from autocompress.transforms.prune import Importance, importance, keep_blocks, keep_heads, keep_neurons

Progress = training.Progress
LOGITS_FILE = "logits.npy"
_RANGE_ROWS = 64
"""Calibration rows that activation ranges are taken from; more did not change accuracy."""
_ACCURACY_BATCH, _ACCURACY_STEP = 32, 4
"""Rows per call and multiple of tokens where a runtime's logits depend on neither."""
_DROP_ROWS = 128
"""Calibration rows that the order of dropping blocks is taken from."""


def silent(_: str) -> None:
    """Report no progress."""


class Workshop:
    """Everything that turns plans of one run into measurements.

    Args:
        run: the resolved run file.
        artefacts: folder for built candidates.
        progress: told what is being done, a line at a time.
    """

    def __init__(self, run: RunConfig, artefacts: Path, progress: Progress = silent) -> None:
        self.run = run
        self.artefacts = artefacts
        self.progress = progress
        self.bank = Bank(Path(run.storage.bank).expanduser() if run.storage.bank else default_bank())
        self.runtime: Runtime = get_runtime(run.target.runtime)
        self.source = model.locate(run.model.id, run.model.revision)
        model.check_files(self.source)
        self.task = task.load(run.data, labels=model.head_labels(self.source))
        self._bases: dict[str, tuple[EncoderModel, Importance]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return model.load_tokenizer(self.source)

    @cached_property
    def splits(self) -> dict[str, Split]:
        return self.task.tokenized(self.tokenizer, self.run.data.max_tokens)

    @cached_property
    def calibration(self) -> Split:
        return self.splits["train"].head(self.run.data.calibration_rows)

    def calibration_batches(self, rows: int | None = None) -> list[Batch]:
        split = self.calibration if rows is None else self.calibration.head(rows)
        return list(split.in_order_of_length(16))

    @cached_property
    def teacher_folder(self) -> Path:
        """The folder of the uncompressed classifier, fine-tuned by us if the model came without a head."""
        if model.head_labels(self.source) is not None:
            return self.source
        made_from = {
            "model": model.fingerprint(self.source),
            "task": self.task.fingerprint,
            "max_tokens": self.run.data.max_tokens,
            "finetune": self.run.model.finetune.model_dump(),
            "precision": self._precision(),
            "seed": self.run.seed,
        }
        return self.bank.get("finetuned", made_from, self._finetune)

    def _finetune(self, folder: Path) -> None:
        config = self.run.model.finetune
        rows = self.splits["train"]
        self.progress(f"fine-tuning {self.run.model.id} on {len(rows)} rows for {config.epochs:g} epochs")
        loaded = model.load(self.source, labels=self.task.labels, seed=self.run.seed)
        budget = training.TrainingBudget(**config.model_dump(), precision=self._precision())
        with _threads(machine.cores()):
            training.finetune(
                loaded.module, rows, budget, seed=self.run.seed, progress=lambda s: self.progress(f"fine-tuning: {s}")
            )
        loaded.module.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def teacher(self) -> EncoderModel:
        return model.load(self.teacher_folder, labels=self.task.labels)

    def _precision(self) -> str:
        wanted = self.run.recovery.precision
        return ("bfloat16" if training.has_bfloat16() else "float32") if wanted == "auto" else wanted

    def _key(self, **more: Any) -> dict[str, Any]:
        return {
            "teacher": self.teacher.base,
            "task": self.task.fingerprint,
            "max_tokens": self.run.data.max_tokens,
            "calibration_rows": self.run.data.calibration_rows,
            **more,
        }

    def base(self, student: Student | None) -> tuple[EncoderModel, Importance]:
        """Return the teacher or a distilled student with its importance scores; both are shared, not to be changed."""
        key = repr(student)
        if key not in self._bases:
            base = self.teacher if student is None else self._student(student)
            self._bases[key] = (base, self._importance(base))
        return self._bases[key]

    def _importance(self, base: EncoderModel) -> Importance:
        drops = self._space_file.drop_blocks.at_most if self._space_file.drop_blocks else 0
        key = self._key(base=base.base, drops=drops)

        def make(folder: Path) -> None:
            self.progress(f"scoring heads, neurons and blocks on {len(self.calibration)} calibration rows")
            with _threads(machine.cores()):
                scores = importance(
                    base, self.calibration_batches(), drops=drops, drop_batches=self.calibration_batches(_DROP_ROWS)
                )
            tensors = {f"heads.{n}": t for n, t in enumerate(scores.heads)}
            tensors |= {f"neurons.{n}": t for n, t in enumerate(scores.neurons)}
            save_file({**tensors, "drop_order": torch.tensor(scores.drop_order)}, folder / "scores.safetensors")

        found = load_file(self.bank.get("importance", key, make) / "scores.safetensors")
        depth = range(len(base.shape.blocks))
        return Importance(
            tuple(found[f"heads.{n}"] for n in depth),
            tuple(found[f"neurons.{n}"] for n in depth),
            tuple(found["drop_order"].tolist()),
        )

    @cached_property
    def _teacher_logits(self) -> torch.Tensor:
        def make(folder: Path) -> None:
            self.progress(f"running the teacher on {len(self.splits['train'])} training rows")
            with _threads(machine.cores()):
                logits = training.logits_of(self.teacher.module, self.splits["train"], precision=self._precision())
            save_file({"logits": logits}, folder / "logits.safetensors")

        key = self._key(train_rows=len(self.splits["train"]), precision=self._precision())
        return load_file(self.bank.get("teacher-logits", key, make) / "logits.safetensors")["logits"]

    def _distilled(self, target: EncoderModel, what: str, epochs: float, made_from: dict[str, Any]) -> EncoderModel:
        """Give ``target`` the weights that distillation leads to; they are kept in the bank."""
        budget = training.TrainingBudget(
            **{**self.run.recovery.model_dump(), "epochs": epochs, "precision": self._precision()}
        )
        key = self._key(what=made_from, budget=dataclasses.asdict(budget), seed=self.run.seed)

        def make(folder: Path) -> None:
            teacher = self._teacher_logits
            rows = self.splits["train"]
            self.progress(f"distilling {what} on {len(rows)} rows for {epochs:g} epochs")
            with _threads(machine.cores()):
                training.distill(
                    target.module,
                    teacher,
                    rows,
                    budget,
                    seed=self.run.seed,
                    progress=lambda s: self.progress(f"distilling: {s}"),
                )
            save_file(
                {name: tensor.contiguous() for name, tensor in target.module.state_dict().items()},
                folder / "weights.safetensors",
            )

        folder = self.bank.get("distilled", key, make)
        target.module.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
        target.module.eval()
        target.base = folder.name
        return target

    def _student(self, student: Student) -> EncoderModel:
        _, scores = self.base(None)
        built = self.teacher.clone()
        keep_blocks(built, student.blocks)
        for number, block in enumerate(student.blocks):
            keep_heads(built, number, scores.best_heads(block, student.heads))
            keep_neurons(built, number, scores.best_neurons(block, student.neurons))
        return self._distilled(built, f"a {student.words()}", student.epochs, student.to_dict())

    @cached_property
    def _space_file(self) -> SearchSpace:
        return SearchSpace.load(self.run.space)

    @cached_property
    def space(self) -> BoundSpace:
        """The search space bound to the teacher; distils the students that it names."""
        shape = self.teacher.shape
        bind(self._space_file, shape)
        students = students_of(self._space_file, shape)
        orders = {name: self.base(s)[1].drop_order for name, s in {"full": None, **students}.items()}
        return bind(self._space_file, shape, orders)

    def check(self, plan: CompressionPlan) -> None:
        """Refuse a plan that cannot be carried out, before any work.

        Raises:
            PlanError: naming the site and what is allowed there.
        """
        check_plan(plan, self.teacher.shape)
        self.runtime.check(plan, self.teacher.shape)

    def structured(self, plan: CompressionPlan) -> EncoderModel:
        """Return the torch model that the structural decisions of ``plan`` lead to."""
        student = plan.of_type(Student).get(MODEL_SITE)
        base, scores = self.base(student)
        built = base.clone()
        apply_plan(built, plan, scores)
        wanted = plan.of_type(Recover).get(MODEL_SITE)
        if wanted is not None:
            made_from = json.loads(plan.structural().to_json())
            return self._distilled(built, "the picked point", wanted.epochs, {"plan": made_from, "base": base.base})
        return built

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield the rows of a split for accuracy: in the target's batch size, unless logits do not depend on it."""
        if self.runtime.batch_invariant:
            return self.splits[split].in_order_of_length(_ACCURACY_BATCH, step=_ACCURACY_STEP)
        return self.splits[split].in_order_of_length(self.run.target.batch_size)

    @property
    def reference_folder(self) -> Path:
        return self.artefacts / "reference"

    @cached_property
    def reference_session(self) -> Session:
        return self.runtime.load(Artifact.open(self.reference_folder), self.run.target)

    def inputs(self, artifact: Artifact) -> dict[str, np.ndarray]:
        return scoring.timing_inputs(artifact.inputs, self.run.target, self.vocabulary, self.run.seed)

    @property
    def vocabulary(self) -> int:
        """Number of token ids of the model."""
        return int(self.teacher.module.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def build(self, plan: CompressionPlan, folder: Path) -> Artifact:
        """Build the plan's artefact in ``folder``: whole, or not at all."""
        self.check(plan)
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            self.runtime.build(self.structured(plan), plan, self.calibration_batches(_RANGE_ROWS), aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return Artifact.open(folder)

    def score(self, artifact: Artifact, *, split: str = "search") -> Measurement:
        """Measure a built artefact: accuracy through it, its bytes, its latency paired with the reference."""
        started = time.perf_counter()
        session = self.runtime.load(artifact, self.run.target)
        logits = scoring.logits_of(session, self.splits[split], self.batches(split))
        scored = scoring.accuracy(logits, self.splits[split])
        if split == "search":
            np.save(artifact.folder / LOGITS_FILE, logits, allow_pickle=False)
        timed = scoring.latency(
            session,
            self.reference_session,
            self.inputs(artifact),
            pairs=self.run.search.latency_pairs,
            clock=scoring.clock_of(self.run.target),
            seed=self.run.seed,
        )
        return Measurement(
            accuracy=scored.value,
            accuracy_low=scored.low,
            accuracy_high=scored.high,
            loss=scored.loss,
            rows=scored.rows,
            predictions=scored.predictions,
            size_bytes=artifact.size_bytes,
            latency_ms=timed.p50_ms,
            latency_p90_ms=timed.p90_ms,
            reference_ms=timed.reference_ms,
            latency_ratio=timed.ratio,
            latency_ratio_low=timed.ratio_low,
            latency_ratio_high=timed.ratio_high,
            seconds=time.perf_counter() - started,
            fingerprint=self.fingerprint,
        ).check()

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Machine, versions, target and runtime options, as stored with every number."""
        settings = {k: str(v) for k, v in self.runtime.settings(self.run.target).items()}
        return {**machine.fingerprint(), "target": self.run.target.model_dump(), "runtime_options": settings}

    def ready(self) -> None:
        """Load what every candidate needs, so that the first one is not charged for it."""
        self.reference_session.run(self.inputs(Artifact.open(self.reference_folder)))
        # The first build of a process imports the converter and its like.
        with _threads(self.run.target.threads), tempfile.TemporaryDirectory() as scratch:
            self.build(CompressionPlan(), Path(scratch) / "first")

    def evaluate(self, plan: CompressionPlan) -> Measurement:
        """Build and score one candidate; its artefact stays under its plan id.

        Raises:
            AutocompressError: with the reason, if the candidate cannot be built or scored.
        """
        started = time.perf_counter()
        folder = self.artefacts / plan.plan_id
        with _threads(self.run.target.threads):
            try:
                measured = self.score(self.build(plan, folder))
            except AutocompressError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return dataclasses.replace(measured, seconds=time.perf_counter() - started)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kept_logits(folder: Path) -> np.ndarray:
    """Return the logits that the artefact in ``folder`` was scored with, ``rows x classes``."""
    found: np.ndarray = np.load(folder / LOGITS_FILE, allow_pickle=False)
    return found
