"""Trimming the vocabulary: which rows are kept, and which of them every token reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LABELS, SPECIAL, make_model, make_tokenizer
from helpers_plans import counts_of

from autocompress import task
from autocompress.anatomy import ModelShape
from autocompress.config import DataConfig
from autocompress.decisions import TrimVocabulary
from autocompress.errors import PlanError
from autocompress.model import understand
from autocompress.plan import CompressionPlan
from autocompress.transforms import check_plan
from autocompress.transforms.importance import importance
from autocompress.transforms.vocabulary import TokenUse, trimmed

WIDTH = 8
EVENLY = torch.eye(WIDTH, dtype=torch.float64)
INF = float("inf")


def table_of(*rows: tuple[float, ...]) -> np.ndarray:
    """Return rows with the given first numbers and zeros after them."""
    return np.array([[*row, *[0.0] * (WIDTH - len(row))] for row in rows], dtype=np.float32)


def use_of(table: np.ndarray, counts: list[float], slopes: torch.Tensor = EVENLY) -> TokenUse:
    return TokenUse.of(torch.from_numpy(table), torch.tensor(counts, dtype=torch.float64), slopes)


def test_what_is_frequent_and_unlike_the_others_is_kept_first() -> None:
    table = table_of((0.0,), (10.0,), (10.1,), (20.0,), (30.0,), (40.0,))
    #                what has to stay, frequent, as frequent but alike, rare, not read, read once
    use = use_of(table, [INF, 100, 100, 5, 0, 1])
    assert use.order.tolist() == [0, 1, 3, 5, 2, 4]


def test_all_that_has_to_stay_comes_first_even_if_rows_are_equal() -> None:
    use = use_of(table_of((1.0,), (2.0,), (2.0,), (2.0,)), [3, INF, INF, INF])
    assert sorted(use.order[:3].tolist()) == [1, 2, 3]
    rows, index = trimmed(table_of((1.0,), (2.0,), (2.0,), (2.0,)), TrimVocabulary(keep=3), use)
    assert index[1:].tolist() == [0, 1, 2], "each reads its own"
    assert rows.shape == (3, WIDTH)


def test_special_tokens_are_never_trimmed() -> None:
    table = table_of((1.0,), (2.0,), (3.0,), (4.0,))
    use = use_of(table, [3, INF, INF, 1])
    assert use.needed == 2
    assert trimmed(table, TrimVocabulary(keep=2), use)[1].tolist() == [0, 0, 1, 1]
    with pytest.raises(PlanError, match=r"keep must be >= 2, which are special tokens, got 1"):
        trimmed(table, TrimVocabulary(keep=1), use)


def test_every_token_reads_the_nearest_row_that_is_kept() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3000, WIDTH)).astype(np.float32)
    half = torch.from_numpy(rng.normal(size=(WIDTH, WIDTH)))
    use = use_of(table, rng.integers(0, 50, 3000).astype(float).tolist(), half @ half.T)
    rows, index = trimmed(table, TrimVocabulary(keep=100), use)
    kept = np.sort(use.order[:100].numpy())
    assert np.array_equal(rows, table[kept])
    metric = (half @ half.T).numpy()
    metric = metric + 0.1 * np.trace(metric) / WIDTH * np.eye(WIDTH)
    apart = table[:, None].astype(np.float64) - rows[None]
    distances = np.einsum("tkw,wv,tkv->tk", apart, metric, apart)
    chosen = np.take_along_axis(distances, index[:, None].astype(int), axis=1)[:, 0]
    assert np.allclose(chosen, distances.min(axis=1), rtol=1e-3, atol=1e-4)
    assert np.array_equal(index[kept], np.arange(100))


def test_what_the_loss_does_not_answer_to_is_near() -> None:
    """The last token differs from the first a lot where nothing depends on it, from the second a little elsewhere."""
    table = table_of((0.0, 0.0), (3.0, 8.0), (0.0, 8.0))
    slopes = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    slopes[0, 0] = 1.0
    for given, expected in ((slopes, 0), (EVENLY, 1)):
        use = TokenUse(torch.tensor([0, 1, 2]), given)
        assert trimmed(table, TrimVocabulary(keep=2), use)[1].tolist() == [0, 1, expected]


@pytest.mark.parametrize("slope", [0.0, float("nan"), float("inf")])
def test_without_slopes_that_say_anything_distances_are_plain(slope: float) -> None:
    table = table_of((0.0,), (10.0,), (4.0,), (6.0,))
    use = use_of(table, [9, 9, 1, 1], torch.full((WIDTH, WIDTH), slope, dtype=torch.float64))
    assert set(use.order[:2].tolist()) == {0, 1}
    assert trimmed(table, TrimVocabulary(keep=2), use)[1].tolist() == [0, 1, 0, 1]


def test_numbers_of_rows_take_no_more_bytes_than_they_need() -> None:
    table = np.random.default_rng(0).normal(size=(2**16 + 2, 1)).astype(np.float32)
    use = TokenUse(torch.arange(len(table)), torch.eye(1, dtype=torch.float64))
    assert trimmed(table[:5], TrimVocabulary(keep=4), TokenUse(torch.arange(5), use.slopes))[1].dtype == np.uint16
    # Looked up in few tokens at a time: all distances at once would fill the memory.
    _, index = trimmed(table[:40], TrimVocabulary(keep=39), TokenUse(torch.arange(40), use.slopes))
    assert index.max() == 38


@pytest.mark.parametrize("family", FAMILIES)
def test_the_words_of_a_task_are_ranked_with_its_parts(family: str, tiny_csv: str) -> None:
    of = understand(make_model(family, labels=LABELS), base="test")
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    rows = loaded.tokenized(make_tokenizer(family), 16)["train"]
    batches = list(rows.head(24).in_order_of_length(8))
    before = {name: tensor.clone() for name, tensor in of.module.state_dict().items()}
    counts = counts_of(of.shape.vocabulary, batches)
    found, plain = importance(of, batches, counts=counts), importance(of, batches)
    assert found.tokens is not None
    assert plain.tokens is None
    order = found.tokens.order.tolist()
    assert sorted(order) == list(range(of.shape.vocabulary))
    assert sorted(order[: len(SPECIAL)]) == list(range(len(SPECIAL)))
    read = int((counts > 0).sum())
    assert all(counts[token] == 0 for token in order[read:])
    assert torch.linalg.eigvalsh(found.tokens.slopes).min() > -1e-12
    assert float(found.tokens.slopes.trace()) > 0
    for mine, other in zip((*found.heads, *found.neurons), (*plain.heads, *plain.neurons), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in of.module.state_dict().items())
    assert not of.module.get_submodule(of.layout.embeddings[0])._forward_hooks


def test_slopes_are_those_of_the_loss(tiny_csv: str) -> None:
    """Moving one word's row a little moves the loss as the slopes say, on average over words."""
    of = understand(make_model("bert", labels=LABELS), base="test").clone()
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    rows = loaded.tokenized(make_tokenizer("bert"), 16)["train"]
    batch = rows.batch([0])
    counts = counts_of(of.shape.vocabulary, [batch])
    use = importance(of, [batch], counts=counts).tokens
    assert use is not None
    tokens = [t for t in batch.input_ids[0].tolist() if t >= len(SPECIAL)]
    assert len(tokens) == len(set(tokens)), "each word once, so that its row is one place"
    table = of.module.get_parameter(f"{of.layout.embeddings[0]}.weight")
    loss = torch.nn.functional.cross_entropy(of.module(**batch.inputs()).logits, batch.labels)
    [slope] = torch.autograd.grad(loss, table)
    expected = slope[tokens].double().T @ slope[tokens].double() / len(tokens)
    assert torch.allclose(use.slopes, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4)


def test_plans_that_cannot_be_are_refused() -> None:
    shape = ModelShape(32, (), 100)
    check_plan(CompressionPlan((("embeddings", TrimVocabulary(keep=99)),)), shape)
    with pytest.raises(PlanError, match=r"embeddings: TrimVocabulary.keep must be < 100, got 100"):
        check_plan(CompressionPlan((("embeddings", TrimVocabulary(keep=100)),)), shape)
    with pytest.raises(PlanError, match=r"head: only embeddings have a vocabulary"):
        check_plan(CompressionPlan((("head", TrimVocabulary(keep=10)),)), shape)
