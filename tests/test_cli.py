"""The command line: exit codes, one line for each error, what goes to stdout and what to stderr. Nothing is trained."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
import yaml
from helpers_records import make_measurement
from ray_nodes import free_port
from test_study import CSV_COLUMNS, SMALL, evaluate, results_in

from autocompress import __version__, api, cli, console, delivery
from autocompress.config import RunConfig
from autocompress.identity import identity_of
from autocompress.records import Candidate, Stopped
from autocompress.study import Study

HEAVY = ("torch", "ray", "plotly", "transformers", "pandas", "optuna", "openvino", "onnx", "onnxruntime", "datasets")


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    def line(self, code: int) -> str:
        """Return the one line of an error that ended with ``code``, after checking that it is one."""
        assert self.code == code, self
        assert self.out == ""
        assert self.err.endswith("\n"), "a line ends"
        line = self.err.removesuffix("\n")
        assert len(line.splitlines()) == 1, self.err
        assert "Traceback" not in line
        assert line.isprintable()
        return line

    def json(self) -> Any:
        """Return what was printed, after checking that nothing else was."""
        assert self.code == 0, self
        assert self.err == ""
        return json.loads(self.out)


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Return a function that runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Done:
        monkeypatch.setenv("AUTOCOMPRESS_DEBUG", "")
        monkeypatch.setattr(sys, "argv", ["autocompress", *map(str, args)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def spawn(tmp_path: Path) -> Call:
    """Return a function that runs a command in a process of its own, in an empty folder."""

    def run(*args: object, env: dict[str, str] | None = None, code: str | None = None) -> Done:
        start = ["-m", "autocompress.cli"] if code is None else ["-c", code]
        # A continuous integration service makes rich believe in a terminal.
        ours = {k: v for k, v in os.environ.items() if k not in ("GITHUB_ACTIONS", "FORCE_COLOR", "AUTOCOMPRESS_DEBUG")}
        done = subprocess.run(
            [sys.executable, *start, *map(str, args)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**ours, "TERM": "xterm-256color", **(env or {})},
            timeout=300,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def run_yaml(tmp_path: Path, tiny_run: Callable[..., RunConfig], bert_headed_folder: Path) -> Path:
    """A run file of the tiny model with a head, which needs no training."""
    file = tmp_path / "run.yaml"
    file.write_text(tiny_run([f"model.id={json.dumps(str(bert_headed_folder))}"]).to_yaml(), encoding="utf-8")
    return file


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a results folder of made-up scores, or of failures, without a model."""

    def make(name: str = "made", *, trials: int = 6, tell: Callable[..., Any] | None = None) -> Path:
        folder = results_in(tmp_path / name)
        run = RunConfig.from_mapping({"name": folder.name, "model": {"id": "./none"}, "search": {"trials": trials}})
        write(folder / "run.yaml", run.to_yaml())
        identity = identity_of(run, model="m", data="d", space=SMALL)
        study = Study(folder, run, identity=identity, space=SMALL, writable=True)
        if tell is None:
            evaluate(study)
        else:
            while (asked := study.ask()) is not None:
                study.tell(*asked, tell(asked[0]))
        study.close()
        api.write_results(study)
        return folder

    return make


# --- exit codes through a process of its own


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--version"], 0),
        (["ls", "spaces"], 0),
        (["status", "nowhere"], 1),
        (["validate", "nowhere.yaml"], 2),
        (["--nonsense"], 2),
        (["pick"], 2),
    ],
)
def test_exit_codes_of_the_process(spawn: Call, args: list[str], code: int) -> None:
    done = spawn(*args)
    assert done.code == code
    assert (done.out == "") == (code != 0)
    assert (done.err == "") == (code == 0)
    assert "Traceback" not in done.err
    assert "\x1b" not in done.out + done.err


def test_a_traceback_is_shown_with_debug_only(spawn: Call) -> None:
    plain, debug = spawn("status", "nowhere"), spawn("--debug", "status", "nowhere")
    assert plain.line(1) == "autocompress: nowhere: holds no run.yaml; give the results folder of a search"
    assert debug.code == 1
    assert "Traceback" in debug.err
    assert "StudyError: nowhere: holds no run.yaml" in debug.err
    assert debug.err.splitlines()[-1] == plain.line(1)
    usage = spawn("--debug", "validate", "nowhere.yaml")
    assert usage.code == spawn("validate", "nowhere.yaml").code == 2
    assert "Traceback" in usage.err


def test_the_installed_command_is_this_one(spawn: Call) -> None:
    command = Path(sys.executable).with_name("autocompress")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_an_interrupted_search_says_how_to_go_on(
    call: Call, run_yaml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "search", interrupted)
    line = call("search", run_yaml, "--out", tmp_path / "out").line(130)
    assert line.endswith("interrupted; run the same command again to continue")


