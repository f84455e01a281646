"""Recovery of a picked structure: what is trained and kept in the bank, by which keys, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress import model, training
from autocompress.bases import Bases
from autocompress.config import RunConfig
from autocompress.decisions import LowRank, PruneHeads, PruneNeurons, Quantize, Recover, Student
from autocompress.plan import MODEL_SITE, CompressionPlan

PRUNED = CompressionPlan(
    (
        ("block.0.attention", PruneHeads(keep=3)),
        ("block.0.ffn", PruneNeurons(keep=8)),
        ("block.1.attention", LowRank(rank=4)),
        ("block.1.ffn", Quantize(weight_bits=8)),
    )
)


class Interrupted(BaseException):
    """As if the process was killed."""


@pytest.fixture
def bases(tiny_run: Callable[..., RunConfig], tmp_path: Path, bert_headed_folder: Path) -> Callable[..., Bases]:
    """Return a factory of the same teacher on one fresh bank."""

    def make(*overrides: str) -> Bases:
        where = {"model.id": bert_headed_folder, "storage.bank": tmp_path / "bank"}
        given = [f"{key}={json.dumps(str(path))}" for key, path in where.items()]
        return Bases(tiny_run([*given, "data.max_train_rows=40", "recovery.batch_size=8", *overrides]))

    return make


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all distillations, as they come."""
    seeds: list[int] = []
    distill = training.distill

    def noting(*arguments: Any, seed: int, **options: Any) -> None:
        seeds.append(seed)
        distill(*arguments, seed=seed, **options)

    monkeypatch.setattr(training, "distill", noting)
    return seeds


def weights(built: model.EncoderModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in built.module.state_dict().items()}


def recovered(**options: Any) -> CompressionPlan:
    return PRUNED.with_decision(MODEL_SITE, Recover(epochs=1, **options))


