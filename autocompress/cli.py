"""The command line: each command is one call of the public API. What is printed, and where, `console.py` says."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from autocompress import __version__, console, garbage
from autocompress.cluster import Cluster
from autocompress.errors import AutocompressError, ConfigError, StudyError, quoted
from autocompress.options import (
    Address,
    Data,
    Folder,
    Insecure,
    Json,
    MaxDrop,
    MaxMb,
    MaxMs,
    MaxRatio,
    Model,
    Prefer,
    Preferred,
    Run,
    Set,
    Space,
    Target,
    Trial,
    picked,
)

app = typer.Typer(
    name="autocompress",
    help="Search for compressed versions of a pretrained Transformer, scored on what is shipped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    os.environ["AUTOCOMPRESS_DEBUG"] = "1" if debug else os.environ.get("AUTOCOMPRESS_DEBUG", "")


def _run(
    run: str, model: str | None, data: str | None, space: str | None, target: str | None, overrides: list[str] | None
) -> Any:
    from autocompress.config import RunConfig

    named = {"model.id": model, "data.source": data, "space": space, "target.runtime": target}
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value is not None]
    return RunConfig.from_file(run, overrides=[*given, *(overrides or [])])


@app.command()
def init(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the run file.")] = Path("run.yaml"),
    demo: Annotated[bool, typer.Option("--demo", help="Write the demo's run file.")] = False,
    model: Model = None,
    data: Data = None,
    text: Annotated[str | None, typer.Option("--text", help="Column of the text, by default text.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Column of the class, by default label.")] = None,
    target: Target = None,
    name_: Annotated[str | None, typer.Option("--name", help="Name of the run.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of run files instead.")] = False,
) -> None:
    """Write a commented run file to edit; on a terminal it asks for what was not given."""
    from autocompress import runfile
    from autocompress.config import RunConfig

    if schema:
        typer.echo(json.dumps(RunConfig.json_schema(), indent=1))
        return
    if out.exists() and not force:
        raise ConfigError(f"init: {out} exists; give another --out or --force")
    asks = sys.stdin.isatty() and not demo
    if not demo and not asks and (model is None or data is None):
        raise ConfigError("init: give --demo, or --model and --data")
    if demo and any(given is not None for given in (model, data, text, label)):
        raise ConfigError("init: --demo goes without --model, --data, --text and --label")
    if asks:
        model = model or _answer("model: demo/minilm, a local folder or a hub id", default="demo/minilm")
        data = data or _answer("data: demo/movies, a file or a datasets id", default="demo/movies")
        target = target or _answer("runtime: openvino or onnxruntime", default="openvino")
    rows = None
    if data is not None:
        known = runfile.Known(data)
        if asks:
            text = _column("text", text, known.columns)
            label = _column("label", label, [c for c in known.columns or [] if c != (text or "text")])
        for column in (text or "text", label or "label"):
            known.check_column(column)
        rows = known.search_rows(text, label)
        name_ = name_ or runfile.name_of(data)
    wanted = {"name": name_, "model": model, "data": data, "text": text, "label": label, "target": target}
    content = runfile.run_text(out, {**wanted, "search_rows": rows})
    out.write_text(content, encoding="utf-8")
    typer.echo(f"wrote {out}; next: autocompress search {quoted(out)}")


def _column(name: str, given: str | None, columns: list[str] | None) -> str | None:
    """Return the column that was given, or, where the data have none called ``name``, one that is asked for."""
    if given is not None or not columns or name in columns:
        return given
    return _answer(f"column of the {name}: {', '.join(columns)}", default=columns[0])


def _answer(question: str, default: str) -> str:
    """Ask on the terminal.

    Raises:
        KeyboardInterrupt: at Ctrl-C or the end of what is typed, of which the prompt makes an error like others.
    """
    try:
        found: str = typer.prompt(question, default=default)
    except typer.Abort:
        raise KeyboardInterrupt from None
    return found


@app.command()
def validate(
    run: Run,
    model: Model = None,
    data: Data = None,
    space: Space = None,
    target: Target = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Check a run file with its model, data and space, without training anything."""
    config = _run(run, model, data, space, target, set_)
    from autocompress import api

    found = api.validate(config)
    found["space"]["uniform_plans"] = len(found["space"].pop("seeds"))
    console.result(found, as_json)


