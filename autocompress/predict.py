"""Predictions that cost nothing: what a plan will weigh, how fast it will be, and what it will lose.

They order proposals and pass over plans that are far behind the front; nothing that is reported comes from them. Sizes
are counted from the products of a plan. Latency is a sum over its products, with non-negative coefficients fitted to
what was measured, and what products of one shape are off by themselves: kernels do not like all shapes alike. Loss of
quality starts from the sensitivity of each site to each decision, estimated on calibration rows (sites are taken to add
up, as in Dong et al. 2020, "HAWQ-V2"), and is fitted to what was measured, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from autocompress.anatomy import ModelShape, before_drop
from autocompress.decisions import ACTIVATIONS, DropBlocks, LowRank, MaxTokens, Recover, Student
from autocompress.fits import FEWEST, Fit, effects, latency_fit, least_squares
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.products import Product, Sizes, products_of
from autocompress.records import OBJECTIVES, Z95, Candidate
from autocompress.sensitivity import Sensitivity, level_of

_BEHIND = 3.0
"""Residual standard deviations that a prediction is given the benefit of before a plan is passed over."""
_FINE = 16
"""Weights of 4 bits in groups below this may have no kernel: how to unpack them then stands in the graph."""
_TABLES = (32, 16, 8, 4, 3, 2)
"""Bits of the tables: how a row is unpacked depends on them."""
_DESCRIBED = 8192
"""Plans whose description is kept: fits and proposals ask for the same ones again and again."""
_LEARNED_FROM = 1000
"""Measured candidates that fits are made of: more add little, and a large study's first ask would wait for them."""
_SHAPES = 256
"""Shapes that are looked at by themselves, the most common ones: a proposal would wait for more."""
_LEAST_RATIO = 1e-3
"""No candidate is taken to be faster."""
_LEAST_SPREAD = 0.02
"""Relative residual of a latency below which no fit is trusted: that of the measurement itself."""
_KINDS = ("attention", "ffn")
_AS_INTEGERS, _UNPACKED_ANEW, _AS_FLOATS = range(3)
"""How a product is computed: what is stored in few bits is unpacked for integers once, when the file is loaded."""
_WHOLE, _COSTS = 2, 4
"""What a plan's work is told by as a whole, and that of its products of one kind and arithmetic."""


class _Shape(NamedTuple):
    """What products of a kind of site have in common that take equally long, but for caches.

    Args:
        kind: of the site.
        arithmetic: how they are computed.
        outer, inner: of the matrix.
        read: share of the target's tokens that is not cut off.
    """

    kind: str
    arithmetic: int
    outer: int
    inner: int
    read: float

    @property
    def costs(self) -> np.ndarray:
        """Multiplications, one product, rows and columns."""
        return _costs(self)

    @property
    def place(self) -> slice:
        """Where in a plan's work these costs are added up."""
        first = _WHOLE + _COSTS * (3 * _KINDS.index(self.kind) + self.arithmetic)
        return slice(first, first + _COSTS)


@lru_cache(maxsize=_DESCRIBED)
def _costs(shape: _Shape) -> np.ndarray:
    rows, columns = shape.read * shape.outer, shape.read * shape.inner
    return np.array([rows * shape.inner / 1e6, 0.1, rows / 1e4, columns / 1e4])


@dataclass(frozen=True)
class _Features:
    """What a plan is described by: see `Predictor`'s methods of these names."""

    counted: float
    extras: np.ndarray
    work: np.ndarray
    shapes: Mapping[_Shape, int]
    student: Student | None
    dropped: int
    harm: float
    pruned: float
    """The harm of pruning alone, where a reconstruction makes up for it."""
    reconstructed: bool


