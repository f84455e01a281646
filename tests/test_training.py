"""Training: the loss falls, students move towards their teacher, and a seed gives the same weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LABELS, make_model, make_tokenizer
from torch.nn import functional

from autocompress import losses, machine, model, task, training
from autocompress.config import DataConfig
from autocompress.errors import ModelError
from autocompress.training import TrainingBudget
from autocompress.transforms.prune import keep_heads


@pytest.fixture(scope="module")
def splits(tiny_csv: Path) -> dict[str, task.Split]:
    return task.load(DataConfig(source=str(tiny_csv), search_rows=60)).tokenized(make_tokenizer("bert"), 16)


@pytest.fixture
def module() -> Any:
    return make_model("bert", labels=LABELS)


def budget(**fields: Any) -> TrainingBudget:
    given = {"epochs": 2, "learning_rate": 2e-3, "batch_size": 16, "precision": "float32", **fields}
    return TrainingBudget(**given)


def quiet(_: str) -> None:
    pass


def loss_on(module: Any, rows: task.Split) -> float:
    return float(functional.cross_entropy(training.logits_of(module, rows), torch.tensor(rows.labels)))


def accuracy_on(module: Any, rows: task.Split) -> float:
    predicted = training.logits_of(module, rows).argmax(dim=1)
    return float((predicted == torch.tensor(rows.labels)).float().mean())


def divergence(student: Any, teacher: torch.Tensor, rows: task.Split) -> float:
    found = functional.log_softmax(training.logits_of(student, rows), dim=-1)
    return float(functional.kl_div(found, teacher.log_softmax(dim=-1), log_target=True, reduction="batchmean"))


def weights(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class TestFinetuning:
    def test_the_loss_falls_on_rows_seen_and_unseen(self, module: Any, splits: dict[str, task.Split]) -> None:
        before = {name: loss_on(module, rows) for name, rows in splits.items()}
        training.finetune(module, splits["train"], budget(epochs=8), seed=0, progress=quiet)
        assert loss_on(module, splits["train"]) < 0.5 * before["train"]
        assert loss_on(module, splits["test"]) < before["test"]
        assert accuracy_on(module, splits["test"]) > 0.75
        assert not module.training

    def test_it_says_how_far_it_is_by_the_clock_too(
        self, module: Any, splits: dict[str, task.Split], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seconds = itertools.count(0.0, 15.0)  # passing at each look
        monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        said: list[str] = []
        training.logits_of(module, splits["train"].head(150), progress=said.append)
        assert said == ["128/150 rows"]
        said.clear()
        training.finetune(module, splits["train"].head(40), budget(batch_size=1), seed=0, progress=said.append)
        assert len(said) > 10, "not at each tenth alone"

    def test_one_seed_gives_the_same_weights(self, module: Any, splits: dict[str, task.Split]) -> None:
        rows = splits["train"].head(48)
        found = []
        for seed in (1, 1, 2):
            trained = copy.deepcopy(module)
            torch.rand(seed)
            training.finetune(trained, rows, budget(), seed=seed, progress=quiet)
            found.append(weights(trained))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    @pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (0.5, 2), (2.25, 9), (0.01, 1)])
    def test_the_budget_is_kept(self, module: Any, splits: dict[str, task.Split], epochs: float, steps: int) -> None:
        said: list[str] = []
        training.finetune(module, splits["train"].head(50), budget(epochs=epochs), seed=0, progress=said.append)
        assert said[-1].startswith(f"step {steps}/{steps}, loss ")

    def test_frozen_parameters_stay(self, module: Any, splits: dict[str, task.Split]) -> None:
        table = module.bert.embeddings.word_embeddings.weight
        table.requires_grad_(False)
        before = table.clone()
        training.finetune(module, splits["train"].head(32), budget(), seed=0, progress=quiet)
        assert torch.equal(table, before)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_is_refused(
        self, module: Any, splits: dict[str, task.Split], value: float
    ) -> None:
        with torch.no_grad():
            module.classifier.weight.fill_(value)
        with pytest.raises(ModelError, match=r"training: the loss is nan at step 0; lower the learning rate"):
            training.finetune(module, splits["train"], budget(), seed=0, progress=quiet)

    def test_a_learning_rate_that_blows_up_is_refused(self, module: Any, splits: dict[str, task.Split]) -> None:
        with torch.no_grad():
            module.classifier.weight.mul_(1e38)
        with pytest.raises(ModelError, match=r"training: the loss is (nan|inf) at step \d+; lower the learning rate"):
            training.finetune(module, splits["train"], budget(learning_rate=1.0), seed=0, progress=quiet)

    def test_the_rate_rises_and_falls(self) -> None:
        rates = [training._linear(step, 100) for step in range(100)]
        top = rates.index(max(rates))
        assert 3 <= top <= 8
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert all(0 < rate <= 1 for rate in rates)
        assert training._linear(0, 1) > 0, "a budget of one step must learn something"


class TestDistillation:
    @pytest.fixture(scope="class")
    def teacher(self, splits: dict[str, task.Split]) -> torch.Tensor:
        module = make_model("bert", labels=LABELS, seed=5)
        return 3 * training.logits_of(module, splits["train"])

    def test_a_student_moves_towards_its_teacher(self, splits: dict[str, task.Split], teacher: torch.Tensor) -> None:
        rows = splits["train"]
        student = make_model("bert", labels=LABELS, num_hidden_layers=2)
        before = divergence(student, teacher, rows)
        training.distill(student, teacher, rows, budget(epochs=8, alpha=1.0), seed=0, progress=quiet)
        assert divergence(student, teacher, rows) < 0.5 * before

    def test_alpha_weighs_teacher_against_labels(self, splits: dict[str, task.Split], teacher: torch.Tensor) -> None:
        rows = splits["train"]
        found = {}
        for alpha in (0.0, 1.0):
            student = make_model("bert", labels=LABELS, num_hidden_layers=2)
            training.distill(student, teacher, rows, budget(epochs=6, alpha=alpha), seed=0, progress=quiet)
            found[alpha] = (divergence(student, teacher, rows), loss_on(student, rows))
        assert found[1.0][0] < found[0.0][0]
        assert found[0.0][1] < found[1.0][1]

    def test_without_the_teacher_it_is_finetuning_without_dropout(
        self, module: Any, splits: dict[str, task.Split], teacher: torch.Tensor
    ) -> None:
        rows, other = splits["train"].head(48), copy.deepcopy(module)
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        training.finetune(module, rows, budget(), seed=3, progress=quiet)
        training.distill(other, teacher[:48], rows, budget(alpha=0.0), seed=3, progress=quiet)
        assert torch.allclose(weights(module), weights(other), atol=1e-6)

    def test_frozen_modules_keep_their_weights(
        self, module: Any, splits: dict[str, task.Split], teacher: torch.Tensor
    ) -> None:
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        table = "bert.embeddings.word_embeddings"
        rows = splits["train"].head(32)
        training.distill(module, teacher[:32], rows, budget(), frozen=[table], seed=0, progress=quiet)
        kept = {name for name, p in module.named_parameters() if torch.equal(p, before[name])}
        assert f"{table}.weight" in kept
        assert "classifier.weight" not in kept
        assert all(p.requires_grad for p in module.parameters()), "only for the time of training"

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_the_loss_is_that_of_the_paper(
        self, monkeypatch: pytest.MonkeyPatch, module: Any, splits: dict[str, task.Split], temperature: float
    ) -> None:
        """Hinton et al. 2015: alpha T^2 KL(teacher || student), both softened by T, + (1 - alpha) cross-entropy."""
        losses: list[Callable[..., torch.Tensor]] = []
        monkeypatch.setattr(training, "_train", lambda *arguments, **_: losses.append(arguments[3]))
        rows = splits["train"]
        teacher = torch.randn(len(rows), 2)
        training.distill(module, teacher, rows, budget(alpha=0.3, temperature=temperature), seed=0, progress=quiet)
        batch = rows.batch([4, 9, 2])
        with torch.no_grad():
            logits = module(**batch.inputs()).logits
        p = (teacher[[4, 9, 2]] / temperature).softmax(dim=1)
        q = (logits / temperature).softmax(dim=1)
        soft = float((p * (p / q).log()).sum(dim=1).mean())
        hard = float(-logits.log_softmax(dim=1)[range(3), batch.labels].mean())
        expected = 0.3 * temperature**2 * soft + 0.7 * hard
        with torch.no_grad():
            assert float(losses[0](batch)) == pytest.approx(expected, rel=1e-4)

    def test_blocks_are_drawn_to_their_examples(self, splits: dict[str, task.Split]) -> None:
        """What a student's blocks return comes nearer to what those of its teacher do, padding left out."""
        rows, example = splits["train"], make_model("bert", labels=LABELS, num_hidden_layers=3, seed=5)
        logits = training.logits_of(example, rows)
        blocks = (("bert.encoder.layer.0", "bert.encoder.layer.1"), ("bert.encoder.layer.1", "bert.encoder.layer.2"))
        before = copy.deepcopy(example.state_dict())
        apart = {}
        for hidden in (0.0, 10.0):
            student = make_model("bert", labels=LABELS, num_hidden_layers=2)
            training.distill(
                student,
                logits,
                rows,
                budget(epochs=4, hidden=hidden),
                example=training.Example(example, blocks),
                seed=0,
                progress=quiet,
            )
            batch = rows.batch(range(20))
            read = batch.attention_mask.bool()
            with torch.no_grad(), losses.noted(student, [a for a, _ in blocks]) as mine:
                student(**batch.inputs())
            with torch.no_grad(), losses.noted(example, [b for _, b in blocks]) as theirs:
                example(**batch.inputs())
            apart[hidden] = [float((mine[a] - theirs[b])[read].square().mean()) for a, b in blocks]
        assert all(near < 0.7 * far for near, far in zip(apart[10.0], apart[0.0], strict=True))
        assert all(torch.equal(tensor, before[name]) for name, tensor in example.state_dict().items())
        assert not any(part._forward_hooks for part in (*example.modules(), *student.modules()))

    def test_the_loss_between_blocks_is_a_mean_square(
        self, monkeypatch: pytest.MonkeyPatch, module: Any, splits: dict[str, task.Split]
    ) -> None:
        losses: list[Callable[..., torch.Tensor]] = []
        monkeypatch.setattr(training, "_train", lambda *arguments, **_: losses.append(arguments[3]))
        rows, example = splits["train"], make_model("bert", labels=LABELS, seed=5)
        pair = ("bert.encoder.layer.0", "bert.encoder.layer.1")
        for hidden in (0.0, 3.0):
            training.distill(
                module,
                torch.zeros(len(rows), 2),
                rows,
                budget(alpha=0.0, hidden=hidden),
                example=training.Example(example, (pair,)),
                seed=0,
                progress=quiet,
            )
        batch = rows.batch([0, 3, 8])
        with torch.no_grad():
            mine = module(**batch.inputs(), output_hidden_states=True).hidden_states[1]
            theirs = example(**batch.inputs(), output_hidden_states=True).hidden_states[2]
            plain, drawn = (float(loss(batch)) for loss in losses)
        square = (mine - theirs)[batch.attention_mask.bool()].square().mean()
        assert drawn - plain == pytest.approx(3.0 * float(square), rel=1e-3)

    def test_labels_alone_need_no_teacher(self, splits: dict[str, task.Split], teacher: torch.Tensor) -> None:
        """Neither its logits nor the teacher itself, though it is at hand."""
        example = make_model("bert", labels=LABELS, seed=5)
        example.forward = pytest.fail
        found = []
        for logits in (None, teacher[:32]):
            student = make_model("bert", labels=LABELS, num_hidden_layers=1)
            training.distill(
                student,
                logits,
                splits["train"].head(32),
                budget(alpha=0.0),
                example=training.Example(example, (("bert.encoder.layer.0", "bert.encoder.layer.2"),)),
                seed=0,
                progress=quiet,
            )
            found.append(weights(student))
        assert torch.equal(found[0], found[1])

    def test_attention_is_drawn_to_that_of_the_example(self, splits: dict[str, task.Split]) -> None:
        """With 2 of 4 heads, whose relations come nearer to those of all 4."""
        rows, example = splits["train"], make_model("bert", labels=LABELS, num_hidden_layers=1, seed=5)
        logits = training.logits_of(example, rows)
        roles = tuple(f"attention.self.{role}" for role in ("query", "key", "value"))
        pair = ("bert.encoder.layer.0", "bert.encoder.layer.0")
        drawn_to = training.Example(example, (pair,), related=tuple(zip(roles, roles, strict=True)), heads=4)
        apart = {}
        for relations in (0.0, 10.0):
            student = model.understand(make_model("bert", labels=LABELS, num_hidden_layers=1), base="test")
            keep_heads(student, 0, [1, 3])
            training.distill(
                student.module,
                logits,
                rows,
                budget(epochs=4, relations=relations),
                example=drawn_to,
                seed=0,
                progress=quiet,
            )
            batch = rows.batch(range(20))
            read, paths = batch.attention_mask.bool(), [f"{pair[0]}.{role}" for role in roles]
            with torch.no_grad(), losses.noted(student.module, paths) as mine, losses.noted(example, paths) as theirs:
                student.module(**batch.inputs())
                example(**batch.inputs())
            apart[relations] = [float(losses.relations_apart(mine[p], theirs[p], read, 4)) for p in paths]
        assert all(near < 0.7 * far for near, far in zip(apart[10.0], apart[0.0], strict=True))

    def test_relations_of_queries_keys_and_values_add_up(
        self, monkeypatch: pytest.MonkeyPatch, module: Any, splits: dict[str, task.Split]
    ) -> None:
        """Wang et al. 2021, section 3.1, as a mean over two pairs of blocks; the teacher runs once for both terms."""
        made: list[Callable[..., torch.Tensor]] = []
        monkeypatch.setattr(training, "_train", lambda *arguments, **_: made.append(arguments[3]))
        rows, example = splits["train"], make_model("bert", labels=LABELS, seed=5)
        blocks = tuple((f"bert.encoder.layer.{a}", f"bert.encoder.layer.{b}") for a, b in ((0, 1), (1, 2)))
        roles = tuple(f"attention.self.{role}" for role in ("query", "key", "value"))
        drawn_to = training.Example(example, blocks, related=tuple(zip(roles, roles, strict=True)), heads=4)
        for weights_of in ({}, {"hidden": 3.0}, {"relations": 2.0}, {"hidden": 3.0, "relations": 2.0}):
            training.distill(
                module, None, rows, budget(alpha=0.0, **weights_of), example=drawn_to, seed=0, progress=quiet
            )
        batch = rows.batch([0, 3, 8])
        with torch.no_grad():
            plain, drawn, related, both = (float(loss(batch)) for loss in made)
            expected = 0.0
            for mine, theirs in drawn_to.layers():
                with losses.noted(module, [mine]) as found, losses.noted(example, [theirs]) as wanted:
                    module(**batch.inputs())
                    example(**batch.inputs())
                read = batch.attention_mask.bool()
                expected += float(losses.relations_apart(found[mine], wanted[theirs], read, 4)) / 2
        assert len(drawn_to.layers()) == 6
        assert related - plain == pytest.approx(2.0 * expected, rel=1e-3)
        assert both - plain == pytest.approx(drawn - plain + related - plain, rel=1e-3)

    def test_penalties_are_of_matrices_in_the_blocks(
        self, monkeypatch: pytest.MonkeyPatch, module: Any, splits: dict[str, task.Split]
    ) -> None:
        made: list[Callable[..., torch.Tensor]] = []
        monkeypatch.setattr(training, "_train", lambda *arguments, **_: made.append(arguments[3]))
        rows = splits["train"]
        for weights_of in ({}, {"l1": 0.5}, {"l2": 0.25}):
            training.distill(
                module,
                None,
                rows,
                budget(alpha=0.0, **weights_of),
                penalised=["bert.encoder.layer"],
                seed=0,
                progress=quiet,
            )
        linear = [part.weight for part in module.bert.encoder.modules() if isinstance(part, torch.nn.Linear)]
        assert len(linear) == 18
        batch = rows.batch([0, 3, 8])
        with torch.no_grad():
            plain, first, second = (float(loss(batch)) for loss in made)
            assert first - plain == pytest.approx(0.5 * sum(float(w.abs().sum()) for w in linear), rel=1e-4)
            assert second - plain == pytest.approx(0.25 * sum(float(w.square().sum()) for w in linear), rel=1e-4)

    @pytest.mark.parametrize("penalty", ["l1", "l2"])
    def test_penalties_hold_weights_down(self, splits: dict[str, task.Split], penalty: str) -> None:
        sizes = []
        for weight in (0.0, 1.0):
            student = make_model("bert", labels=LABELS, num_hidden_layers=1)
            asked = budget(epochs=4, alpha=0.0, **{penalty: weight})
            training.distill(
                student, None, splits["train"], asked, penalised=["bert.encoder.layer"], seed=0, progress=quiet
            )
            matrix = student.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").detach()
            sizes.append(float(matrix.abs().sum() if penalty == "l1" else matrix.square().sum()))
        assert sizes[1] < 0.8 * sizes[0]

    def test_one_seed_gives_the_same_weights(self, splits: dict[str, task.Split], teacher: torch.Tensor) -> None:
        found = []
        for _ in range(2):
            student = make_model("bert", labels=LABELS, num_hidden_layers=1)
            training.distill(student, teacher, splits["train"].head(32), budget(), seed=0, progress=quiet)
            found.append(weights(student))
        assert torch.equal(found[0], found[1])