@app.command()
def plan(
    run: Run,
    model: Model = None,
    data: Data = None,
    space: Space = None,
    target: Target = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Forecast a search: the space's size, what it will take, and the uniform plans that it starts with."""
    config = _run(run, model, data, space, target, set_)
    from autocompress import api

    found = api.validate(config)["space"]
    forecast = api.forecast(config, progress=console.progress).to_dict()
    if as_json:
        console.result({**found, "forecast": forecast}, True)
        return
    for name, words in found["students"].items():
        typer.echo(f"student {name}: {words}")
    for number, words in enumerate(found["seeds"]):
        typer.echo(f"seed {number:>2}: {words}")
    console.result(forecast, False)


@app.command()
def finetune(
    run: Run,
    model: Model = None,
    data: Data = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Copy the classifier to this new folder.")] = None,
) -> None:
    """Fine-tune the model on the data where it has no head yet; a search does this by itself."""
    config = _run(run, model, data, None, None, set_)
    from autocompress import api

    if out is not None and out.exists():
        raise ConfigError(f"finetune: {out} exists; give a new folder")
    folder = api.finetune(config, progress=console.progress)
    if out is not None:
        shutil.copytree(folder, out)
    typer.echo(str(out or folder))


@app.command()
def search(
    run: Run,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Results folder, default results/<name>.")] = None,
    model: Model = None,
    data: Data = None,
    space: Space = None,
    target: Target = None,
    set_: Set = None,
    address: Address = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Search for compressed models; run again to continue."""
    config = _run(run, model, data, space, target, set_)
    from autocompress import api, runfile

    if data is not None:
        config = runfile.named(config, run, out)

    cluster = _cluster(address, insecure)
    try:
        with console.live() as watch:
            study = api.search(config, out, progress=console.progress, watch=watch, cluster=cluster)
    except KeyboardInterrupt:
        console.progress("interrupted; run the same command again to continue")
        raise
    console.front_of(study, as_json)
    if not as_json:
        typer.echo(f"report: {study.folder / 'report.html'}")
        if len(study.front()):
            typer.echo(f"next: autocompress export {quoted(study.folder)} --prefer knee -o OUT")


def _cluster(address: str | None, insecure: bool) -> Cluster | None:
    if insecure and address is None:
        raise ConfigError("--insecure: goes with --address")
    return None if address is None else Cluster(address, insecure)


@app.command()
def status(
    folder: Folder,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the report here, and let it follow.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of the page; 0 takes a free one.")] = 8770,
    as_json: Json = False,
) -> None:
    """Say how far a search is."""
    from autocompress import api

    try:
        console.result(api.status(folder), as_json)
    except StudyError as error:
        if not (serve and folder.is_dir()):
            raise
        console.progress(f"{error}; the page waits for it")  # as while the model is fine-tuned
    if serve:
        with api.serve(folder, port=port) as address:
            console.progress(f"the report is at {address} until this command ends (Ctrl-C)")
            console.wait()


@app.command()
def report(folder: Folder, as_json: Json = False) -> None:
    """Write report.html and the CSV files anew, and print the front."""
    from autocompress import api

    console.front_of(api.report(folder), as_json)


@app.command()
def retarget(
    folder: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", help="Results folder of the new study.")],
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="1 is what nothing beats, 2 adds what only that beats.")
    ] = 2,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Measure the best points of a study on this machine, or for another target, into a new study."""
    from autocompress import api

    _, moved = api.retarget(folder, out, overrides=set_ or [], ranks=ranks, progress=console.progress)
    if as_json:
        console.result(console.about_moves(moved), True)
        return
    for each in moved:
        typer.echo(each.words())
    typer.echo(f"report: {out / 'report.html'}")


@app.command()
def salvage(folder: Folder, as_json: Json = False) -> None:
    """Write what can be read of a damaged study into a new file; the old one stays as it is."""
    from autocompress import api

    found = api.salvage(folder)
    told = {"file": str(found.file), "damaged": found.damaged, "left_out": found.left_out, "again": found.again}
    console.result(told, as_json)
    if not as_json:
        typer.echo(f"next: mv {quoted(found.file)} {quoted(folder / 'study.journal')}, then search again")


@app.command()
def pick(
    folder: Folder,
    prefer: Preferred = Prefer.knee,
    trial: Trial = None,
    max_accuracy_drop: MaxDrop = None,
    max_latency_ms: MaxMs = None,
    max_latency_ratio: MaxRatio = None,
    max_size_mb: MaxMb = None,
    as_json: Json = False,
) -> None:
    """Pick a point, of the front unless it is named: which one, why, and what its neighbours would trade for it."""
    chosen = picked(folder, prefer, trial, max_accuracy_drop, max_latency_ms, max_latency_ratio, max_size_mb)
    console.result(console.about_choice(chosen), as_json)
    if not as_json:
        typer.echo(f"next: autocompress export {quoted(folder)} --trial {chosen.point.number} -o OUT")


@app.command()
def recover(
    folder: Folder,
    prefer: Preferred = Prefer.knee,
    trial: Trial = None,
    max_accuracy_drop: MaxDrop = None,
    max_latency_ms: MaxMs = None,
    max_latency_ratio: MaxRatio = None,
    max_size_mb: MaxMb = None,
    epochs: Annotated[str | None, typer.Option("--epochs", help="Passes over the training rows, or auto.")] = None,
    set_: Set = None,
    address: Address = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Distil a picked point from the teacher, measure it again and add it to the study."""
    from autocompress import api

    chosen = picked(folder, prefer, trial, max_accuracy_drop, max_latency_ms, max_latency_ratio, max_size_mb).point
    named = [] if epochs is None else [f"recovery.epochs={json.dumps(epochs)}"]
    overrides, cluster = [*(set_ or []), *named], _cluster(address, insecure)
    recovered = api.recover(chosen, overrides=overrides, progress=console.progress, cluster=cluster)
    console.result(console.about(recovered), as_json)


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", help="An empty or new folder.")],
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="openvino, onnx, hf (for transformers), torch; default: as searched. Repeatable: each gets a folder.",
        ),
    ] = None,
    prefer: Preferred = Prefer.knee,
    trial: Trial = None,
    max_accuracy_drop: MaxDrop = None,
    max_latency_ms: MaxMs = None,
    max_latency_ratio: MaxRatio = None,
    max_size_mb: MaxMb = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", help="Put it into this hub repository, in place of an earlier export."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private if it is new.")] = False,
    as_json: Json = False,
) -> None:
    """Ship a point: copy what was scored, reload it in a fresh process, compare, score on the held-out test rows."""
    if private and push_to_hub is None:
        raise ConfigError("--private: goes with --push-to-hub")
    chosen = picked(folder, prefer, trial, max_accuracy_drop, max_latency_ms, max_latency_ratio, max_size_mb).point
    from autocompress import api

    found = api.export(
        chosen,
        out,
        formats=format_ or (),
        force=force,
        push_to_hub=push_to_hub,
        private=private,
        progress=console.progress,
    )
    console.result(console.about_exports(chosen, found), as_json)


@app.command()
def measure(
    folder: Annotated[Path, typer.Argument(help="A folder that export wrote.")],
    pairs: Annotated[
        int | None, typer.Option("--pairs", help="Blocks of runs, 4 to 10,000; by default as many as export takes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time an exported folder on this machine, against the reference that it carries if it is a runtime's."""
    from autocompress import api

    found = api.measure(folder) if pairs is None else api.measure(folder, pairs=pairs)
    console.result(found, as_json)
    if not as_json:
        typer.echo(console.words_of_measured(found))


class Listing(StrEnum):
    """What `ls` can list."""

    spaces = "spaces"
    transforms = "transforms"
    runtimes = "runtimes"
    studies = "studies"


@app.command()
def ls(what: Listing, as_json: Json = False) -> None:
    """List search spaces, transforms, runtimes and what exports to them, or the studies under results/."""
    found: dict[str, Any] = {}
    if what is Listing.spaces:
        from autocompress.space import SearchSpace, shipped_spaces

        found = {name: SearchSpace.load(name).description for name in shipped_spaces()}
    elif what is Listing.transforms:
        from autocompress.decisions import DECISIONS

        found = {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in DECISIONS.items()}
    elif what is Listing.runtimes:
        from autocompress import delivery
        from autocompress import doctor as examination

        formats = {f"export --format {name}": words for name, words in delivery.formats().items()}
        found = {**examination.runtimes(), **formats}
    else:
        from autocompress import api
        from autocompress.storage import holds_study

        for folder in sorted(filter(holds_study, Path("results").glob("*"))):
            try:
                found[str(folder)] = api.status(folder)
            except AutocompressError as error:  # such as a damaged journal, which must not hide the others
                found[str(folder)] = str(error)
    console.result(found, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what the CPU can do, which runtimes are ready, and what adds what is missing."""
    from autocompress import doctor as examination

    console.result(examination.examine(), as_json)


def main() -> None:
    """Run the command line: 0 done, 1 our error in one line, 2 usage, 130 interrupted."""
    garbage.collect_rarely()
    try:
        app()
    except AutocompressError as error:
        _traced()
        from autocompress.report.tables import one_line

        # What a message quotes (a name, a file's content) may hold line breaks and control characters.
        said = one_line(str(error))
        typer.echo(f"autocompress: {said}" if error.exit_code == 1 else said, err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _traced()
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"autocompress: {where}{error.strerror or error}".replace("\n", " "), err=True)
        sys.exit(1)


def _traced() -> None:
    if os.environ.get("AUTOCOMPRESS_DEBUG"):
        traceback.print_exc()


if __name__ == "__main__":
    main()