@dataclass
class Predictor:
    """Predicts sizes, latency ratios and the guide's cost of plans from what was measured so far.

    Args:
        shape: of the uncompressed model.
        sizes: of its other matrices.
        weight_bytes: bytes of a product's weights and scales in the runtime's files.
        sensitivity: of the uncompressed model (None) or a student; may take seconds at the first call for each.
        guide: the quality that is predicted: ``accuracy``, ``loss`` or ``divergence``.
        tokens: of the target's inputs.
    """

    shape: ModelShape
    sizes: Sizes
    weight_bytes: Callable[[Product], float]
    sensitivity: Callable[[Student | None], Sensitivity]
    guide: str
    tokens: int
    errors: dict[str, list[float]] = field(default_factory=dict)
    """Relative errors of predictions made before their candidate was measured, by ``size`` and ``latency``."""
    _fits: dict[str, Fit] = field(default_factory=dict)
    _effects: dict[_Shape, float] = field(default_factory=dict)
    """By how much a product of a shape takes longer than the fit says."""
    _students: list[Student | None] = field(default_factory=list)
    guide_deviation: float = 0.0
    """Standard deviation of the guide's cost of plans from what is predicted, but for chance."""
    settled: dict[int, float] = field(default_factory=dict)
    """The guide's cost of what it learned from, by trial, without what chance is likely to have made of it."""

    def __post_init__(self) -> None:
        self._features = lru_cache(maxsize=_DESCRIBED)(self._describe)

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Fit everything to the measured ones of ``candidates``."""
        measured = [c for c in candidates if c.measurement is not None and not c.plan.trained]
        if len(measured) < FEWEST:
            return
        # The latest, and those timed anew, which show how the others' latencies are off.
        measured = sorted(measured, key=lambda c: c.score.confirmed)[-_LEARNED_FROM:]
        known = [self._features(c.plan) for c in measured]
        self._students = list(dict.fromkeys(found.student for found in known))
        sizes = np.array([c.score.size_bytes for c in measured], dtype=float)
        counted = np.array([found.counted for found in known])
        self._fits["size"] = least_squares(np.array([found.extras for found in known]), sizes - counted, ridge=1e-6)
        self._learn_latency(
            known,
            np.array([c.score.latency_ratio for c in measured]),
            np.array([c.score.confirmed for c in measured]),
        )
        name, direction = OBJECTIVES[self.guide]
        sign = -1.0 if direction == "maximize" else 1.0
        costs = np.array([sign * getattr(c.score, name) for c in measured])
        described = np.array([self._harm(found) for found in known])
        self._fits["guide"] = least_squares(described, costs, ridge=1e-2)
        self._settle(measured, costs, described @ self._fits["guide"].weights)

    def _settle(self, measured: Sequence[Candidate], costs: np.ndarray, fitted: np.ndarray) -> None:
        """Draw measured costs of the guide towards the fit, as far as chance moved them (empirical Bayes).

        The best of many are best by chance, too, and no prediction would compare with them as they are; see Efron and
        Morris (1975), "Data Analysis Using Stein's Estimator and its Generalizations".
        """
        by_chance = np.array([_deviation(c) ** 2 if self.guide == "accuracy" else 0.0 for c in measured])
        by_plan = max(0.0, self._fits["guide"].spread ** 2 - float(by_chance.mean()))
        told = np.divide(by_plan, by_plan + by_chance, out=np.ones(len(costs)), where=by_plan + by_chance > 0)
        self.guide_deviation = math.sqrt(by_plan)
        settled = (fitted + told * (costs - fitted)).tolist()
        self.settled = {candidate.number: cost for candidate, cost in zip(measured, settled, strict=True)}

    def _learn_latency(self, known: Sequence[_Features], ratios: np.ndarray, confirmed: np.ndarray) -> None:
        work = np.array([found.work for found in known])
        fit, alike = latency_fit(work, ratios, confirmed, self._fits.get("latency"))
        # Its spread is that without effects: what is passed over by it is given the benefit of that doubt.
        self._fits["latency"] = fit
        common = Counter(shape for found in known for shape in found.shapes).most_common(_SHAPES)
        places = {shape: n for n, (shape, _) in enumerate(common)}
        each = np.array([shape.costs @ fit.weights[shape.place] for shape in places])
        counts = np.zeros((len(known), len(places)))
        for row, found in zip(counts, known, strict=True):
            for shape in found.shapes.keys() & places.keys():
                row[places[shape]] = found.shapes[shape]
        fitted = np.maximum(_LEAST_RATIO, work @ fit.weights)
        by_themselves = each * effects(counts * each / fitted[:, None], alike / fitted - 1, confirmed)
        self._effects = dict(zip(places, by_themselves.tolist(), strict=True))

    @property
    def ready(self) -> bool:
        """Whether enough was measured to predict from."""
        return "guide" in self._fits

    def size_bytes(self, plan: CompressionPlan) -> float:
        """Return the bytes of the artefact's files: weights counted, the graph's description fitted."""
        found = self._features(plan)
        return found.counted + (float(found.extras @ self._fits["size"].weights) if "size" in self._fits else 0.0)

    def latency(self, plan: CompressionPlan) -> float:
        """Return candidate over reference."""
        found = self._features(plan)
        more = sum(count * self._effects.get(shape, 0.0) for shape, count in found.shapes.items())
        return max(_LEAST_RATIO, float(found.work @ self._fits["latency"].weights) + more)

    def cost(self, plan: CompressionPlan) -> float:
        """Return the guide's cost, to be minimised; accuracies are negative."""
        return float(self._harm(self._features(plan)) @ self._fits["guide"].weights)

    def note(self, candidate: Candidate) -> None:
        """Keep the errors of predicting ``candidate``, which `learn` has not seen yet."""
        if not self.ready or candidate.measurement is None:
            return
        size, ratio = candidate.score.size_bytes, candidate.score.latency_ratio
        self.errors.setdefault("size", []).append(self.size_bytes(candidate.plan) / size - 1)
        self.errors.setdefault("latency", []).append(self.latency(candidate.plan) / ratio - 1)

    def expected(self, plan: CompressionPlan, told: Sequence[str]) -> list[float] | None:
        """Return the predicted costs in the order of ``told``.

        None where one of these is not predicted, where too little is measured yet, or nothing of the plan's student.
        """
        if (
            not self.ready
            or _student(plan) not in self._students
            or not {*told} <= {"size_bytes", "latency", self.guide}
        ):
            return None
        found = {"size_bytes": self.size_bytes(plan), "latency": self.latency(plan), self.guide: self.cost(plan)}
        return [found[name] for name in told]

    def hoped(self, plan: CompressionPlan) -> dict[str, float] | None:
        """Return the costs by objective of ``plan`` if it does as well as predictions leave room for.

        None where too little is measured yet, or nothing of the plan's student.
        """
        if not self.ready or _student(plan) not in self._students:  # a student would have to be distilled first
            return None
        slack = 1 - _BEHIND * max(self._fits["latency"].spread, _LEAST_SPREAD)
        return {
            "size_bytes": 0.99 * self.size_bytes(plan),
            "latency": slack * self.latency(plan),
            self.guide: self.cost(plan) - _BEHIND * self._fits["guide"].spread,
        }

    def behind(self, plan: CompressionPlan, rivals: Sequence[Sequence[float]], told: Sequence[str]) -> str | None:
        """Return why ``plan`` is far behind the front, or None if it may reach it.

        Args:
            plan: not measured yet.
            rivals: costs of the front's points in the order of ``told``.
            told: objectives that the sampler is told.
        """
        if (hoped := self.hoped(plan)) is None:
            return None
        for rival in rivals:
            if all(name in hoped and value <= hoped[name] for name, value in zip(told, rival, strict=True)):
                words = ", ".join(f"{name} {hoped[name]:.4g}" for name in told)
                return f"predicted behind a measured point even if it does well ({words})"
        return None

    def _describe(self, plan: CompressionPlan) -> _Features:
        products, after = products_of(plan, self.shape, self.sizes), self.shape.after(plan)
        dropped, cut = plan.of_type(DropBlocks).get(MODEL_SITE), plan.of_type(MaxTokens).get(MODEL_SITE)
        read = 1.0 if cut is None else min(1.0, cut.tokens / self.tokens)
        shapes = Counter(_shape_of(p, read) for p in products if p.kind in _KINDS for _ in range(after.runs))
        reconstructed = bool(plan.of_type(Recover))
        return _Features(
            counted=sum(self.weight_bytes(p) + 4.0 * p.outer * p.bias for p in products),
            extras=np.array([*_extras(products, after), cut is not None]),
            work=_work(products, shapes, after, read),
            shapes=shapes,
            student=_student(plan),
            dropped=len(dropped.blocks) if dropped else 0,
            harm=self.harm(plan),
            pruned=self.harm(plan.structural().without(LowRank)) if reconstructed else 0.0,
            reconstructed=reconstructed,
        )

    def _harm(self, plan: _Features) -> np.ndarray:
        """Return an intercept for each base, and the sum of sensitivities with its root.

        With the same once more of what was pruned, where a reconstruction makes up for a part of it. What is rounded
        after that stays as it is, and factors already come as near as their rank allows.
        """
        bases = [float(plan.student == known) for known in self._students]
        lost = [1.0, plan.dropped, plan.harm, math.sqrt(plan.harm)]
        made_up = [plan.reconstructed * plan.dropped, plan.pruned, math.sqrt(plan.pruned)]
        return np.array([*lost, *bases, *made_up])

    def harm(self, plan: CompressionPlan) -> float:
        """Return the sum of the sensitivities of all sites to what ``plan`` decides there, in nats."""
        student = _student(plan)
        sensitivity = self.sensitivity(student)
        base = self.shape if student is None else self.shape.of_student(student)
        dropped = plan.of_type(DropBlocks).get(MODEL_SITE)
        kept = [n for n in range(len(base.blocks)) if dropped is None or n not in dropped.blocks]
        after = self.shape.after(plan)
        total = 0.0
        for site, decision in plan:
            if decision.scope == "model" and not isinstance(decision, MaxTokens):
                continue
            in_base = before_drop(site, kept)
            if isinstance(decision, LowRank):
                axis, level = level_of(after, site, decision)
            else:
                axis, level = level_of(base, in_base, decision)
            total += sensitivity.at(in_base, axis, level)
        return total


