"""The models that took training: the teacher, students distilled from it, and recovered structures.

The bank keeps them: each is trained once for all that it is made from, and read after that. What a student begins as,
and what the structural decisions of a plan lead to, is known to `bases.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from autocompress import machine, model, origins, recovery, soup, task, training
from autocompress.bank import Bank, default_bank
from autocompress.config import OF_PICKED_POINTS, RunConfig
from autocompress.decisions import Recover, Student
from autocompress.errors import ConfigError
from autocompress.model import EncoderModel
from autocompress.pieces import code_version
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.reconstruct import Wanted, read_sums, reconstruct, save_sums, sums_in
from autocompress.rounding import read_packed, rounded, save_packed
from autocompress.task import Batch, Split
from autocompress.transforms.moments import Moments
from autocompress.transforms.quantize import Packed

Progress = training.Progress
_RECONSTRUCTION = (
    "reconstruct.py",
    "recovery.py",
    *(f"transforms/{name}.py" for name in ("importance", "prune", "surgery", "factorize", "moments")),
)
"""What a reconstructed model comes of: its weights, and what they go on from."""

_AT_ONCE = 2e11
"""Multiplications of a batch: of larger ones, others would not wait to the end (`slot.py`)."""
FITTED_AT_ONCE = 64
"""Rows of a batch by which weights are fitted; products over many tokens are faster."""


def silent(_: str) -> None:
    """Report no progress."""


def bank_root(run: RunConfig) -> Path:
    """Return the folder of the run's bank."""
    return Path(run.storage.bank).expanduser() if run.storage.bank else default_bank()


def bank_of(run: RunConfig) -> Bank:
    """Return the run's bank, with the depot that it shares with other machines, if there is one."""
    depot = None
    if run.storage.shared is not None:
        from autocompress.depot import Depot

        depot = Depot(run.storage.shared)
    return Bank(bank_root(run), limit_bytes=int(run.storage.bank_gb * 1e9), depot=depot)


