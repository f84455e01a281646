"""Transformers knows our class, whoever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

LAST = "print(type(AutoConfig.for_model('autocompress')).__name__)"
FIRST_US = "import sys, autocompress; assert not {'torch', 'transformers'} & set(sys.modules)"


@pytest.mark.parametrize(
    "lines",
    [
        (FIRST_US, "from transformers import AutoConfig"),
        (FIRST_US, "from transformers import AutoModel, AutoConfig"),
        ("import transformers", "import autocompress", "from transformers import AutoConfig"),
        ("from transformers import AutoModel, AutoConfig", "import autocompress"),
        ("import autocompress.hf.modeling", "from transformers import AutoConfig"),
        ("import autocompress.hf.config", "from transformers import AutoModel, AutoConfig"),
    ],
)
def test_transformers_knows_our_class_whoever_comes_first(lines: tuple[str, ...]) -> None:
    program = "\n".join((*lines, LAST))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["CompressedConfig"], done.stderr