@pytest.mark.parametrize("args", [[], ["search"], ["export"], ["init"], ["ls"]])
def test_help_imports_nothing_heavy(spawn: Call, args: list[str]) -> None:
    code = (
        "import sys\nfrom autocompress import cli\n"
        f"sys.argv = ['autocompress', *{args!r}, '--help']\n"
        "try:\n    cli.main()\n"
        f"finally:\n    print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = spawn(code=code)
    assert (done.code, done.err) == (0, "[]\n")
    assert "Usage: " in done.out
    assert "\x1b" not in done.out


def test_a_shell_completes_commands(spawn: Call) -> None:
    asked = {"_AUTOCOMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": "autocompress re", "COMP_CWORD": "1"}
    done = spawn(env=asked, code="import sys; from autocompress import cli; sys.argv = ['autocompress']; cli.main()")
    assert set(done.out.split()) == {"report", "recover", "retarget"}


# --- run files (rows 1 to 4 of the faults)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("search: {trails: 3}", "run.yaml: search.trails: unknown key, did you mean trials?"),
        ("search:\n  trials: 3\n  trials: 4\n", "run.yaml: line 3: duplicate key 'trials'"),
        ("search: [", "run.yaml: line 1: "),
        ("search: {trials: none}", "run.yaml: search.trials: input should be a valid integer"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "plan", "search", "finetune"])
def test_a_wrong_run_file_is_a_usage_error(call: Call, tmp_path: Path, command: str, text: str, line: str) -> None:
    file = write(tmp_path / "run.yaml", text)
    assert call(command, file).line(2).startswith(line)
    assert tree(tmp_path) == {"run.yaml"}


def test_yaml_that_would_run_code_or_explode_is_refused_at_once(call: Call, tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for this, last in zip("bcdefghij", "abcdefghi", strict=True):
        bomb += f"{this}: &{this} [{', '.join(['*' + last] * 9)}]\n"
    code = '!!python/object/apply:os.system ["touch executed"]'
    for text, expected in ((f"name: {code}", "python/object/apply"), (bomb, "aliases are not accepted")):
        file = write(tmp_path / "run.yaml", text)
        start = time.monotonic()
        line = call("validate", file).line(2)
        assert time.monotonic() - start < 1
        assert line.startswith("run.yaml: line ")
        assert expected in line
    file, space = write(tmp_path / "run.yaml", "{}"), write(tmp_path / "bomb.yaml", bomb)
    assert "aliases are not accepted" in call("validate", file, "--space", space).line(2)
    assert "python/object/apply" in call("validate", file, "--set", f"name={code}").line(2)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ("bits: [5]", ("bits", "16, 8, 4, 3, 2", "got 5")),
        ("neurons: [1.2]", ("neurons", "must be a fraction > 0 and <= 1 (1.0 keeps all) or a whole count >= 1", "1.2")),
        ("neurons: [-0.5]", ("neurons", "> 0 and <= 1", "-0.5")),
        ("neurons: [-3]", ("neurons", "whole count >= 1", "-3")),
        ("neurons: [0]", ("neurons", "whole count >= 1", "got 0")),
        ("neurons: [.nan]", ("neurons", "> 0 and <= 1", "nan")),
        ("neurons: [1000]", ("neurons at block.0.ffn: must be <= 64, got 1000",)),
        ("rank: [33]", ("rank at block.0.ffn: must be <= 32, got 33",)),
        ("rank: [.inf]", ("rank", "> 0 and <= 1", "inf")),
    ],
)
def test_a_space_out_of_range_is_refused_with_the_range(
    call: Call, tmp_path: Path, run_yaml: Path, rule: str, parts: tuple[str, ...]
) -> None:
    space = write(tmp_path / "mine.yaml", f"schema: 1\nname: mine\nrules: [{{match: block.*.ffn, {rule}}}]\n")
    line = call("validate", run_yaml, "--space", space).line(2)
    for part in parts:
        assert part in line


def test_a_uniform_plan_that_cannot_be_carried_out_is_refused_by_validate(
    call: Call, tmp_path: Path, run_yaml: Path, bert_folder: Path
) -> None:
    rules = "[{match: embeddings, vocabulary: [1.0, 3]}]"
    space = write(tmp_path / "mine.yaml", f"schema: 1\nname: mine\nrules: {rules}\n")
    for model in ([], ["--model", bert_folder]):  # with a head, and without one, which is not trained for it
        line = call("validate", run_yaml, "--space", space, *model).line(1)
        assert "TrimVocabulary.keep must be >= 5, which are special tokens, got 3" in line
    assert tree(tmp_path) == {"run.yaml", "mine.yaml"}


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--target", "tpu"], ("target.runtime", "'openvino' or 'onnxruntime'", "got 'tpu'")),
        (["--space", "huge"], ("space: huge: not a shipped search space", "encoder-joint", ".yaml")),
        (["--set", "search.trials=-1"], ("search.trials", "greater than or equal to 1", "got -1")),
        (["--set", "search.trials"], ("--set search.trials: must read dotted.key=value",)),
        (["--set", "objectives=[accuracy]"], ("objectives", "at least 2")),
    ],
)
def test_a_wrong_option_names_what_is_allowed(
    call: Call, run_yaml: Path, args: list[str], parts: tuple[str, ...]
) -> None:
    line = call("search", run_yaml, *args).line(2)
    for part in parts:
        assert part in line