class Trained:
    """The teacher and what is trained from it.

    Args:
        run: the resolved run file.
        progress: told what is being done, a line at a time.
        threads: of torch, by default as many as there are cores; workers, who work beside each other, have fewer.
    """

    def __init__(self, run: RunConfig, progress: Progress = silent, *, threads: int | None = None) -> None:
        self.run = run
        self.progress = progress
        self.threads = threads or machine.cores()
        self.bank = bank_of(run)
        self.source = origins.locate(run.model.id, run.model.revision)
        model.check_files(self.source)
        self.task = task.load(run.data, labels=model.head_labels(self.source))
        self._rounded: dict[str, dict[str, Packed]] = {}
        self._read_in: dict[str, list[dict[str, Moments]]] = {}
        """Moments of what the layers of the model read that was reconstructed last, by its name and block."""

    @cached_property
    def tokenizer(self) -> Any:
        return model.load_tokenizer(self.source)

    @cached_property
    def splits(self) -> Mapping[str, Split]:
        return self.task.tokenized(self.tokenizer, self.run.data.max_tokens)

    def loaded(self, folder: Path) -> EncoderModel:
        """Load a classifier that reads all rows, or one to be; a head that it has to get comes from the run's seed.

        Raises:
            ModelError: if it cannot be loaded or is not understood.
            ConfigError: if what is timed, or a row, has more tokens than it reads at once.
        """
        found = model.load(folder, labels=self.task.labels, seed=self.run.seed)
        most = found.most_tokens
        if most is None or self.run.data.max_tokens <= most:
            return found
        # Only now, as it takes a while: rows may all be shorter than they could be.
        longest = max(self.run.target.tokens, *(len(row) for split in self.splits.values() for row in split.input_ids))
        if longest > most:
            raise ConfigError(f"data.max_tokens: must be <= {most}, as {folder} reads no more, and a row has {longest}")
        return found

    @cached_property
    def calibration(self) -> Split:
        head = self.task.head("train", self.run.data.calibration_rows)
        return head.tokenized(self.tokenizer, self.run.data.max_tokens)["train"]

    @property
    def reconstruction_rows(self) -> int:
        """Training rows that reconstructions are fitted on."""
        return min(self.run.data.reconstruction_rows, len(self.task.splits["train"]))

    @cached_property
    def fitted_batches(self) -> list[Batch]:
        """The rows that reconstructions are fitted on."""
        head = self.task.head("train", self.run.data.reconstruction_rows)
        rows = head.tokenized(self.tokenizer, self.run.data.max_tokens)["train"]
        return list(rows.in_order_of_length(FITTED_AT_ONCE, most_tokens=self.tokens_at_once))

    def calibration_batches(self, rows: int | None = None, *, at_once: int = 16) -> list[Batch]:
        split = self.calibration if rows is None else self.calibration.head(rows)
        return list(split.in_order_of_length(at_once, most_tokens=self.tokens_at_once))

    @cached_property
    def tokens_at_once(self) -> int:
        """Tokens of a batch that the uncompressed model is run on in a piece of work."""
        blocks, hidden = self.untuned.shape.blocks, self.untuned.shape.hidden
        weights = sum(4 * b.heads * b.head_size * hidden + 2 * b.neurons * hidden for b in blocks)
        return max(1, int(_AT_ONCE / weights))

    @cached_property
    def teacher_folder(self) -> Path:
        """The folder of the uncompressed classifier, fine-tuned by us if the model came without a head."""
        if model.head_labels(self.source) is not None:
            return self.source
        made_from = {
            "model": model.fingerprint(self.source),
            "task": self.task.fingerprint,
            "max_tokens": self.run.data.max_tokens,
            "finetune": self.run.model.finetune.model_dump(),
            "precision": self.precision(),
            "seed": self.run.seed,
            # Not of the recipe that there was before it was noted here.
            **({"recipe": training.RECIPE} if training.RECIPE > 2 else {}),
        }
        return self.bank.get("finetuned", made_from, self._finetune)

    def _finetune(self, folder: Path) -> None:
        config = self.run.model.finetune
        rows = self.splits["train"]
        self.progress(f"fine-tuning {self.run.model.id} on {len(rows)} rows for {config.epochs:g} epochs")
        loaded = self.loaded(self.source)
        budget = training.TrainingBudget(**config.model_dump(), precision=self.precision())
        with torch_threads(self.threads):
            training.finetune(
                loaded.module, rows, budget, seed=self.run.seed, progress=lambda s: self.progress(f"fine-tuning: {s}")
            )
        loaded.module.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def teacher(self) -> EncoderModel:
        return self.loaded(self.teacher_folder)

    @property
    def untuned(self) -> EncoderModel:
        """The teacher, or, as long as nobody needed that, the model that it is fine-tuned from: of the same sizes."""
        return self.teacher if "teacher" in self.__dict__ else self._given

    @cached_property
    def _given(self) -> EncoderModel:
        return self.loaded(self.source)

    def precision(self) -> str:
        wanted = self.run.recovery.precision
        return ("bfloat16" if machine.has_bfloat16() else "float32") if wanted == "auto" else wanted

    def _key(self, **more: Any) -> dict[str, Any]:
        return {
            "teacher": self.teacher.base,
            "task": self.task.fingerprint,
            "max_tokens": self.run.data.max_tokens,
            "calibration_rows": self.run.data.calibration_rows,
            **more,
        }

    @cached_property
    def _teacher_logits(self) -> torch.Tensor:
        def make(folder: Path) -> None:
            self.progress(f"running the teacher on {len(self.splits['train'])} training rows")
            with torch_threads(self.threads):
                logits = training.logits_of(
                    self.teacher.module,
                    self.splits["train"],
                    precision=self.precision(),
                    progress=lambda s: self.progress(f"running the teacher: {s}"),
                )
            save_file({"logits": logits}, folder / "logits.safetensors")

        key = self._key(train_rows=len(self.splits["train"]), precision=self.precision())
        return load_file(self.bank.get("teacher-logits", key, make) / "logits.safetensors")["logits"]

    def _distilled(
        self,
        target: EncoderModel,
        what: str,
        budget: training.TrainingBudget,
        made_from: dict[str, Any],
        *,
        begin: Callable[[EncoderModel], None] | None = None,
        example: training.Example | None = None,
        rounded_by: CompressionPlan | None = None,
        tables: Callable[[], Mapping[str, np.ndarray]] = dict,
        seed: int | None = None,
    ) -> EncoderModel:
        """Give ``target`` the weights that distillation leads to, from the run's seed or another, after ``begin``.

        They are rounded meanwhile as the decisions of ``rounded_by`` say, if it is given; embeddings are then looked up
        in ``tables``, by path.
        """
        seed = self.run.seed if seed is None else seed

        def train() -> Mapping[str, Packed]:
            if begin is not None:
                begin(target)
            teacher = self._teacher_logits if budget.alpha else None
            rows = self.splits["train"]
            self.progress(f"distilling {what} on {len(rows)} rows for {budget.epochs:g} epochs")
            plan = rounded_by or CompressionPlan()
            with torch_threads(self.threads), rounded(target, plan, tables() if rounded_by else None) as weights:
                training.distill(
                    target.module,
                    teacher,
                    rows,
                    budget,
                    # What is pruned is in the blocks; the tables are half of what the optimiser would move. Those of a
                    # narrower student, too: to train them took several times as long and made it no better.
                    frozen=target.layout.embeddings,
                    penalised=(target.layout.blocks,),
                    example=example,
                    refit=weights.refit if rounded_by is not None else None,
                    seed=seed,
                    progress=lambda s: self.progress(f"distilling: {s}"),
                )
            return weights.stored

        return self._trained(target, self._distilled_from(made_from, budget, seed), train)

    def _trained(
        self, target: EncoderModel, key: dict[str, Any], train: Callable[[], Mapping[str, Packed]]
    ) -> EncoderModel:
        """Give ``target`` the weights that ``train`` gives it; they are kept in the bank.

        Some may be trained in the numbers that are to be stored; ``train`` returns these.
        """

        def make(folder: Path) -> None:
            found = train()
            state = target.module.state_dict()
            save_file({name: value.contiguous() for name, value in state.items()}, folder / "weights.safetensors")
            save_packed(found, folder)

        folder = self.bank.get("distilled", key, make)
        target.module.load_state_dict(load_file(folder / "weights.safetensors"))
        target.module.eval()
        target.base = folder.name
        self._rounded[target.base] = read_packed(folder)
        return target

    def _reconstructed(self, target: EncoderModel, plan: CompressionPlan, base: EncoderModel) -> EncoderModel:
        """Give ``target``, to which structural decisions of ``plan`` led from ``base``, weights fitted to the latter.

        The bank keeps those that this changes: the rest follows from the plan.
        """
        structure, found = plan.structural().without(Recover), list[list[dict[str, Moments]]]()

        def make(folder: Path) -> None:
            before = {name: value.clone() for name, value in target.module.state_dict().items()}
            self.progress(f"reconstructing a structure on {self.reconstruction_rows} training rows")
            depth = len(base.shape.blocks)
            blocks, since = recovery.counterparts(plan.without(Student), depth), recovery.first_other(plan, depth)
            aim, rows = self.sums(base), self.fitted_batches
            with torch_threads(self.threads):
                found.append(reconstruct(target, aim, blocks, rows, since=since, autocast=self._autocast))
            after = target.module.state_dict()
            changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
            save_file({name: after[name].contiguous() for name in changed}, folder / "weights.safetensors")

        made_from = {"plan": json.loads(structure.to_json()), "base": base.base}
        key = self._fitted_key(**made_from, code=code_version(_RECONSTRUCTION))
        folder = self.bank.get("reconstructed", key, make)
        if found:
            self._read_in = {folder.name: found[0]}
        target.module.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
        target.base = folder.name
        return target

    def sums(self, base: EncoderModel) -> Wanted:
        """Return what gives the sums in ``base`` that a reconstruction aims at, for the rows that it is fitted on."""

        def make(folder: Path) -> None:
            self.progress(f"running {self.reconstruction_rows} training rows to reconstruct by")
            with torch_threads(self.threads):
                save_sums(sums_in(base, self.fitted_batches, autocast=self._autocast), folder)

        key = self._fitted_key(base=base.base, code=code_version(("reconstruct.py",)))
        return lambda block, role: self.bank.load("sums", key, make, lambda folder: read_sums(folder, block, role))

    def _fitted_key(self, **more: Any) -> dict[str, Any]:
        return self._key(**more, rows=self.reconstruction_rows, precision=self.precision())

    def _autocast(self) -> torch.autocast:
        return training.autocast(self.precision())

    def _budget(self, decided: Student | Recover) -> training.TrainingBudget:
        return recovery.budget_of(self.run.recovery, decided, precision=self.precision())

    def _distilled_from(self, what: dict[str, Any], budget: training.TrainingBudget, seed: int) -> dict[str, Any]:
        # Without options that are 0, as before there were such: what is in the bank stays of use.
        spent = {n: value for n, value in dataclasses.asdict(budget).items() if n not in OF_PICKED_POINTS or value}
        return self._key(what=what, budget=spent, seed=seed, recipe=training.RECIPE)

    @property
    def affordable_passes(self) -> float:
        """Passes of one fine-tuning of the uncompressed model, whose arithmetic a recovery may take."""
        headed = model.head_labels(self.source) is not None
        return recovery.HEADED_EPOCHS if headed else self.run.model.finetune.epochs

    def recovering(self, plan: CompressionPlan) -> CompressionPlan:
        """Return ``plan`` with the recovery that the run file asks for."""
        asked = self.run.recovery
        # Without training there is no use for the others.
        options = asked.model_dump(include=set(OF_PICKED_POINTS) if asked.epochs else {"reconstruct"})
        if asked.epochs != "auto":
            return plan.recovered(Recover(epochs=asked.epochs, **options))
        wanted = plan.recovered(Recover(epochs=1, **options)).of_type(Recover)[MODEL_SITE]
        affordable = recovery.affordable_epochs(plan, wanted, self.teacher, self.affordable_passes, alpha=asked.alpha)
        return plan.recovered(dataclasses.replace(wanted, epochs=affordable))

    def _recovered(
        self,
        built: EncoderModel,
        plan: CompressionPlan,
        wanted: Recover,
        base: EncoderModel,
        tables: Callable[[], Mapping[str, np.ndarray]],
    ) -> EncoderModel:
        """Give ``built``, to which structural decisions of ``plan`` led from ``base``, the weights of its recovery.

        Embeddings are looked up in ``tables``, by path, where weights are rounded meanwhile.
        """
        if not wanted.epochs:
            return self._reconstructed(built, plan, base)
        budget, example = self._budget(wanted), recovery.example_of(plan, self.teacher, built)
        rounded_by = plan if wanted.quantized else None

        def made_from(seeds: int) -> dict[str, Any]:
            trained = plan if wanted.quantized else plan.structural()
            counted = trained.with_decision(MODEL_SITE, dataclasses.replace(wanted, seeds=seeds))
            code = {"grid": code_version(("transforms/quantize.py",))} if wanted.quantized else {}
            if wanted.reconstruct:
                code |= {"reconstruction": code_version(_RECONSTRUCTION), "rows": str(self.reconstruction_rows)}
            return {"plan": json.loads(counted.to_json()), "base": base.base, **code}

        def begin(target: EncoderModel) -> None:
            if wanted.reconstruct:
                self._reconstructed(target, plan, base)

        def one(target: EncoderModel, what: str, seed: int) -> EncoderModel:
            # By the key that it has where it is not averaged: none of them is trained twice.
            return self._distilled(
                target,
                what,
                budget,
                made_from(1),
                begin=begin,
                example=example,
                rounded_by=rounded_by,
                tables=tables,
                seed=seed,
            )

        def average() -> Mapping[str, Packed]:
            what, seeds = "a picked structure", [(self.run.seed + n) % 2**32 for n in range(wanted.seeds)]
            members = [one(built.clone(), f"{what} (seed {seed})", seed).module.state_dict() for seed in seeds]
            built.module.load_state_dict(self._averaged(members, built.module, budget))
            return {}

        if wanted.seeds == 1:
            return one(built, "a picked structure", self.run.seed)
        return self._trained(built, self._distilled_from(made_from(wanted.seeds), budget, self.run.seed), average)

    def _averaged(
        self, members: list[dict[str, torch.Tensor]], module: torch.nn.Module, budget: training.TrainingBudget
    ) -> dict[str, torch.Tensor]:
        """Return the mean of all members; where rows are held out, of those that do not harm it there."""
        if not budget.patience:
            return soup.uniform(members)
        rows, teacher = self.splits["train"], self._teacher_logits if budget.alpha else None
        held = training.parted(rows)[1]

        def loss_of(state: soup.State) -> float:
            module.load_state_dict(state)
            return training.held_loss(module, teacher, rows, held, budget)

        with torch_threads(self.threads):
            return soup.greedy(members, loss_of)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
