"""Decisions: what can be done to one site of a model, or to the whole of it.

A decision refuses what it can never mean; whether a model's site can have it is for the transforms and the runtime to
say. `plan.py` collects decisions. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from autocompress.errors import PlanError

ACTIVATIONS = ("relu",)
"""Activation functions of the FFN that a student may have in place of the teacher's."""


def _require_int(owner: object, field: str, low: int, high: int | None = None) -> None:
    value = getattr(owner, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" and <= {high}"
        raise PlanError(f"{type(owner).__name__}.{field}: must be an integer >= {low}{upper}, got {value!r}")


def _require_blocks(owner: object, blocks: tuple[int, ...]) -> None:
    valid = all(isinstance(b, int) and not isinstance(b, bool) and b >= 0 for b in blocks)
    if not blocks or not valid or tuple(sorted(set(blocks))) != tuple(blocks):
        raise PlanError(f"{type(owner).__name__}.blocks: must be ascending block numbers >= 0, got {blocks!r}")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Base of all decisions. ``scope`` says whether it belongs to one site or to the whole model."""

    scope: ClassVar[Literal["site", "model"]] = "site"
    structural: ClassVar[bool] = True
    """Whether the decision changes the torch module; the others are carried out by the runtime."""

    def words(self) -> str:
        """Say the decision in a few words, for tables and hover texts."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        # Fields are numbers, words and tuples of numbers: there is nothing to go down into.
        return {"type": type(self).__name__, **vars(self)}


@dataclass(frozen=True, kw_only=True)
class PruneHeads(Decision):
    """Keep the ``keep`` most important attention heads of a block and remove the others physically."""

    keep: int

    def __post_init__(self) -> None:
        _require_int(self, "keep", 1)

    def words(self) -> str:
        return f"{self.keep} heads"


@dataclass(frozen=True, kw_only=True)
class PruneNeurons(Decision):
    """Keep the ``keep`` most important FFN neurons of a block and remove the others physically."""

    keep: int

    def __post_init__(self) -> None:
        _require_int(self, "keep", 1)

    def words(self) -> str:
        return f"{self.keep} neurons"


@dataclass(frozen=True, kw_only=True)
class LowRank(Decision):
    """Factorise each linear layer of a site into two of inner dimension ``rank``."""

    rank: int

    def __post_init__(self) -> None:
        _require_int(self, "rank", 1)

    def words(self) -> str:
        return f"rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class TrimVocabulary(Decision):
    """Keep ``keep`` rows of the table of tokens; every other token reads the kept row that is nearest to its own.

    The tokenizer stays as it is, and any text still has its tokens.
    """

    structural: ClassVar[bool] = False
    keep: int

    def __post_init__(self) -> None:
        _require_int(self, "keep", 1)

    @property
    def index_bits(self) -> int:
        """Bits that the number of a row takes."""
        return 16 if self.keep <= 2**16 else 32

    def words(self) -> str:
        return f"{self.keep} token rows"


@dataclass(frozen=True, kw_only=True)
class Quantize(Decision):
    """Store a site's weights in ``weight_bits`` and, with ``activation_bits`` of 8, compute in 8-bit integers.

    Args:
        weight_bits: 16 (IEEE half precision storage), 8 (per output channel), 4, 3 or 2 (per group along the input).
        activation_bits: 8 for integer arithmetic, 16 for arithmetic on unquantised activations.
        scheme: ``symmetric`` weights; the only grid offered so far.
        group_size: weights that share a step along the input dimension, 0 for a whole channel.
    """

    structural: ClassVar[bool] = False
    weight_bits: int
    activation_bits: int = 16
    scheme: str = "symmetric"
    group_size: int = 0

    def __post_init__(self) -> None:
        _require_int(self, "weight_bits", 1)
        _require_int(self, "group_size", 0)
        if self.weight_bits not in (2, 3, 4, 8, 16):
            raise PlanError(f"Quantize.weight_bits: must be one of 2, 3, 4, 8, 16, got {self.weight_bits!r}")
        if self.activation_bits not in (8, 16):
            raise PlanError(f"Quantize.activation_bits: must be 8 or 16, got {self.activation_bits!r}")
        if self.activation_bits == 8 and self.weight_bits == 16:
            raise PlanError("Quantize.activation_bits: 8 goes with weight_bits of 8 or fewer, got weight_bits 16")
        if self.scheme != "symmetric":
            raise PlanError(f"Quantize.scheme: must be 'symmetric', got {self.scheme!r}")
        if (self.weight_bits < 8) != (self.group_size > 0):
            raise PlanError(
                f"Quantize.group_size: must be > 0 below 8 bits and 0 otherwise, got {self.group_size} at "
                f"{self.weight_bits} bits"
            )

    @property
    def whole_steps(self) -> bool:
        """Whether the steps of groups are whole multiples of a unit of their row, instead of floats."""
        return self.weight_bits < 4 or (self.weight_bits == 4 and self.activation_bits == 8)

    def words(self) -> str:
        return f"w{self.weight_bits}" + ("a8" if self.activation_bits == 8 else "")


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Decision):
    """Remove whole blocks; numbers count in the model (the student's, where there is one) from 0."""

    scope: ClassVar[Literal["site", "model"]] = "model"
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _require_blocks(self, self.blocks)

    def words(self) -> str:
        return "without block " + ", ".join(str(b) for b in self.blocks)


@dataclass(frozen=True, kw_only=True)
class MaxTokens(Decision):
    """Read the first ``tokens`` tokens of a text and no more; the artefact itself cuts what it is given."""

    scope: ClassVar[Literal["site", "model"]] = "model"
    structural: ClassVar[bool] = False
    tokens: int

    def __post_init__(self) -> None:
        _require_int(self, "tokens", 1, 2**31 - 1)

    def words(self) -> str:
        return f"first {self.tokens} tokens"


