"""A plan becomes a measurement: stitch the artefact from pieces, time it against the reference, run the rows.

`Workshop` adds to the models that plans start from what all candidates of a search share at a target: the runtime,
converted templates, the loaded reference, the search rows in batches.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from autocompress import machine, recovery, scoring, slot
from autocompress.anatomy import ModelShape, before_drop
from autocompress.bases import RANGE_ROWS, Bases
from autocompress.config import RunConfig
from autocompress.decisions import Decision, DropBlocks, Recover, Student, TrimVocabulary
from autocompress.errors import AutocompressError, MeasurementError
from autocompress.gauge import Gauge
from autocompress.model import EncoderModel
from autocompress.pieces import Factor, Piece, code_version
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.predict import Predictor
from autocompress.products import Sizes
from autocompress.records import QUALITIES, Candidate, Drop, Measurement, Stopped
from autocompress.rows import LOGITS_FILE, read_logits
from autocompress.runtimes import Artifact, Runtime, Template, get_runtime
from autocompress.stopwatch import Stopwatch
from autocompress.task import Batch
from autocompress.trained import Progress, silent, torch_threads
from autocompress.transforms import check_plan
from autocompress.transforms.prune import cut_to_blocks
from autocompress.transforms.vocabulary import check_needed
from autocompress.trial import CannotReachFront, Rivals, Trial

_ACCURACY_BATCH, _ACCURACY_STEP = 16, 4
"""Rows per call and multiple of tokens, on which logits do not depend: little padding and few shapes."""


class Workshop(Bases):
    """Everything that turns plans of one run into measurements.

    Args:
        run: the resolved run file.
        artefacts: folder for built candidates.
        progress: told what is being done, a line at a time.
        threads: of torch; see `Trained`.
    """

    def __init__(
        self, run: RunConfig, artefacts: Path, progress: Progress = silent, *, threads: int | None = None
    ) -> None:
        super().__init__(run, progress, threads=threads)
        self.artefacts = artefacts
        self.runtime: Runtime = get_runtime(run.target.runtime)
        # Weakly, so that who is done with a workshop is done with its models, too.
        own = weakref.proxy(self)
        self.gauge = Gauge(run, self.runtime, self.reference_folder, lambda: own.vocabulary)
        self.follows: Runtime | None = None
        """Another runtime that scored what is built, and whose rounding is followed as far as this one can."""
        self._templates: dict[tuple[str, tuple[int, ...]], Template] = {}
        self._parts: dict[str, list[list[Batch]]] = {}

    @cached_property
    def predictor(self) -> Predictor:
        """Predicts sizes, latencies and losses of this run's plans."""
        return Predictor(
            self.teacher.shape,
            Sizes.of(self.teacher),
            self.runtime.weight_bytes,
            self.sensitivity,
            self.run.search.guide,
            self.run.target.tokens,
        )

    def loaded(self, folder: Path) -> EncoderModel:
        """Load a classifier, or one to be, as models are trained from it.

        Raises:
            AutocompressError: if it cannot be loaded, does not fit the rows, or the runtime's files cannot hold it.
        """
        found = super().loaded(folder)
        self.runtime.require_size(found.parameters())
        return found

    def check(self, plan: CompressionPlan, shape: ModelShape | None = None) -> None:
        """Refuse a plan that cannot be carried out, before any work.

        Args:
            plan: to be carried out.
            shape: of the model, by default that of the teacher, which is fine-tuned for it where it has no head.

        Raises:
            PlanError: naming the site and what is allowed there.
        """
        shape = shape or self.teacher.shape
        check_plan(plan, shape)
        for trim in plan.of_type(TrimVocabulary).values():
            check_needed(trim, len(self.special_tokens(shape.vocabulary)))
        self.runtime.check(plan, shape)

    def stitched(self, plan: CompressionPlan) -> tuple[Template, dict[str, Piece]]:
        """Return the template that ``plan`` starts from and a piece for each site that it decides."""
        base, kept, pieces = self.parted(plan)
        return self._template(base, kept), pieces

    def parted(self, plan: CompressionPlan) -> tuple[EncoderModel, tuple[int, ...], dict[str, Piece]]:
        """Return the model that ``plan`` starts from, which of its blocks stay, and a piece for each decided site.

        The model is shared, not to be changed. It may be one that a recovery led to, which has all its blocks.
        """
        by_site: dict[str, Sequence[Decision]] = {}
        for site, decision in plan:
            if site != MODEL_SITE:
                by_site[site] = [*by_site.get(site, ()), decision]
        base, scores = self.base(plan.of_type(Student).get(MODEL_SITE))
        drop = plan.of_type(DropBlocks).get(MODEL_SITE)
        kept = tuple(n for n in range(len(base.shape.blocks)) if drop is None or n not in drop.blocks)
        start, of_start, pieces = base, kept, dict[str, Piece]()
        if plan.of_type(Recover):
            recovered = self.structured(plan)
            of_recovered, sites = self.scores_of_recovered(recovered, plan), recovered.shape.sites()
            if plan.trained:  # every weight was moved
                start, of_start = recovered, tuple(range(len(recovered.shape.blocks)))
                fitted = []
            else:
                first = recovery.first_other(plan, len(base.shape.blocks))
                fitted = [site for site in sites if site.startswith("block.") and int(site.split(".")[1]) >= first]
            # What is left to do is what the runtime does.
            for site in sites if plan.trained else (*fitted, "head"):
                left = [decision for decision in by_site.pop(site, ()) if not decision.structural]
                if left or site in fitted:
                    pieces[site] = self.piece(recovered, site, left, of_recovered)
        for site, decisions in by_site.items():
            pieces[site] = self.piece(base, before_drop(site, kept), decisions, scores)
        return start, of_start, pieces

    def _template(self, base: EncoderModel, kept: tuple[int, ...]) -> Template:
        key = (base.base, kept)
        if key not in self._templates:
            # Those of recovered points are used for one plan, and are as large as the uncompressed model.
            many = {of.base for of, _ in self._bases.values()}
            self._templates = {known: found for known, found in self._templates.items() if known[0] in many}
            model = cut_to_blocks(base, kept)
            example = self.calibration_batches(RANGE_ROWS)[0]
            runtime = self.runtime
            sources = ("transforms/prune.py", *(f"runtimes/{name}.py" for name in ("base", runtime.name)))
            self._templates[key] = self.bank.load(
                "templates",
                {
                    "base": base.base,
                    "kept": kept,
                    "inputs": list(example.inputs()),  # those of text pairs have segments
                    "runtime": f"{runtime.name} {runtime.version()}",
                    "converted_with": {name: machine.versions()[name] for name in ("torch", "transformers")},
                    "code": code_version(sources),
                },
                lambda folder: runtime.convert(model, example, folder),
                lambda folder: runtime.template(model, folder),
            )
        return self._templates[key]

    def parts(self, split: str) -> list[list[Batch]]:
        """Return the rows of a split for accuracy: random parts, each in batches by length, cut at `scoring.LOOKS`."""
        if split not in self._parts:
            rows = self.splits[split]
            order = np.random.default_rng(self.run.seed).permutation(len(rows))
            self._parts[split] = [
                list(
                    rows.in_order_of_length(
                        _ACCURACY_BATCH, step=_ACCURACY_STEP, among=part.tolist(), most_tokens=self.tokens_at_once
                    )
                )
                for part in np.split(order, [round(share * len(rows)) for share in scoring.LOOKS])
                if len(part)
            ]
        return self._parts[split]

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield all rows of a split in the batches that accuracy is taken in."""
        return (batch for part in self.parts(split) for batch in part)

    def logits(self, artifact: Artifact, split: str) -> np.ndarray:
        """Return what an artefact makes of the rows of a split, ``rows x classes``, in their order."""
        session = self.runtime.load(artifact, self.run.target)
        try:
            return scoring.logits_of(session, self.splits[split], self.batches(split))
        finally:
            session.close()

    @property
    def reference_folder(self) -> Path:
        return self.artefacts / "reference"

    @property
    def majority(self) -> float:
        """Accuracy of always guessing the search rows' most frequent class."""
        labels = self.splits["search"].labels
        return max(labels.count(label) for label in set(labels)) / len(labels)

    @property
    def vocabulary(self) -> int:
        """Number of token ids of the model."""
        return int(self.untuned.module.config.vocab_size)  # type: ignore[union-attr, arg-type]

    @cached_property
    def reference_logits(self) -> np.ndarray:
        file = self.reference_folder / LOGITS_FILE
        if not file.exists():
            found = scoring.logits_of(self.gauge.stand.reference, self.splits["search"], self.batches("search"))
            _save_aside(file, found)  # other workers may read it at any moment
        return read_logits(self.reference_folder)

    @cached_property
    def reference_logits_on_test(self) -> np.ndarray:
        """What the uncompressed model makes of the held-out rows; kept beside it, for the next export of these data."""
        file = self.reference_folder / f"test-logits-{self.task.fingerprint}.npy"
        if not file.exists():
            found = scoring.logits_of(self.gauge.stand.reference, self.splits["test"], self.batches("test"))
            with suppress(OSError):  # one exports from a folder that one may not write to, too
                _save_aside(file, found)
            return found
        return np.asarray(np.load(file, allow_pickle=False))

    def build(self, plan: CompressionPlan, folder: Path) -> Artifact:
        """Build the plan's artefact in ``folder``: whole, or not at all."""
        self.check(plan)
        template, pieces = self.stitched(plan)
        if self.follows is not None:
            products = (site for site in pieces if site != "embeddings")
            pieces |= {site: self._rounded_alike(pieces[site], self.follows) for site in products}
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            with slot.working():
                self.runtime.stitch(template, pieces, plan, aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return Artifact.open(folder)

    def _rounded_alike(self, piece: Piece, other: Runtime) -> Piece:
        """Return the same matrices, of which no more columns are rounded together than ``other`` does."""

        def rounded(factor: Factor) -> Factor:
            columns = other.rounded_together(factor.weight)
            if not 0 < columns < self.runtime.rounded_together(factor.weight):
                return factor
            return dataclasses.replace(factor, weight=factor.weight.regrouped(columns))

        return tuple(tuple(rounded(factor) for factor in layer) for layer in piece)

    def score(self, artifact: Artifact, *, front: Rivals = (), stages: dict[str, float] | None = None) -> Measurement:
        """Measure a built artefact: its bytes, its latency paired with the reference, accuracy through it.

        Args:
            artifact: built for this run's target.
            front: costs (in the order of the run's objectives) that it has to reach; it is given up when it cannot.
            stages: seconds already spent, by stage.

        Raises:
            CannotReachFront: if the accuracy pass was ended.
        """
        watch = Stopwatch(stages, waited=slot.waited)
        self.gauge.require()
        with watch("load"):
            session = self.gauge.stand.load(artifact)
        memory = None
        if self.gauge.measures_memory:
            with watch("memory"):
                memory = self.gauge.memory(artifact)
        trial = Trial(self, session, artifact, memory)
        try:
            trial.run(front, watch)
        except CannotReachFront as given_up:
            given_up.stopped = dataclasses.replace(given_up.stopped, stages=watch.seconds)
            raise
        finally:
            with watch("load"):  # freeing a compiled model takes time, too
                session.close()
        logits, timed = trial.logits, trial.latency
        if artifact.folder != self.reference_folder:
            divergence = scoring.divergence(logits, self.reference_logits)
            drop = scoring.drop(logits, self.reference_logits, self.splits["search"])
        else:
            divergence, drop = 0.0, Drop(0.0, 0.0, 0.0)
        np.save(artifact.folder / LOGITS_FILE, logits, allow_pickle=False)
        scored = scoring.accuracy(logits, self.splits["search"])
        return Measurement(
            **scored.fields(),
            **drop.fields(),
            divergence=divergence,
            size_bytes=artifact.size_bytes,
            **timed.fields(),
            peak_memory_bytes=memory,
            seconds=sum(watch.seconds.values()),
            stages=watch.seconds,
            fingerprint=self.gauge.fingerprint,
        ).check()

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

    def open(self) -> None:
        """Load what needs neither artefact nor bank; the driver may be at work on both."""
        self.parts("search")
        _ = self.teacher.shape

    def ready(self) -> None:
        """Load what is left of what every candidate needs, so that the first one is not charged for it."""
        _ = self.gauge.stand.reference
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
        watch = Stopwatch(waited=slot.waited)
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

    def kept(self, candidate: Candidate) -> Measurement:
        """Return the score of a candidate, which is built and scored again where its artefact is gone.

        Raises:
            MeasurementError: if what is built is not what was scored.
        """
        if (self.artefacts / candidate.plan.plan_id).is_dir():
            return candidate.score
        again, known = self.evaluate(candidate.plan), candidate.score
        if (again.predictions, again.size_bytes) != (known.predictions, known.size_bytes):
            shutil.rmtree(self.artefacts / candidate.plan.plan_id, ignore_errors=True)
            raise MeasurementError("its artefact is gone, and what is built from its plan now is another one")
        return again

    def confirmed(
        self,
        points: Sequence[tuple[CompressionPlan, Measurement]],
        *,
        pairs: int,
        quiet: Callable[[], None] | None = None,
        progress: Progress = silent,
    ) -> list[Measurement]:
        """Return ``points``, whose artefacts are there, with their latencies taken anew; see `Gauge.confirmed`."""
        artefacts = [(Artifact.open(self.artefacts / plan.plan_id), measured) for plan, measured in points]
        return self.gauge.confirmed(artefacts, pairs=pairs, quiet=quiet, progress=progress)


def _save_aside(file: Path, logits: np.ndarray) -> None:
    np.save(aside := file.with_name(f".{uuid.uuid4().hex}.npy"), logits, allow_pickle=False)
    aside.rename(file)
