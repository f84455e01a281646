"""Models: anatomy by structure, refusal of what is not understood, and safe loading."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import BLOCKS, FAMILIES, HEADS, HIDDEN, LABELS, NEURONS, VOCABULARY, make_model, make_tokenizer
from torch import nn

from autocompress import model
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.errors import ModelError

SHAPE = ModelShape(HIDDEN, (BlockShape(HEADS, HIDDEN // HEADS, NEURONS),) * BLOCKS, len(VOCABULARY))
ROLES = ["query", "key", "value", "output", "ffn_in", "ffn_out"]


@pytest.fixture
def bert_copy(bert_headed_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_headed_folder, tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
class TestAnatomy:
    @pytest.fixture
    def loaded(self, family: str, tiny_model: Callable[..., Path]) -> model.EncoderModel:
        return model.load(tiny_model(family), labels=LABELS)

    def test_sizes(self, family: str, loaded: model.EncoderModel) -> None:
        assert loaded.shape == dataclasses.replace(SHAPE, table_width=HIDDEN // 2 if family == "electra" else 0)
        assert loaded.parameters() == sum(p.numel() for p in loaded.module.parameters())

    def test_it_reads_as_many_tokens_as_it_says_and_no_more(self, family: str, loaded: model.EncoderModel) -> None:
        most, module = loaded.most_tokens, loaded.module
        assert most is not None
        ids = torch.full((1, most), len(VOCABULARY) - 1)
        assert module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
        longer = torch.full((1, most + 1), len(VOCABULARY) - 1)
        with pytest.raises((IndexError, RuntimeError)):
            module(input_ids=longer, attention_mask=torch.ones_like(longer))

    def test_roles_are_what_their_names_say(self, family: str, loaded: model.EncoderModel) -> None:
        words = {"query": "q", "key": "k", "value": "v"}
        assert list(loaded.layout.roles) == ROLES
        for role, letter in words.items():
            assert loaded.layout.roles[role].rsplit(".", 1)[-1] in (role, f"{letter}_lin")
        for block in range(BLOCKS):
            for role in ROLES:
                layer = loaded.linear(block, role)
                expected = {"ffn_in": (NEURONS, HIDDEN), "ffn_out": (HIDDEN, NEURONS)}.get(role, (HIDDEN, HIDDEN))
                assert tuple(layer.weight.shape) == expected
        assert "out" in loaded.layout.roles["output"]

    def test_every_linear_layer_and_table_belongs_to_exactly_one_site(self, loaded: model.EncoderModel) -> None:
        claimed = [path for site in loaded.shape.sites() for path in loaded.layout.linears(site)]
        present = [
            path for path, m in loaded.module.named_modules() if isinstance(m, nn.Linear | nn.Embedding) and path
        ]
        assert sorted(claimed) == sorted(present)

    def test_the_proof_leaves_the_module_as_it_is(self, family: str) -> None:
        module = make_model(family, labels=LABELS)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        model.understand(module, base="test")
        after = module.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_model_without_a_head_gets_one_from_the_seed(self, family: str, tiny_model: Callable[..., Path]) -> None:
        folder = tiny_model(family, headed=False)
        assert model.head_labels(folder) is None
        names = ("a", "b", "c")
        one, same, other = (model.load(folder, labels=names, seed=seed) for seed in (1, 1, 2))
        weights = [m.module.get_submodule(m.layout.head[-1]).weight for m in (one, same, other)]
        assert weights[0].shape[0] == 3
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        assert torch.equal(one.linear(0, "query").weight, other.linear(0, "query").weight)

    def test_a_saved_model_gives_the_same_logits(
        self, family: str, loaded: model.EncoderModel, tiny_model: Callable[..., Path]
    ) -> None:
        direct = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model(family)).eval()
        ids = torch.arange(10, 26).reshape(2, 8)
        mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
        with torch.no_grad():
            expected = direct(input_ids=ids, attention_mask=mask).logits
            assert torch.allclose(loaded.module(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-5)


class _Blocks(nn.Module):
    """An encoder of six linear layers a block whose parts depend on each other, so that none can be removed."""

    def __init__(self, *, fixed_heads: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=16, num_attention_heads=4, num_hidden_layers=2, vocab_size=30)
        self.fixed_heads = fixed_heads
        self.table = nn.Embedding(30, 16)
        sizes = dict.fromkeys(("a", "b", "c", "d"), (16, 16)) | {"e": (16, 24), "f": (24, 16)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(2)
        )
        self.out = nn.Linear(16, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        x = self.table(input_ids) * attention_mask[..., None]
        for b in self.blocks:
            mixed = b["a"](x) * torch.sigmoid(b["b"](x)) + b["c"](x)
            if self.fixed_heads:
                mixed = mixed.reshape(*x.shape[:2], 4, 4).flatten(2)
            x = x + b["d"](mixed)
            x = x + b["f"](torch.softmax(b["e"](x), dim=-1))
        return SimpleNamespace(logits=self.out(x.mean(dim=1)))


def _tiny(config: Any) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config)
    return module.eval()


def _albert() -> nn.Module:
    return _tiny(
        transformers.AlbertConfig(
            vocab_size=60, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=64,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    return _tiny(transformers.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4, pad_token_id=0))


def _opt() -> nn.Module:
    return _tiny(
        transformers.OPTConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=32,
            num_attention_heads=4, word_embed_proj_dim=32, pad_token_id=1,
        )
    )  # fmt: skip


def _mpnet() -> nn.Module:
    return _tiny(
        transformers.MPNetConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=40,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    return _tiny(transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


def _uneven() -> nn.Module:
    module = make_model("bert", labels=LABELS)
    module.bert.encoder.layer[1] = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN) for _ in ROLES))
    return module


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (_albert, r"Albert\w+: anatomy not understood: expected one list of blocks with 6 linear layers"),
            (_gpt2, r"GPT2\w+: anatomy not understood: expected one list .* transformer\.h \(2 x 0 linear layers\)"),
            (_opt, r"OPT\w+: anatomy not understood: "),
            (_mpnet, r"MPNet\w+: anatomy not understood: "),
            (_t5, r"T5\w+: anatomy not understood: "),
            (_uneven, r"Bert\w+: anatomy not understood: bert\.encoder\.layer\.1 differs"),
            (lambda: _Blocks(fixed_heads=True), "_Blocks: anatomy not understood: a head cannot be removed"),
            (lambda: _Blocks(fixed_heads=False), "_Blocks: anatomy not understood: removing a head changes the logits"),
            (lambda: nn.Linear(3, 2), "Linear: anatomy not understood: .* found lists: none"),
        ],
        ids=["albert", "gpt2", "opt", "mpnet", "t5", "uneven", "fixed-heads", "tied-neurons", "no-blocks"],
    )
    def test_what_is_not_understood_is_refused(self, make: Callable[[], nn.Module], why: str) -> None:
        with pytest.raises(ModelError, match=why) as caught:
            model.understand(make(), base="test")
        assert "\n" not in str(caught.value)

    def test_blocks_that_are_shared_are_refused(self) -> None:
        module = make_model("bert", labels=LABELS)
        module.config.num_hidden_layers = 2 * BLOCKS
        with pytest.raises(ModelError, match=f"{2 * BLOCKS} layers are configured .* shared blocks are not supported"):
            model.understand(module, base="test")

    def test_linear_layers_of_other_sizes_are_refused(self) -> None:
        module = make_model("bert", labels=LABELS)
        module.bert.encoder.layer[2].output.dense = nn.Linear(NEURONS, HIDDEN + 1)
        with pytest.raises(ModelError, match=r"anatomy not understood: bert\.encoder\.layer\.2 has linear layers"):
            model.understand(module, base="test")


class TestFiles:
    def test_a_folder_without_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"config\.json: missing"):
            model.check_files(tmp_path)
        (tmp_path / "config.json").write_text("{", encoding="utf-8")
        with pytest.raises(ModelError, match=r"config\.json: not readable as JSON"):
            model.check_files(tmp_path)
        (tmp_path / "config.json").write_text("[]", encoding="utf-8")
        with pytest.raises(ModelError, match=r"config\.json: "):
            model.check_files(tmp_path)

    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights_name_their_file(self, bert_copy: Path, kept: float) -> None:
        file = bert_copy / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: int(kept * len(whole))])
        for action in (lambda: model.check_files(bert_copy), lambda: model.load(bert_copy, labels=LABELS)):
            with pytest.raises(ModelError, match=rf"{file}: truncated or not a safetensors file"):
                action()

    def test_weights_of_other_sizes_are_refused(self, bert_copy: Path) -> None:
        config = json.loads((bert_copy / "config.json").read_text(encoding="utf-8"))
        (bert_copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}), encoding="utf-8")
        with pytest.raises(ModelError, match="does not load as a sequence classifier"):
            model.load(bert_copy, labels=LABELS)

    @pytest.mark.parametrize("change", ["missing", "other size"])
    @pytest.mark.parametrize("headed", [True, False])
    def test_weights_that_would_be_made_up_are_refused(
        self, tiny_model: Callable[..., Path], tmp_path: Path, headed: bool, change: str
    ) -> None:
        from safetensors.torch import load_file, save_file

        folder = Path(shutil.copytree(tiny_model("bert", headed=headed), tmp_path / "model"))
        tensors = load_file(folder / "model.safetensors")
        [name] = [key for key in tensors if key.endswith("layer.1.attention.self.key.weight")]
        if change == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:-8].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        why = r"layer\.1\.attention\.self\.key\.weight" if change == "missing" or not headed else "does not load"
        with pytest.raises(ModelError, match=why):
            model.load(folder, labels=LABELS)

    def test_an_encoder_saved_with_another_head_is_taken_without_it(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        other = transformers.BertForMaskedLM(make_model("bert").config)
        other.save_pretrained(tmp_path)
        assert model.head_labels(tmp_path) is None
        loaded = model.load(tmp_path, labels=LABELS)
        assert torch.equal(loaded.linear(0, "query").weight, other.bert.encoder.layer[0].attention.self.query.weight)

    def test_a_configuration_that_does_not_say_its_heads_is_refused(self) -> None:
        module = _Blocks(fixed_heads=True)
        del module.config.num_attention_heads
        with pytest.raises(ModelError, match=r"anatomy not understood: its configuration .*num_attention_heads"):
            model.understand(module, base="test")

    def test_an_unknown_architecture_is_refused(self, bert_copy: Path) -> None:
        config = json.loads((bert_copy / "config.json").read_text(encoding="utf-8"))
        (bert_copy / "config.json").write_text(json.dumps({**config, "model_type": "no-such"}), encoding="utf-8")
        with pytest.raises(ModelError, match="does not load as a sequence classifier"):
            model.load(bert_copy, labels=LABELS)

    def test_labels_are_read_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        names = {str(i): f"class {i}" for i in (11, 2, 0, 10, 1)}
        config = {"architectures": ["BertForSequenceClassification"], "id2label": names}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert model.head_labels(tmp_path) == ("class 0", "class 1", "class 2", "class 10", "class 11")

    def test_labels_may_be_numbers(self, bert_headed_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(bert_headed_folder, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"id2label": {"0": 0, "1": 1}, "label2id": {"0": 0, "1": 1}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert (labels := model.head_labels(folder)) == ("0", "1")
        assert model.load(folder, labels=labels).shape == model.load(bert_headed_folder, labels=LABELS).shape


class _Touch:
    """A pickle of this runs code when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


