"""Soups: means of weights by hand; a greedy one leaves out what harms."""

from __future__ import annotations

import pytest
import torch

from autocompress import soup

STATES = [
    {"weight": torch.tensor([1.0, 4.0]), "ids": torch.tensor([3])},
    {"weight": torch.tensor([3.0, 0.0]), "ids": torch.tensor([5])},
    {"weight": torch.tensor([8.0, 2.0]), "ids": torch.tensor([7])},
]


def test_a_uniform_soup_is_the_mean_of_each_weight() -> None:
    found = soup.uniform(STATES)
    assert found["weight"].tolist() == [4.0, 2.0]
    assert found["weight"].dtype == torch.float32
    assert found["ids"].tolist() == [3], "numbers of positions are no weights"


def test_halves_are_averaged_in_higher_precision() -> None:
    many = [{"weight": torch.tensor([60000.0], dtype=torch.float16)}] * 3
    assert soup.uniform(many)["weight"].tolist() == [60000.0], "their sum is beyond what 16 bits hold"


@pytest.mark.parametrize(
    ("aim", "expected"),
    [
        # Distances are 1, 1 and 6: the first two together are at 0, and the third only harms.
        (2.0, [2.0, 2.0]),
        # The second is nearest; with the first it would be further away, with the third it is nearer.
        (4.5, [5.5, 1.0]),
        # The third alone is nearest, and each of the others harms.
        (9.0, [8.0, 2.0]),
    ],
)
def test_a_greedy_soup_keeps_what_helps(aim: float, expected: list[float]) -> None:
    found = soup.greedy(STATES, lambda state: abs(float(state["weight"][0]) - aim))
    assert found["weight"].tolist() == expected
