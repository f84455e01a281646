"""Fine-tune the demo model with the Trainer of transformers, as most people would: the yardstick of ``search_cost.py``.

Run by it, in an environment that has accelerate: three passes over the demo's training rows with the run file's batch
size and learning rate, batches padded to their longest row, and for all else what the Trainer does by default. Prints
the seconds from loading the model to the last step, and the accuracy on the search rows, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from autocompress.config import RunConfig
from autocompress.evaluate import Workshop

EPOCHS = 3.0


def encoded(shop: Workshop, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split as the Trainer takes them."""
    rows = shop.task.splits[split]
    texts = shop.tokenizer([text for text, _, _ in rows], truncation=True, max_length=shop.run.data.max_tokens)
    return [{**{key: texts[key][n] for key in texts}, "labels": label} for n, (_, _, label) in enumerate(rows)]


def main() -> None:
    run = RunConfig.from_file("demo")
    with tempfile.TemporaryDirectory() as scratch:
        shop = Workshop(run, Path(scratch))
        search = encoded(shop, "search")
        started = time.perf_counter()
        module = AutoModelForSequenceClassification.from_pretrained(shop.source, num_labels=len(shop.task.labels))
        trainer = Trainer(
            model=module,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=run.model.finetune.batch_size,
                learning_rate=run.model.finetune.learning_rate,
                seed=run.seed,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=encoded(shop, "train"),  # type: ignore[arg-type]
            data_collator=DataCollatorWithPadding(shop.tokenizer),
        )
        trainer.train()
        seconds = time.perf_counter() - started
        found = np.argmax(trainer.predict(search).predictions, axis=1)  # type: ignore[arg-type]
    accuracy = float(np.mean(found == np.array([row["labels"] for row in search])))
    json.dump({"seconds": seconds, "accuracy": accuracy}, sys.stdout)


if __name__ == "__main__":
    main()