def _deviation(candidate: Candidate) -> float:
    """Return the standard error of what a candidate loses against the reference, or of its accuracy."""
    score = candidate.score
    low, high = (score.accuracy_low, score.accuracy_high) if score.drop is None else (score.drop.low, score.drop.high)
    return (high - low) / (2 * Z95)


def _extras(products: Sequence[Product], after: ModelShape) -> np.ndarray:
    """Return what fills the files besides weights: the graph's description grows with its nodes."""
    # A weight that several products share is stored once, but each of them is a node.
    weights = [p for p in products if p.kind != "index" for _ in range(_runs(p, after))]
    by_bits = [sum(p.bits == bits and not p.whole_steps for p in weights) for bits in (4, 8, 16)]
    by_bits += [sum(p.bits == bits and p.whole_steps for p in weights) for bits in (4, 3, 2)]
    fine = sum(p.bits == 4 and not p.whole_steps and p.group < _FINE for p in weights)
    drawn = sum(p.integers and not p.shares for p in weights)
    trimmed = any(p.kind == "index" for p in products)
    return np.array([1.0, len(after.blocks) * after.runs, len(weights), *by_bits, fine, drawn, trimmed])


def _shape_of(product: Product, read: float) -> _Shape:
    anew = product.bits == 4 and not product.whole_steps
    arithmetic = _AS_INTEGERS if product.integers else _UNPACKED_ANEW if anew else _AS_FLOATS
    return _Shape(product.kind, arithmetic, product.outer, product.inner, read)


