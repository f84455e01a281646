"""Predictions that cost nothing: what a plan will weigh, how fast it will be, and what it will lose.

They order proposals and pass over plans that are far behind the front; nothing that is reported comes from them. Sizes
are counted from the products of a plan. Latency is a sum over its products, with non-negative coefficients fitted to
what was measured. Loss of quality starts from the sensitivity of each site to each decision, estimated on calibration
rows (sites are taken to add up, as in Dong et al. 2020, "HAWQ-V2"), and is fitted to what was measured, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from autocompress.anatomy import ModelShape, before_drop
from autocompress.errors import PlanError
from autocompress.model import EncoderModel
from autocompress.pieces import stand_ins
from autocompress.plan import (
    MODEL_SITE,
    CompressionPlan,
    Decision,
    DropBlocks,
    LowRank,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
)
from autocompress.records import OBJECTIVES, Candidate
from autocompress.task import Batch
from autocompress.transforms.prune import Importance

_FEWEST = 12
"""Measured candidates from which on fits are used."""
_BEHIND = 3.0
"""Residual standard deviations that a prediction is given the benefit of before a plan is passed over."""
_DESCRIBED = 8192
"""Plans whose description is kept: fits and proposals ask for the same ones again and again."""
_CHANGES_OF_SETS = 3
"""Times the number of weights that the active set may grow."""
_LEAST_SPREAD = 0.02
"""Relative residual of a latency below which no fit is trusted: that of the measurement itself."""


@dataclass(frozen=True)
class Sensitivity:
    """Divergence (nats) that single decisions cause at the sites of one model.

    Args:
        curves: by site and axis, pairs of (share kept, divergence) in rising order of shares; bits by their number.
    """

    curves: Mapping[tuple[str, str], tuple[tuple[float, float], ...]]

    @classmethod
    def measure(
        cls,
        model: EncoderModel,
        scores: Importance,
        options: Mapping[str, Sequence[Decision]],
        batches: Sequence[Batch],
        *,
        seed: int,
    ) -> Sensitivity:
        """Estimate what each of ``options`` (by site) does on its own to the class probabilities.

        To second order the divergence is half the mean of p_c (dlog p_c / dy . delta y)^2, summed over classes c
        (Martens 2020, "New Insights and Perspectives on the Natural Gradient Method", eq. 13), where delta y is what
        the decision changes at the layers' outputs. Random signs weight the classes, so that one backward pass a
        batch gives all of them.
        """
        flows = [_flow(model, batch, torch.Generator().manual_seed(seed + n)) for n, batch in enumerate(batches)]
        rows = sum(len(batch.labels) for batch in batches)
        curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for site, decisions in options.items():
            for decision in decisions:
                axis, level = _level(model.shape, site, decision)
                try:
                    weights = stand_ins(model, site, decision, scores)
                except PlanError:
                    # Such as groups that do not fill a narrower table: a candidate that decides so fails by itself.
                    continue
                changes = {
                    path: torch.from_numpy(weight) - model.module.get_parameter(f"{path}.weight").detach()
                    for path, weight in weights.items()
                }
                total = 0.0
                for flow in flows:
                    moved = sum(flow[path].moved(change) for path, change in changes.items())
                    total += 0.5 * float(torch.as_tensor(moved).square().sum())
                curves.setdefault((site, axis), []).append((level, total / rows))
        return cls({key: tuple(sorted(points)) for key, points in curves.items()})

    def to_json(self) -> str:
        return json.dumps([[site, axis, points] for (site, axis), points in self.curves.items()])

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        return cls({(s, a): tuple((float(x), float(y)) for x, y in points) for s, a, points in json.loads(text)})

    def at(self, site: str, axis: str, level: float) -> float:
        """Return the divergence at ``level``, between measured ones in proportion; keeping all costs nothing."""
        points = self.curves.get((site, axis), ())
        if axis == "bits":
            return min(((abs(level - bits), found) for bits, found in points), default=(0.0, 0.0))[1]
        shares, found = [share for share, _ in points], [value for _, value in points]
        return float(np.interp(level, [*shares, 1.0], [*found, 0.0])) if points else 0.0


@dataclass(frozen=True)
class _Flow:
    """What a layer read on one batch, and how the signed log-probability answers to what it returned.

    Args:
        read: ``rows x tokens x in``; token ids, ``rows x tokens``, of an embedding.
        slope: ``rows x tokens x out``.
    """

    read: torch.Tensor
    slope: torch.Tensor

    def moved(self, change: torch.Tensor) -> torch.Tensor:
        """Return, for each row, the first-order move of the signed log-probability when weights change so."""
        looked_up = self.read.dtype == torch.int64
        returned = change[self.read] if looked_up else functional.linear(self.read, change)
        return (returned * self.slope).flatten(1).sum(dim=1)


def _flow(model: EncoderModel, batch: Batch, generator: torch.Generator) -> dict[str, _Flow]:
    """Run a batch forward and backward; returns what every layer read and its slope, by path."""
    paths = [path for site in model.shape.sites() for path in model.layout.linears(site)]
    caught: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(path: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            caught[path] = (inputs[0].detach(), output)

        return hook

    handles = [model.module.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    try:
        with torch.enable_grad():
            log_p = functional.log_softmax(model.module(**batch.inputs()).logits, dim=-1)
            signs = torch.randint(0, 2, log_p.shape, generator=generator) * 2.0 - 1.0
            signed = (signs * (0.5 * log_p.detach()).exp() * log_p).sum()
            slopes = torch.autograd.grad(signed, [output for _, output in caught.values()])
    finally:
        for handle in handles:
            handle.remove()
    flows = {}
    for (path, (read, _)), slope in zip(caught.items(), slopes, strict=True):
        rows = len(batch.labels)
        if len(read) != rows:  # positions are looked up once for all rows
            read = read.expand(rows, *read.shape[1:])
            slope = slope.expand(rows, *slope.shape[1:]) / rows
        flows[path] = _Flow(read, slope)
    return flows


def _level(shape: ModelShape, site: str, decision: Decision) -> tuple[str, float]:
    """Return the axis of a decision at a site of a model of ``shape``, and the share that it keeps (or its bits)."""
    if isinstance(decision, Quantize):
        return "bits", float(decision.weight_bits)
    place = shape.sites()[site]
    if isinstance(decision, LowRank):
        return "rank", decision.rank * (place.inner + place.outer) / (place.inner * place.outer)
    assert isinstance(decision, (PruneHeads, PruneNeurons))
    return "keep", decision.keep / place.parts


@dataclass(frozen=True)
class Product:
    """One stored matrix of a planned model, ``outer x inner``.

    Args:
        kind: of its site.
        outer: rows.
        inner: columns.
        bits: 32 where nothing is decided.
        group: weights that share a scale, at 4 bits.
        bias: whether it has one.
        shares: whether it reads the same tensor as the one before it, as keys and values do.
    """

    kind: str
    outer: int
    inner: int
    bits: int
    group: int = 0
    bias: bool = True
    shares: bool = False


@dataclass(frozen=True)
class Sizes:
    """Matrices of the uncompressed model outside its blocks, ``outer x inner`` each."""

    tables: tuple[tuple[int, int], ...]
    head: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: EncoderModel) -> Sizes:
        """Read them off a model."""

        def sizes(paths: Iterable[str]) -> tuple[tuple[int, int], ...]:
            weights = (model.module.get_parameter(f"{path}.weight") for path in paths)
            return tuple((w.shape[0], w.shape[1]) for w in weights)

        return cls(sizes(model.layout.embeddings), sizes(model.layout.head))


def products_of(plan: CompressionPlan, shape: ModelShape, sizes: Sizes) -> list[Product]:
    """Return every matrix of the model that ``plan`` leads to from one of ``shape``."""
    quantize, ranks = plan.of_type(Quantize), plan.of_type(LowRank)
    found: list[Product] = []

    def add(site: str, kind: str, pairs: Iterable[tuple[int, int]]) -> None:
        decision = quantize.get(site)
        bits, group = (32, 0) if decision is None else (decision.weight_bits, decision.group_size)
        rank = ranks[site].rank if site in ranks else 0
        for number, (outer, inner) in enumerate(pairs):
            shares = kind == "attention" and number in (1, 2)
            if rank:
                found.append(Product(kind, rank, inner, bits, group, bias=False, shares=shares))
            biased = kind != "embedding"
            found.append(Product(kind, outer, rank or inner, bits, group, bias=biased, shares=shares and not rank))

    add("embeddings", "embedding", sizes.tables)
    for number, block in enumerate(shape.after(plan).blocks):
        width = block.heads * block.head_size
        attention = [(width, shape.hidden)] * 3 + [(shape.hidden, width)]
        add(f"block.{number}.attention", "attention", attention)
        add(f"block.{number}.ffn", "ffn", [(block.neurons, shape.hidden), (shape.hidden, block.neurons)])
    add("head", "head", sizes.head)
    return found


@dataclass(frozen=True)
class _Features:
    """What a plan is described by: see `Predictor`'s methods of these names."""

    counted: float
    extras: np.ndarray
    work: np.ndarray
    student: Student | None
    dropped: int
    harm: float


