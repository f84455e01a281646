"""The task: labelled texts in three splits, tokenised once.

``train`` is for fine-tuning, distillation and calibration; ``search`` scores candidates; ``test`` is touched once, for
points that are exported. Rows are assigned by a hash of their text, so that equal texts stay together and the same
data always split the same way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autocompress.config import DataConfig
from autocompress.errors import DataError
from autocompress.sources import is_held_out, read_table

if TYPE_CHECKING:
    import pandas as pd

Row = tuple[str, str | None, int]
"""Text, second text or None, and class of a row."""
FEWEST_ROWS = 20
"""That are not held out: half of them score candidates."""


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest of them.

    Args:
        input_ids: ``batch x tokens``, int64.
        attention_mask: ``batch x tokens``, int64, 1 for real tokens.
        token_type_ids: ``batch x tokens``, int64, or None where the model takes none or texts come alone.
        labels: ``batch``, int64.
        rows: ``batch``, positions in the split.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None
    labels: torch.Tensor
    rows: torch.Tensor

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the model's keyword arguments."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the same inputs for a runtime."""
        return {name: tensor.numpy() for name, tensor in self.inputs().items()}


@dataclass(frozen=True)
class Split:
    """Tokenised rows of one split: lists of token ids (and segment ids) of varying length, and class numbers."""

    input_ids: tuple[tuple[int, ...], ...]
    token_type_ids: tuple[tuple[int, ...], ...] | None
    labels: tuple[int, ...]
    pad_id: int = 0
    cut: int | None = None
    """How many rows lost tokens beyond the longest that is read; None where the tokenizer does not tell."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int], *, step: int = 1) -> Batch:
        """Return the given rows as one batch, padded to a multiple of ``step`` tokens or the split's longest row."""
        width = max(len(self.input_ids[row]) for row in rows)
        if step > 1:
            width = max(width, min(-(-width // step) * step, max(map(len, self.input_ids))))
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        types = None if self.token_type_ids is None else torch.zeros((len(rows), width), dtype=torch.int64)
        for position, row in enumerate(rows):
            tokens = self.input_ids[row]
            ids[position, : len(tokens)] = torch.tensor(tokens)
            mask[position, : len(tokens)] = 1
            if types is not None and self.token_type_ids is not None:
                types[position, : len(tokens)] = torch.tensor(self.token_type_ids[row])
        labels = torch.tensor([self.labels[row] for row in rows])
        return Batch(ids, mask, types, labels, torch.tensor(list(rows)))

    def in_order_of_length(
        self, batch_size: int, *, step: int = 1, among: Sequence[int] | None = None, most_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yield all rows in batches of similar length, which saves padding; ``rows`` says where they belong.

        A ``step`` above 1 pads to multiples of it: a runtime that prepares its kernels for each new shape then meets
        few of them. ``among`` restricts it to some rows, and batches of more than one row have ``most_tokens``, padding
        up to the longest of them included.
        """
        order = sorted(range(len(self)) if among is None else among, key=lambda row: (len(self.input_ids[row]), row))
        batch: list[int] = []
        for row in order:
            tokens = (len(batch) + 1) * len(self.input_ids[row])
            if len(batch) == batch_size or (batch and most_tokens is not None and tokens > most_tokens):
                yield self.batch(batch, step=step)
                batch = []
            batch.append(row)
        if batch:
            yield self.batch(batch, step=step)

    def shuffled(self, batch_size: int, generator: torch.Generator) -> list[Batch]:
        """Return one epoch of shuffled batches, each of rows of similar length."""
        order = torch.randperm(len(self), generator=generator).tolist()
        pool, batches = batch_size * 50, []
        for start in range(0, len(order), pool):
            chunk = sorted(order[start : start + pool], key=lambda row: len(self.input_ids[row]))
            batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        return [self.batch(batches[i]) for i in torch.randperm(len(batches), generator=generator).tolist()]

    def head(self, count: int) -> Split:
        """Return the first ``count`` rows."""
        types = None if self.token_type_ids is None else self.token_type_ids[:count]
        return Split(self.input_ids[:count], types, self.labels[:count], self.pad_id)


@dataclass(frozen=True)
class Task:
    """Texts and classes in three splits, before tokenisation.

    Args:
        labels: class names; a row's class is a position in them.
        splits: per split name, rows of (text, second text or None, class).
        shared_rows: texts that stand in two splits, where the run file accepts that.
    """

    labels: tuple[str, ...]
    splits: dict[str, tuple[Row, ...]]
    shared_rows: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """Content key of all rows, splits and class names; part of the key of every piece, so taken once."""
        text = json.dumps({"labels": self.labels, "splits": self.splits}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def tokenized(self, tokenizer: Any, max_tokens: int) -> Mapping[str, Split]:
        """Return the splits with texts truncated at ``max_tokens``, each tokenised when it is first asked for."""
        return _Tokenized(self.splits, tokenizer, max_tokens)

    def head(self, split: str, count: int) -> Task:
        """Return a task of that split's first rows alone."""
        return Task(self.labels, {split: self.splits[split][:count]})


class _Tokenized(Mapping[str, Split]):
    """Splits as a model reads them. A worker needs none of the training rows, which are most."""

    def __init__(self, rows: Mapping[str, Sequence[Row]], tokenizer: Any, max_tokens: int) -> None:
        self._rows, self._tokenizer, self._max_tokens = rows, tokenizer, max_tokens
        self._found: dict[str, Split] = {}

    def __getitem__(self, name: str) -> Split:
        if name not in self._found:
            self._found[name] = _tokenize(self._rows[name], self._tokenizer, self._max_tokens)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _tokenize(rows: Sequence[Row], tokenizer: Any, max_tokens: int) -> Split:
    paired = bool(rows) and rows[0][1] is not None
    pairs = [str(row[1]) for row in rows] if paired else None
    encoded = tokenizer([row[0] for row in rows], pairs, truncation=True, max_length=max_tokens)
    types = encoded.get("token_type_ids") if paired else None
    return Split(
        tuple(map(tuple, encoded["input_ids"])),
        None if types is None else tuple(map(tuple, types)),
        tuple(row[2] for row in rows),
        int(tokenizer.pad_token_id or 0),
        None if encoded.encodings is None else sum(bool(each.overflowing) for each in encoded.encodings),
    )


def load(config: DataConfig, *, labels: tuple[str, ...] | None = None) -> Task:
    """Read the data and cut the three splits.

    Args:
        config: the run file's ``data`` section.
        labels: class names of a model that already has a head; the data must not know others.

    Raises:
        DataError: for missing, empty, one-class or unreadable data, labels unknown to the model, or shared rows.
    """
    names, train, test = _held_apart(config, labels)
    if len(train) < FEWEST_ROWS:
        raise DataError(
            f"data: {config.source}: has {len(train)} rows that are not held out; a search needs at least {FEWEST_ROWS}"
        )
    if len(train) < 2 * config.search_rows:
        raise DataError(
            f"data.search_rows: must be <= half of the {len(train)} training rows of {config.source}, got "
            f"{config.search_rows}; give fewer, such as --set data.search_rows={fitting_search_rows(len(train))}"
        )
    train.sort(key=_hash_of)
    cut = config.search_rows
    if not config.allow_shared_rows:  # equal texts stay together
        while cut < len(train) and _hash_of(train[cut]) == _hash_of(train[cut - 1]):
            cut += 1
    search, train = train[:cut], train[cut:]
    if config.max_train_rows is not None:
        train = train[: config.max_train_rows]
    if not test:
        raise DataError(
            f"data: {config.source}: the held-out test split is empty; mark rows as test in a column "
            f"{config.split!r}, or raise data.test_fraction"
        )
    splits = {"train": tuple(train), "search": tuple(search), "test": tuple(test)}
    for name in ("train", "search"):
        if len({row[2] for row in splits[name]}) < 2:
            raise DataError(
                f"data: {config.source}: the {name} split holds one class only; add rows of the others, or give fewer "
                "data.search_rows"
            )
    shared = _shared(splits)
    if shared and not config.allow_shared_rows:
        raise DataError(
            f"data: {config.source}: {shared} texts stand in two of train, search and test; remove them, or accept "
            "them with data.allow_shared_rows=true, which the report will say"
        )
    return Task(tuple(names), splits, shared)


def training_rows(config: DataConfig, table: pd.DataFrame) -> int:
    """Return how many rows of a table that was read are not held out; those of the search are cut of them.

    Raises:
        DataError: if nothing can be trained on them.
    """
    return len(_held_apart(config, table=table)[1])


def fitting_search_rows(training_rows: int) -> int:
    """Return how many of so many rows a search may be scored on and still leave most to train on."""
    return max(FEWEST_ROWS // 2, training_rows // 3)


def _held_apart(
    config: DataConfig, labels: tuple[str, ...] | None = None, table: pd.DataFrame | None = None
) -> tuple[list[str], list[Row], list[Row]]:
    """Return the names of the classes, the rows to train and search on, and those held out for the test."""
    frame = _clean(read_table(config) if table is None else table, config)
    names = _class_names(frame, labels, config)
    rows = [
        (str(text), None if pair is None else str(pair), names.index(label))
        for text, pair, label in zip(
            frame["text"], frame["pair"] if config.text_pair else [None] * len(frame), frame["label"], strict=True
        )
    ]
    held_out = frame["test"].tolist() if "test" in frame else _by_hash(rows, config.test_fraction)
    test = [row for row, out in zip(rows, held_out, strict=True) if out]
    train = [row for row, out in zip(rows, held_out, strict=True) if not out]
    return names, train, test


def _clean(raw: pd.DataFrame, config: DataConfig) -> pd.DataFrame:
    import pandas as pd

    if len(raw) == 0:
        raise DataError(f"data: {config.source}: holds no rows")
    wanted = {"text": config.text, "label": config.label}
    if config.text_pair:
        wanted["pair"] = config.text_pair
    for key, column in wanted.items():
        if column not in raw.columns:
            field = "text_pair" if key == "pair" else key
            raise DataError(
                f"data.{field}: column {column!r} is not in {config.source}; it has "
                f"{', '.join(map(str, raw.columns))}; name one with --set data.{field}=..."
            )
    frame = pd.DataFrame({key: raw[column] for key, column in wanted.items()})
    if config.split in raw.columns:
        # Rows that say nothing are not held out; pandas maps no function of strings over them.
        marked = raw[config.split].astype(object).map(lambda split: is_held_out(str(split))).astype(bool)
        if marked.any():
            frame["test"] = marked
    missing = frame[list(wanted)].isna().any(axis=1)
    if missing.any():
        first = int(missing.to_numpy().argmax())
        raise DataError(
            f"data: {config.source}: {int(missing.sum())} of {len(frame)} rows miss a text or label, the first is row "
            f"{first + 1} (a header not counted); fill or remove them"
        )
    if pd.api.types.is_float_dtype(frame["label"]) and (frame["label"] % 1 == 0).all():
        frame["label"] = frame["label"].astype(int)
    return frame.assign(label=frame["label"].astype(str))


def _class_names(frame: pd.DataFrame, labels: tuple[str, ...] | None, config: DataConfig) -> list[str]:
    # Superscripts are digits, but no number can be read from them.
    numbered = re.compile(r"-?[0-9]+").fullmatch
    found = sorted(frame["label"].unique(), key=lambda v: (0, int(v), v) if numbered(v) else (1, 0, v))
    if len(found) < 2:
        raise DataError(f"data: {config.source}: holds one class only ({found[0]!r}); a classifier needs two")
    if len(found) > 1000:
        raise DataError(
            f"data.label: {config.label!r} has {len(found)} distinct values, and may have 1000; is it "
            "a class? name its column with --set data.label=..."
        )
    if labels is None:
        return found
    if set(found) <= set(labels):
        return list(labels)
    # Heads saved without names call their classes LABEL_0, LABEL_1, ...; numbers then mean positions.
    generic = all(name == f"LABEL_{i}" for i, name in enumerate(labels))
    if generic and found == [str(i) for i in range(len(labels))]:
        return found
    unknown = sorted(set(found) - set(labels))
    raise DataError(
        f"data: {config.source}: labels do not match the model's head: it knows {', '.join(labels[:10])}, the data "
        f"also have {', '.join(unknown[:10])}; rename those of the data, or give a model without a head, which gets one"
    )


def _hash_of(row: Row) -> str:
    return hashlib.sha256(f"{row[0]}\0{row[1] or ''}".encode()).hexdigest()


def _by_hash(rows: Sequence[Row], fraction: float) -> list[bool]:
    return [int(_hash_of(row)[:8], 16) / 0xFFFFFFFF < fraction for row in rows]


def _shared(splits: dict[str, tuple[Row, ...]]) -> int:
    texts = {name: {(row[0], row[1]) for row in rows} for name, rows in splits.items()}
    pairs = (("train", "search"), ("train", "test"), ("search", "test"))
    return len(set().union(*(texts[a] & texts[b] for a, b in pairs)))