def _work(products: Sequence[Product], shapes: Mapping[_Shape, int], after: ModelShape, read: float) -> np.ndarray:
    """Return what takes time: products by arithmetic in multiplications, in number and in rows and columns.

    Args:
        products: of the plan.
        shapes: of those of its blocks, with their numbers.
        after: the shape that it leads to.
        read: share of the target's tokens that is not cut off.
    """
    of_blocks = np.zeros(_WHOLE + _COSTS * 3 * len(_KINDS))
    of_blocks[:_WHOLE] = 1.0, len(after.blocks) * after.runs
    for shape, count in shapes.items():
        of_blocks[shape.place] += count * shape.costs
    found = of_blocks.tolist()
    # Every head compares every token with every other one.
    found += [read * read * after.runs * sum(b.heads for b in after.blocks) / 10]
    neurons = read * after.runs * sum(b.neurons for b in after.blocks) / 1e3
    cheap = after.activation in ACTIVATIONS
    found += [0.0 if cheap else neurons, neurons if cheap else 0.0]
    table = next(p.bits for p in products if p.kind == "embedding")
    found += [read * (table == bits) for bits in _TABLES]
    found += [read * any(p.kind == "index" for p in products)]
    head = next(p for p in products if p.kind == "head")
    return np.array([*found, head.integers, head.bits < 16 and not head.integers])


def _runs(product: Product, after: ModelShape) -> int:
    return after.runs if product.kind in ("attention", "ffn") else 1


def _student(plan: CompressionPlan) -> Student | None:
    return plan.of_type(Student).get(MODEL_SITE)
