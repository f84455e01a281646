"""Fronts and candidates as a notebook shows them: tables of plain HTML, with everything from outside escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from autocompress.anatomy import ModelShape
from autocompress.front import Front
from autocompress.records import Candidate
from autocompress.report.blocks import BlockPicture, Picture
from autocompress.report.tables import FRONT_HEADINGS, accuracy_words, drop_words, front_rows, one_line, short, size_mb

_BLOCK_HEADINGS = ("block", "heads", "rank", "bits", "neurons", "rank", "bits")


def front_html(front: Front) -> str:
    """Return a front with the reference that it is held against."""
    reference = front.reference
    said = (
        f"{len(front)} points; the uncompressed reference has {accuracy_words(reference)} accuracy, "
        f"{short(size_mb(reference))} MB and {short(reference.latency_ms)} ms"
    )
    return f"<p>{escape(said)}</p>{_table(FRONT_HEADINGS, front_rows(front))}"


def candidate_html(candidate: Candidate) -> str:
    """Return a candidate's numbers, and its plan block by block where its results folder knows the model."""
    lines = [("trial", str(candidate.number)), ("plan", candidate.plan.words())]
    if candidate.measurement is None:
        lines.append(("state", f"{candidate.state}: {candidate.failure}"))
    else:
        score = candidate.score
        interval = f"{1 / score.latency_ratio_high:.2f} to {1 / score.latency_ratio_low:.2f}"
        lines.append(("accuracy", accuracy_words(score)))
        if score.drop is not None:
            lines.append(("lost on the same rows", drop_words(score.drop)))
        lines += [
            ("size", f"{short(size_mb(score))} MB"),
            ("latency", f"{short(score.latency_ms)} ms median, {short(score.latency_p90_ms)} ms 90th percentile"),
            ("times faster", f"{1 / score.latency_ratio:.2f} ({interval})"),
        ]
    told = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(one_line(value))}</td></tr>"
        for name, value in lines
    )
    shape = _shape_of(candidate)
    picture = None if shape is None else Picture.of(candidate.plan, shape)
    if picture is None:
        return f"<table>{told}</table>"
    rows = ((str(number), *_cells(block)) for number, block in enumerate(picture.blocks))
    return f"<table>{told}</table>{_table(_BLOCK_HEADINGS, rows)}"


def _cells(block: BlockPicture) -> tuple[str, ...]:
    attention = (str(block.heads), str(block.attention_rank or "full"), block.attention_bits)
    return (*attention, str(block.neurons), str(block.ffn_rank or "full"), block.ffn_bits)


def _shape_of(candidate: Candidate) -> ModelShape | None:
    if candidate.folder is None:
        return None
    try:
        environment = json.loads((candidate.folder / "environment.json").read_text(encoding="utf-8"))
        return ModelShape.from_dict(environment["shape"])
    except (OSError, ValueError, KeyError, TypeError):  # not known, or of a version that did not write it
        return None


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(one_line(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
