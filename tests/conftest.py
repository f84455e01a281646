"""Tiny models, tokenizers and data, built locally in seconds, that the tests of everything above `plan.py` share.

Nothing here needs a network: the hub is switched off for the whole suite (tests of what happens without one start
their own process), and caches go to a temporary folder.
"""

from __future__ import annotations

import atexit
import csv
import getpass
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Hub clients read these when they are imported, so before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Threads that spin at every barrier make tiny matrices thirty times slower where other work shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Searches of one machine wait for each other while they time; those of tests that run beside each other need not.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="tests-")
    Path(tempfile.tempdir).chmod(0o755)  # a server that they start may run as another user
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

FAMILIES = ("bert", "roberta", "distilbert", "electra")
HIDDEN, BLOCKS, HEADS, NEURONS, POSITIONS = 32, 3, 4, 64, 80
LABELS = ("negative", "positive")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GOOD = _words(
    "good great fine lovely superb bright charming clever fresh funny gentle graceful honest lively moving neat "
    "perfect rich sharp smart solid strong subtle sweet tender touching vivid warm wise witty"
)
BAD = _words(
    "bad awful poor boring bland broken clumsy cold confused crude dreary dull empty flat foolish gloomy grim hollow "
    "lazy limp loud messy muddled noisy shallow slow stale tedious weak wooden"
)
MIXED = _words(
    "odd plain usual average common normal typical middling fair medium standard regular ordinary simple mild"
)
FILLER = _words(
    "the a an this that film movie book story plot actor scene music song voice end start hour day night city house "
    "man woman child dog cat car with without and or but so very quite rather really just only some many few was is "
    "felt looked seemed sounded became stayed in on at of to from by about after before over under"
)
VOCABULARY = (*SPECIAL, *GOOD, *BAD, *MIXED, *FILLER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that hold slow tests: begun last, one keeps a process busy while all others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def make_tokenizer(family: str) -> Any:
    """Return a fast word-level tokenizer with the special tokens and inputs of ``family``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # RoBERTa's padding is token 1 and shifts its positions, as in the published models.
    words = [VOCABULARY[2], VOCABULARY[0], *VOCABULARY[3:4], VOCABULARY[1], *VOCABULARY[4:]]
    words = words if family == "roberta" else list(VOCABULARY)
    fast = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    types = "1" if family in ("bert", "electra") else "0"
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair=f"[CLS]:0 $A:0 [SEP]:0 $B:{types} [SEP]:{types}",
        special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))],
    )
    segments = ["token_type_ids"] if family in ("bert", "electra") else []
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", *segments, "attention_mask"],
        model_max_length=64,
    )


def make_config(family: str, **overrides: Any) -> Any:
    """Return the configuration of a tiny model of ``family``."""
    import transformers

    pad = 1 if family == "roberta" else 0
    if family == "distilbert":
        sizes = {"dim": HIDDEN, "n_layers": BLOCKS, "n_heads": HEADS, "hidden_dim": NEURONS}
    else:
        sizes = {
            "hidden_size": HIDDEN,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "intermediate_size": NEURONS,
            "type_vocab_size": 1 if family == "roberta" else 2,
        }
    if family == "electra":
        sizes["embedding_size"] = HIDDEN // 2
    kinds = {
        "bert": transformers.BertConfig,
        "roberta": transformers.RobertaConfig,
        "distilbert": transformers.DistilBertConfig,
        "electra": transformers.ElectraConfig,
    }
    # Weights of the usual 0.02 would leave every block close to the identity, and logits close to zero.
    common = {"vocab_size": len(VOCABULARY), "max_position_embeddings": POSITIONS, "initializer_range": 0.15}
    return kinds[family](**{**sizes, **common, "pad_token_id": pad, **overrides})


def template_of(runtime: Any, model: Any, example: Any) -> Any:
    """Convert a model, and read what was written."""
    with tempfile.TemporaryDirectory() as folder:
        runtime.convert(model, example, Path(folder))
        return runtime.template(model, Path(folder))


def make_model(family: str, *, labels: tuple[str, ...] | None = None, seed: int = 0, **overrides: Any) -> Any:
    """Return a randomly initialised model: a classifier over ``labels``, or one without a head."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = make_config(family, **overrides)
    if labels is None:
        return AutoModel.from_config(config).eval()
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Biases and normalisations that are neither 0 nor 1, so that one which gets lost is noticed.
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_texts(count: int, classes: int, seed: int) -> list[tuple[str, int]]:
    """Return unique texts of 4 to 12 words whose class is that of most of their telling words."""
    telling = (BAD, GOOD, MIXED)[:classes]
    rng = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < count:
        label = len(found) % classes
        words = rng.choices(telling[label], k=rng.randint(2, 4)) + rng.choices(FILLER, k=rng.randint(2, 8))
        if rng.random() < 0.1:
            words.append(rng.choice(telling[(label + 1) % classes]))
        rng.shuffle(words)
        found.setdefault(" ".join(words), label)
    return list(found.items())


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write ``rows`` with the first one's keys as header."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def _split(number: int) -> str:
    return "test" if number % 5 == 4 else "train"


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the suite, and every process that it starts, away from the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a factory: ``tiny_model(family, headed=True)`` is the folder of a saved model and its tokenizer.

    Headed ones are trained for a second on the texts of `tiny_csv`, so that accuracy means something.
    """
    made: dict[tuple[str, bool], Path] = {}

    def make(family: str, *, headed: bool = True) -> Path:
        if (family, headed) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{'headed' if headed else 'bare'}")
            tokenizer = make_tokenizer(family)
            model = make_model(family, labels=LABELS if headed else None)
            if headed:
                _teach(model, tokenizer)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family, headed] = folder
        return made[family, headed]

    return make


def _teach(model: Any, tokenizer: Any) -> None:
    import torch

    torch.manual_seed(0)
    texts = make_texts(400, 2, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for start in [*range(0, 400, 20)] * 4:
        rows = texts[start : start + 20]
        inputs = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([label for _, label in rows])).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="session")
def bert_folder(tiny_model: Callable[..., Path]) -> Path:
    """A BERT of 3 blocks without a head, with its tokenizer."""
    return tiny_model("bert", headed=False)


@pytest.fixture(scope="session")
def bert_headed_folder(tiny_model: Callable[..., Path]) -> Path:
    """The same with a trained head over negative and positive."""
    return tiny_model("bert", headed=True)


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 unique texts, negative or positive by their words; every fifth is held out for the test."""
    rows = [
        {"text": text, "label": LABELS[label], "split": _split(number)}
        for number, (text, label) in enumerate(make_texts(300, 2, seed=0))
    ]
    return write_csv(tmp_path_factory.mktemp("data") / "tiny.csv", rows)


@pytest.fixture(scope="session")
def tiny_three_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 unique texts of three classes."""
    names = (*LABELS, "so-so")
    rows = [
        {"text": text, "label": names[label], "split": _split(number)}
        for number, (text, label) in enumerate(make_texts(300, 3, seed=2))
    ]
    return write_csv(tmp_path_factory.mktemp("data") / "three.csv", rows)


@pytest.fixture(scope="session")
def tiny_pairs_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pairs of texts: whether both are of the same mood."""
    texts = make_texts(600, 2, seed=3)
    rng = random.Random(3)
    rng.shuffle(texts)
    rows = [
        {
            "first": one,
            "second": two,
            "label": "same" if one_label == two_label else "different",
            "split": _split(number),
        }
        for number, ((one, one_label), (two, two_label)) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    return write_csv(tmp_path_factory.mktemp("data") / "pairs.csv", rows)


@pytest.fixture(scope="session")
def tiny_bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bank for the whole suite, so that the tiny model is fine-tuned and its students distilled once."""
    return tmp_path_factory.mktemp("bank")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Yield the URL of an empty database on a PostgreSQL server of our own, which asks for a password."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [shutil.which("initdb")]
    if programs[-1] is None:
        pytest.skip("no PostgreSQL server is installed")
    bin_, folder = Path(programs[-1]).parent, Path(tempfile.mkdtemp(prefix="pg"))
    # It refuses to run as root; Debian's package brings a user for it.
    user, ours = ("postgres", ["runuser", "-u", "postgres", "--"]) if os.geteuid() == 0 else (getpass.getuser(), [])
    (secret := folder / "secret").write_text(secrets.token_hex(16), encoding="ascii")
    shutil.chown(folder, user)
    shutil.chown(secret, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    make = [str(bin_ / "initdb"), "-D", str(folder / "data"), "-U", "me", "--auth=scram-sha-256", f"--pwfile={secret}"]
    subprocess.run([*ours, *make], check=True, capture_output=True, cwd="/")
    listen = [str(bin_ / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
    server = subprocess.Popen([*ours, *listen], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    before = os.environ.get("PGPASSWORD")
    os.environ["PGPASSWORD"] = secret.read_text(encoding="ascii")
    try:
        import psycopg

        until = time.monotonic() + 60
        while True:
            try:
                with psycopg.connect(
                    host="127.0.0.1", port=port, user="me", dbname="postgres", autocommit=True
                ) as made:
                    made.execute("CREATE DATABASE searches")
                break
            except psycopg.OperationalError:
                assert time.monotonic() < until, "the server did not start"
                time.sleep(0.2)
        yield f"postgresql://me@127.0.0.1:{port}/searches"
    finally:
        # As its child `postgres` gets no signal from `runuser`, which waits for it, ask for its own number.
        pid = int((folder / "data" / "postmaster.pid").read_text(encoding="ascii").splitlines()[0])
        os.kill(pid, signal.SIGINT)
        server.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            del os.environ["PGPASSWORD"]
        else:
            os.environ["PGPASSWORD"] = before


@pytest.fixture(scope="session")
def tiny_run(bert_folder: Path, tiny_csv: Path, tiny_bank: Path) -> Callable[..., Any]:
    """Return a factory of run files for the tiny model and data; overrides are ``dotted.key=value``."""
    from autocompress.config import RunConfig

    def make(overrides: list[str] | None = None) -> RunConfig:
        data = {
            "name": "tiny",
            "model": {"id": str(bert_folder), "finetune": {"epochs": 2, "learning_rate": 1e-3, "batch_size": 8}},
            "data": {"source": str(tiny_csv), "search_rows": 60, "calibration_rows": 32, "max_tokens": 16},
            "target": {"tokens": 16},
            "space": "encoder-small",
            "search": {"trials": 3, "workers": 1, "latency_pairs": 2, "confirm_pairs": 2},
            # The same arithmetic on every CPU.
            "recovery": {"precision": "float32"},
            "storage": {"bank": str(tiny_bank)},
        }
        return RunConfig.from_mapping(data, source="tiny", overrides=overrides or [])

    return make


@pytest.fixture
def hub_on_loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for the hub that this process takes for the real one."""
    from helpers_hub import TOKEN, served

    with served() as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        files = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        # Large files by plain HTTP: its own protocol needs servers of its own.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
