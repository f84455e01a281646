"""Scoring: accuracy with its interval, logits in row order, and what ends a pass early."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tokenizer

from autocompress import scoring, task
from autocompress.config import DataConfig
from autocompress.errors import MeasurementError
from autocompress.runtimes.base import Session


@pytest.fixture(scope="module")
def rows(tiny_csv: Path) -> task.Split:
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    return loaded.tokenized(make_tokenizer("bert"), 16)["search"]


class Scripted(Session):
    """Returns logits that are a function of a row's tokens."""

    def __init__(self, of: Callable[[np.ndarray, np.ndarray], list[float]]) -> None:
        self.of = of
        self.sizes: list[int] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.sizes.append(len(ids))
        return np.array([self.of(i, m) for i, m in zip(ids, mask, strict=True)], dtype=np.float32)

    def close(self) -> None:
        """Hold nothing."""


class TestWilson:
    @pytest.mark.parametrize(
        ("hits", "count", "low", "high"),
        [
            # Wilson score interval, 95 %: Newcombe 1998, "Two-sided confidence intervals for the single proportion",
            # Statistics in Medicine 17, table I, method 3.
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ],
    )
    def test_published_values(self, hits: int, count: int, low: float, high: float) -> None:
        assert scoring.wilson(hits, count) == pytest.approx((low, high), abs=5e-5)

    @pytest.mark.parametrize("count", [1, 7, 1000])
    def test_it_is_symmetric_and_within_bounds(self, count: int) -> None:
        for hits in {0, 1, count // 2, count}:
            low, high = scoring.wilson(hits, count)
            mirrored = scoring.wilson(count - hits, count)
            assert 0 <= low <= hits / count <= high <= 1
            assert low < high
            assert mirrored == pytest.approx((1 - high, 1 - low))
        assert scoring.wilson(0, count)[0] == 0.0
        assert scoring.wilson(count, count)[1] == 1.0


class TestAccuracy:
    def split(self, labels: list[int]) -> task.Split:
        return task.Split(tuple((1, 2) for _ in labels), None, tuple(labels))

    def test_values_worked_out_by_hand(self) -> None:
        logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.5], [0.0, -1.0]], dtype=np.float32)
        found = scoring.accuracy(logits, self.split([0, 1, 0, 1]))
        assert found.value == 0.5
        assert found.rows == 4
        assert (found.low, found.high) == scoring.wilson(2, 4)
        losses = [np.log(1 + np.exp(-2)), np.log(1 + np.exp(-1)), np.log(1 + np.exp(0.5)), np.log(1 + np.exp(1))]
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)

    def test_large_logits_do_not_overflow(self) -> None:
        logits = np.array([[3e4, -3e4], [-3e4, 3e4]], dtype=np.float32)
        assert scoring.accuracy(logits, self.split([0, 0])).loss == pytest.approx(3e4)

    def test_the_hash_is_of_the_predicted_classes_in_order(self) -> None:
        logits = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
        found = scoring.predictions_hash(logits)
        assert len(found) == 64
        assert scoring.predictions_hash(logits * 7 + 1) == found
        assert scoring.predictions_hash(logits[::-1]) != found
        flipped = logits.copy()
        flipped[20] = -flipped[20]
        assert scoring.predictions_hash(flipped) != found
        assert scoring.accuracy(logits, self.split([0] * 50)).predictions == found
        # Fixed for ever: what was exported is compared with it.
        assert (
            scoring.predictions_hash(np.eye(3, dtype=np.float32))
            == "ad5dc1478de06a4c2728ea528bd9361a4b945e92a414bf4d180cedaaeaa5f4cc"
        )


