"""The fresh process that proves an export."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from helpers_records import make_measurement

from autocompress import delivery, fresh, machine
from autocompress.config import RunConfig
from autocompress.decisions import Quantize
from autocompress.errors import ExportError
from autocompress.exported import require_same_numbers
from autocompress.plan import CompressionPlan


def test_a_process_has_the_time_that_its_rows_take() -> None:
    run = RunConfig.from_mapping({"data": {"max_tokens": 128}, "target": {"tokens": 64}})
    score = make_measurement()  # whose reference takes 16 ms
    few, many = (delivery._patience(run, score, rows) for rows in (100, 100_000))
    assert few >= fresh.LEAST_PATIENCE_S
    assert many >= 10 * 100_000 * 0.016 * 2


@pytest.mark.parametrize(("features", "refused"), [(["avx2", "avx512_vnni"], True), (["avx2"], False), (None, False)])
def test_other_arithmetic_makes_nothing_again(
    monkeypatch: pytest.MonkeyPatch, features: list[str] | None, refused: bool
) -> None:
    """Here is a CPU without VNNI, for which weights of 8 bits have 7."""
    here = {"system": "Linux x86_64", "cpu": {"features": ["avx2"]}}
    monkeypatch.setattr(machine, "fingerprint", lambda: here)
    monkeypatch.setattr(machine, "cpu", lambda: here["cpu"])
    there = {} if features is None else {"system": "Linux x86_64", "cpu": {"features": features}}
    floats, narrow = (CompressionPlan((("head", Quantize(weight_bits=bits)),)) for bits in (16, 8))
    require_same_numbers(floats, there, "trial 1")
    refusal = pytest.raises(ExportError, match="trial 1: was scored on a CPU that multiplies 8-bit numbers otherwise")
    with refusal if refused else nullcontext():
        require_same_numbers(narrow, there, "trial 1")


def test_a_process_that_fails_gives_its_last_line() -> None:
    with pytest.raises(ExportError, match=r"cannot be reloaded \(.*No module named"):
        delivery._elsewhere("autocompress.no_such_module", seconds=60)