# --- model and data (rows 5 to 8)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--model", "./none"], "autocompress: model: ./none: no such folder"),
        (["--model", "/no/such/model"], "autocompress: model: /no/such/model: no such folder"),
        (["--model", "org/none"], "autocompress: model: org/none: not found locally, "),
        (["--data", "none.csv"], "autocompress: data: none.csv: no such file"),
        (["--data", "org/none"], "autocompress: data: org/none: not found locally, "),
    ],
)
def test_what_is_not_found_is_said(call: Call, run_yaml: Path, args: list[str], line: str) -> None:
    assert call("validate", run_yaml, *args).line(1).startswith(line)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("cut", r"model: .+/model\.safetensors: truncated or not a safetensors file \(.+\)"),
        ("pickled", r"model: .+/pytorch_model\.bin: pickled weights .+ load the folder once .+save_pretrained.+"),
        ("code", r"model: .+: needs remote code \(auto_map in config\.json\), which is never run"),
    ],
    ids=["cut", "pickled", "code"],
)
def test_a_model_that_is_broken_or_could_run_code_is_refused(
    call: Call,
    run_yaml: Path,
    tmp_path: Path,
    bert_headed_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    line: str,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = Path(shutil.copytree(bert_headed_folder, tmp_path / "model"))
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickled":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write(folder / "config.json", json.dumps({**config, "auto_map": {"AutoConfig": "code.Config"}}))
    for command in (["validate", run_yaml], ["search", run_yaml, "--out", "out"]):
        assert re.fullmatch(f"autocompress: {line}", call(*command, "--model", folder).line(1))
    assert not (tmp_path / "out" / "study.journal").exists()


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--model", "org/none"], ["--data", "org/none"]])
def test_a_hub_that_does_not_answer_is_given_up(spawn: Call, run_yaml: Path, silent_hub: str, args: list[str]) -> None:
    # The imports before it do not count: they are paid with a hub as well.
    code = (
        "import sys, time, datasets, huggingface_hub, transformers\n"
        "from autocompress import api, cli\nstart = time.monotonic()\n"
        "try:\n    cli.main()\nfinally:\n    print(time.monotonic() - start)"
    )
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": silent_hub}
    done = spawn("validate", run_yaml, *args, code=code, env=env)
    assert Done(done.code, "", done.err).line(1).endswith("offline (the hub did not answer); give a local path")
    assert float(done.out) < 8, "4 s for the hub, and what a busy machine takes for the rest"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ("text,label\n", "holds no rows"),
        ("text,label\n" + "".join(f"word {n},positive\n" for n in range(300)), "holds one class only ('positive')"),
        (
            "text,label\n" + "".join(f"word {n},{'xy'[n % 2]}\n" for n in range(300)),
            "labels do not match the model's head: it knows negative, positive, the data also have x, y",
        ),
        ("words,label\na,b\n", "data.text: column 'text' is not in "),
        (
            "text,label\n" + "".join(f"word {n},{('negative', 'positive')[n % 2]}\n" for n in range(60)),
            "data.search_rows: must be <= half of the ",
        ),
    ],
)
def test_data_that_cannot_be_searched_on_are_refused_before_the_first_candidate(
    call: Call, tmp_path: Path, run_yaml: Path, content: str, expected: str
) -> None:
    data = write(tmp_path / "mine.csv", content)
    line = call("search", run_yaml, "--data", data, "--out", tmp_path / "out").line(1)
    assert expected in line
    assert not (tmp_path / "out" / "study.journal").exists()


def test_quoted_input_cannot_break_the_line(call: Call, run_yaml: Path) -> None:
    line = call("validate", run_yaml, "--model", "./two\nlines \x1b[31mred").line(1)
    assert line == "autocompress: model: ./two lines [31mred: no such folder"


@pytest.mark.parametrize("name", ["mödel", "模型", "\U0001f600", 'quote"s', "co: lon #x", "back\\slash", "[list]"])
def test_names_arrive_as_they_were_typed(call: Call, run_yaml: Path, tmp_path: Path, name: str) -> None:
    line = call("validate", run_yaml, "--model", f"./{name}").line(1)
    assert line == f"autocompress: model: ./{name}: no such folder"
    write(tmp_path / f"{name}.csv", "text,label\nfine,good\n")
    assert call("init", "--model", f"./{name}", "--data", f"{name}.csv", "-o", tmp_path / "mine.yaml").code == 0
    written = RunConfig.from_file(tmp_path / "mine.yaml")
    assert (written.model.id, written.data.source) == (f"./{name}", f"{name}.csv")


# --- where results go (rows 18 and 27)


@pytest.mark.parametrize("out", ["file/below", "file", "/proc", "/proc/autocompress-test", "/dev/null/x"])
def test_an_output_that_cannot_be_written_fails_before_the_search(call: Call, run_yaml: Path, out: str) -> None:
    file = write(run_yaml.with_name("file"), "content")
    line = call("search", run_yaml, "--out", out).line(1)
    assert line.startswith(f"autocompress: {out}: cannot be written to (")
    assert line.endswith("; give another folder with --out")
    assert file.read_text(encoding="utf-8") == "content"


@pytest.mark.parametrize("given", [[], ["--out", "mine"]])
def test_a_refused_search_leaves_no_folder(call: Call, run_yaml: Path, tmp_path: Path, given: list[str]) -> None:
    assert "no such file" in call("search", run_yaml, "--data", "none.csv", *given).line(1)
    assert not (tmp_path / "results" / "tiny").exists()
    assert not (tmp_path / "mine").exists()
    (tmp_path / "kept").mkdir()
    assert "no such file" in call("search", run_yaml, "--data", "none.csv", "--out", "kept").line(1)
    assert (tmp_path / "kept").is_dir()


def test_a_default_output_that_cannot_be_written_fails_too(call: Call, run_yaml: Path) -> None:
    write(run_yaml.with_name("results"), "a file")
    assert "results/tiny: cannot be written to (" in call("search", run_yaml).line(1)


