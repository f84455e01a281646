"""What benchmarks of methods share: their data sets, rows through an artefact, and intervals over the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from figures import Figures

from autocompress import scoring
from autocompress.evaluate import Workshop
from autocompress.plan import CompressionPlan
from autocompress.runtimes import Artifact
from autocompress.space import SearchSpace

DATA = ("demo/movies", "demo/tweets")
DRAWS = 10_000
"""Of a bootstrap."""


def space_without_students(folder: Path) -> Path:
    """Write the joint space without its students and return the file."""
    content = SearchSpace.load("encoder-joint").model_dump(mode="json", by_alias=True, exclude_none=True)
    file = folder / "encoder-joint-without-students.yaml"
    file.write_text(yaml.safe_dump(content | {"name": file.stem, "students": {}}), encoding="utf-8")
    return file


def logits_of(shop: Workshop, plan: CompressionPlan, split: str) -> np.ndarray:
    """Return what the plan's artefact makes of a split, ``rows x classes``."""
    return _run(shop, shop.build(plan, shop.artefacts / plan.plan_id), split)


def test_hits(shop: Workshop, folder: Path) -> np.ndarray:
    """Return which test rows an artefact predicts rightly, ``rows``, bool."""
    return hits(shop, _run(shop, Artifact.open(folder), "test"), "test")


def hits(shop: Workshop, logits: np.ndarray, split: str) -> np.ndarray:
    """Return which rows of a split are predicted rightly, ``rows``, bool."""
    return np.asarray(logits.argmax(axis=1) == np.array(shop.splits[split].labels))


def add_comparison(
    figures: Figures, shop: Workshop, name: str, split: str, logits: Sequence[np.ndarray], full: np.ndarray
) -> None:
    """Add what a method gains over its plain counterpart on a split: accuracy, and divergence from the full model.

    Args:
        figures: to add to.
        shop: of the split.
        name: of the comparison.
        split: whose rows were run.
        logits: of the method and of its counterpart, each ``rows x classes``.
        full: of the full model.
    """
    first, second = (hits(shop, each, split) for each in logits)
    name = f"{name}, {split} rows"
    gained = first.mean() - second.mean()
    figures.add(f"{name}: accuracy gained", gained, "share", interval=interval(first, second))
    apart = [scoring.divergence(each, full) for each in logits]
    figures.add(f"{name}: divergence from the full model", apart[0] / apart[1], "times the plain's")
    figures.more[name] = {"accuracy": [float(first.mean()), float(second.mean())], "divergence": apart}


def interval(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Return the 95 % interval of the difference of two accuracies on the same rows, by a paired bootstrap.

    What is right is given as ``rows``, or as its share over several models at each row.
    """
    gained = first.astype(float) - second
    drawn = np.random.default_rng(0).integers(0, len(gained), (DRAWS, len(gained)))
    return [float(q) for q in np.quantile(gained[drawn].mean(axis=1), (0.025, 0.975))]


def _run(shop: Workshop, artifact: Artifact, split: str) -> np.ndarray:
    session = shop.runtime.load(artifact, shop.run.target)
    logits = scoring.logits_of(session, shop.splits[split], shop.batches(split))
    session.close()
    return logits