class TestCodeIsNeverRun:
    @pytest.fixture(autouse=True)
    def _nobody_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def asked(*_: object) -> str:
            raise AssertionError("a question was asked")

        monkeypatch.setattr("builtins.input", asked)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
    def test_pickled_weights_are_refused_unread(self, bert_copy: Path, tmp_path: Path, name: str) -> None:
        (bert_copy / "model.safetensors").unlink()
        (bert_copy / name).write_bytes(pickle.dumps(_Touch(tmp_path / "ran")))
        for action in (lambda: model.check_files(bert_copy), lambda: model.load(bert_copy, labels=LABELS)):
            with pytest.raises(ModelError, match=rf"{name}: pickled weights .* load the folder once .*save_pretrained"):
                action()
        assert not (tmp_path / "ran").exists()

    def test_pickled_weights_beside_safetensors_are_not_read(self, bert_copy: Path, tmp_path: Path) -> None:
        (bert_copy / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(tmp_path / "ran")))
        model.load(bert_copy, labels=LABELS)
        assert not (tmp_path / "ran").exists()

    def test_a_model_that_needs_remote_code_is_refused(self, bert_copy: Path, tmp_path: Path) -> None:
        mapped = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
        self._edit(bert_copy / "config.json", auto_map=mapped, model_type="of-our-own")
        self._write_code(bert_copy, tmp_path)
        for action in (lambda: model.check_files(bert_copy), lambda: model.load(bert_copy, labels=LABELS)):
            with pytest.raises(ModelError, match=r"needs remote code \(auto_map in config\.json\), which is never run"):
                action()
        assert not (tmp_path / "ran").exists()

    def test_a_tokenizer_that_needs_remote_code_is_refused(self, bert_copy: Path, tmp_path: Path) -> None:
        mapped = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
        self._edit(bert_copy / "tokenizer_config.json", auto_map=mapped, tokenizer_class="Tokenizer")
        (bert_copy / "tokenizer.json").unlink()
        self._write_code(bert_copy, tmp_path)
        with pytest.raises(ModelError, match="its tokenizer does not load"):
            model.load_tokenizer(bert_copy)
        assert not (tmp_path / "ran").exists()

    def test_a_model_without_tokenizer_is_refused(self, bert_copy: Path) -> None:
        for file in bert_copy.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ModelError, match="its tokenizer does not load"):
            model.load_tokenizer(bert_copy)

    @staticmethod
    def _edit(file: Path, **fields: object) -> None:
        about = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**about, **fields}), encoding="utf-8")

    @staticmethod
    def _write_code(folder: Path, tmp_path: Path) -> None:
        code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Config: pass\n"
        (folder / "code.py").write_text(f"{code}class Model: pass\nclass Tokenizer: pass\n", encoding="utf-8")


