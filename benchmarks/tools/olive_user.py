"""What Olive loads as its user script: the rows that it calibrates, scores and times candidates with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from olive.data.registry import Registry
from points import INPUTS, Prepared

_FIRST_TOKEN = 5


class FeedRows(torch.utils.data.Dataset[tuple[dict[str, torch.Tensor], torch.Tensor]]):
    """Batches of inputs and classes; each is one row at its real length."""

    def __init__(self, feeds: list[dict[str, np.ndarray]], labels: list[int]) -> None:
        self._feeds, self._labels = feeds, labels

    def __len__(self) -> int:
        return len(self._feeds)

    def __getitem__(self, row: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = {name: torch.from_numpy(array) for name, array in self._feeds[row].items()}
        return inputs, torch.tensor([self._labels[row]])


@Registry.register_dataset()
def prepared_rows(prepared: str, split: str, rows: int | None = None, **_: Any) -> FeedRows:
    """Return the first ``rows`` of a split."""
    found = Prepared(Path(prepared)).rows(split, rows)
    return FeedRows(found.feeds(), list(found.labels))


@Registry.register_dataset()
def target_shape(prepared: str, **_: Any) -> FeedRows:
    """Return one batch of exactly the shape that latency is measured at, without padding."""
    meta = Prepared(Path(prepared)).meta
    shape = (meta["batch_size"], meta["tokens"])
    ids = np.random.default_rng(0).integers(_FIRST_TOKEN, 1000, shape, dtype=np.int64)
    return FeedRows([dict(zip(INPUTS, (ids, np.ones_like(ids)), strict=True))], [0])


@Registry.register_post_process()
def predicted_class(logits: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return the class of each row."""
    return logits.argmax(dim=-1)


def files_of(model: Path) -> list[Path]:
    """Return the model file and what it stores beside it."""
    return [model, *sorted(model.parent.glob(f"{model.name}.data"))]