@dataclass(frozen=True, kw_only=True)
class Student(Decision):
    """Start from a smaller model distilled from the teacher.

    Args:
        blocks: teacher blocks that the student is initialised from, ascending, from 0.
        heads: attention heads kept in each block.
        neurons: FFN neurons kept in each block.
        epochs: distillation budget in passes over the training rows.
        activation: the FFN's activation function; empty for the teacher's.
        hidden: channels kept of the width between the blocks; 0 for all of them.
        share: times that each block is run in a row, with one set of weights.
    """

    scope: ClassVar[Literal["site", "model"]] = "model"
    blocks: tuple[int, ...]
    heads: int
    neurons: int
    epochs: float = 1.0
    activation: str = ""
    hidden: int = 0
    share: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _require_blocks(self, self.blocks)
        _require_int(self, "heads", 1)
        _require_int(self, "neurons", 1)
        _require_epochs(self, self.epochs)
        if self.activation not in ("", *ACTIVATIONS):
            raise PlanError(
                f"Student.activation: must be {' or '.join(ACTIVATIONS)}, or empty for the teacher's, got "
                f"{self.activation!r}"
            )
        _require_int(self, "hidden", 0)
        _require_int(self, "share", 1)

    def to_dict(self) -> dict[str, Any]:
        # As it was written before there were such students: the ids of the others' plans stay what they are.
        whole = {"activation": "", "hidden": 0, "share": 1}
        return {name: value for name, value in super().to_dict().items() if whole.get(name) != value}

    def words(self) -> str:
        said = [f"student of {len(self.blocks)} blocks x {self.heads} heads x {self.neurons} neurons"]
        said += [f"{self.hidden} wide"] if self.hidden else []
        said += [f"with {self.activation}"] if self.activation else []
        said += [f"each block run {self.share} times"] if self.share > 1 else []
        return ", ".join(said)


@dataclass(frozen=True, kw_only=True)
class Recover(Decision):
    """After all structural decisions, distil from the teacher for ``epochs`` passes over the training rows.

    Args:
        epochs: passes over the training rows; 0 trains nothing.
        hidden: weight of what differs from the teacher between the blocks; 0 for its logits alone.
        relations: weight of what differs from it in the relations of queries, keys and values.
        l1: weight of the sum of magnitudes of the blocks' matrices.
        l2: weight of the sum of their squares.
        patience: passes without improvement on held training rows after which it ends; 0 to use all rows and end last.
        seeds: trainings that are averaged.
        quantized: whether weights are rounded while they are trained, as the plan's other decisions store them.
        reconstruct: whether layers are first fitted, by least squares, to what stood between the blocks before
            anything was removed.
    """

    scope: ClassVar[Literal["site", "model"]] = "model"
    epochs: float
    hidden: float = 0.0
    relations: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    patience: float = 0.0
    seeds: int = 1
    quantized: bool = False
    reconstruct: bool = False

    def __post_init__(self) -> None:
        for name in ("quantized", "reconstruct"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"Recover.{name}: must be true or false, got {getattr(self, name)!r}")
        if self.reconstruct and self.epochs in (0, 0.0) and not isinstance(self.epochs, bool):
            object.__setattr__(self, "epochs", 0.0)
        else:
            _require_epochs(self, self.epochs)
        for name in ("hidden", "relations", "l1", "l2"):
            _require_weight(self, name, "1e6")
        _require_weight(self, "patience", "100")
        _require_int(self, "seeds", 1, 32)
        if self.quantized and self.seeds > 1:
            raise PlanError(f"Recover.quantized: goes with 1 seed, a mean is on no grid; got {self.seeds} seeds")
        if not self.epochs:
            for field in dataclasses.fields(self):
                if field.name not in ("epochs", "reconstruct") and getattr(self, field.name) != field.default:
                    raise PlanError(f"Recover.{field.name}: goes with epochs > 0, without which nothing is trained")

    def to_dict(self) -> dict[str, Any]:
        # What is not used is not written, as before there was such an option: the ids of such plans stay what they are.
        unused = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in super().to_dict().items() if value != unused.get(name)}

    def words(self) -> str:
        fitted = "reconstructed" if self.reconstruct else ""
        if not self.epochs:
            return fitted
        said = f"recovered {self.epochs:g} epochs" + (" block by block" if self.hidden else "")
        named = ("relations", "l1", "l2", "patience")
        more = [f"{name} {getattr(self, name):g}" for name in named if getattr(self, name)]
        more += [f"mean of {self.seeds} seeds"] if self.seeds > 1 else []
        more += ["with rounded weights"] if self.quantized else []
        return ", ".join([*([fitted] if fitted else []), said, *more])


def _require_weight(owner: object, field: str, high: str) -> None:
    value = getattr(owner, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= float(high):
        raise PlanError(f"{type(owner).__name__}.{field}: must be >= 0 and <= {high}, got {value!r}")
    object.__setattr__(owner, field, float(value))


def _require_epochs(owner: object, epochs: object) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 < epochs <= 100:
        raise PlanError(f"{type(owner).__name__}.epochs: must be > 0 and <= 100, got {epochs!r}")
    # 1 and 1.0 are the same budget and must give the same plan_id.
    object.__setattr__(owner, "epochs", float(epochs))


# The order is the order of application, and with it the canonical order within a site.
DECISIONS: dict[str, type[Decision]] = {
    cls.__name__: cls
    for cls in (
        *(Student, DropBlocks, MaxTokens, PruneHeads, PruneNeurons, LowRank, Recover),
        *(TrimVocabulary, Quantize),
    )
}

RECONSTRUCTED = Recover(epochs=0, reconstruct=True)
"""Layers are fitted, and nothing is trained."""
