"""The run file: what it accepts, what it says about the rest, overrides, and that it can be written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from autocompress import strict_yaml
from autocompress.config import RunConfig, demo_run_text
from autocompress.errors import ConfigError


def read(text: str, *overrides: str) -> RunConfig:
    return RunConfig.from_mapping(strict_yaml.parse(text, "run.yaml"), source="run.yaml", overrides=overrides)


def message_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search: {trails: 3}", "run.yaml: search.trails: unknown key, did you mean trials?"),
        ("serch: {trials: 3}", "run.yaml: serch: unknown key, did you mean search?"),
        ("model: {finetune: {epoch: 1}}", "run.yaml: model.finetune.epoch: unknown key, did you mean epochs?"),
        (
            "model: {finetune: {qqq: 1}}",
            "run.yaml: model.finetune.qqq: unknown key, known: epochs, learning_rate, batch_size",
        ),
        ("shema: 1", "run.yaml: shema: unknown key, did you mean schema?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(text: str, message: str) -> None:
    assert message_of(text) == message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("search: {trials: 0}", ("run.yaml: search.trials:", "greater than or equal to 1", "got 0")),
        ("search: {trials: -4}", ("search.trials:", "greater than or equal to 1", "got -4")),
        ("search: {trials: 1.5}", ("search.trials:", "integer", "got 1.5")),
        ("search: {sampler: gp}", ("search.sampler:", "'tpe', 'nsga2', 'nsga3' or 'random'", "got 'gp'")),
        ("seed: -1", ("seed:", "greater than or equal to 0", "got -1")),
        ("seed: 4294967296", ("seed:", "less than 4294967296", "got 4294967296")),
        ("recovery: {alpha: .nan}", ("recovery.alpha:", "finite number", "got nan")),
        ("recovery: {temperature: .inf}", ("recovery.temperature:", "finite number", "got inf")),
        ("recovery: {alpha: 1.2}", ("recovery.alpha:", "less than or equal to 1", "got 1.2")),
        ("recovery: {epochs: -1}", ("run.yaml: recovery.epochs: must be auto, or >= 0 and <= 100, got -1",)),
        ("recovery: {epochs: .nan}", ("run.yaml: recovery.epochs: must be auto, or >= 0 and <= 100, got nan",)),
        ("recovery: {epochs: all}", ("run.yaml: recovery.epochs: must be auto, or >= 0 and <= 100, got 'all'",)),
        ("recovery: {relations: -1}", ("recovery.relations:", "greater than or equal to 0", "got -1")),
        ("recovery: {l1: .inf}", ("recovery.l1:", "finite number", "got inf")),
        ("recovery: {patience: 101}", ("recovery.patience:", "less than or equal to 100", "got 101")),
        ("recovery: {seeds: 0}", ("recovery.seeds:", "greater than or equal to 1", "got 0")),
        ("data: {test_fraction: 1}", ("data.test_fraction:", "less than 1", "got 1")),
        ("data: []", ("data:", "got []")),
        ("search: null", ("search:", "got None")),
        ("target: {runtime: tensorrt}", ("target.runtime:", "'openvino' or 'onnxruntime'", "got 'tensorrt'")),
        ("target: {precision: bf16}", ("target.precision:", "'f32'", "got 'bf16'")),
        ("constraints: {max_accuracy_drop: 1}", ("constraints.max_accuracy_drop:", "less than 1", "got 1")),  # not 1 %
        ("constraints: {max_size_mb: 1e400}", ("constraints.max_size_mb:", "finite number", "got inf")),
        ("objectives: [accuracy]", ("objectives:", "at least 2", "got ['accuracy']")),
        (
            "objectives: [accuracy, flops]",
            ("objectives.1:", "'accuracy', 'loss', 'divergence', 'size_bytes', 'latency' or 'peak_memory'"),
        ),
        ("objectives: [accuracy, flops]", ("objectives.1:", "got 'flops'")),
        ("objectives: [accuracy, loss, divergence, size_bytes, latency, peak_memory]", ("objectives:", "at most 5")),
        ("search: {mutation_share: 1.1}", ("search.mutation_share:", "less than or equal to 1", "got 1.1")),
        ("search: {mutation_share: .nan}", ("search.mutation_share:", "finite number", "got nan")),
        ("search: {guide: size_bytes}", ("search.guide:", "'accuracy', 'loss' or 'divergence'", "got 'size_bytes'")),
        ("search: {skip_behind: 7}", ("search.skip_behind:", "boolean", "got 7")),
        ("search: {stop_early: often}", ("search.stop_early:", "boolean", "got 'often'")),
        ("search: {latency_pairs: 1}", ("search.latency_pairs:", "greater than or equal to 2", "got 1")),
        ("search: {confirm_pairs: -1}", ("search.confirm_pairs:", "greater than or equal to 0", "got -1")),
        ("search: {recover: 1001}", ("search.recover:", "less than or equal to 1000", "got 1001")),
        ("search: {seed: -1}", ("search.seed:", "greater than or equal to 0", "got -1")),
        ("baselines: [best]", ("baselines.0:", "'random'", "got 'best'")),
        ("storage: {shared: bucket/folder}", ("storage.shared:", "must read PROTOCOL://PLACE/FOLDER")),
        ("storage: {shared: 's3://'}", ("storage.shared:", "must read PROTOCOL://PLACE/FOLDER")),
        ("storage: {shared: 'ftp://me:secret@here/x'}", ("storage.shared:", "holds a password")),
        ("storage: {study: 'postgresql://me@here/x?password=secret'}", ("storage.study:", "holds a password")),
        ("storage: {bank_gb: 0}", ("storage.bank_gb:", "greater than 0", "got 0")),
        ("constraints: {max_memory_mb: 0}", ("constraints.max_memory_mb:", "greater than 0", "got 0")),
        ("objectives: [latency, latency]", ("run.yaml: objectives: each may be named once",)),
        ("target: {tokens: 128}", ("run.yaml: target.tokens: must be <= data.max_tokens (64), got 128",)),
        ("schema: 2", ("schema:", "should be 1", "got 2")),
        ("[1, 2]", ("run.yaml: must hold keys and values, got list",)),
        ("", ("run.yaml: must hold keys and values, it is empty",)),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(text: str, parts: tuple[str, ...]) -> None:
    message = message_of(text)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "name",
    ["../../x", "..", "/etc/x", "a/b", "a\\b", "", ".hidden", "-rf", "a b", "a\n", "x" * 65, "</script>", "=cmd", "~x"],
)
def test_a_study_name_cannot_leave_the_results_folder(name: str) -> None:
    message = message_of(f"name: {json.dumps(name)}")
    assert message.startswith("run.yaml: name: ")
    assert "must be 1 to 64 letters, digits" in message


@pytest.mark.parametrize("name", ["demo", "a", "minilm-movies-openvino", "v1.2_x", "x" * 64])
def test_an_ordinary_study_name_is_accepted(name: str) -> None:
    assert read(f"name: {json.dumps(name)}").name == name


def test_a_long_value_is_shortened_in_the_message() -> None:
    assert len(message_of(f"name: {'x' * 5000}")) < 200


def test_overrides_win_over_the_file_and_read_like_yaml() -> None:
    run = read(
        "search: {trials: 3}\nseed: 1",
        "search.trials=60",
        "recovery.learning_rate=1e-3",
        "objectives=[accuracy, latency]",
        "model.id=a=b",
        "constraints.max_size_mb=30",
    )
    assert (run.search.trials, run.seed, run.recovery.learning_rate) == (60, 1, 1e-3)
    assert run.objectives == ("accuracy", "latency")
    assert run.model.id == "a=b"
    assert run.constraints.max_size_mb == 30


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.trials", "--set search.trials: must read dotted.key=value, such as search.trials=60"),
        ("=3", "--set =3: must read dotted.key=value"),
        ("seed.x=3", "--set seed.x=3: seed holds a value, not keys"),
        ("search.trails=3", "run.yaml: search.trails: unknown key, did you mean trials?"),
        ("search.trials={a: 1, a: 2}", "--set search.trials: line 1: duplicate key 'a'"),
        ("seed=!!python/name:os.system", "python/name"),
    ],
)
def test_a_wrong_override_is_one_line(override: str, message: str) -> None:
    assert message in message_of("seed: 1", override)


def test_overrides_leave_the_callers_mapping_alone() -> None:
    data = {"search": {"trials": 3}}
    RunConfig.from_mapping(data, overrides=["search.trials=9", "seed=4"])
    assert data == {"search": {"trials": 3}}


def test_the_shipped_run_file_states_the_defaults() -> None:
    demo = RunConfig.from_file("demo")
    assert demo == RunConfig()
    assert demo_run_text().startswith("#")


def test_an_empty_run_file_of_keys_is_the_default_run() -> None:
    assert read("{}") == RunConfig()


def test_from_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("search: {trails: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^mine\.yaml: search\.trails: unknown key, did you mean trials\?$"):
        RunConfig.from_file(path)
    path.write_text("name: mine\nsearch: {trials: 7}\n", encoding="utf-8")
    assert RunConfig.from_file(path, overrides=["search.trials=8"]).search.trials == 8
    with pytest.raises(ConfigError, match="no such file"):
        RunConfig.from_file(tmp_path / "other.yaml")


def test_a_run_survives_writing_and_reading() -> None:
    run = read(
        "name: a\nobjectives: [latency, accuracy]\nrecovery: {learning_rate: 1e-5}\nconstraints: {max_size_mb: 12.5}\n"
        "data: {text_pair: other}\nseed: 7"
    )
    text = run.to_yaml()
    assert read(text) == run
    assert "schema: 1" in text


@pytest.mark.parametrize("text", ["1e6", "1_0", "12", "0x1f", "yes", "null", "2026-11-25", "1.0"])
def test_texts_that_look_like_something_else_survive_it(text: str) -> None:
    run = RunConfig.from_mapping({"name": text, "data": {"label": text}})
    assert read(run.to_yaml()) == run


def test_a_run_is_frozen() -> None:
    run = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        run.search.trials = 3


def test_the_json_schema_describes_the_keys_of_the_file() -> None:
    schema = RunConfig.json_schema()
    assert set(schema["properties"]) == set(strict_yaml.parse(demo_run_text(), "demo"))
    assert schema["additionalProperties"] is False
    search = schema["$defs"]["SearchConfig"]["properties"]
    assert "continues a study" in search["trials"]["description"]


@pytest.mark.parametrize(("text", "epochs"), [("auto", "auto"), ("2", 2.0), ("0.5", 0.5)])
def test_epochs_of_recovery_are_a_number_or_counted(text: str, epochs: object) -> None:
    run = read(f"recovery: {{epochs: {text}}}")
    assert run.recovery.epochs == epochs
    assert type(run.recovery.epochs) is type(epochs)
    assert read(run.to_yaml()) == run


def test_options_of_recovery_are_off_by_default() -> None:
    found = RunConfig().recovery
    assert (found.epochs, found.hidden, found.seeds) == (1.0, 30.0, 1)
    assert (found.relations, found.l1, found.l2, found.patience, found.quantized) == (0, 0, 0, 0, False)