@pytest.mark.parametrize("name", ["../../x", "/absolute/path", "..", "a/b", "~root", ".", "a\\b", ""])
@pytest.mark.parametrize("through", ["file", "option"])
def test_a_name_that_is_a_path_is_refused(call: Call, run_yaml: Path, tmp_path: Path, name: str, through: str) -> None:
    args = []
    if through == "file":
        settings = yaml.safe_load(run_yaml.read_text(encoding="utf-8"))
        write(run_yaml, yaml.safe_dump({**settings, "name": name}))
    else:
        args = ["--set", f"name={json.dumps(name)}"]
    before = tree(tmp_path.parent)
    assert call("search", run_yaml, *args).line(2).startswith("run.yaml: name: ")
    assert tree(tmp_path.parent) == before


@pytest.mark.parametrize("kind", ["folder", "nothing", "itself"])
def test_a_link_that_leads_out_of_the_results_is_refused(
    call: Call, run_yaml: Path, tmp_path: Path, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (tmp_path / "results").mkdir()
    target = {"folder": outside, "nothing": outside / "new", "itself": Path("tiny")}[kind]
    (tmp_path / "results" / "tiny").symlink_to(target)
    before = tree(tmp_path)
    line = call("search", run_yaml).line(1)
    assert line == "autocompress: results/tiny: leads out of results; give the folder with --out"
    assert tree(outside) == set()
    assert tree(tmp_path) == before


# --- init, validate, plan


def test_init_writes_a_commented_file_that_validates(call: Call, tmp_path: Path) -> None:
    done = call("init", "--demo", "-o", "mine.yaml")
    assert (done.code, done.err) == (0, "")
    assert "autocompress search mine.yaml" in done.out
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert text.count("#") > 10
    assert RunConfig.from_file(tmp_path / "mine.yaml") == RunConfig.from_file("demo")


def test_init_takes_a_model_data_and_a_name(
    call: Call, tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path
) -> None:
    assert call("init", "--model", bert_headed_folder, "--data", tiny_csv, "--name", "mine").code == 0
    written = RunConfig.from_file(tmp_path / "run.yaml")
    assert (written.name, written.model.id, written.data.source) == ("mine", str(bert_headed_folder), str(tiny_csv))
    small = ["--set", "data.search_rows=60", "--set", "data.max_tokens=16", "--set", "target.tokens=16"]
    assert call("validate", "run.yaml", *small, "--json").json()["model"]["blocks"] == 3
    assert "#" in (tmp_path / "run.yaml").read_text(encoding="utf-8")


def test_init_fits_to_the_data(call: Call, tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path) -> None:
    assert call("init", "--model", bert_headed_folder, "--data", tiny_csv).code == 0
    short = ["--set", "data.max_tokens=16", "--set", "target.tokens=16"]
    found = call("validate", "run.yaml", *short, "--json").json()["data"]["rows"]
    assert found["search"] == RunConfig.from_file(tmp_path / "run.yaml").data.search_rows < 1000
    assert RunConfig.from_file(tmp_path / "run.yaml").name == tiny_csv.stem


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "init: give --demo, or --model and --data"),
        (["--model", "m"], "init: give --demo, or --model and --data"),
        (["--demo", "--name", "../x"], "new.yaml: name: "),
        (
            ["--demo", "--model", "m", "--data", "d.csv"],
            "init: --demo goes without --model, --data, --text and --label",
        ),
        (["--demo", "--text", "review"], "init: --demo goes without --model, --data, --text and --label"),
        (["--demo", "-o", "old.yaml"], "init: old.yaml exists; give another --out or --force"),
    ],
)
def test_init_refuses(call: Call, tmp_path: Path, args: list[str], expected: str) -> None:
    write(tmp_path / "old.yaml", "mine")
    done = call("init", *([] if "-o" in args else ["-o", "new.yaml"]), *args)
    assert done.line(2).startswith(expected)
    assert tree(tmp_path) == {"old.yaml"}
    assert (tmp_path / "old.yaml").read_text(encoding="utf-8") == "mine"


def test_init_takes_columns_and_a_target(call: Call, tmp_path: Path) -> None:
    write(tmp_path / "mine.csv", "review,mood\nfine,good\n")
    asked = ("--model", "m", "--data", "mine.csv", "--text", "review", "--label", "mood", "--target", "onnxruntime")
    assert call("init", *asked).code == 0
    written = RunConfig.from_file(tmp_path / "run.yaml")
    assert (written.data.text, written.data.label, written.target.runtime) == ("review", "mood", "onnxruntime")


@pytest.mark.parametrize(
    ("asked", "missing"),
    [((), "text"), (("--text", "review"), "label"), (("--text", "revue", "--label", "mood"), "revue")],
)
def test_init_names_the_columns_where_one_is_not_there(
    call: Call, tmp_path: Path, asked: tuple[str, ...], missing: str
) -> None:
    write(tmp_path / "mine.csv", "review,mood\nfine,good\n")
    line = call("init", "--model", "m", "--data", "mine.csv", *asked).line(2)
    assert line == f"init: mine.csv: has no column {missing}; it has review, mood; give --text and --label"
    assert tree(tmp_path) == {"mine.csv"}