@dataclass
class _Fit:
    """A least-squares fit with the spread of its residuals."""

    weights: np.ndarray
    spread: float


@dataclass
class Predictor:
    """Predicts sizes, latency ratios and the guide's cost of plans from what was measured so far.

    Args:
        shape: of the uncompressed model.
        sizes: of its other matrices.
        weight_bytes: bytes of a product's weights and scales in the runtime's files.
        sensitivity: of the uncompressed model (None) or a student; may take seconds at the first call for each.
        guide: the quality that is predicted: ``accuracy``, ``loss`` or ``divergence``.
    """

    shape: ModelShape
    sizes: Sizes
    weight_bytes: Callable[[Product], float]
    sensitivity: Callable[[Student | None], Sensitivity]
    guide: str
    errors: dict[str, list[float]] = field(default_factory=dict)
    """Relative errors of predictions made before their candidate was measured, by ``size`` and ``latency``."""
    _fits: dict[str, _Fit] = field(default_factory=dict)
    _students: list[Student | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._features = lru_cache(maxsize=_DESCRIBED)(self._describe)

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Fit everything to the measured ones of ``candidates``."""
        measured = [c for c in candidates if c.measurement is not None and not c.plan.of_type(Recover)]
        if len(measured) < _FEWEST:
            return
        known = [self._features(c.plan) for c in measured]
        self._students = list(dict.fromkeys(found.student for found in known))
        sizes = np.array([c.score.size_bytes for c in measured], dtype=float)
        counted = np.array([found.counted for found in known])
        self._fits["size"] = _least_squares(np.array([found.extras for found in known]), sizes - counted, ridge=1e-6)
        self._fits["latency"] = _latency_fit(
            np.array([found.work for found in known]),
            np.array([c.score.latency_ratio for c in measured]),
            np.array([c.score.confirmed for c in measured]),
        )
        name, direction = OBJECTIVES[self.guide]
        sign = -1.0 if direction == "maximize" else 1.0
        costs = np.array([sign * getattr(c.score, name) for c in measured])
        self._fits["guide"] = _least_squares(np.array([self._harm(found) for found in known]), costs, ridge=1e-2)

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
        return max(1e-3, float(self._features(plan).work @ self._fits["latency"].weights))

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

    def behind(self, plan: CompressionPlan, rivals: Sequence[Sequence[float]], told: Sequence[str]) -> str | None:
        """Return why ``plan`` is far behind the front, or None if it may reach it.

        Args:
            plan: not measured yet.
            rivals: costs of the front's points in the order of ``told``.
            told: objectives that the sampler is told.
        """
        if not self.ready:
            return None
        slack = 1 - _BEHIND * max(self._fits["latency"].spread, _LEAST_SPREAD)
        hoped = {
            "size_bytes": 0.99 * self.size_bytes(plan),
            "latency": slack * self.latency(plan),
            self.guide: self.cost(plan) - _BEHIND * self._fits["guide"].spread,
        }
        for rival in rivals:
            if all(name in hoped and value <= hoped[name] for name, value in zip(told, rival, strict=True)):
                words = ", ".join(f"{name} {hoped[name]:.4g}" for name in told)
                return f"predicted behind a measured point even if it does well ({words})"
        return None

    def _describe(self, plan: CompressionPlan) -> _Features:
        products, after = products_of(plan, self.shape, self.sizes), self.shape.after(plan)
        dropped = plan.of_type(DropBlocks).get(MODEL_SITE)
        return _Features(
            counted=sum(self.weight_bytes(p) + 4.0 * p.outer * p.bias for p in products),
            extras=_extras(products, after),
            work=_work(products, after),
            student=_student(plan),
            dropped=len(dropped.blocks) if dropped else 0,
            harm=self.harm(plan),
        )

    def _harm(self, plan: _Features) -> np.ndarray:
        """Return an intercept for each base, and the sum of sensitivities with its root."""
        bases = [float(plan.student == known) for known in self._students]
        return np.array([1.0, *bases, plan.dropped, plan.harm, math.sqrt(plan.harm)])

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
            if site == MODEL_SITE:
                continue
            in_base = before_drop(site, kept)
            if isinstance(decision, LowRank):
                axis, level = _level(after, site, decision)
            else:
                axis, level = _level(base, in_base, decision)
            total += sensitivity.at(in_base, axis, level)
        return total


def _extras(products: Sequence[Product], after: ModelShape) -> np.ndarray:
    """Return what fills the files besides weights: the graph's description grows with its nodes."""
    by_bits = [sum(p.bits == bits for p in products) for bits in (4, 8, 16)]
    drawn = sum(p.bits == 8 and p.kind != "embedding" and not p.shares for p in products)
    return np.array([1.0, len(after.blocks), len(products), *by_bits, drawn])


def _work(products: Sequence[Product], after: ModelShape) -> np.ndarray:
    """Return what takes time: products by arithmetic in multiplications, in number and in rows and columns."""
    found = [1.0, float(len(after.blocks))]
    for kind in ("attention", "ffn"):
        for widths in ((8,), (4,), (16, 32)):
            chosen = [p for p in products if p.kind == kind and p.bits in widths]
            found += [
                sum(p.outer * p.inner for p in chosen) / 1e6,
                len(chosen) / 10,
                sum(p.outer for p in chosen) / 1e4,
                sum(p.inner for p in chosen) / 1e4,
            ]
    found += [sum(b.heads for b in after.blocks) / 10, sum(b.neurons for b in after.blocks) / 1e3]
    embedding = next(p.bits for p in products if p.kind == "embedding")
    return np.array([*found, embedding == 8, embedding == 4])


def _student(plan: CompressionPlan) -> Student | None:
    return plan.of_type(Student).get(MODEL_SITE)


def _least_squares(inputs: np.ndarray, outputs: np.ndarray, *, ridge: float) -> _Fit:
    """Fit ``inputs @ weights`` (``rows x features``) to ``outputs`` with a penalty in units of each feature."""
    scale = np.maximum(np.abs(inputs).max(axis=0), 1e-12)
    scaled = inputs / scale
    penalty = ridge * len(outputs) * np.eye(scaled.shape[1])
    penalty[0, 0] = 0.0
    weights = np.linalg.solve(scaled.T @ scaled + penalty + 1e-12 * np.eye(len(penalty)), scaled.T @ outputs)
    left = outputs - scaled @ weights
    freedom = max(1, len(outputs) - np.linalg.matrix_rank(scaled))
    return _Fit(weights / scale, float(np.sqrt(np.square(left).sum() / freedom)))


def _relative_fit(inputs: np.ndarray, outputs: np.ndarray) -> _Fit:
    """Fit non-negative weights to relative errors of ``outputs``, which are > 0."""
    spread = inputs.std(axis=0)
    scale = np.where(spread > 1e-9, spread, 1.0)
    penalty = np.sqrt(1e-4 * len(outputs)) * np.eye(inputs.shape[1])
    penalty[0, 0] = 0.0
    stacked = np.vstack([inputs / scale / outputs[:, None], penalty])
    weights = _nonnegative(stacked, np.concatenate([np.ones(len(outputs)), np.zeros(len(penalty))])) / scale
    left = inputs @ weights / outputs - 1
    freedom = max(1, len(outputs) - int((weights > 0).sum()))
    return _Fit(weights, float(np.sqrt(np.square(left).sum() / freedom)))


def _latency_fit(work: np.ndarray, ratios: np.ndarray, confirmed: np.ndarray) -> _Fit:
    """Fit ratios as they are once confirmed, where there are such.

    In a search, between rows of other shapes, models are slower by a few percent than where nothing else is run, and
    small ones more so than the reference: the factor between the two comes from the confirmed ones, which are compared
    with a fit to the others, since those of them that were measured too fast are more likely to be confirmed.
    """
    if min(confirmed.sum(), (~confirmed).sum()) < _FEWEST:
        return _relative_fit(work, ratios)
    searched = _relative_fit(work[~confirmed], ratios[~confirmed])
    factor = float(np.median(ratios[confirmed] / (work[confirmed] @ searched.weights)))
    return _relative_fit(work, np.where(confirmed, ratios, factor * ratios))


def _nonnegative(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return the non-negative least-squares weights, by the active sets of Lawson and Hanson on the normal equations.

    See Bro and de Jong (1997), "A fast non-negativity-constrained least squares algorithm".
    """
    square, product = inputs.T @ inputs, inputs.T @ outputs
    weights, free = np.zeros(len(product)), np.zeros(len(product), dtype=bool)
    enough = 1e-10 * max(1.0, float(np.abs(product).max(initial=0.0)))
    for _ in range(_CHANGES_OF_SETS * len(weights)):
        slope = np.where(free, -np.inf, product - square @ weights)
        if not (slope > enough).any():
            break
        free[int(slope.argmax())] = True
        while True:
            wanted = np.zeros(len(weights))
            wanted[free] = np.linalg.lstsq(square[np.ix_(free, free)], product[free], rcond=None)[0]
            below = free & (wanted <= 0)
            if not below.any():
                weights = wanted
                break
            # As far towards it as all stay non-negative; what reaches zero is fixed there.
            step = float((weights[below] / np.maximum(weights[below] - wanted[below], 1e-300)).min())
            weights = weights + step * (wanted - weights)
            free &= ~(below & (weights <= 1e-14))
            weights[~free] = 0.0
    return weights
