"""The fresh process that proves an export."""

from __future__ import annotations

import pytest
from helpers_records import make_measurement

from autocompress import delivery, fresh
from autocompress.config import RunConfig
from autocompress.errors import ExportError


def test_a_process_has_the_time_that_its_rows_take() -> None:
    run = RunConfig.from_mapping({"data": {"max_tokens": 128}, "target": {"tokens": 64}})
    score = make_measurement()  # whose reference takes 16 ms
    few, many = (delivery._patience(run, score, rows) for rows in (100, 100_000))
    assert few >= fresh.LEAST_PATIENCE_S
    assert many >= 10 * 100_000 * 0.016 * 2


def test_a_process_that_fails_gives_its_last_line() -> None:
    with pytest.raises(ExportError, match=r"cannot be reloaded \(.*No module named"):
        delivery._elsewhere("autocompress.no_such_module", seconds=60)