def test_init_wants_a_file_that_is_there(call: Call, tmp_path: Path) -> None:
    done = call("init", "--model", "m", "--data", "reveiws.csv")
    assert done.line(1) == "autocompress: data: reveiws.csv: no such file"
    assert tree(tmp_path) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "typed"), [("review", b"./model\nmine.csv\n\nreview\n\n"), ("text", b"./model\nmine.csv\n\n\n")]
)
def test_init_asks_on_a_terminal(tmp_path: Path, text: str, typed: bytes) -> None:
    write(tmp_path / "mine.csv", f"{text},mood\nfine,good\n")
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "autocompress.cli", "init", "--name", "asked"]
    asking = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    os.close(theirs)
    try:
        os.write(ours, typed)
        said, _ = asking.communicate(timeout=120)
    finally:
        os.close(ours)
        asking.kill()
        asking.wait()
    assert asking.returncode == 0, said
    assert "column of the label: mood [mood]" in said
    written = RunConfig.from_file(tmp_path / "run.yaml")
    assert (written.name, written.model.id, written.data.source) == ("asked", "./model", "mine.csv")
    assert (written.data.text, written.data.label, written.target.runtime) == (text, "mood", "openvino")


def test_a_question_that_is_not_answered_interrupts(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> str:
        raise typer.Abort

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "prompt", interrupted)
    assert call("init").code == 130
    assert tree(tmp_path) == set()


def test_an_error_of_the_system_is_one_line_too(call: Call, tmp_path: Path) -> None:
    line = call("init", "--demo", "-o", "no/such/folder.yaml").line(1)
    assert line == "autocompress: no/such/folder.yaml: No such file or directory"
    assert tree(tmp_path) == set()


def test_init_replaces_with_force(call: Call, tmp_path: Path) -> None:
    write(tmp_path / "run.yaml", "mine")
    assert call("init", "--demo", "--force").code == 0
    assert RunConfig.from_file(tmp_path / "run.yaml").name == "demo"


def test_more_tokens_than_the_model_reads_are_refused(call: Call, run_yaml: Path, tmp_path: Path) -> None:
    assert call("validate", run_yaml, "--set", "data.max_tokens=4096").code == 0, "no row is as long"
    data = pd.read_csv(RunConfig.from_file(run_yaml).data.source)
    data.assign(text=data["text"] + " good" * 300).to_csv(tmp_path / "long.csv", index=False)
    long = ["--data", tmp_path / "long.csv", "--set"]
    refused = r"data\.max_tokens: must be <= \d+, as .+ reads no more, and a row has \d+$"
    assert re.match(refused, call("validate", run_yaml, *long, "data.max_tokens=4096").line(2))
    assert call("validate", run_yaml, *long, "data.max_tokens=64").code == 0
    for row in range(6):  # whichever split it is in
        data.assign(text=data["text"].where(data.index != row, data["text"] + " good" * 300)).to_csv(
            tmp_path / "long.csv", index=False
        )
        assert re.match(refused, call("validate", run_yaml, *long, "data.max_tokens=4096").line(2)), row


def test_validate_says_what_it_found(call: Call, run_yaml: Path, tmp_path: Path) -> None:
    found = call("validate", run_yaml, "--json").json()
    assert found["model"]["blocks"] == 3
    assert found["model"]["has_head"] is True
    assert found["data"] == {
        "classes": ["negative", "positive"],
        "rows": {"train": 180, "search": 60, "test": 60},
        "search_rows_cut": 0,
    }
    short = ["--set", "data.max_tokens=4", "--set", "target.tokens=4"]
    assert call("validate", run_yaml, *short, "--json").json()["data"]["search_rows_cut"] == 60
    assert found["space"]["name"] == "encoder-small"
    assert found["space"]["uniform_plans"] > 5
    assert found["target"]["runtime"] == "openvino"
    words = call("validate", run_yaml)
    assert (words.code, words.err) == (0, "")
    assert "data.rows.search: 60\n" in words.out
    assert call("validate", run_yaml, "--target", "onnxruntime", "--json").json()["target"]["runtime"] == "onnxruntime"
    assert tree(tmp_path) == {"run.yaml"}, "validate leaves nothing behind"


def test_plan_shows_what_a_search_starts_with(call: Call, run_yaml: Path, tmp_path: Path) -> None:
    found = json.loads(call("plan", run_yaml, "--json").out)
    done = call("plan", run_yaml)
    assert done.code == 0
    assert "timing a few training steps" in done.err
    lines = done.out.splitlines()
    assert lines[0] == "student half: student of 3 blocks x 2 heads x 32 neurons"
    seeds = [line.split(": ", 1)[1] for line in lines if line.startswith("seed ")]
    assert seeds == found["seeds"]
    forecast = found["forecast"]
    assert forecast["sites"] == 8
    assert all(forecast[name] > 0 for name in ("plans", "pieces", "candidate_seconds", "total_seconds", "disk_mb"))
    assert {line.split(": ")[0] for line in lines[1 + len(seeds) :]} == set(forecast)
    assert found["seeds"][0] == "attention 0-2: w8a8; ffn 0-2: w8a8; embeddings: w8"
    assert tree(tmp_path) == {"run.yaml"}


def test_plans_without_blocks_name_none_of_them(run_yaml: Path) -> None:
    """Which matter least is known once the model is fine-tuned."""
    found = api.validate(RunConfig.from_file(run_yaml, overrides=["space=encoder-joint"]))
    dropped = [seed for seed in found["space"]["seeds"] if "without" in seed]
    said = {re.sub(r"^.*without the |; .*$", "", seed) for seed in dropped}
    assert said == {"block that matters least", "2 blocks that matter least"}


# --- ls