class TestDrop:
    @staticmethod
    def rows(lost: int, gained: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray, task.Split]:
        """Return logits, the reference's, and rows of class 0 of which so many are right."""
        right = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
        ours = np.concatenate([right[1]] * lost + [right[0]] * (gained + both) + [right[1]] * neither)
        theirs = np.concatenate([right[0]] * lost + [right[1]] * gained + [right[0]] * both + [right[1]] * neither)
        count = lost + gained + both + neither
        return ours, theirs, task.Split(((1,),) * count, None, (0,) * count)

    def test_values_worked_out_by_hand(self) -> None:
        # 11/102 - 5/102 = 0.0588; sqrt((16/102 - 0.0588^2) / 102) = 0.03878, times 1.96 = 0.0760
        found = scoring.drop(*self.rows(lost=10, gained=4, both=80, neither=6))
        assert found == pytest.approx((0.06, -0.0172, 0.1348), abs=1e-4)

    def test_what_both_get_right_or_wrong_makes_no_difference(self) -> None:
        assert scoring.drop(*self.rows(10, 4, 80, 6)) == scoring.drop(*self.rows(10, 4, 6, 80))

    def test_gains_are_losses_the_other_way_round(self) -> None:
        lost, gained = scoring.drop(*self.rows(10, 4, 80, 6)), scoring.drop(*self.rows(4, 10, 80, 6))
        assert (lost.value, lost.low, lost.high) == pytest.approx((-gained.value, -gained.high, -gained.low))

    @pytest.mark.parametrize("lost", [0, 1, 3])
    def test_it_holds_the_value_and_stays_within_bounds(self, lost: int) -> None:
        found = scoring.drop(*self.rows(lost=lost, gained=0, both=0, neither=3 - lost))
        assert -1 <= found.low <= found.value <= found.high <= 1

    @pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.01), (0.05, 0.05), (0.1, 0.02)])
    def test_it_holds_the_truth_about_as_often_as_it_says(self, lost: float, gained: float) -> None:
        draws = np.random.default_rng(0).multinomial(1000, [lost, gained, 0.8, 0.2 - lost - gained], size=300)
        intervals = [scoring.drop(*self.rows(*map(int, counts))) for counts in draws]
        held = np.mean([found.low <= lost - gained <= found.high for found in intervals])
        assert 0.92 <= held <= 0.985


class TestDivergence:
    def test_it_is_zero_for_what_is_equal(self) -> None:
        logits = (10 * np.random.default_rng(0).standard_normal((200, 4))).astype(np.float32)
        assert scoring.divergence(logits, logits) == 0.0
        # Adding the same to all logits of a row leaves its probabilities.
        assert scoring.divergence(logits + np.float32(8), logits) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("classes", [2, 3, 8])
    def test_it_is_that_of_torch(self, classes: int) -> None:
        rng = np.random.default_rng(classes)
        logits, reference = (rng.standard_normal((2, 300, classes)) * 3).astype(np.float32)
        expected = torch.nn.functional.kl_div(
            torch.log_softmax(torch.from_numpy(logits).double(), dim=1),
            torch.log_softmax(torch.from_numpy(reference).double(), dim=1),
            reduction="batchmean",
            log_target=True,
        )
        assert scoring.divergence(logits, reference) == pytest.approx(float(expected), rel=1e-12)
        assert scoring.divergence(logits, reference) != pytest.approx(scoring.divergence(reference, logits), rel=1e-3)

    def test_it_is_never_negative_nor_overflows(self) -> None:
        rng = np.random.default_rng(0)
        for scale in (1e-6, 1e-3, 1, 1e4):
            reference = (scale * rng.standard_normal((500, 3))).astype(np.float32)
            near = np.nextafter(reference, np.float32(np.inf))
            for row in range(500):
                assert scoring.divergence(near[row : row + 1], reference[row : row + 1]) >= 0
        sure = np.array([[3e4, -3e4]], dtype=np.float32)
        assert scoring.divergence(-sure, sure) == pytest.approx(6e4)


def rows_with(labels: np.ndarray) -> task.Split:
    return task.Split(tuple((1, 2) for _ in labels), None, tuple(labels.tolist()))


def one_hot(predicted: np.ndarray, classes: int = 2) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predicted]


