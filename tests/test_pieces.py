"""Pieces: what stands at a site is what the plan makes of the whole model there, however it is made, kept and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LABELS, make_model, make_tokenizer

from autocompress import pieces, task
from autocompress.config import DataConfig
from autocompress.decisions import Decision, LowRank, PruneHeads, PruneNeurons, Quantize
from autocompress.model import EncoderModel, understand
from autocompress.pieces import Factor, Piece, code_version, linear_modules, make_piece, read_piece, save_piece
from autocompress.plan import CompressionPlan
from autocompress.transforms import HANDLERS, apply_plan
from autocompress.transforms.importance import Importance, importance
from autocompress.transforms.moments import take_moments
from autocompress.transforms.quantize import ActivationRange, Activations, Packed, observe, packed

W16 = Quantize(weight_bits=16)
W8 = Quantize(weight_bits=8)
W8A8 = Quantize(weight_bits=8, activation_bits=8)
W4 = Quantize(weight_bits=4, group_size=8)
ATTENTION, FFN = "block.1.attention", "block.1.ffn"

DECISIONS: dict[str, tuple[str, tuple[Decision, ...]]] = {
    "nothing": (FFN, ()),
    "half precision": (ATTENTION, (W16,)),
    "tables": ("embeddings", (W8,)),
    "tables of 4 bits": ("embeddings", (W4,)),
    "head": ("head", (W8A8,)),
    "heads": (ATTENTION, (PruneHeads(keep=3),)),
    "heads and integers": (ATTENTION, (PruneHeads(keep=2), W8A8)),
    "one head": (ATTENTION, (PruneHeads(keep=1), W4)),
    "neurons": (FFN, (PruneNeurons(keep=37),)),
    "neurons and integers": (FFN, (PruneNeurons(keep=24), W8A8)),
    "rank": (ATTENTION, (LowRank(rank=5), W8)),
    "rank and integers": (FFN, (LowRank(rank=7), W8A8)),
    "everything at the attention": (ATTENTION, (PruneHeads(keep=3), LowRank(rank=8), W8A8)),
    "everything at the FFN": (FFN, (PruneNeurons(keep=32), LowRank(rank=8), W8A8)),
}


@dataclasses.dataclass
class Given:
    """A model with what pieces are made from, and its state before."""

    model: EncoderModel
    batches: list[task.Batch]
    scores: Importance
    activations: Activations

    def piece(self, site: str, decisions: tuple[Decision, ...]) -> Piece:
        return make_piece(self.model, site, decisions, self.scores, self.activations)


@pytest.fixture(scope="module")
def given(tiny_csv: Path) -> Callable[[str], Given]:
    made: dict[str, Given] = {}

    def get(family: str) -> Given:
        if family not in made:
            model = understand(make_model(family, labels=LABELS), base="test")
            rows = task.load(DataConfig(source=str(tiny_csv), search_rows=60)).tokenized(make_tokenizer(family), 16)
            batches = list(rows["train"].head(24).in_order_of_length(8))
            moments = take_moments(model, batches)
            scores = dataclasses.replace(importance(model, batches), moments=lambda block, role: moments[block][role])
            made[family] = Given(model, batches, scores, observe(model, batches))
        return made[family]

    return get


@pytest.fixture(scope="module")
def bert(given: Callable[[str], Given]) -> Given:
    return given("bert")


def same(one: Piece, other: Piece) -> None:
    """Assert that two pieces hold the same bits."""
    assert [len(layer) for layer in one] == [len(layer) for layer in other]
    for mine, his in zip([f for x in one for f in x], [f for x in other for f in x], strict=True):
        assert mine.weight.bits == his.weight.bits
        assert mine.span == his.span
        for a, b in (
            (mine.weight.values, his.weight.values),
            (mine.weight.scales, his.weight.scales),
            (mine.bias, his.bias),
        ):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert np.array_equal(a, b)


def state_of(model: EncoderModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_piece_is_what_the_plan_makes_of_the_model(given: Callable[[str], Given], family: str, name: str) -> None:
    one, (site, decisions) = given(family), DECISIONS[name]
    quantize = next((d for d in decisions if isinstance(d, Quantize)), None)
    changed = one.model.clone()
    apply_plan(changed, CompressionPlan(tuple((site, d) for d in decisions)), one.scores)
    piece = one.piece(site, decisions)
    paths = one.model.layout.linears(site)
    assert len(piece) == len(paths)
    for path, layer in zip(paths, piece, strict=True):
        wanted = [changed.module.get_submodule(path)] if site == "embeddings" else _layers(changed, path)
        assert len(layer) == len(wanted) == (2 if any(isinstance(d, LowRank) for d in decisions) else 1)
        for factor, module in zip(layer, wanted, strict=True):
            expected = packed(module.weight.detach().numpy(), quantize, looked_up=site == "embeddings")
            bias = None if getattr(module, "bias", None) is None else module.bias.detach().numpy()
            span = factor.span
            if quantize is W4 and site != "embeddings":
                assert factor.weight.values.shape == expected.values.shape
                assert not np.array_equal(factor.weight.values, expected.values), "rounding errors are made up for"
            else:
                same(((factor,),), ((Factor(expected, bias, span),),))
            assert (span is not None) == (quantize is W8A8)


def _layers(model: EncoderModel, path: str) -> list[torch.nn.Linear]:
    return [module for _, module in linear_modules(model, path)]


@pytest.mark.parametrize("name", DECISIONS)
def test_the_model_is_given_back_as_it_was(bert: Given, name: str) -> None:
    before, shape = state_of(bert.model), bert.model.shape
    modules = list(bert.model.module.modules())
    batch = bert.batches[0]
    with torch.no_grad():
        logits = bert.model.module(**batch.inputs()).logits
    bert.piece(*DECISIONS[name])
    after = state_of(bert.model)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert bert.model.shape == shape
    assert all(a is b for a, b in zip(modules, bert.model.module.modules(), strict=True)), "the same modules as before"
    with torch.no_grad():
        assert torch.equal(bert.model.module(**batch.inputs()).logits, logits)


@pytest.mark.parametrize("where", ["structure", "packing"])
def test_the_model_is_given_back_after_an_error(bert: Given, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before, shape, modules = state_of(bert.model), bert.model.shape, list(bert.model.module.modules())

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    if where == "structure":
        monkeypatch.setattr(HANDLERS[LowRank], "apply", broken)
    else:
        monkeypatch.setattr(pieces, "packed", broken)
    with pytest.raises(ZeroDivisionError):
        bert.piece(ATTENTION, (PruneHeads(keep=2), LowRank(rank=4), W8))
    after = state_of(bert.model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert bert.model.shape == shape
    assert all(a is b for a, b in zip(modules, bert.model.module.modules(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_return_what_is_nearer_on_calibration_rows(given: Callable[[str], Given], family: str) -> None:
    one = given(family)
    plain = dataclasses.replace(one, scores=dataclasses.replace(one.scores, moments=None))
    for decisions in ((W4,), (PruneNeurons(keep=32), W4)):
        for site, path in ((FFN, one.model.layout.path(1, "ffn_out")), (ATTENTION, one.model.layout.path(1, "output"))):
            if site == ATTENTION and len(decisions) > 1:
                continue
            read = np.concatenate(rows_of(one, path)).astype(np.float64)
            layer = one.model.module.get_submodule(path)
            columns = one.scores.best_neurons(1, 32) if len(decisions) > 1 else slice(None)
            wanted = read[:, columns] @ layer.weight.detach().numpy()[:, columns].T + layer.bias.detach().numpy()
            errors = []
            for kind in (plain, one):
                factor = kind.piece(site, decisions)[-1][0]
                found = read[:, columns] @ factor.weight.restored().T + factor.bias
                errors.append(np.square(found - wanted).mean())
            assert errors[1] < errors[0], (site, decisions)


def test_one_site_does_not_depend_on_another(bert: Given) -> None:
    first = bert.piece(FFN, (PruneNeurons(keep=24), W8A8))
    bert.piece(ATTENTION, (PruneHeads(keep=1), W8A8))
    same(bert.piece(FFN, (PruneNeurons(keep=24), W8A8)), first)


class TestFiles:
    @pytest.mark.parametrize("name", DECISIONS)
    def test_what_is_read_is_what_was_saved(self, bert: Given, tmp_path: Path, name: str) -> None:
        piece = bert.piece(*DECISIONS[name])
        save_piece(piece, tmp_path)
        same(read_piece(tmp_path), piece)

    def test_layers_keep_their_order_beyond_ten(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)

        def factor() -> Factor:
            values = rng.standard_normal((2, 3)).astype(np.float32)
            return Factor(Packed(32, values), None, ActivationRange(float(rng.normal()) / 3, 1 / 3))

        piece = tuple(tuple(factor() for _ in range(1 + number % 2)) for number in range(12))
        save_piece(piece, tmp_path)
        same(read_piece(tmp_path), piece)

    def test_weights_that_are_not_contiguous_are_kept_rightly(self, tmp_path: Path) -> None:
        values = np.arange(6, dtype=np.float32).reshape(2, 3).T
        save_piece(((Factor(Packed(32, values)),),), tmp_path)
        assert np.array_equal(read_piece(tmp_path)[0][0].weight.values, values)


def rows_of(given: Given, path: str) -> list[np.ndarray]:
    """Return the input of the layer at ``path`` row by row, without padding, found without the package's help."""
    found: list[np.ndarray] = []

    def note(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        for row, mask in zip(inputs[0], batch.attention_mask, strict=True):
            found.append((row[mask.bool()] if row.ndim == 2 else row[None]).numpy().copy())

    handle = given.model.module.get_submodule(path).register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in given.batches:
            given.model.module(**batch.inputs())
    handle.remove()
    return found


def span_of(rows: list[np.ndarray]) -> ActivationRange:
    low, high = (float(np.mean([end(row) for row in rows])) for end in (np.min, np.max))
    return ActivationRange.around(low, high)


def check_span(found: ActivationRange | None, expected: ActivationRange) -> None:
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
class TestRanges:
    def test_those_of_whole_layers_are_what_they_read(self, given: Callable[[str], Given], family: str) -> None:
        one = given(family)
        for site in (s for s in one.model.shape.sites() if s != "embeddings"):
            for path, (factor,) in zip(one.model.layout.linears(site), one.piece(site, (W8A8,)), strict=True):
                check_span(factor.span, span_of(rows_of(one, path)))

    def test_those_of_a_pruned_layer_are_of_the_channels_kept(self, given: Callable[[str], Given], family: str) -> None:
        one = given(family)
        size = one.model.shape.blocks[1].head_size
        heads = [h * size + i for h in one.scores.best_heads(1, 2) for i in range(size)]
        for site, role, prune, kept in (
            (ATTENTION, "output", PruneHeads(keep=2), heads),
            (FFN, "ffn_out", PruneNeurons(keep=3), one.scores.best_neurons(1, 3)),
        ):
            read = rows_of(one, one.model.layout.path(1, role))
            *before, (last,) = one.piece(site, (prune, W8A8))
            check_span(last.span, span_of([row[:, kept] for row in read]))
            assert last.span != span_of(read)
            # What is pruned narrows the output of the layers before, not what they read.
            whole = one.piece(site, (W8A8,))
            assert [layer[0].span for layer in before] == [layer[0].span for layer in whole[:-1]]

    def test_that_of_a_second_factor_is_of_what_the_first_one_gives(
        self, given: Callable[[str], Given], family: str
    ) -> None:
        one = given(family)
        for decisions in ((LowRank(rank=6), W8A8), (PruneNeurons(keep=40), LowRank(rank=6), W8A8)):
            changed = one.model.clone()
            apply_plan(changed, CompressionPlan(tuple((FFN, d) for d in decisions)), one.scores)
            kept = one.scores.best_neurons(1, 40) if len(decisions) == 3 else list(range(64))
            for role, layer in zip(("ffn_in", "ffn_out"), one.piece(FFN, decisions), strict=True):
                path = one.model.layout.path(1, role)
                read = rows_of(one, path)
                read = [row[:, kept] for row in read] if role == "ffn_out" else read
                first, second = _layers(changed, path)
                between = [row @ first.weight.detach().numpy().T for row in read]
                check_span(layer[0].span, span_of(read))
                check_span(layer[1].span, span_of(between))
                assert (first.bias, layer[0].bias) == (None, None)
                assert (second.bias is None) == (layer[1].bias is None)

    def test_those_of_a_model_that_was_factorised_before_are_its_own(
        self, given: Callable[[str], Given], family: str
    ) -> None:
        one = given(family)
        changed = one.model.clone()
        apply_plan(changed, CompressionPlan(((FFN, LowRank(rank=6)),)), one.scores)
        recovered = Given(changed, one.batches, one.scores, observe(changed, one.batches))
        piece = make_piece(changed, FFN, (W8A8,), None, recovered.activations)
        for path, layer in zip(changed.layout.linears(FFN), piece, strict=True):
            for (name, _), factor in zip(linear_modules(changed, path), layer, strict=True):
                check_span(factor.span, span_of(rows_of(recovered, name)))


class TestCodeVersion:
    @pytest.fixture(autouse=True)
    def forgotten(self) -> object:
        code_version.cache_clear()
        yield
        code_version.cache_clear()

    @pytest.mark.parametrize(
        "name",
        ["pieces.py", *(f"transforms/{name}.py" for name in ("__init__", "importance", "quantize", "prune"))],
    )
    def test_it_changes_with_the_code_that_makes_pieces(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        package = Path(str(resources.files("autocompress")))
        (tmp_path / "transforms").mkdir()
        for file in ("pieces.py", "scoring.py", *(f"transforms/{f.name}" for f in package.glob("transforms/*.py"))):
            (tmp_path / file).write_bytes((package / file).read_bytes())
        now = code_version()
        monkeypatch.setattr(pieces.resources, "files", lambda _: tmp_path)

        def version() -> str:
            code_version.cache_clear()
            return code_version()

        assert version() == now
        (tmp_path / "scoring.py").write_text("other", encoding="utf-8")
        assert version() == now, "what makes no pieces does not count"
        with (tmp_path / name).open("a", encoding="utf-8") as opened:
            opened.write("# changed\n")
        assert version() != now

    def test_it_is_short_and_the_same_each_time(self) -> None:
        assert code_version() == code_version()
        assert len(code_version()) == 12
