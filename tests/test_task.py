"""The task: classes, refusing what cannot be learnt from, the three splits, and batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, make_tokenizer
from helpers_rows import all_rows, config, frame, saved

from autocompress import task
from autocompress.errors import DataError


class TestSplits:
    def test_rows_marked_test_are_held_out_and_the_others_are_not(self, tiny_csv: Path) -> None:
        loaded = task.load(config(tiny_csv, search_rows=60))
        written = pd.read_csv(tiny_csv)
        assert {name: len(rows) for name, rows in loaded.splits.items()} == {"train": 180, "search": 60, "test": 60}
        assert {row[0] for row in loaded.splits["test"]} == set(written["text"][written["split"] == "test"])

    @pytest.mark.parametrize(
        "name",
        [
            *("test", "TEST", "validation", "Val", "valid", "dev", "eval", "validation_matched", "test2", "dev-1"),
            *(" test", "ood_test", "testSeen", "testA", "Validation set", "test.clean", "holdout"),
        ],
    )
    def test_names_of_a_test_split(self, tmp_path: Path, name: str) -> None:
        data = frame()
        data["split"] = ["train"] * 70 + [name] * 30
        loaded = task.load(config(saved(tmp_path, data)))
        assert {row[0] for row in loaded.splits["test"]} == set(data["text"][70:])

    @pytest.mark.parametrize("name", ["training", "train_sft", "train-dev", "testimony", "values", "0", "unsupervised"])
    def test_rows_of_other_names_are_trained_on(self, tmp_path: Path, name: str) -> None:
        data = frame()
        data["split"] = [name] * 70 + ["test"] * 30
        loaded = task.load(config(saved(tmp_path, data)))
        assert {row[0] for row in loaded.splits["test"]} == set(data["text"][70:])

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
    def test_rows_that_say_no_split_are_not_held_out(self, tmp_path: Path, suffix: str) -> None:
        data = frame()
        data["split"] = [None] * 70 + ["test"] * 30
        file = saved(tmp_path, data)
        if suffix == ".jsonl":
            file = file.with_suffix(suffix)
            data.to_json(file, orient="records", lines=True)
        assert {row[0] for row in task.load(config(file)).splits["test"]} == set(data["text"][70:])

    def test_without_a_mark_a_share_is_held_out(self, tmp_path: Path) -> None:
        data = frame(1000)
        file = saved(tmp_path, data)
        for fraction in (0.1, 0.4):
            loaded = task.load(config(file, test_fraction=fraction))
            # Rows are drawn by hash: the count is binomial, within four standard deviations of its mean.
            spread = 4 * (1000 * fraction * (1 - fraction)) ** 0.5
            assert abs(len(loaded.splits["test"]) - 1000 * fraction) < spread
            assert sorted(row[0] for row in all_rows(loaded)) == sorted(data["text"])

    def test_splits_depend_on_the_rows_and_not_on_their_order(self, tmp_path: Path) -> None:
        data = frame()
        one = task.load(config(saved(tmp_path, data, "one.csv")))
        other = task.load(config(saved(tmp_path, data.sample(frac=1, random_state=1), "other.csv")))
        assert {name: set(rows) for name, rows in one.splits.items()} == {
            name: set(rows) for name, rows in other.splits.items()
        }
        assert one.splits["search"] == other.splits["search"]

    def test_the_search_split_is_a_mix_of_both_classes(self, tiny_csv: Path) -> None:
        counts = Counter(row[2] for row in task.load(config(tiny_csv, search_rows=60)).splits["search"])
        assert min(counts[0], counts[1]) >= 15

    def test_the_same_text_in_one_split_is_kept(self, tmp_path: Path) -> None:
        data = frame()
        data = pd.concat([data, data.iloc[:1]])
        loaded = task.load(config(saved(tmp_path, data)))
        assert len(all_rows(loaded)) == 101
        assert loaded.shared_rows == 0

    def test_fewer_training_rows_on_request(self, tiny_csv: Path) -> None:
        whole = task.load(config(tiny_csv))
        part = task.load(config(tiny_csv, max_train_rows=25))
        assert part.splits["train"] == whole.splits["train"][:25]
        assert part.splits["search"] == whole.splits["search"]

    def test_the_fingerprint_is_of_all_content(self, tmp_path: Path) -> None:
        data = frame()
        prints = {task.load(config(saved(tmp_path, data))).fingerprint}
        flipped = data.copy()
        flipped.loc[5, "label"] = next(name for name in LABELS if name != flipped.loc[5, "label"])
        other = data.copy()
        other.loc[5, "text"] += " indeed"
        for changed in (flipped, other):
            prints.add(task.load(config(saved(tmp_path, changed))).fingerprint)
        prints.add(task.load(config(saved(tmp_path, data), search_rows=21)).fingerprint)
        assert len(prints) == 4
        assert task.load(config(saved(tmp_path, data))).fingerprint in prints


class TestRefusals:
    def refused(self, file: Path, why: str, *, labels: tuple[str, ...] | None = None, **fields: Any) -> None:
        with pytest.raises(DataError, match=why) as caught:
            task.load(config(file, **fields), labels=labels)
        assert "\n" not in str(caught.value)

    def test_one_class(self, tmp_path: Path) -> None:
        data = frame().assign(label="positive")
        self.refused(saved(tmp_path, data), "holds one class only .'positive'.; a classifier needs two")

    def test_one_class_in_a_split(self, tmp_path: Path) -> None:
        data = frame().assign(label="negative", split="train")
        data["split"] = ["train"] * 70 + ["test"] * 30
        data.loc[70:, "label"] = "positive"
        self.refused(saved(tmp_path, data), "the train split holds one class only")

    @pytest.mark.parametrize(("found", "names"), [("①②", ("①", "②")), (("10", "9", "-1"), ("-1", "9", "10"))])
    def test_labels_that_are_numbers_are_in_their_order_and_others_in_theirs(
        self, tmp_path: Path, found: Sequence[str], names: tuple[str, ...]
    ) -> None:
        data = frame().assign(label=lambda f: [found[n % len(found)] for n in range(len(f))])
        assert task.load(config(saved(tmp_path, data))).labels == names

    def test_a_column_that_is_no_class(self, tmp_path: Path) -> None:
        data = frame(1100).assign(label=lambda f: [f"row {n}" for n in range(len(f))])
        self.refused(saved(tmp_path, data), "'label' has 1100 distinct values, and may have 1000; is it a class")

    @pytest.mark.parametrize(
        ("field", "value"), [("text", "sentence"), ("label", "sentiment"), ("text_pair", "hypothesis")]
    )
    def test_a_missing_column(self, tmp_path: Path, field: str, value: str) -> None:
        why = rf"data\.{field}: column '{value}' is not in .*; it has text, label; name one with --set data\.{field}="
        self.refused(saved(tmp_path, frame()), why, **{field: value})

    @pytest.mark.parametrize("column", ["text", "label"])
    def test_a_missing_value_names_its_row(self, tmp_path: Path, column: str) -> None:
        data = frame()
        data.loc[[6, 40], column] = None
        self.refused(saved(tmp_path, data), "2 of 100 rows miss a text or label, the first is row 7")

    def test_not_enough_rows(self, tmp_path: Path) -> None:
        data = frame().assign(split=["train"] * 79 + ["test"] * 21)
        why = r"data\.search_rows: must be <= half of the 79 training rows .*, got 40; .* --set data\.search_rows=26"
        self.refused(saved(tmp_path, data), why, search_rows=40)
        assert len(task.load(config(saved(tmp_path, data), search_rows=39)).splits["search"]) == 39

    def test_rows_in_two_splits(self, tmp_path: Path) -> None:
        data = frame().assign(split=["train"] * 70 + ["test"] * 30)
        data.loc[70:72, "text"] = data.loc[0:2, "text"].to_numpy()
        file = saved(tmp_path, data)
        self.refused(file, r"3 texts stand in two of .*; remove them, or accept them with data\.allow_shared_rows=true")
        accepted = task.load(config(file, allow_shared_rows=True))
        assert accepted.shared_rows == 3
        assert len(all_rows(accepted)) == 100

    def test_equal_texts_stay_on_one_side_of_the_cut(self, tmp_path: Path) -> None:
        data = pd.DataFrame({"text": [f"text {n // 3}" for n in range(300)], "label": ["a", "b", "b"] * 100})
        for rows in (20, 21, 22):
            loaded = task.load(config(saved(tmp_path, data), search_rows=rows))
            assert rows <= len(loaded.splits["search"]) < rows + 3
            assert loaded.shared_rows == 0

    def test_rows_in_two_splits_with_different_classes_are_still_shared(self, tmp_path: Path) -> None:
        data = frame().assign(split=["train"] * 70 + ["test"] * 30)
        first = data.loc[0]
        data.loc[70, ["text", "label"]] = [first["text"], next(name for name in LABELS if name != first["label"])]
        self.refused(saved(tmp_path, data), "1 texts? stands? in two of")

    def test_pairs_are_shared_only_as_pairs(self, tmp_path: Path) -> None:
        data = frame().assign(second="the same", split=["train"] * 70 + ["test"] * 30)
        data.loc[70, "text"] = data.loc[0, "text"]
        data.loc[70, "second"] = "another"
        loaded = task.load(config(saved(tmp_path, data), text_pair="second"))
        assert loaded.shared_rows == 0

    def test_labels_that_the_head_does_not_know(self, tmp_path: Path) -> None:
        file = saved(tmp_path, frame())
        why = "labels do not match the model's head: it knows bad, good, the data also have negative, positive"
        self.refused(file, why, labels=("bad", "good"))
        self.refused(file, "also have positive", labels=("negative", "neutral"))
        self.refused(file, "also have negative, positive", labels=("LABEL_0", "LABEL_1"))

    def test_labels_of_the_head_give_the_order_of_classes(self, tmp_path: Path) -> None:
        file = saved(tmp_path, frame())
        plain = task.load(config(file))
        loaded = task.load(config(file), labels=("positive", "neutral", "negative"))
        assert loaded.labels == ("positive", "neutral", "negative")
        for name, rows in plain.splits.items():
            assert [2 - 2 * row[2] for row in rows] == [row[2] for row in loaded.splits[name]]

    def test_numbers_are_positions_in_a_head_without_names(self, tmp_path: Path) -> None:
        data = frame()
        data["label"] = [LABELS.index(name) for name in data["label"]]
        file = saved(tmp_path, data)
        assert task.load(config(file), labels=("LABEL_0", "LABEL_1")).labels == ("0", "1")
        self.refused(file, "do not match the model's head", labels=("LABEL_0", "LABEL_1", "LABEL_2"))
        self.refused(file, "do not match the model's head", labels=LABELS)


class TestTokens:
    @pytest.fixture
    def loaded(self, tiny_csv: Path) -> task.Task:
        return task.load(config(tiny_csv))

    def test_rows_are_those_of_the_tokenizer(self, loaded: task.Task) -> None:
        tokenizer = make_tokenizer("bert")
        split = loaded.tokenized(tokenizer, 64)["test"]
        assert len(split) == len(loaded.splits["test"])
        assert [list(ids) for ids in split.input_ids] == tokenizer([r[0] for r in loaded.splits["test"]])["input_ids"]
        assert split.labels == tuple(row[2] for row in loaded.splits["test"])
        assert split.token_type_ids is None

    @pytest.mark.parametrize("limit", [4, 7])
    def test_longer_texts_are_truncated_and_stay_whole_sequences(self, loaded: task.Task, limit: int) -> None:
        tokenizer = make_tokenizer("bert")
        whole = loaded.tokenized(tokenizer, 64)["train"].input_ids
        split = loaded.tokenized(tokenizer, limit)["train"]
        cut = split.input_ids
        assert split.cut == sum(len(row) > limit for row in whole)
        assert max(map(len, whole)) > limit
        for long, short in zip(whole, cut, strict=True):
            assert len(short) == min(len(long), limit)
            assert short[:-1] == long[: len(short) - 1]
            assert short[-1] == tokenizer.sep_token_id

    def test_pairs_have_segments_where_the_model_takes_them(self, tiny_pairs_csv: Path) -> None:
        loaded = task.load(config(tiny_pairs_csv, text="first", text_pair="second"))
        tokenizer = make_tokenizer("bert")
        split = loaded.tokenized(tokenizer, 16)["search"]
        assert split.token_type_ids is not None
        for ids, types in zip(split.input_ids, split.token_type_ids, strict=True):
            assert len(ids) == len(types) <= 16
            assert ids.count(tokenizer.sep_token_id) == 2
            assert types == (0,) * (ids.index(tokenizer.sep_token_id) + 1) + (1,) * sum(types)
        batch = split.batch([0, 1, 2])
        assert set(batch.inputs()) == {"input_ids", "attention_mask", "token_type_ids"}
        assert loaded.tokenized(make_tokenizer("distilbert"), 16)["search"].token_type_ids is None


class TestBatches:
    @pytest.fixture(params=["bert", "roberta"])
    def split(self, request: pytest.FixtureRequest, tiny_csv: Path) -> task.Split:
        return task.load(config(tiny_csv)).tokenized(make_tokenizer(request.param), 16)["train"]

    def test_padding_and_mask(self, split: task.Split) -> None:
        rows = [5, 0, 17]
        batch = split.batch(rows)
        width = max(len(split.input_ids[row]) for row in rows)
        assert batch.input_ids.shape == batch.attention_mask.shape == (3, width)
        assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == torch.int64
        assert batch.rows.tolist() == rows
        assert batch.labels.tolist() == [split.labels[row] for row in rows]
        for position, row in enumerate(rows):
            tokens = split.input_ids[row]
            assert batch.input_ids[position].tolist() == [*tokens, *[split.pad_id] * (width - len(tokens))]
            assert batch.attention_mask[position].tolist() == [1] * len(tokens) + [0] * (width - len(tokens))

    def test_the_padding_token_is_the_tokenizers(self, tiny_csv: Path) -> None:
        loaded = task.load(config(tiny_csv))
        assert loaded.tokenized(make_tokenizer("bert"), 16)["train"].pad_id == 0
        assert loaded.tokenized(make_tokenizer("roberta"), 16)["train"].pad_id == 1

    def test_segments_are_padded_with_zero(self) -> None:
        split = task.Split(((7, 8, 9), (7, 8)), ((0, 1, 1), (1, 1)), (0, 1), pad_id=5)
        batch = split.batch([0, 1])
        assert batch.input_ids.tolist() == [[7, 8, 9], [7, 8, 5]]
        assert batch.token_type_ids is not None
        assert batch.token_type_ids.tolist() == [[0, 1, 1], [1, 1, 0]]

    @pytest.mark.parametrize("size", [1, 7, 1000])
    def test_in_order_of_length_covers_every_row_once(self, split: task.Split, size: int) -> None:
        batches = list(split.in_order_of_length(size))
        rows = [row for batch in batches for row in batch.rows.tolist()]
        assert sorted(rows) == list(range(len(split)))
        assert all(len(batch.rows) == size for batch in batches[:-1])
        lengths = [len(split.input_ids[row]) for row in rows]
        assert lengths == sorted(lengths)

    @pytest.mark.parametrize("most", [1, 30, 10**6])
    def test_batches_of_several_rows_have_so_many_tokens_at_most(self, split: task.Split, most: int) -> None:
        plain, limited = (list(split.in_order_of_length(7, most_tokens=n)) for n in (None, most))
        assert [r for b in limited for r in b.rows.tolist()] == [r for b in plain for r in b.rows.tolist()]
        assert all(b.input_ids.numel() <= most or len(b.rows) == 1 for b in limited)
        assert (len(limited) == len(plain)) == (most == 10**6)

    @pytest.mark.parametrize("step", [1, 4, 5])
    def test_steps_of_padding_give_few_widths_and_lose_nothing(self, split: task.Split, step: int) -> None:
        longest = max(map(len, split.input_ids))
        plain, stepped = (list(split.in_order_of_length(7, step=n)) for n in (1, step))
        for one, other in zip(plain, stepped, strict=True):
            width = other.input_ids.shape[1]
            assert width % step == 0 or width == longest
            assert 0 <= width - one.input_ids.shape[1] < step
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.attention_mask.sum(dim=1), other.attention_mask.sum(dim=1))
            assert torch.equal(other.input_ids[:, : one.input_ids.shape[1]], one.input_ids)
            assert (other.input_ids[other.attention_mask == 0] == split.pad_id).all()

    def test_an_epoch_covers_every_row_once_and_follows_its_generator(self, split: task.Split) -> None:
        def epoch(seed: int) -> list[list[int]]:
            return [b.rows.tolist() for b in split.shuffled(16, torch.Generator().manual_seed(seed))]

        assert sorted(row for rows in epoch(0) for row in rows) == list(range(len(split)))
        assert epoch(0) == epoch(0)
        assert epoch(0) != epoch(1)

    def test_the_head_is_the_first_rows(self, split: task.Split) -> None:
        part = split.head(10)
        assert len(part) == 10
        assert part.input_ids == split.input_ids[:10]
        assert part.labels == split.labels[:10]
        assert part.pad_id == split.pad_id
        assert len(split.head(10**6)) == len(split)

    def test_arrays_are_the_same_inputs(self, split: task.Split) -> None:
        batch = split.batch([0, 1])
        arrays = batch.arrays()
        assert list(arrays) == list(batch.inputs())
        assert all(array.dtype == np.int64 for array in arrays.values())
        assert arrays["input_ids"].tolist() == batch.input_ids.tolist()


def test_the_tiny_data_are_unique_texts(tiny_csv: Path, tiny_three_csv: Path, tiny_pairs_csv: Path) -> None:
    for file, columns in ((tiny_csv, ["text"]), (tiny_three_csv, ["text"]), (tiny_pairs_csv, ["first", "second"])):
        assert not pd.read_csv(file).duplicated(columns).any()
