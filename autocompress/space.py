"""Search spaces: YAML files of the choices that a search has.

A space names students, how many blocks may go, and rules: a pattern over site names with the choices of each axis
there. ``tie`` says how many groups of consecutive blocks decide together, so that the number of parameters stays
small enough to be searched. `binding.py` binds a space to a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from autocompress import strict_yaml
from autocompress.config import Name, Section, validated
from autocompress.errors import ConfigError


def _fraction_or_count(value: object) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if whole or (isinstance(value, float) and 0 < value <= 1):
        return value
    raise ValueError(f"must be a fraction > 0 and <= 1 (1.0 keeps all) or a whole count >= 1, got {value!r}")


def _rank(value: object) -> object:
    return value if value == "full" else _fraction_or_count(value)


def _length(value: object) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value == "full" or whole or (isinstance(value, float) and 0 < value <= 1):
        return value
    raise ValueError(
        "must be full (texts stay as they are), a fraction > 0 and <= 1 of the target's tokens or a whole count >= 1, "
        f"got {value!r}"
    )


def _tie(value: object) -> object:
    if value in ("all", "none") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be a whole number >= 1, all or none, got {value!r}")


def _student_blocks(value: object) -> object:
    if isinstance(value, float) and 0 < value <= 1:
        return value
    if isinstance(value, (list, tuple)) and value:
        whole = all(isinstance(b, int) and not isinstance(b, bool) and b >= 0 for b in value)
        if whole and sorted(set(value)) == list(value):
            return tuple(value)
    raise ValueError(f"must be a fraction > 0 and <= 1 or ascending block numbers >= 0, got {value!r}")


Tie = Annotated[int | Literal["all", "none"], BeforeValidator(_tie)]
StudentBlocks = Annotated[tuple[int, ...] | float, BeforeValidator(_student_blocks)]
Keep = Annotated[int | float, BeforeValidator(_fraction_or_count)]
Rank = Annotated[int | float | Literal["full"], BeforeValidator(_rank)]
Length = Annotated[int | float | Literal["full"], BeforeValidator(_length)]
Bits = Literal[16, 8, 4, 3, 2, "w4a8", "w3a8", "w2a8"]
Value = int | float | str


AXES = ("heads", "neurons", "rank", "vocabulary", "bits")
"""What rules decide, in the order of decisions: none reads what a later one decides."""


class Axis(Section):
    tie: Tie = Field(
        "none",
        description="how many groups of neighbouring blocks there are, whose blocks get one choice; all: one group, "
        "none: one for each block",
    )


class KeepAxis(Axis):
    choices: tuple[Keep, ...] = Field(
        min_length=1, description="what is kept: fractions (1.0 is all) or counts (1 is one)"
    )


class BitsAxis(Axis):
    choices: tuple[Bits, ...] = Field(
        min_length=1, description="of weights; w4a8 is 4 bits, multiplied as integers by activations of 8"
    )


class RankAxis(Axis):
    choices: tuple[Rank, ...] = Field(
        min_length=1, description="full (no factors), fractions of the rank at which they store as much, or counts"
    )


class StudentSpec(Section):
    blocks: StudentBlocks = Field(
        1.0, description="fraction of the depth, or the numbers of the blocks that it starts from"
    )
    heads: Keep = Field(1.0, description="of each block, as a fraction or a count")
    neurons: Keep = Field(1.0, description="of each block, as a fraction or a count")
    epochs: float = Field(1.0, gt=0, le=100, description="distillation passes over the training rows")
    activation: Literal["relu"] | None = Field(None, description="of the FFN, in place of the model's")
    hidden: Keep = Field(1.0, description="channels that are kept of the width between the blocks")
    share: int = Field(1, ge=1, le=100, description="times that each block is run in a row, with one set of weights")


class DropSpec(Section):
    at_most: int = Field(ge=0, description="blocks that a plan may leave out")


def bits_of(choice: Value) -> int:
    """Return the bits of a weight that a choice of bits says."""
    return int(choice[1]) if isinstance(choice, str) else int(choice)


def _all_differ(name: str, choices: Sequence[object]) -> None:
    # The count 1 and the fraction 1.0 are equal too: a sampler could not tell them apart.
    if len(set(choices)) < len(choices):
        raise ValueError(f"{name}: each choice may be given once, got {list(choices)}")


class Rule(Section):
    match: str = Field(min_length=1, description="pattern over site names, such as block.*.ffn")
    name: Name | None = Field(None, description="needed where two rules decide the same for one kind of site")
    heads: KeepAxis | None = Field(None, description="of sites of attention")
    neurons: KeepAxis | None = Field(None, description="of sites of an FFN")
    bits: BitsAxis | None = Field(None, description="of any site")
    rank: RankAxis | None = Field(None, description="of sites of attention and of an FFN")
    vocabulary: KeepAxis | None = Field(None, description="of the embeddings: rows of the table of tokens")

    @model_validator(mode="before")
    @classmethod
    def _lists_are_untied_choices(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {k: {"choices": v} if k in AXES and isinstance(v, list) else v for k, v in data.items()}

    @model_validator(mode="after")
    def _choices_differ(self) -> Rule:
        for name, axis in self.axes().items():
            _all_differ(name, axis.choices)
        return self

    def axes(self) -> dict[str, KeepAxis | BitsAxis | RankAxis]:
        return {name: axis for name in AXES if (axis := getattr(self, name)) is not None}


class SearchSpace(Section):
    """The content of a search-space file."""

    schema_version: Literal[1] = Field(1, alias="schema")
    name: Name = Field(description="of the space")
    description: str = Field("", description="for people")
    students: dict[Name, StudentSpec] = Field(
        default_factory=dict,
        description="models that are distilled, by names of your own, and taken in the model's place",
    )
    drop_blocks: DropSpec | None = Field(None, description="whether plans leave out blocks")
    max_tokens: tuple[Length, ...] | None = Field(
        None, min_length=1, description="tokens that are read of a text: full, fractions of the target's, or counts"
    )
    rules: tuple[Rule, ...] = Field((), description="what is decided at which sites")
    reconstruct: tuple[bool, ...] | None = Field(
        None,
        min_length=1,
        description="whether the layers of a pruned model are fitted, by least squares on calibration rows, to what it "
        "was before it was pruned",
    )

    @model_validator(mode="after")
    def _choices_differ(self) -> SearchSpace:
        _all_differ("max_tokens", self.max_tokens or ())
        _all_differ("reconstruct", self.reconstruct or ())
        return self

    @classmethod
    def load(cls, name_or_path: str) -> SearchSpace:
        """Read a shipped space by name or a YAML file by path.

        Raises:
            ConfigError: if it cannot be found or does not validate.
        """
        path = Path(name_or_path).expanduser()
        if path.suffix in (".yaml", ".yml"):
            data = strict_yaml.read(path)
            source = path.name
        else:
            if name_or_path not in shipped_spaces():
                raise ConfigError(
                    f"space: {name_or_path}: not a shipped search space ({', '.join(shipped_spaces())}) and not a "
                    "path to a .yaml file"
                )
            source = f"{name_or_path}.yaml"
            text = resources.files("autocompress").joinpath("search_spaces", source).read_text(encoding="utf-8")
            data = strict_yaml.parse(text, source)
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: must hold keys and values, got {type(data).__name__}")
        return validated(cls, data, source)


def shipped_spaces() -> list[str]:
    """Return the names of the search spaces that come with the package."""
    folder = resources.files("autocompress").joinpath("search_spaces")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