class TestFingerprint:
    def test_it_is_of_the_content_and_not_of_the_place(self, bert_headed_folder: Path, bert_copy: Path) -> None:
        assert model.fingerprint(bert_copy) == model.fingerprint(bert_headed_folder)
        (bert_copy / "README.md").write_text("said about it", encoding="utf-8")
        assert model.fingerprint(bert_copy) == model.fingerprint(bert_headed_folder)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_it_changes_with_every_file_that_matters(self, bert_copy: Path, name: str) -> None:
        before = model.fingerprint(bert_copy)
        data = bytearray((bert_copy / name).read_bytes())
        data[-2] ^= 1
        (bert_copy / name).write_bytes(data)
        assert model.fingerprint(bert_copy) != before

    def test_it_is_the_base_of_a_loaded_model(self, bert_copy: Path) -> None:
        assert model.load(bert_copy, labels=LABELS).base == model.fingerprint(bert_copy)


def test_the_tiny_tokenizers_know_all_words(bert_folder: Path) -> None:
    """A fixture that mapped its words to [UNK] would make every test of accuracy meaningless."""
    for family in FAMILIES:
        tokenizer = make_tokenizer(family)
        ids = tokenizer(" ".join(VOCABULARY[5:]), add_special_tokens=False)["input_ids"]
        assert len(set(ids)) == len(VOCABULARY) - 5
    loaded = transformers.AutoTokenizer.from_pretrained(bert_folder, local_files_only=True)
    assert loaded("good film")["input_ids"] == make_tokenizer("bert")("good film")["input_ids"]