class TestEndingEarly:
    """A tenth of the rows is held out; the state that does best on them is kept."""

    @pytest.fixture
    def judged(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """What the held rows will say, look by look."""
        coming: list[float] = []
        monkeypatch.setattr(training, "held_loss", lambda *_: coming.pop(0))
        return coming

    def train(
        self, rows: task.Split, *, seen: list[torch.Tensor] | None = None, **fields: Any
    ) -> tuple[Any, list[str]]:
        """Train 40 rows of which 36 are learnt from, in batches of 3: 12 steps a pass, a look every third."""
        student, said = make_model("bert", labels=LABELS, num_hidden_layers=1), []
        if seen is not None:
            student.register_forward_pre_hook(
                lambda *_: seen.append(weights(student)) if torch.is_grad_enabled() else None
            )
        asked = budget(batch_size=3, alpha=0.0, **fields)
        training.distill(student, None, rows.head(40), asked, seed=0, progress=said.append)
        return student, said

    def test_the_state_of_least_loss_is_kept(self, splits: dict[str, task.Split], judged: list[float]) -> None:
        judged += [0.5, 0.4, 0.6, 0.4]
        seen: list[torch.Tensor] = []
        student, said = self.train(splits["train"], seen=seen, epochs=1, patience=5)
        assert len(seen) == 12
        # What stood before step 7 is what step 6 left, of which the second look was taken.
        assert torch.equal(weights(student), seen[6])
        assert said[-1] == "kept the state of step 6/12, loss on held rows 0.400"

    @pytest.mark.parametrize(("patience", "ended", "looks"), [(0.25, 9, 3), (0.5, 12, 4), (0.6, 15, 5)])
    def test_it_ends_after_so_many_passes_without_improvement(
        self, splits: dict[str, task.Split], judged: list[float], patience: float, ended: int, looks: int
    ) -> None:
        judged += [0.5, 0.4, *[0.45] * 6]
        _, said = self.train(splits["train"], epochs=2, patience=patience)
        assert f"ends at step {ended}/24: no better on held rows since step 6" in said
        assert len(judged) == 8 - looks

    def test_the_end_is_judged_in_any_case(self, splits: dict[str, task.Split], judged: list[float]) -> None:
        judged += [0.5]
        _, said = self.train(splits["train"], epochs=0.1, patience=1)
        assert said[-1] == "kept the state of step 1/1, loss on held rows 0.500"

    def test_a_loss_that_is_not_finite_is_refused(self, splits: dict[str, task.Split], judged: list[float]) -> None:
        judged += [float("nan")]
        with pytest.raises(ModelError, match=r"the loss on held rows is nan at step 3; lower the learning rate"):
            self.train(splits["train"], epochs=1, patience=1)

    def test_held_rows_are_the_last_tenth_and_teach_nothing(
        self, splits: dict[str, task.Split], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = splits["train"].head(40)
        learnt, held = training.parted(rows)
        assert (learnt, held) == (rows.head(36), range(36, 40))
        judge, judged = training.held_loss, []
        monkeypatch.setattr(training, "held_loss", lambda *given: judged.append((given[2:4], judge(*given))) or 0.0)
        first, _ = self.train(rows, epochs=1, patience=5)
        others = task.Split(rows.input_ids, None, (*rows.labels[:36], *(1 - label for label in rows.labels[36:])))
        second, _ = self.train(others, epochs=1, patience=5)
        assert torch.equal(weights(first), weights(second)), "what is held was learnt from"
        assert [given for given, _ in judged] == [(rows, held)] * 4 + [(others, held)] * 4
        assert judged[0][1] != judged[4][1]

    def test_teacher_and_labels_are_judged_as_they_are_mixed(self, splits: dict[str, task.Split], module: Any) -> None:
        rows, held = splits["train"], [5, 1, 30]
        teacher = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(0))
        asked = budget(alpha=0.3, temperature=2.0, hidden=7.0, relations=7.0, l1=7.0)
        batch = rows.batch(held)
        with torch.no_grad():
            logits = module(**batch.inputs()).logits
        expected = losses.distillation(logits, batch.labels, teacher[held], alpha=0.3, temperature=2.0)
        assert training.held_loss(module, teacher, rows, held, asked) == pytest.approx(float(expected), rel=1e-5)


class TestLogits:
    def test_they_stand_in_the_order_of_rows(self, module: Any, splits: dict[str, task.Split]) -> None:
        rows = splits["test"]
        found = training.logits_of(module, rows)
        assert found.shape == (len(rows), 2)
        assert found.dtype == torch.float32
        with torch.no_grad():
            for row in (0, 7, len(rows) - 1):
                assert torch.allclose(found[row], module(**rows.batch([row]).inputs()).logits[0], atol=1e-5)

    def test_they_are_taken_without_dropout(self, module: Any, splits: dict[str, task.Split]) -> None:
        module.train()
        first = training.logits_of(module, splits["test"])
        module.train()
        assert torch.equal(first, training.logits_of(module, splits["test"]))

    def test_bfloat16_is_close(self, module: Any, splits: dict[str, task.Split]) -> None:
        rows = splits["test"].head(8)
        exact = training.logits_of(module, rows)
        rough = training.logits_of(module, rows, precision="bfloat16")
        assert not torch.equal(rough, exact)
        assert torch.allclose(rough, exact, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("features", "expected"), [([], False), (["avx2", "avx512f"], False), (["avx512_bf16"], True), (["amx_bf16"], True)]
)
def test_bfloat16_is_taken_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, features: list[str], expected: bool
) -> None:
    monkeypatch.setattr(machine, "cpu", lambda: {"name": "any", "features": features, "cores": 1})
    assert machine.has_bfloat16() is expected
    for precision, wanted in (("auto", expected), ("float32", False), ("bfloat16", True)):
        with training.autocast(precision):
            assert torch.is_autocast_enabled("cpu") is wanted
