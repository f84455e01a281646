"""What a notebook shows of a front and of a candidate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from helpers_records import SEARCH, front_of, make_candidate

from autocompress.anatomy import BlockShape, ModelShape
from autocompress.decisions import PruneNeurons
from autocompress.plan import CompressionPlan

SHAPE = ModelShape(hidden=384, blocks=(BlockShape(heads=12, head_size=32, neurons=1536),) * 2, vocabulary=30_522)
ATTACK = "<img src=x onerror=alert(1)>"


def test_a_front_is_a_table_with_its_reference() -> None:
    html = front_of(SEARCH)._repr_html_()
    assert "3 points; the uncompressed reference has 88.0 % (85.8 to 89.9) accuracy, 90.0 MB and 16.0 ms" in html
    assert html.count("<tr>") == 1 + 3
    assert "<td>2</td><td>83.0 (80.5 to 85.2)</td><td>15.0</td><td>6.0</td><td>4.0</td>" in html


def test_a_candidate_tells_its_numbers_and_its_blocks(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"shape": dataclasses.asdict(SHAPE)}), encoding="utf-8")
    plan = CompressionPlan((("block.1.ffn", PruneNeurons(keep=768)),))
    html = dataclasses.replace(SEARCH[2], plan=plan, folder=tmp_path)._repr_html_()
    assert "83.0 % (80.5 to 85.2)" in html
    assert "4.00 (3.92 to 4.08)" in html
    assert "5.0 points (4.0 to 6.0)" in html
    assert "<tr><td>1</td><td>12</td><td>full</td><td>w32</td><td>768</td><td>full</td><td>w32</td></tr>" in html


def test_without_its_folder_a_candidate_tells_its_numbers_alone(tmp_path: Path) -> None:
    for candidate in (SEARCH[2], dataclasses.replace(SEARCH[2], folder=tmp_path)):
        html = candidate._repr_html_()
        assert "15.0 MB" in html
        assert "heads" not in html


def test_a_failed_one_tells_why() -> None:
    assert "FAIL: logits: not finite" in SEARCH[5]._repr_html_()


def test_off_a_notebook_they_say_themselves_in_short() -> None:
    assert repr(SEARCH[2]) == "<trial 2: 83.0 %, 15.0 MB, 4.0 ms (4.00x faster), ffn 0: 66 neurons w8a8>"
    assert repr(SEARCH[5]) == "<trial 5: FAIL, logits: not finite>"
    front = repr(front_of(SEARCH))
    assert front.startswith("<front of 3 points: fastest within 1% <trial 0: 87.5 %, ")
    assert "knee <trial 2: " in front
    assert repr(front_of([])) == "<front without a point>"


def test_nothing_from_outside_is_markup() -> None:
    plan = CompressionPlan(((ATTACK, PruneNeurons(keep=2)),))
    candidate = make_candidate(0, plan=plan)
    failed = make_candidate(1, state=ATTACK, failure=ATTACK)
    for html in (front_of([candidate])._repr_html_(), candidate._repr_html_(), failed._repr_html_()):
        assert "<img" not in html
        assert "&lt;img" in html
