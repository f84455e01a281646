"""The models that plans start from, and what is made of them once: all of it is kept in the bank.

These are the teacher, which is the uncompressed classifier, and students distilled from it (`trained.py` has them
trained), each with the importance of its parts, its sensitivity to single decisions, the ranges of its activations, and
the pieces of its sites.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autocompress import slot
from autocompress.binding import NO_STUDENT, BoundSpace, bind, students_of
from autocompress.config import RunConfig
from autocompress.decisions import Decision, Quantize, Recover, Student
from autocompress.model import EncoderModel
from autocompress.pieces import (
    SOURCES,
    Piece,
    code_version,
    make_piece,
    read_piece,
    reads_moments,
    save_piece,
    unpacked,
)
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.sensitivity import Sensitivity
from autocompress.space import SearchSpace
from autocompress.trained import FITTED_AT_ONCE, Progress, Trained, silent, torch_threads
from autocompress.transforms import apply_plan
from autocompress.transforms.depth import drop_order
from autocompress.transforms.importance import READING, Importance, importance
from autocompress.transforms.moments import Moments, read_moments, save_moments, take_moments
from autocompress.transforms.quantize import Activations, observe
from autocompress.transforms.student import begun, channel_scores
from autocompress.transforms.vocabulary import TokenUse

RANGE_ROWS = 64
"""Calibration rows that activation ranges are taken from; more did not change accuracy."""
_DROP_ROWS = 64
"""Calibration rows that the order of dropping blocks is taken from."""
_COUNTED_ROWS = 20_000
"""Training rows whose tokens are counted: what is not among them hardly matters, and reading millions takes minutes."""
_SENSITIVITY_ROWS = 256
"""Calibration rows that single decisions are judged on."""
_SENSITIVITY_SEED = 0
"""Of the directions in which they are judged: runs of any seed share what was found."""


class Bases(Trained):
    """The teacher and its students, with what is known of them.

    Args:
        run: the resolved run file.
        progress: told what is being done, a line at a time.
        threads: of torch; see `Trained`.
    """

    def __init__(self, run: RunConfig, progress: Progress = silent, *, threads: int | None = None) -> None:
        super().__init__(run, progress, threads=threads)
        self._bases: dict[str, tuple[EncoderModel, Importance]] = {}
        self._drop_orders: dict[str, tuple[int, ...]] = {}
        self._observed: dict[str, Activations] = {}
        self._sensitivities: dict[str, Sensitivity] = {}

    def special_tokens(self, rows: int) -> frozenset[int]:
        """Return the tokens that are no part of any text; a tokenizer may have more of them than the model has rows."""
        return frozenset(token for token in self.tokenizer.all_special_ids if token < rows)

    def base(self, student: Student | None) -> tuple[EncoderModel, Importance]:
        """Return the teacher or a distilled student with its importance scores; both are shared, not to be changed."""
        key = repr(student)
        if key not in self._bases:
            base = self.teacher if student is None else self._student(student)
            self._bases[key] = (base, self._importance(base))
        return self._bases[key]

    def adopt(self, student: Student, built: EncoderModel) -> None:
        """Let ``built`` stand for a student as it is, as where a forecast has no time to distil one."""
        # With the numbers of its blocks, which its words do not give: the bank tells students apart by this.
        built.base = f"{self.teacher.base} cut to {json.dumps(student.to_dict())}"
        self._bases[repr(student)] = (built, self._importance(built))

    def _importance(self, base: EncoderModel) -> Importance:
        code = code_version(("transforms/importance.py", "transforms/vocabulary.py"))
        key = self._key(base=base.base, counted=_COUNTED_ROWS, precision=self.precision(), code=code)

        def make(folder: Path) -> None:
            self.progress(f"scoring heads and neurons on {len(self.calibration)} calibration rows")
            with slot.working():
                counts = self._counts()
            with torch_threads(self.threads):
                scores = importance(
                    base,
                    self.calibration_batches(at_once=FITTED_AT_ONCE),
                    counts=counts,
                    autocast=self._autocast,
                )
            tensors = {f"heads.{n}": t for n, t in enumerate(scores.heads)}
            tensors |= {f"neurons.{n}": t for n, t in enumerate(scores.neurons)}
            assert scores.tokens is not None
            tensors |= {"tokens.order": scores.tokens.order, "tokens.slopes": scores.tokens.slopes}
            tensors |= {"tokens.needed": torch.tensor(scores.tokens.needed)}
            save_file(tensors, folder / "scores.safetensors")
            assert scores.slopes is not None
            keys = [(n, role) for n in range(len(base.shape.blocks)) for role in READING]
            save_file({f"{n}.{role}": scores.slopes(n, role) for n, role in keys}, folder / "slopes.safetensors")

        folder = self.bank.get("importance", key, make)
        found = load_file(folder / "scores.safetensors")

        def slopes(block: int, role: str) -> torch.Tensor:
            return self.bank.load("importance", key, make, lambda folder: _slopes_in(folder, block, role))

        depth = range(len(base.shape.blocks))
        return Importance(
            tuple(found[f"heads.{n}"] for n in depth),
            tuple(found[f"neurons.{n}"] for n in depth),
            lambda block, role: self._moments(base, block, role),
            TokenUse(found["tokens.order"], found["tokens.slopes"], int(found["tokens.needed"])),
            slopes,
            folder.name,
        )

    def drop_order(self, student: Student | None) -> tuple[int, ...]:
        """Return the numbers of the blocks of the teacher or a student, least important first."""
        key = repr(student)
        if key not in self._drop_orders:
            self._drop_orders[key] = self._drop_order(self.base(student)[0])
        return self._drop_orders[key]

    def _drop_order(self, base: EncoderModel) -> tuple[int, ...]:
        drops = self._space_file.drop_blocks.at_most if self._space_file.drop_blocks else 0

        def make(folder: Path) -> None:
            self.progress(f"ordering {len(base.shape.blocks)} blocks by what the predictions are without them")
            with torch_threads(self.threads):
                order = drop_order(base, self.calibration_batches(_DROP_ROWS), drops, autocast=self._autocast)
            save_file({"order": torch.tensor(order)}, folder / "order.safetensors")

        # Apart from the other scores: how many blocks a space lets go is no reason to make all pieces anew.
        code = code_version(("transforms/depth.py",))
        key = self._key(base=base.base, drops=drops, rows=_DROP_ROWS, precision=self.precision(), code=code)
        found = self.bank.load("drop-order", key, make, lambda folder: load_file(folder / "order.safetensors"))
        return tuple(found["order"].tolist())

    def made_up_for(self, base: EncoderModel, scores: Importance) -> Importance:
        """Return ``scores`` with those of heads and neurons of ``base`` where a reconstruction makes up for them."""

        def make(folder: Path) -> None:
            self.progress("ordering heads and neurons by what removing them costs where others make up for it")
            _take(scores, "block.0.attention")
            orders = {}
            for number in range(len(base.shape.blocks)):
                for role in READING:
                    with slot.working(), torch_threads(self.threads):
                        orders[f"{number}.{role}"] = scores.made_up_for(base, number, role)
            save_file(orders, folder / "orders.safetensors")

        sources = ("transforms/surgery.py", "transforms/moments.py")
        key = self._key(base=base.base, scores=scores.name, precision=self.precision(), code=code_version(sources))
        found = self.bank.load("orders", key, make, lambda folder: load_file(folder / "orders.safetensors"))
        heads, neurons = (
            tuple(found[f"{number}.{role}"] for number in range(len(base.shape.blocks))) for role in READING
        )
        return dataclasses.replace(scores, heads=heads, neurons=neurons)

    def _counts(self) -> torch.Tensor:
        """Return how often the training texts have each token, ``vocabulary``; infinite for special ones."""
        if len(self.task.splits["train"]) <= _COUNTED_ROWS:
            rows = self.splits["train"]
        else:
            head = self.task.head("train", _COUNTED_ROWS)
            rows = head.tokenized(self.tokenizer, self.run.data.max_tokens)["train"]
        read = torch.tensor([token for row in rows.input_ids for token in row])
        found = torch.bincount(read, minlength=self.teacher.shape.vocabulary).double()
        found[list(self.special_tokens(self.teacher.shape.vocabulary))] = torch.inf
        return found

    def _moments(self, base: EncoderModel, block: int, role: str) -> Moments:
        """Return the moments of what a layer of ``base`` reads; all of them are taken when one is first asked for."""

        def make(folder: Path) -> None:
            self.progress(f"running {len(self.calibration)} calibration rows to fit weights by")
            with torch_threads(self.threads):
                rows = self.calibration_batches(at_once=FITTED_AT_ONCE)
                save_moments(take_moments(base, rows, autocast=self._autocast), folder)

        # Read one by one: those of all layers would fill more memory than the model.
        return self.bank.load(
            "moments",
            self._key(base=base.base, precision=self.precision(), code=code_version(("transforms/moments.py",))),
            make,
            lambda folder: read_moments(folder, block, role),
        )

    def _tables(self, plan: CompressionPlan) -> dict[str, np.ndarray]:
        """Return the embedding tables that ``plan`` leads to, by path, as they are looked up."""
        decisions = [decision for site, decision in plan if site == "embeddings"]
        if not decisions:
            return {}
        base, scores = self.base(plan.of_type(Student).get(MODEL_SITE))
        found = unpacked(base, "embeddings", self.piece(base, "embeddings", decisions, scores))
        return {path: table.weight for path, table in found.items()}

    def scores_of_recovered(self, built: EncoderModel, plan: CompressionPlan) -> Importance:
        """Return the scores by which what is left to do is done to ``built``, which the recovery of ``plan`` led to.

        No recovery changes which tokens are read. Weights of few bits are fitted to what their layers read now, unless
        they were rounded while they were trained.
        """
        known = self.base(plan.of_type(Student).get(MODEL_SITE))[1]
        fitted = not plan.of_type(Recover)[MODEL_SITE].quantized
        narrow = {site for site, decision in plan.of_type(Quantize).items() if reads_moments(site, [decision])}

        rows = self.calibration_batches(at_once=FITTED_AT_ONCE) if plan.trained else self.fitted_batches

        @functools.cache
        def moments() -> list[dict[str, Moments]]:
            if built.base in self._read_in:
                return self._read_in[built.base]
            with torch_threads(self.threads):
                return take_moments(built, rows, sites=narrow, autocast=self._autocast)

        return Importance(
            tuple(torch.zeros(block.heads) for block in built.shape.blocks),
            tuple(torch.zeros(block.neurons) for block in built.shape.blocks),
            # Not in the bank: they would take more room than the model, for one plan or a few.
            (lambda block, role: moments()[block][role]) if fitted and narrow else None,
            known.tokens,
            name=known.name,
        )

    def needs_training(self, plan: CompressionPlan) -> bool:
        """Return whether the student that ``plan`` starts from has not been distilled yet."""
        student = plan.of_type(Student).get(MODEL_SITE)
        return student is not None and not self._is_trained(student)

    def _is_trained(self, student: Student) -> bool:
        if repr(student) in self._bases:
            return True
        made_from = self._distilled_from(student.to_dict(), self._budget(student), self.run.seed)
        return self.bank.path("distilled", made_from).is_dir()

    @property
    def untrained(self) -> int:
        """How many students plans may start from that have not been distilled yet."""
        return sum(not self._is_trained(s) for s in students_of(self._space_file, self.teacher.shape).values())

    def make_students(self) -> None:
        """Distil every student that plans may start from and that is not there yet."""
        for student in students_of(self._space_file, self.teacher.shape).values():
            if not self._is_trained(student):
                self.base(student)

    def _student(self, student: Student) -> EncoderModel:
        # From the teacher's logits alone, which are there for all students: a search waits for them.
        what = f"a {student.words()}"
        return self._distilled(self.cut(student), what, self._budget(student), student.to_dict())

    def cut(self, student: Student) -> EncoderModel:
        """Return the parts of the teacher that a student begins as."""
        return begun(self.teacher, student, self.base(None)[1], self._channels() if student.hidden else None)

    def _channels(self) -> torch.Tensor:
        """Return how important the channels between the teacher's blocks are, ``hidden``."""

        def make(folder: Path) -> None:
            self.progress(f"scoring {self.teacher.shape.hidden} channels on {len(self.calibration)} calibration rows")
            with torch_threads(self.threads):
                scores = channel_scores(self.teacher, self.calibration_batches(), autocast=self._autocast)
            save_file({"channels": scores}, folder / "channels.safetensors")

        key = self._key(precision=self.precision(), code=code_version(("transforms/student.py",)))
        return self.bank.load("channels", key, make, lambda f: load_file(f / "channels.safetensors")["channels"])

    @cached_property
    def _space_file(self) -> SearchSpace:
        return SearchSpace.load(self.run.space)

    @cached_property
    def space(self) -> BoundSpace:
        """The search space bound to the teacher; a student is distilled when a plan first asks for it."""
        shape = self.teacher.shape
        students: dict[str, Student | None] = {NO_STUDENT: None, **students_of(self._space_file, shape)}
        return bind(
            self._space_file,
            shape,
            tokens=self.run.target.tokens,
            drop_order=lambda name: self.drop_order(students[name]),
            most_tokens=self.run.data.max_tokens,
        )

    def sensitivity(self, student: Student | None) -> Sensitivity:
        """Return what single decisions do to the teacher or a student, measured once and kept in the bank."""
        base, scores = self.base(student)
        if base.base not in self._sensitivities:
            options = self.space.options(base.shape)
            named = {site: [d.to_dict() for d in decisions] for site, decisions in options.items()}
            rows = self.calibration_batches(_SENSITIVITY_ROWS)

            def piece(site: str, decision: Decision) -> Piece:
                return self.piece(base, site, (decision,), scores)

            def make(folder: Path) -> None:
                what = "the full model" if student is None else f"a {student.words()}"
                self.progress(f"measuring the sensitivity of {what} to single decisions")
                if any(reads_moments(site, [d]) for site, decisions in options.items() for d in decisions):
                    _take(scores, "block.0.attention")  # before it is this process's turn, as for a piece
                with torch_threads(self.threads):
                    found = Sensitivity.measure(
                        base, scores, options, rows, piece, seed=_SENSITIVITY_SEED, autocast=self._autocast
                    )
                (folder / "sensitivity.json").write_text(found.to_json(), encoding="utf-8")

            rows_of = {"rows": _SENSITIVITY_ROWS, "range_rows": RANGE_ROWS}
            about = {"base": base.base, "scores": scores.name, "options": named, "precision": self.precision()}
            key = self._key(**about, **rows_of, code=code_version((*SOURCES, "sensitivity.py")))
            self._sensitivities[base.base] = self.bank.load(
                "sensitivity", key, make, lambda f: Sensitivity.from_json((f / "sensitivity.json").read_text())
            )
        return self._sensitivities[base.base]

    def prepare(self, plan: CompressionPlan) -> None:
        """Make what takes long to make and many plans share, so that workers find it in the bank."""
        base, scores = self.base(plan.of_type(Student).get(MODEL_SITE))
        if any(reads_moments(site, [decision]) for site, decision in plan):
            _take(scores, "block.0.attention")
        if any(recovery.reconstruct for recovery in plan.of_type(Recover).values()):
            self.made_up_for(base, scores)
            self.sums(base)(0, "output")

    def structured(self, plan: CompressionPlan) -> EncoderModel:
        """Return the torch model that the structural decisions of ``plan`` lead to, distilled if it says so."""
        student = plan.of_type(Student).get(MODEL_SITE)
        base, scores = self.base(student)
        built = base.clone()
        wanted = plan.of_type(Recover).get(MODEL_SITE)
        apply_plan(built, plan, self.made_up_for(base, scores) if wanted and wanted.reconstruct else scores)
        return built if wanted is None else self._recovered(built, plan, wanted, base, lambda: self._tables(plan))

    def piece(self, base: EncoderModel, site: str, decisions: Sequence[Decision], scores: Importance) -> Piece:
        """Return what stands at ``site`` of ``base`` after ``decisions``, from the bank."""

        def make(folder: Path) -> None:
            if reads_moments(site, decisions):
                _take(scores, site)  # of the base as it is: making a piece changes its site for a while
            trained = self._rounded.get(base.base, {})
            save_piece(make_piece(base, site, decisions, scores, self.activations(base), trained), folder)

        about = {"base": base.base, "scores": scores.name, "site": site, "range_rows": RANGE_ROWS}
        key = self._key(**about, decisions=[d.to_dict() for d in decisions], code=code_version())
        if reads_moments(site, decisions) and not self.bank.path("pieces", key).is_dir():
            _take(scores, site)  # before it is this process's turn, which it would keep for all of them
        return self.bank.load("pieces", key, make, read_piece)

    def activations(self, base: EncoderModel) -> Activations:
        """Return what the layers of ``base`` read on calibration rows."""
        if base.base not in self._observed:
            shared = {known.base for known, _ in self._bases.values()}
            # Those of a model that no other plan starts from are of use until the next one comes.
            self._observed = {name: found for name, found in self._observed.items() if name in shared}
            self._observed[base.base] = observe(base, self.calibration_batches(RANGE_ROWS))
        return self._observed[base.base]


def _slopes_in(folder: Path, block: int, role: str) -> torch.Tensor:
    """Read the slopes of one layer: those of all would fill as much memory as many layers."""
    with safe_open(folder / "slopes.safetensors", framework="pt") as opened:
        found: torch.Tensor = opened.get_tensor(f"{block}.{role}")
    return found


def _take(scores: Importance, site: str) -> None:
    """Have moments taken, unless they are there: those of a site, and of all others that are taken with them."""
    if scores.moments is not None:
        _, number, kind = site.split(".")
        scores.moments(int(number), "output" if kind == "attention" else "ffn_out")