@pytest.mark.parametrize(
    ("what", "some"),
    [
        ("spaces", {"encoder-joint", "encoder-small"}),
        ("transforms", {"PruneHeads", "PruneNeurons", "LowRank", "Quantize", "Student", "DropBlocks"}),
        ("runtimes", {"openvino", "onnxruntime", "export --format hf", "export --format torch"}),
    ],
)
def test_ls_lists(call: Call, what: str, some: set[str]) -> None:
    found = call("ls", what, "--json").json()
    assert some <= set(found)
    assert all(isinstance(words, str) and words for words in found.values())
    done = call("ls", what)
    assert done.out == "".join(f"{name}: {words}\n" for name, words in found.items())


def test_ls_lists_the_studies_under_results(call: Call, results: Callable[..., Path], tmp_path: Path) -> None:
    assert call("ls", "studies", "--json").json() == {}
    (tmp_path / "results").mkdir()
    results("results/one", trials=2)
    found = call("ls", "studies", "--json").json()
    assert list(found) == ["results/one"]
    assert found["results/one"]["complete"] == 2
    results("results/two", trials=2)
    journal = tmp_path / "results" / "two" / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"no JSON\n", *lines[4:]]))
    found = call("ls", "studies", "--json").json()
    assert found["results/one"]["complete"] == 2
    assert "study.journal" in found["results/two"], "one that is damaged does not hide the others"


def test_ls_of_something_else_is_a_usage_error(call: Call) -> None:
    done = call("ls", "nonsense")
    assert (done.code, done.out) == (2, "")
    assert "spaces" in done.err
    assert "Traceback" not in done.err


def test_doctor_says_everything_at_once(call: Call) -> None:
    found = call("doctor", "--json").json()
    assert set(found) >= {"cpu", "versions", "good at", "runtimes", "parts", "free", "bank"}


# --- results folders (rows 25 and 26)


def test_status_counts(call: Call, results: Callable[..., Path]) -> None:
    folder = results(trials=5, tell=lambda number: make_measurement() if number % 2 else "it broke")
    found = call("status", folder, "--json").json()
    assert (found["complete"], found["failed"], found["wanted"], found["front"]) == (2, 3, 5, 1)
    assert "failed: 3\n" in call("status", folder).out


def test_report_writes_anew_and_prints_the_front(call: Call, spawn: Call, results: Callable[..., Path]) -> None:
    folder = results()
    names = ("study.csv", "pareto.csv", "report.html")
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    front = call("report", folder, "--json").json()
    assert {name: (folder / name).read_bytes() for name in names} == before
    table = pd.read_csv(folder / "pareto.csv")
    assert [point["number"] for point in front] == list(table["number"])
    assert set(CSV_COLUMNS) <= set(front[0])
    words = spawn("report", folder)
    assert (words.code, words.err) == (0, "")
    assert "\x1b" not in words.out
    assert "reference:" in words.out


def test_a_study_where_all_trials_fail(call: Call, results: Callable[..., Path]) -> None:
    folder = results(tell=lambda _: "logits: 3 of 60 rows are not finite")
    assert call("report", folder, "--json").json() == []
    words = call("report", folder)
    assert words.code == 0
    assert "no candidate completed within the constraints" in " ".join(words.out.split())
    for command in (["pick", folder], ["recover", folder], ["export", folder, "-o", folder / "out"]):
        assert "the front is empty" in call(*command).line(1)
    failed = api.open_study(folder).candidates()[0].number
    said = f"trial {failed}: has no measurement (logits: 3 of 60 rows are not finite)"
    assert said in call("pick", folder, "--trial", failed).line(1)
    assert call("status", folder, "--json").json()["failed"] == 6


def test_a_study_of_one_trial(call: Call, results: Callable[..., Path]) -> None:
    folder = results(trials=1)
    found = call("pick", folder, "--json").json()
    assert found["trial"] == call("report", folder, "--json").json()[0]["number"]
    assert found["accuracy"][1] <= found["accuracy"][0] <= found["accuracy"][2]