def test_what_a_model_is_like_is_known_without_fine_tuning_it(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an artefact is exported, of which nothing is made any more."""

    def never(*_: object) -> None:
        raise AssertionError("it was fine-tuned")

    monkeypatch.setattr(Bases, "_finetune", never)
    run = tiny_run([f"storage.bank={json.dumps(str(tmp_path / 'bank'))}"])
    untuned = Bases(run).untuned
    assert untuned.most_tokens is not None
    with pytest.raises(AssertionError, match="it was fine-tuned"):
        _ = Bases(run).teacher
    known = Bases(run)
    known.__dict__["teacher"] = untuned
    assert known.untuned is untuned


def test_runs_of_any_seed_share_sensitivities(bases: Callable[..., Bases], tmp_path: Path) -> None:
    """So that what is proposed from them does not depend on whose run has filled the bank."""
    banks = [f"storage.bank={json.dumps(str(tmp_path / name))}" for name in ("one", "other")]
    one, other = (bases(bank, f"seed={seed}").sensitivity(None) for seed, bank in enumerate(banks))
    assert one.to_json() == other.to_json()


class TestSoup:
    def test_it_is_the_mean_of_trainings_with_their_own_seeds(
        self, bases: Callable[..., Bases], trainings: list[int]
    ) -> None:
        plain = [weights(bases(f"seed={seed}").structured(recovered())) for seed in (4, 5, 6)]
        assert trainings == [4, 5, 6]
        found = bases("seed=4").structured(recovered(seeds=3))
        assert trainings == [4, 5, 6], "each has the key that it has alone, and none is trained twice"
        for name, tensor in weights(found).items():
            expected = torch.stack([state[name].double() for state in plain]).mean(dim=0)
            assert torch.allclose(tensor.double(), expected, atol=1e-6), name
        query = "bert.encoder.layer.2.attention.self.query.weight"
        assert not torch.equal(plain[0][query], plain[1][query])

    def test_what_was_trained_before_an_interruption_is_kept(
        self, bases: Callable[..., Bases], trainings: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noting = training.distill

        def interrupt(*arguments: Any, seed: int, **options: Any) -> None:
            if seed == 2:
                raise Interrupted
            noting(*arguments, seed=seed, **options)

        monkeypatch.setattr(training, "distill", interrupt)
        with pytest.raises(Interrupted):
            bases().structured(recovered(seeds=3))
        assert trainings == [0, 1]
        monkeypatch.setattr(training, "distill", noting)
        first = bases().structured(recovered(seeds=3))
        assert trainings == [0, 1, 2]
        again = bases().structured(recovered(seeds=3))
        assert trainings == [0, 1, 2]
        assert first.base == again.base != bases().structured(recovered()).base
        assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(first).items())

    def test_with_held_rows_it_is_greedy(self, bases: Callable[..., Bases], monkeypatch: pytest.MonkeyPatch) -> None:
        """The second seed alone is made to do well on held rows: it is all that is kept."""
        shop = bases()
        second = weights(bases("seed=1").structured(recovered(patience=1)))
        name = "bert.encoder.layer.2.attention.self.query.weight"

        def loss(module: Any, *_: Any) -> float:
            return float((module.get_parameter(name).detach() - second[name]).abs().sum())

        monkeypatch.setattr(training, "held_loss", loss)
        found = weights(shop.structured(recovered(patience=1, seeds=2)))
        assert all(torch.equal(tensor, second[part]) for part, tensor in found.items())


class TestWithoutATeacher:
    @pytest.fixture
    def shop(self, bases: Callable[..., Bases], monkeypatch: pytest.MonkeyPatch) -> Bases:
        """At hand is a teacher that is not to be run once its parts are ranked."""
        made = bases("recovery.alpha=0")
        made.structured(PRUNED)
        kind: Any = type(made.teacher.module)
        run = kind.forward

        def forward(module: Any, **inputs: Any) -> Any:
            if module is made.teacher.module:
                pytest.fail("the teacher was run")
            return run(module, **inputs)

        monkeypatch.setattr(kind, "forward", forward)
        return made

    def test_labels_alone_do_not_run_it(self, shop: Bases) -> None:
        before, after = shop.structured(PRUNED), shop.structured(recovered())
        assert not torch.equal(before.linear(2, "query").weight, after.linear(2, "query").weight)
        assert not (shop.bank.root / "teacher-logits").exists()

    @pytest.mark.parametrize("option", ["hidden", "relations"])
    def test_what_is_compared_with_it_does(self, shop: Bases, option: str) -> None:
        with pytest.raises(pytest.fail.Exception, match="the teacher was run"):
            shop.structured(recovered(**{option: 1}))
        assert not (shop.bank.root / "teacher-logits").exists()


class TestKeys:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What distilled models were made from."""
        found: list[dict[str, Any]] = []

        def stop(_: Bases, target: Any, key: dict[str, Any], train: object, **__: Any) -> Any:
            found.append(key)
            return target

        monkeypatch.setattr(Bases, "_trained", stop)
        return found

    def test_those_from_before_there_were_more_options_stay(
        self, bases: Callable[..., Bases], asked: list[dict[str, Any]]
    ) -> None:
        """As they were written before relations, penalties, patience and seeds."""
        shop = bases()
        spent = {"epochs": 1.0, "learning_rate": 3e-4, "batch_size": 8, "precision": "float32"}
        spent |= {"temperature": 2.0, "alpha": 0.5}
        student = Student(blocks=(0, 2), heads=2, neurons=20)
        shop.structured(recovered())
        shop.structured(recovered(hidden=30))
        shop._student(student)
        first, drawn, smaller = asked
        decisions = json.loads(PRUNED.structural().to_json())["decisions"]
        plain = {"site": "model", "type": "Recover", "epochs": 1.0}
        assert first["what"] == {
            "base": shop.teacher.base,
            "plan": {"schema": 1, "decisions": [plain, *decisions]},
        }
        assert (first["budget"], first["seed"], first["recipe"]) == (spent, 0, 2)
        assert drawn["what"]["plan"]["decisions"][0] == {**plain, "hidden": 30.0}
        assert drawn["budget"] == {**spent, "hidden": 30.0}
        assert smaller["what"] == student.to_dict()
        assert smaller["budget"] == spent

    @pytest.mark.parametrize(
        "option", [{"relations": 1}, {"l1": 1}, {"l2": 1}, {"patience": 1}, {"seeds": 2}, {"quantized": True}]
    )
    def test_each_option_makes_another(
        self, bases: Callable[..., Bases], asked: list[dict[str, Any]], option: dict[str, float]
    ) -> None:
        shop = bases()
        shop.structured(recovered())
        shop.structured(recovered(**option))
        assert asked[-1] != asked[0]

    def test_students_do_not_depend_on_options_of_picked_points(
        self, bases: Callable[..., Bases], asked: list[dict[str, Any]]
    ) -> None:
        student = Student(blocks=(0, 2), heads=2, neurons=20)
        options = ("hidden=1", "relations=1", "l1=1", "l2=1", "patience=1", "seeds=2", "epochs=auto")
        bases()._student(student)
        bases(*(f"recovery.{option}" for option in options))._student(student)
        assert asked[0] == asked[1]


class TestAskedFor:
    def test_options_of_the_run_file_become_part_of_the_plan(self, bases: Callable[..., Bases]) -> None:
        asked = ("epochs=2", "hidden=3", "relations=4", "l1=0.1", "l2=0.2", "patience=0.5", "seeds=6")
        found = bases(*(f"recovery.{option}" for option in asked)).recovering(PRUNED)
        wanted = Recover(epochs=2, hidden=3, relations=4, l1=0.1, l2=0.2, patience=0.5, seeds=6)
        assert found == PRUNED.with_decision(MODEL_SITE, wanted)
        assert bases().recovering(PRUNED) == PRUNED.with_decision(MODEL_SITE, Recover(epochs=1, hidden=30))

    def test_epochs_are_counted_from_a_fine_tuning(self, bases: Callable[..., Bases], bert_folder: Path) -> None:
        """Of the run file's passes where the model came without a head, else of 3; labels alone run no teacher."""
        options = ("recovery.epochs=auto", "recovery.alpha=0", "recovery.hidden=0")
        whole = CompressionPlan((("block.0.ffn", Quantize(weight_bits=8)),))
        assert bases(*options).recovering(whole).of_type(Recover)[MODEL_SITE].epochs == 3.0
        headless = bases(*options, f"model.id={json.dumps(str(bert_folder))}", "model.finetune.epochs=1.5")
        assert headless.recovering(whole).of_type(Recover)[MODEL_SITE].epochs == 1.5
