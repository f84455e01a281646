"""A plan becomes a measurement: stitch the artefact from pieces, time it against the reference, run the rows.

`Workshop` holds what all candidates of a search share: the teacher, the task, importance scores, students, converted
templates. What is expensive comes from the bank, where the first process that needs it puts it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from autocompress import machine, model, scoring, task, training
from autocompress.anatomy import before_drop
from autocompress.bank import Bank, default_bank
from autocompress.binding import NO_STUDENT, BoundSpace, bind, students_of
from autocompress.config import RunConfig
from autocompress.errors import AutocompressError
from autocompress.memory import peak_memory_bytes
from autocompress.model import EncoderModel
from autocompress.pieces import Piece, code_version, make_piece, read_piece, save_piece
from autocompress.plan import MODEL_SITE, CompressionPlan, Decision, DropBlocks, Recover, Student
from autocompress.predict import Predictor, Sensitivity, Sizes
from autocompress.records import QUALITIES, Measurement, Stopped
from autocompress.runtimes import Artifact, Runtime, Session, Template, get_runtime
from autocompress.space import SearchSpace
from autocompress.stopwatch import Stopwatch
from autocompress.task import Batch, Split
from autocompress.transforms import apply_plan, check_plan
from autocompress.transforms.prune import Importance, importance, keep_blocks, keep_heads, keep_neurons
from autocompress.transforms.quantize import Activations, observe

Progress = training.Progress
Rivals = Sequence[Sequence[float]]
"""Costs of the points on the front, in the order of a run's objectives, as the sampler is told them."""
LOGITS_FILE = "logits.npy"
_RANGE_ROWS = 64
"""Calibration rows that activation ranges are taken from; more did not change accuracy."""
_ACCURACY_BATCH, _ACCURACY_STEP = 32, 4
"""Rows per call and multiple of tokens where a runtime's logits depend on neither."""
_DROP_ROWS = 128
"""Calibration rows that the order of dropping blocks is taken from."""
_SENSITIVITY_ROWS = 32
"""Calibration rows that single decisions are judged on."""
_ROUNDS = 6
"""Moments at which a latency is taken that is confirmed."""
_AT_ONCE = 64
"""Artefacts that are loaded together while their latencies are confirmed."""


def silent(_: str) -> None:
    """Report no progress."""