def test_a_study_where_all_candidates_are_equal(call: Call, results: Callable[..., Path]) -> None:
    folder = results(tell=lambda _: make_measurement())
    front = call("report", folder, "--json").json()
    assert len(front) == 1
    assert call("report", folder).code == 0
    for prefer in ("knee", "latency", "size", "accuracy"):
        assert call("pick", folder, "--prefer", prefer, "--json").json()["trial"] == front[0]["number"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    call: Call, results: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = results()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert call("report", folder).line(1) == "autocompress: No space left on device"
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert call("status", folder, "--json").json()["complete"] == 6


def test_a_trial_off_the_front_can_be_recovered(
    call: Call, results: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = results()
    on_front = {point["number"] for point in call("report", folder, "--json").json()}
    number = min({candidate.number for candidate in api.open_study(folder).candidates()} - on_front)
    monkeypatch.setattr(api, "recover", lambda candidate, **_: candidate)
    assert call("recover", folder, "--trial", number, "--json").json()["trial"] == number


def test_a_trial_that_was_stopped_is_recovered_and_neither_picked_nor_exported(
    call: Call, results: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Stopped(reason="loss at least 0.5 after 100 of 1000 rows", rows=100, size_bytes=2e7, latency=0.5)
    folder = results(tell=lambda number: stopped if number == 2 else make_measurement())
    line = call("pick", folder, "--trial", 2).line(1)
    assert line == f"autocompress: trial 2: has no measurement ({stopped.reason})"
    line = call("export", folder, "--trial", 2, "-o", "out").line(1)
    assert line == f"autocompress: export: trial 2 was stopped early ({stopped.reason}); pick another"
    asked: list[int] = []

    def recover(candidate: Candidate, **_: object) -> Candidate:
        asked.append(candidate.number)
        return api.open_study(folder).front().points[0]

    monkeypatch.setattr(api, "recover", recover)
    assert call("recover", folder, "--trial", 2).code == 0
    assert asked == [2]


def test_an_unknown_trial_to_recover_names_the_nearest(call: Call, results: Callable[..., Path]) -> None:
    folder = results()
    last = max(candidate.number for candidate in api.open_study(folder).candidates())
    line = call("recover", folder, "--trial", 99).line(1)
    assert line == f"autocompress: trial 99: no such candidate; the nearest is trial {last}"


@pytest.mark.parametrize("command", ["pick", "export"])
def test_an_unknown_trial_names_the_nearest(call: Call, results: Callable[..., Path], command: str) -> None:
    folder = results()
    numbers = [candidate.number for candidate in api.open_study(folder).candidates()]
    extra = ["-o", folder.with_name("out")] if command == "export" else []
    line = call(command, folder, "--trial", 99, *extra).line(1)
    assert line == f"autocompress: trial 99: no such candidate; the nearest is trial {max(numbers)}"
    assert not folder.with_name("out").exists()


def test_a_trial_off_the_front_is_told_what_beats_it(call: Call, results: Callable[..., Path]) -> None:
    folder = results(trials=15)
    study = api.open_study(folder)
    front = {point.number for point in study.front().points}
    number = next(c.number for c in study.candidates() if c.number not in front)
    found = call("pick", folder, "--trial", number, "--json").json()
    said = re.fullmatch(
        r"asked for by its number; not on the front, where trial (\d+) is at least as good in every objective",
        found["why"],
    )
    better = study.candidate(int(said[1])).score
    assert better.accuracy >= found["accuracy"][0]
    assert better.size_bytes <= found["size_bytes"]
    assert better.latency_ratio <= found["latency_ratio"][0]


def test_the_least_divergent_within_a_ratio_is_picked(call: Call, results: Callable[..., Path]) -> None:
    folder = results(
        trials=15,
        tell=lambda number: dataclasses.replace(
            make_measurement(ratio=0.1 + 0.05 * (7 * number % 15)), divergence=0.1 * ((4 * number + 7) % 15)
        ),
    )
    scores = [c.score for c in api.open_study(folder).candidates()]
    limit = sorted(s.latency_ratio for s in scores)[7]
    found = call("pick", folder, "--prefer", "divergence", "--max-latency-ratio", limit, "--json").json()
    assert found["divergence"] == min(s.divergence for s in scores if s.latency_ratio <= limit)
    assert found["why"].startswith("the least divergent of the ")


@pytest.mark.parametrize(("runtime", "expected"), [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_what_is_exported_by_default_is_what_was_searched(
    call: Call, results: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, runtime: str, expected: str
) -> None:
    folder = results()
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    write(folder / "run.yaml", text.replace("runtime: openvino", f"runtime: {runtime}"))
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(delivery, "export", lambda *_, formats, **__: asked.append(formats) or {})
    assert call("export", folder, "-o", folder.with_name("out")).code == 0
    assert call("export", folder, "-o", folder.with_name("out"), "--format", "hf").code == 0
    assert asked == [[expected], ["hf"]]


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (["--max-size-mb", "0.001"], "size in MB"),
        (["--max-latency-ms", "0.001"], "latency in ms"),
        (["--max-latency-ratio", "0.001"], "latency ratio"),
        (["--max-latency-ms", "nan"], "latency in ms"),
        (["--max-size-mb", "-1"], "size in MB"),
    ],
)
def test_limits_that_nothing_satisfies_name_the_nearest(
    call: Call, results: Callable[..., Path], limit: list[str], said: str
) -> None:
    folder = results()
    line = call("pick", folder, *limit).line(1)
    assert re.match(r"autocompress: pick: no point is feasible; the nearest is trial \d+: ", line)
    assert said in line


@pytest.mark.parametrize("command", ["pick", "export", "recover"])
def test_limits_beside_a_trial_are_refused(call: Call, results: Callable[..., Path], command: str) -> None:
    extra = ["-o", "out"] if command == "export" else []
    line = call(command, results(), "--trial", 0, "--max-accuracy-drop", "1%", *extra).line(2)
    assert line == "--trial: names the point; leave out the limits, which would choose one"


def test_a_page_is_served_before_there_is_a_study(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "wait", lambda: None)
    (tmp_path / "begun").mkdir()
    assert "holds no run.yaml" in call("status", "begun").line(1)
    done = call("status", "begun", "--serve", "--port", 0)
    assert done.code == 0
    assert "the page waits for it" in done.err
    assert "the report is at http://127.0.0.1:" in done.err
    assert call("status", "none", "--serve", "--port", 0).code == 1


@pytest.mark.parametrize("drop", ["x", "-1%", "101%", "1", "1.01", "nan", "", "%"])
def test_an_accuracy_drop_that_is_no_share_is_a_usage_error(
    call: Call, results: Callable[..., Path], drop: str
) -> None:
    line = call("pick", results(), f"--max-accuracy-drop={drop}").line(2)
    assert line.startswith("--max-accuracy-drop: must be 0%..100% or a share below 1, such as 0.01, got ")


def test_a_pick_says_why_and_what_its_neighbours_trade(call: Call, results: Callable[..., Path]) -> None:
    folder = results(trials=15)
    front = call("report", folder, "--json").json()
    found = call("pick", folder, "--prefer", "latency", "--json").json()
    assert found["why"] == f"the fastest of the {len(front)} points of the front"
    assert set(found["neighbours"]) <= {"more accurate", "smaller"}, "none is faster"
    numbers = {point["number"] for point in front} - {found["trial"]}
    assert {near["trial"] for near in found["neighbours"].values()} <= numbers
    said = call("pick", folder, "--prefer", "latency").out
    assert said.rstrip().endswith(f"autocompress export {folder} --trial {found['trial']} -o OUT")


def test_percent_and_share_are_the_same_drop(call: Call, results: Callable[..., Path]) -> None:
    folder = results(trials=15)
    picks = [
        call("pick", folder, "--max-accuracy-drop", drop, "--prefer", "size", "--json").json()
        for drop in ("20%", "0.2", "100%")
    ]
    assert picks[0] == picks[1]
    assert picks[0]["accuracy"][0] >= 0.68
    assert picks[2]["size_bytes"] <= picks[0]["size_bytes"]


def test_a_recovery_that_does_nothing_is_refused(call: Call, results: Callable[..., Path]) -> None:
    line = call("recover", results(), "--epochs=0").line(2)
    assert line.startswith("run.yaml: recovery.epochs: 0 trains nothing; set recovery.reconstruct to true")


@pytest.mark.parametrize("epochs", ["-1", "nan", "1000", "many"])
def test_recovery_of_no_epochs_is_refused(call: Call, results: Callable[..., Path], epochs: str) -> None:
    line = call("recover", results(), f"--epochs={epochs}").line(2)
    assert line.startswith("run.yaml: recovery.epochs: must be auto, or >= 0 and <= 100, got ")


def test_only_what_concerns_one_point_is_set_for_it(call: Call, results: Callable[..., Path]) -> None:
    line = call("recover", results(), "--set", "recovery.alpha=0.1").line(2)
    assert line.startswith("recover: only recovery.epochs, recovery.hidden, recovery.l1, ")
    assert line.endswith("can be set for one point, got recovery.alpha=0.1")


def test_export_refuses_before_it_works(call: Call, results: Callable[..., Path], tmp_path: Path) -> None:
    folder = results()
    taken = tmp_path / "taken"
    taken.mkdir()
    write(taken / "mine.txt", "mine")
    assert call("export", folder, "-o", taken).line(1).startswith(f"autocompress: export: {taken} is not empty")
    line = call("export", folder, "-o", "new", "--format", "tflite").line(2)
    assert "must be one of openvino, onnx, hf, torch, got 'tflite'" in line
    gone = call("export", folder, "-o", "new")  # the model that it could be built again from
    assert (gone.code, gone.err.splitlines()[-1]) == (1, "autocompress: model: ./none: no such folder")
    assert tree(taken) == {"mine.txt"}
    assert not (tmp_path / "new").exists()


def test_measure_wants_an_exported_folder(call: Call, tmp_path: Path) -> None:
    assert "cannot be read" in (line := call("measure", tmp_path).line(1))
    assert line.endswith("; give a folder that export wrote, with this version")


@pytest.mark.parametrize("command", ["status", "report", "pick", "recover"])
def test_a_folder_that_is_no_study_is_refused(call: Call, tmp_path: Path, command: str) -> None:
    assert call(command, tmp_path / "none").line(1).endswith("give the results folder of a search")
    write(tmp_path / "run.yaml", "{}")
    assert "holds no study.journal" in call(command, tmp_path).line(1)
    assert tree(tmp_path) == {"run.yaml"}


def test_a_damaged_study_is_salvaged(call: Call, results: Callable[..., Path]) -> None:
    folder = results()
    assert call("salvage", folder).line(1).endswith("study.journal: no line is damaged")
    known = call("status", folder, "--json").json()
    journal = folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:-2], b"\x00" * 40 + b"\n", lines[-1]]))
    assert f"by: autocompress salvage {folder}" in call("status", folder).line(1)
    found = call("salvage", folder, "--json").json()
    assert (found["damaged"], found["left_out"]) == (1, 0)
    Path(found["file"]).replace(journal)
    left = call("status", folder, "--json").json()
    assert known["complete"] - 1 <= left["complete"] <= known["complete"]


def test_a_study_whose_model_is_gone_cannot_be_retargeted(
    call: Call, results: Callable[..., Path], tmp_path: Path
) -> None:
    line = call("retarget", results(), "-o", tmp_path / "other").line(1)
    assert line == "autocompress: model: ./none: no such folder"
    assert call("retarget", results("more"), "-o", tmp_path / "other", "--set", "data.search_rows=9").code == 2


# --- what others make of a study


@pytest.mark.slow
def test_optuna_dashboard_opens_a_study(results: Callable[..., Path]) -> None:
    journal, port = results() / "study.journal", free_port()
    command = [Path(sys.executable).with_name("optuna-dashboard"), journal, "--host", "127.0.0.1", "--port", str(port)]
    served = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies/0?after=0", timeout=30) as answer:
                    shown = json.load(answer)
                break
            except OSError:
                assert served.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        served.kill()
        served.wait()
    assert shown["name"] == "autocompress"
    assert shown["directions"] == ["maximize", "minimize", "minimize"]
    assert shown["objective_names"] == [
        "accuracy",
        "size_bytes",
        "latency",
    ]
    assert [trial["state"] for trial in shown["trials"]] == ["Complete"] * 6
