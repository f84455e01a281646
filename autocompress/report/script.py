"""The program that travels with an exported folder and runs its model without this package."""

from __future__ import annotations

_SCRIPT = '''"""Say which class texts belong to, with nothing but numpy, tokenizers and PACKAGE.

    python predict.py "one text" "another"
    python predict.py < texts.txt

A line each; where the model compares two texts, there is a tab between them. Prints class, probability and text.
"""

import json
import sys
from pathlib import Path

import numpy as np
SILENTLYimport PACKAGE
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
about = json.loads((HERE / "measurement.json").read_text(encoding="utf-8"))
inputs = INPUTS
tokenizer = Tokenizer.from_file(str(HERE / "tokenizer" / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.enable_truncation(about["max_tokens"], direction=about["truncation_side"])
LOAD

for text in sys.argv[1:] or [line.rstrip("\\n") for line in sys.stdin]:
    read = tokenizer.encode(*(text.split("\\t", 1) if about["pair"] else [text]))
    known = {"input_ids": read.ids, "attention_mask": read.attention_mask, "token_type_ids": read.type_ids}
    logits = RUN[0]
    shares = np.exp(logits - logits.max())
    best = int(logits.argmax())
    print(about["labels"][best], f"{shares[best] / shares.sum():.4f}", text, sep="\\t")
'''
_PYTHON_TOKENIZER = {
    "numpy, tokenizers and": "numpy, transformers and",
    "from tokenizers import Tokenizer": "from transformers import AutoTokenizer",
    """tokenizer = Tokenizer.from_file(str(HERE / "tokenizer" / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.enable_truncation(about["max_tokens"], direction=about["truncation_side"])
""": """tokenizer = AutoTokenizer.from_pretrained(HERE / "tokenizer")
""",
    """    read = tokenizer.encode(*(text.split("\\t", 1) if about["pair"] else [text]))
    known = {"input_ids": read.ids, "attention_mask": read.attention_mask, "token_type_ids": read.type_ids}
""": """    texts = text.split("\\t", 1) if about["pair"] else [text]
    known = tokenizer(*texts, truncation=True, max_length=about["max_tokens"], return_token_type_ids=True)
""",
}
"""What is otherwise where the model's tokenizer is one of those that transformers have in Python alone."""
_OF_ARTEFACT = 'json.loads((HERE / "artefact.json").read_text(encoding="utf-8"))["inputs"]'
_LINES = {
    "openvino": {
        "INPUTS": _OF_ARTEFACT,
        "SILENTLY": 'sys.modules["openvino_telemetry"] = None  # or the next line reports that it was imported\n',
        "PACKAGE": "openvino",
        "LOAD": 'settings = {"INFERENCE_NUM_THREADS": about["target"]["threads"], "INFERENCE_PRECISION_HINT": "f32"}\n'
        'model = openvino.Core().compile_model(HERE / "model.xml", "CPU", settings)',
        "RUN": "model([np.array([known[name]]) for name in inputs])[0]",
    },
    "onnxruntime": {
        "INPUTS": _OF_ARTEFACT,
        "SILENTLY": "",
        "PACKAGE": "onnxruntime",
        "LOAD": 'model = onnxruntime.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])',
        "RUN": "model.run(None, {name: np.array([known[name]]) for name in inputs})[0]",
    },
    "torch": {
        "INPUTS": 'about["inputs"]',
        "SILENTLY": "",
        "PACKAGE": "torch",
        "LOAD": 'model = torch.export.load(HERE / "program.pt2").module()',
        "RUN": "model(*(torch.tensor([known[name]]) for name in inputs)).detach().numpy()",
    },
}


TRANSFORMERS = "transformers"
"""What runs a folder of format hf."""
_OF_TRANSFORMERS = '''"""Say which class texts belong to, with transformers and autocompress.

    python predict.py "one text" "another"
    python predict.py < texts.txt

A line each; where the model compares two texts, there is a tab between them. Prints class, probability and text.
"""

import json
import sys
from pathlib import Path

import autocompress
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).resolve().parent
about = json.loads((HERE / "measurement.json").read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(HERE)
model = AutoModelForSequenceClassification.from_pretrained(HERE).eval()

for text in sys.argv[1:] or [line.rstrip("\\n") for line in sys.stdin]:
    texts = text.split("\\t", 1) if about["pair"] else [text]
    read = tokenizer(*texts, truncation=True, max_length=about["max_tokens"], return_tensors="pt")
    with torch.no_grad():
        shares = model(**read).logits[0].softmax(0)
    best = int(shares.argmax())
    print(about["labels"][best], f"{shares[best]:.4f}", text, sep="\\t")
'''


def needs_of(runtime: str, *, fast: bool = True) -> str:
    """Say the packages that the program for a runtime needs; ``fast`` is the tokenizer that is not Python's."""
    if runtime == TRANSFORMERS:
        return "transformers and autocompress"
    return f"numpy, {'tokenizers' if fast else TRANSFORMERS} and {runtime}"


def predict_script(runtime: str, *, fast: bool = True) -> str:
    """Return the program for a runtime's artefacts; it is the same for all models whose tokenizers are alike."""
    if runtime == TRANSFORMERS:
        return _OF_TRANSFORMERS
    text = _SCRIPT
    for mark, line in {**({} if fast else _PYTHON_TOKENIZER), **_LINES[runtime]}.items():
        assert mark in text, "each stands in it"
        text = text.replace(mark, line)
    return text