def bank_root(run: RunConfig) -> Path:
    """Return the folder of the run's bank."""
    return Path(run.storage.bank).expanduser() if run.storage.bank else default_bank()


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
        self.bank = Bank(bank_root(run), limit_bytes=int(run.storage.bank_gb * 1e9))
        self.runtime: Runtime = get_runtime(run.target.runtime)
        self.source = model.locate(run.model.id, run.model.revision)
        model.check_files(self.source)
        self.task = task.load(run.data, labels=model.head_labels(self.source))
        self._bases: dict[str, tuple[EncoderModel, Importance]] = {}
        self._templates: dict[tuple[str, tuple[int, ...]], Template] = {}
        self._observed: dict[str, Activations] = {}
        self._parts: dict[str, list[list[Batch]]] = {}
        self._sensitivities: dict[str, Sensitivity] = {}

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
            "precision": self.precision(),
            "seed": self.run.seed,
        }
        return self.bank.get("finetuned", made_from, self._finetune)

    def _finetune(self, folder: Path) -> None:
        config = self.run.model.finetune
        rows = self.splits["train"]
        self.progress(f"fine-tuning {self.run.model.id} on {len(rows)} rows for {config.epochs:g} epochs")
        loaded = model.load(self.source, labels=self.task.labels, seed=self.run.seed)
        budget = training.TrainingBudget(**config.model_dump(), precision=self.precision())
        with torch_threads(machine.cores()):
            training.finetune(
                loaded.module, rows, budget, seed=self.run.seed, progress=lambda s: self.progress(f"fine-tuning: {s}")
            )
        loaded.module.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def teacher(self) -> EncoderModel:
        return model.load(self.teacher_folder, labels=self.task.labels)

    def precision(self) -> str:
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
            with torch_threads(machine.cores()):
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
            with torch_threads(machine.cores()):
                logits = training.logits_of(self.teacher.module, self.splits["train"], precision=self.precision())
            save_file({"logits": logits}, folder / "logits.safetensors")

        key = self._key(train_rows=len(self.splits["train"]), precision=self.precision())
        return load_file(self.bank.get("teacher-logits", key, make) / "logits.safetensors")["logits"]

    def _distilled(self, target: EncoderModel, what: str, epochs: float, made_from: dict[str, Any]) -> EncoderModel:
        """Give ``target`` the weights that distillation leads to; they are kept in the bank."""
        budget = training.TrainingBudget(
            **{**self.run.recovery.model_dump(), "epochs": epochs, "precision": self.precision()}
        )
        key = self._key(what=made_from, budget=dataclasses.asdict(budget), seed=self.run.seed, recipe=training.RECIPE)

        def make(folder: Path) -> None:
            teacher = self._teacher_logits
            rows = self.splits["train"]
            self.progress(f"distilling {what} on {len(rows)} rows for {epochs:g} epochs")
            with torch_threads(machine.cores()):
                training.distill(
                    target.module,
                    teacher,
                    rows,
                    budget,
                    # What is pruned is in the blocks; the tables are half of what the optimiser would move.
                    frozen=target.layout.embeddings,
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
        """The search space bound to the teacher; a student is distilled when a plan first asks for it."""
        shape = self.teacher.shape
        students: dict[str, Student | None] = {NO_STUDENT: None, **students_of(self._space_file, shape)}
        return bind(self._space_file, shape, lambda name: self.base(students[name])[1].drop_order)

    @cached_property
    def predictor(self) -> Predictor:
        """Predicts sizes, latencies and losses of this run's plans."""
        return Predictor(
            self.teacher.shape,
            Sizes.of(self.teacher),
            self.runtime.weight_bytes,
            self.sensitivity,
            self.run.search.guide,
        )

    def sensitivity(self, student: Student | None) -> Sensitivity:
        """Return what single decisions do to the teacher or a student, measured once and kept in the bank."""
        base, scores = self.base(student)
        if base.base not in self._sensitivities:
            options = self.space.options(base.shape)
            named = {site: [d.to_dict() for d in decisions] for site, decisions in options.items()}
            rows = self.calibration_batches(_SENSITIVITY_ROWS)

            def make(folder: Path) -> None:
                what = "the full model" if student is None else f"a {student.words()}"
                self.progress(f"measuring the sensitivity of {what} to single decisions")
                with torch_threads(machine.cores()):
                    found = Sensitivity.measure(base, scores, options, rows, seed=self.run.seed)
                (folder / "sensitivity.json").write_text(found.to_json(), encoding="utf-8")

            key = self._key(base=base.base, options=named, rows=_SENSITIVITY_ROWS, code=code_version())
            self._sensitivities[base.base] = self.bank.load(
                "sensitivity", key, make, lambda f: Sensitivity.from_json((f / "sensitivity.json").read_text())
            )
        return self._sensitivities[base.base]

    def check(self, plan: CompressionPlan) -> None:
        """Refuse a plan that cannot be carried out, before any work.

        Raises:
            PlanError: naming the site and what is allowed there.
        """
        check_plan(plan, self.teacher.shape)
        self.runtime.check(plan, self.teacher.shape)

    def structured(self, plan: CompressionPlan) -> EncoderModel:
        """Return the torch model that the structural decisions of ``plan`` lead to, distilled if it says so."""
        student = plan.of_type(Student).get(MODEL_SITE)
        base, scores = self.base(student)
        built = base.clone()
        apply_plan(built, plan, scores)
        wanted = plan.of_type(Recover).get(MODEL_SITE)
        if wanted is not None:
            made_from = json.loads(plan.structural().to_json())
            return self._distilled(built, "a picked structure", wanted.epochs, {"plan": made_from, "base": base.base})
        return built

    def stitched(self, plan: CompressionPlan) -> tuple[Template, dict[str, Piece]]:
        """Return the template that ``plan`` starts from and a piece for each site that it decides."""
        by_site: dict[str, list[Decision]] = {}
        for site, decision in plan:
            if site != MODEL_SITE:
                by_site.setdefault(site, []).append(decision)
        scores: Importance | None
        if plan.of_type(Recover):
            # Distillation moved every weight: what is left to do is what the runtime does.
            base, scores = self.structured(plan), None
            by_site = {s: [d for d in ds if not d.structural] for s, ds in by_site.items()}
            dropped: tuple[int, ...] = ()
        else:
            base, scores = self.base(plan.of_type(Student).get(MODEL_SITE))
            drop = plan.of_type(DropBlocks).get(MODEL_SITE)
            dropped = drop.blocks if drop is not None else ()
        kept = tuple(n for n in range(len(base.shape.blocks)) if n not in dropped)
        pieces = {
            site: self._piece(base, before_drop(site, kept), decisions, scores)
            for site, decisions in by_site.items()
            if decisions
        }
        return self._template(base, kept), pieces

    def _template(self, base: EncoderModel, kept: tuple[int, ...]) -> Template:
        key = (base.base, kept)
        if key not in self._templates:
            model = base.clone()
            if len(kept) < len(model.shape.blocks):
                keep_blocks(model, kept)
            self._templates[key] = self.runtime.template(model, self.calibration_batches(_RANGE_ROWS)[0])
        return self._templates[key]

    def _piece(self, base: EncoderModel, site: str, decisions: Sequence[Decision], scores: Importance | None) -> Piece:
        key = self._key(base=base.base, site=site, decisions=[d.to_dict() for d in decisions], code=code_version())
        return self.bank.load(
            "pieces",
            key,
            lambda folder: save_piece(make_piece(base, site, decisions, scores, self.activations(base)), folder),
            read_piece,
        )

    def activations(self, base: EncoderModel) -> Activations:
        """Return what the layers of ``base`` read on calibration rows."""
        if base.base not in self._observed:
            self._observed[base.base] = observe(base, self.calibration_batches(_RANGE_ROWS))
        return self._observed[base.base]

    def parts(self, split: str) -> list[list[Batch]]:
        """Return the rows of a split for accuracy: random parts, each in batches by length, cut at `scoring.LOOKS`.

        Batches are of the target's size, unless logits do not depend on it.
        """
        if split not in self._parts:
            rows = self.splits[split]
            order = np.random.default_rng(self.run.seed).permutation(len(rows))
            size, step = (_ACCURACY_BATCH, _ACCURACY_STEP) if self.runtime.batch_invariant else (0, 1)
            self._parts[split] = [
                list(rows.in_order_of_length(size or self.run.target.batch_size, step=step, among=part.tolist()))
                for part in np.split(order, [round(share * len(rows)) for share in scoring.LOOKS])
                if len(part)
            ]
        return self._parts[split]

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield all rows of a split in the batches that accuracy is taken in."""
        return (batch for part in self.parts(split) for batch in part)

    @property
    def reference_folder(self) -> Path:
        return self.artefacts / "reference"

    @cached_property
    def reference_session(self) -> Session:
        return self.runtime.load(Artifact.open(self.reference_folder), self.run.target)

    def inputs(self, artifact: Artifact) -> dict[str, np.ndarray]:
        return scoring.timing_inputs(artifact.inputs, self.run.target, self.vocabulary, self.run.seed)

    @property
    def majority(self) -> float:
        """Accuracy of always guessing the search rows' most frequent class."""
        labels = self.splits["search"].labels
        return max(labels.count(label) for label in set(labels)) / len(labels)

    @property
    def vocabulary(self) -> int:
        """Number of token ids of the model."""
        return int(self.teacher.module.config.vocab_size)  # type: ignore[union-attr, arg-type]

    @cached_property
    def reference_logits(self) -> np.ndarray:
        file = self.reference_folder / LOGITS_FILE
        if not file.exists():
            logits = scoring.logits_of(self.reference_session, self.splits["search"], self.batches("search"))
            np.save(file, logits, allow_pickle=False)
        return kept_logits(self.reference_folder)

    def prepare(self, plan: CompressionPlan) -> None:
        """Make what training it takes to build ``plan``, so that workers find it in the bank."""
        self.base(plan.of_type(Student).get(MODEL_SITE))

    def build(self, plan: CompressionPlan, folder: Path) -> Artifact:
        """Build the plan's artefact in ``folder``: whole, or not at all."""
        self.check(plan)
        template, pieces = self.stitched(plan)
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            self.runtime.stitch(template, pieces, plan, aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return Artifact.open(folder)

    def score(self, artifact: Artifact, *, front: Rivals = (), stages: dict[str, float] | None = None) -> Measurement:
        """Measure a built artefact: its bytes, its latency paired with the reference, accuracy through it.

        Args:
            artifact: built for this run's target.
            front: costs (in the order of the run's objectives) that it has to reach; it is given up when it cannot.
            stages: seconds already spent, by stage.

        Raises:
            CannotReachFront: if the accuracy pass was ended.
        """
        watch = Stopwatch(stages)
        with watch("load"):
            session = self.runtime.load(artifact, self.run.target)
        memory = None
        if self._wants_memory:
            with watch("memory"):
                memory = peak_memory_bytes(artifact, self.run.target, self.inputs(artifact))
        trial = _Trial(self, session, artifact, memory)
        try:
            trial.run(front, watch)
        except CannotReachFront as given_up:
            given_up.stopped = dataclasses.replace(given_up.stopped, stages=watch.seconds)
            raise
        logits, timed = trial.logits, trial.latency
        if artifact.folder != self.reference_folder:
            divergence = scoring.divergence(logits, self.reference_logits)
        else:
            divergence = 0.0
        np.save(artifact.folder / LOGITS_FILE, logits, allow_pickle=False)
        scored = scoring.accuracy(logits, self.splits["search"])
        return Measurement(
            accuracy=scored.value,
            accuracy_low=scored.low,
            accuracy_high=scored.high,
            loss=scored.loss,
            divergence=divergence,
            rows=scored.rows,
            predictions=scored.predictions,
            size_bytes=artifact.size_bytes,
            **timed.fields(),
            peak_memory_bytes=memory,
            seconds=sum(watch.seconds.values()),
            stages=watch.seconds,
            fingerprint=self.fingerprint,
        ).check()

    @property
    def _wants_memory(self) -> bool:
        return "peak_memory" in self.run.objectives or self.run.constraints.max_memory_mb is not None

    def paired_times(
        self, session: Session, artifact: Artifact, pairs: int, *, warmup: int = scoring.WARMUP_RUNS
    ) -> np.ndarray:
        """Time a loaded artefact against the reference; seconds, ``pairs x (candidate, reference)``."""
        clock = scoring.clock_of(self.run.target)
        inputs = self.inputs(artifact)
        return scoring.paired_times(session, self.reference_session, inputs, pairs=pairs, clock=clock, warmup=warmup)

    def bound(self, known: Mapping[str, float], front: Rivals) -> scoring.Bound | None:
        """Return what an artefact's quality has to reach, or None where its other objectives alone bring it there.

        Args:
            known: its other objectives by name.
            front: costs that it has to reach.
        """
        told = [self.run.search.guide if name == "accuracy" else name for name in self.run.objectives]
        qualities = [position for position, name in enumerate(told) if name in QUALITIES]
        if len(qualities) != 1:
            return None
        [quality] = qualities
        others = [(position, known[name]) for position, name in enumerate(told) if position != quality]
        rivals = [point[quality] for point in front if all(point[p] <= value for p, value in others)]
        return scoring.Bound(told[quality], min(rivals)) if rivals else None

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Machine, versions, target and runtime options, as stored with every number."""
        settings = {k: str(v) for k, v in self.runtime.settings(self.run.target).items()}
        return {**machine.fingerprint(), "target": self.run.target.model_dump(), "runtime_options": settings}

    def ready(self) -> None:
        """Load what every candidate needs, so that the first one is not charged for it."""
        self.reference_session.run(self.inputs(Artifact.open(self.reference_folder)))
        # The first build of a process imports the converter and its like.
        with torch_threads(self.run.target.threads), tempfile.TemporaryDirectory() as scratch:
            self.build(CompressionPlan(), Path(scratch) / "first")

    def evaluate(self, plan: CompressionPlan) -> Measurement:
        """Build and score one candidate; its artefact stays under its plan id.

        Raises:
            AutocompressError: with the reason, if the candidate cannot be built or scored.
        """
        found = self.attempt(plan)
        assert isinstance(found, Measurement), "nothing to reach, nothing to stop for"
        return found

    def attempt(self, plan: CompressionPlan, front: Rivals = ()) -> Measurement | Stopped:
        """Like `evaluate`, but end the accuracy pass once the candidate cannot reach ``front``.

        Args:
            plan: what to do to the model.
            front: costs of points that are not dominated, in the order of the run's objectives.
        """
        folder = self.artefacts / plan.plan_id
        watch = Stopwatch()
        with torch_threads(self.run.target.threads):
            try:
                with watch("build"):
                    artifact = self.build(plan, folder)
                return self.score(artifact, front=front, stages=watch.seconds)
            except CannotReachFront as given_up:
                shutil.rmtree(folder, ignore_errors=True)
                return given_up.stopped
            except AutocompressError:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def confirmed(
        self, points: Sequence[tuple[CompressionPlan, Measurement]], *, pairs: int, progress: Progress = silent
    ) -> list[Measurement]:
        """Return ``points`` with their latencies taken anew, in rounds over all of them.

        A machine is slower for seconds at a time, and small models suffer more than the reference: what is timed at
        several moments is not at the mercy of one.
        """
        times: list[list[np.ndarray]] = [[] for _ in points]
        for first in range(0, len(points), _AT_ONCE):
            some = range(first, min(first + _AT_ONCE, len(points)))
            artefacts = [Artifact.open(self.artefacts / points[n][0].plan_id) for n in some]
            sessions = [self.runtime.load(artifact, self.run.target) for artifact in artefacts]
            for turn in range(_ROUNDS):
                progress(f"confirming latencies: points {some[0] + 1} to {some[-1] + 1}, round {turn + 1} of {_ROUNDS}")
                for n, session, artifact in zip(some, sessions, artefacts, strict=True):
                    warmup = 1 if turn else scoring.WARMUP_RUNS
                    each = max(1, pairs // _ROUNDS)
                    times[n].append(self.paired_times(session, artifact, each, warmup=warmup))
        found = []
        for (_, measured), parts in zip(points, times, strict=True):
            timed = scoring.summarize(parts, seed=self.run.seed)
            found.append(dataclasses.replace(measured, **timed.fields(), confirmed=True).check())
        return found


class _Trial:
    """One pass of a loaded artefact over the search rows, with its latency taken at moments in between.

    A machine is slow for seconds at a time, and not for small and large models alike: pairs that are spread over the
    pass scatter half as much as the same number of pairs in a row.
    """

    def __init__(self, workshop: Workshop, session: Session, artifact: Artifact, memory_bytes: int | None) -> None:
        self._workshop = workshop
        self._session = session
        self._artifact = artifact
        self._memory_bytes = float(memory_bytes or 0)
        self._times: list[np.ndarray] = []
        self._done: list[int] = []
        self._logits: np.ndarray | None = None

    @property
    def logits(self) -> np.ndarray:
        """``rows x classes``, float32, in row order."""
        assert self._logits is not None, "no rows"
        return self._logits

    @property
    def latency(self) -> scoring.Latency:
        return scoring.summarize(self._times, seed=self._workshop.run.seed)

    def run(self, front: Rivals, watch: Stopwatch) -> None:
        """Run all rows, unless it shows that the artefact cannot reach ``front``.

        Raises:
            CannotReachFront: if it cannot.
        """
        parts = self._workshop.parts("search")
        first, *later = _spread(self._workshop.run.search.latency_pairs, len(parts) + 1)
        with watch("latency"):
            self._time(first, scoring.WARMUP_RUNS)
        for part, pairs in zip(parts, later, strict=True):
            with watch("accuracy"):
                self._classify(part)
                if part is not parts[-1]:
                    self._give_up_behind(front)
            with watch("latency"):
                self._time(pairs, 1)

    def _time(self, pairs: int, warmup: int) -> None:
        if pairs:
            self._times.append(self._workshop.paired_times(self._session, self._artifact, pairs, warmup=warmup))

    def _classify(self, part: Sequence[Batch]) -> None:
        rows = self._workshop.splits["search"]
        for batch in part:
            found = self._session.run(batch.arrays())
            if self._logits is None:
                self._logits = np.full((len(rows), found.shape[1]), np.nan, dtype=np.float32)
            self._logits[batch.rows.numpy()] = found
            self._done += batch.rows.tolist()
        scoring.require_finite(self.logits[self._done], len(self._done))

    def _give_up_behind(self, front: Rivals) -> None:
        timed = self.latency
        size_bytes, memory_bytes = float(self._artifact.size_bytes), self._memory_bytes
        # The low end: what is on the front must not be missed for the noise of a few pairs.
        known = {"size_bytes": size_bytes, "latency": timed.ratio_low, "peak_memory": memory_bytes}
        bound = self._workshop.bound(known, front)
        if bound is None:
            return
        rows, reference = self._workshop.splits["search"], self._workshop.reference_logits
        reason = bound.out_of_reach(self.logits, self._done, rows, reference)
        if reason is not None:
            stopped = Stopped(
                reason=reason,
                rows=len(self._done),
                size_bytes=size_bytes,
                latency=timed.ratio,
                peak_memory=memory_bytes,
            )
            raise CannotReachFront(stopped)


def _spread(count: int, places: int) -> list[int]:
    """Return ``count`` in ``places`` parts that differ by one at most, larger ones first."""
    return [count // places + (place < count % places) for place in range(places)]


class CannotReachFront(Exception):
    """An accuracy pass was ended; carries what is known."""

    def __init__(self, stopped: Stopped) -> None:
        super().__init__(stopped.reason)
        self.stopped = stopped


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
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