class TestBound:
    @pytest.mark.parametrize(("rows", "good", "drawn"), [(6, 2, 3), (7, 5, 4), (5, 0, 2), (5, 5, 2), (8, 4, 8)])
    def test_the_chance_is_that_of_all_draws(self, rows: int, good: int, drawn: int) -> None:
        draws = [sum(row < good for row in draw) for draw in itertools.combinations(range(rows), drawn)]
        for hits in range(drawn + 1):
            expected = sum(found <= hits for found in draws) / len(draws)
            assert scoring._hypergeometric(hits, rows, good, drawn) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("hits", [4700, 4790, 4900])
    def test_the_chance_is_the_same_whichever_of_the_two_are_drawn(self, hits: int) -> None:
        """In a split of many rows, too, where coefficients have thousands of digits."""
        chance = scoring._hypergeometric(hits, 20_000, 16_000, 6_000)
        assert 0 < chance < 1
        assert chance == pytest.approx(scoring._hypergeometric(hits, 20_000, 6_000, 16_000), rel=1e-12)

    def test_more_hits_than_rows_are_never_reached(self) -> None:
        assert scoring._hypergeometric(3, 10, 11, 5) == 0.0

    @pytest.mark.parametrize("guide", ["loss", "divergence"])
    def test_nothing_that_gets_below_the_cost_is_stopped(self, guide: str) -> None:
        rng = np.random.default_rng(0)
        stops = 0
        for _ in range(1000):
            count = int(rng.integers(4, 40))
            labels = rng.integers(0, 3, count)
            rows = rows_with(labels)
            reference = (3 * rng.standard_normal((count, 3))).astype(np.float32)
            logits = (reference + rng.exponential(2) * rng.standard_normal((count, 3))).astype(np.float32)
            found = scoring.accuracy(logits, rows).loss if guide == "loss" else scoring.divergence(logits, reference)
            order = rng.permutation(count)
            looks = [order[:n].tolist() for n in range(1, count + 1)]
            undercut = scoring.Bound(guide, found * (1 + 1e-9) + 1e-12)
            assert not any(undercut.out_of_reach(logits, done, rows, reference) for done in looks)
            cost = found * rng.uniform(0.05, 1)
            reasons = [scoring.Bound(guide, cost).out_of_reach(logits, done, rows, reference) for done in looks]
            assert reasons[-1] is not None, "all rows were run and the cost was not undercut"
            # Once it is known it stays known.
            first = next(n for n, reason in enumerate(reasons) if reason)
            assert all(reasons[first:])
            stops += first < count - 1
        assert stops > 500, "most of those that cannot reach it are stopped before the end"

    def test_rows_that_were_not_run_are_not_read(self) -> None:
        labels = np.array([0, 1, 0, 1])
        logits = np.full((4, 2), np.nan, dtype=np.float32)
        logits[[2, 0]] = [[4, 0], [4, 0]]
        reference = np.zeros((4, 2), dtype=np.float32)
        for guide in ("accuracy", "loss", "divergence"):
            cost = -1.0 if guide == "accuracy" else 9.0
            found = scoring.Bound(guide, cost).out_of_reach(logits, [2, 0], rows_with(labels), reference)
            assert (found is None) == (guide != "accuracy"), "more than all rows cannot be right"

    def simulate(self, hits: int, front: int, count: int, *, seed: int, rows: int = 1000) -> tuple[int, int]:
        """Return how many of ``count`` candidates of that many hits are stopped, and after how many rows in all."""
        rng = np.random.default_rng(seed)
        labels = np.zeros(rows, dtype=np.int64)
        split, bound = rows_with(labels), scoring.Bound("accuracy", -front / rows)
        stops, run = 0, 0
        for _ in range(count):
            predicted = np.ones(rows, dtype=np.int64)
            predicted[rng.permutation(rows)[:hits]] = 0
            logits = one_hot(predicted)
            for look in (1, 2, 3):
                done = range(look * rows // 4)
                if bound.out_of_reach(logits, done, split, logits):
                    stops += 1
                    run += len(done)
                    break
            else:
                run += rows
        return stops, run

    @pytest.mark.parametrize("front", [700, 850])
    def test_few_that_would_reach_the_front_are_stopped(self, front: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scoring, "_hypergeometric", functools.cache(scoring._hypergeometric))
        # The worst case: one hit more than the front.
        stops, _ = self.simulate(front + 1, front, 3000, seed=front)
        # Three in 3,000 are allowed on average; ten or more of them have a probability of one in a thousand.
        assert stops <= 3000 * scoring.WRONG_STOPS * 3
        assert self.simulate(front + 30, front, 500, seed=front)[0] == 0

    def test_what_is_hopeless_is_stopped_at_the_first_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scoring, "_hypergeometric", functools.cache(scoring._hypergeometric))
        assert self.simulate(500, 850, 200, seed=0) == (200, 200 * 250)
        stops, run = self.simulate(780, 850, 300, seed=1)
        assert stops >= 290
        assert run < 0.7 * 300 * 1000

    def test_equal_hits_do_not_reach_the_front(self) -> None:
        labels = np.zeros(100, dtype=np.int64)
        predicted = np.array([0] * 80 + [1] * 20)
        rows, logits = rows_with(labels), one_hot(predicted)
        everything = list(range(100))
        for front, beaten in ((0.79, False), (0.80, True), (0.81, True)):
            found = scoring.Bound("accuracy", -front).out_of_reach(logits, everything, rows, logits)
            assert (found is not None) == beaten

    def test_the_reason_says_what_was_seen(self) -> None:
        labels = np.zeros(100, dtype=np.int64)
        logits = one_hot(np.ones(100, dtype=np.int64))
        rows, reference = rows_with(labels), one_hot(labels)
        found = scoring.Bound("accuracy", -0.5).out_of_reach(logits, range(25), rows, reference)
        assert found is not None
        assert found.startswith("0 hits in 25 of 100 rows; the front needs 51 (chance ")
        found = scoring.Bound("loss", 0.2).out_of_reach(logits, range(25), rows, reference)
        assert found == "loss at least 0.328 after 25 of 100 rows; the front has 0.2"


class TestLogits:
    @pytest.mark.parametrize("batch_size", [1, 7, 64])
    def test_they_come_back_in_row_order(self, rows: task.Split, batch_size: int) -> None:
        session = Scripted(lambda ids, mask: [float((ids * mask).sum()), float(mask.sum())])
        found = scoring.logits_of(session, rows, rows.in_order_of_length(batch_size))
        assert found.shape == (len(rows), 2)
        assert found.dtype == np.float32
        assert found[:, 0].tolist() == [float(sum(tokens)) for tokens in rows.input_ids]
        assert found[:, 1].tolist() == [float(len(tokens)) for tokens in rows.input_ids]
        assert max(session.sizes) == min(batch_size, len(rows))
        assert sum(session.sizes) == len(rows)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_logits_that_are_not_finite_are_refused(self, rows: task.Split, value: float) -> None:
        bad = {rows.input_ids[3], rows.input_ids[20]}

        def of(ids: np.ndarray, mask: np.ndarray) -> list[float]:
            return [0.0, value if tuple(ids[mask == 1].tolist()) in bad else 1.0]

        with pytest.raises(MeasurementError, match=f"logits: 2 of {len(rows)} rows are not finite"):
            scoring.logits_of(Scripted(of), rows, rows.in_order_of_length(8))

    def test_rows_that_no_batch_holds_are_noticed(self, rows: task.Split) -> None:
        session = Scripted(lambda *_: [0.0, 1.0])
        with pytest.raises(MeasurementError, match=f"logits: 8 of {len(rows)} rows are not finite"):
            scoring.logits_of(session, rows, list(rows.in_order_of_length(8))[1:])

    def test_no_rows_are_refused(self) -> None:
        with pytest.raises(MeasurementError, match="there are no rows to score on"):
            scoring.logits_of(Scripted(lambda *_: [0.0, 1.0]), task.Split((), None, ()), [])
