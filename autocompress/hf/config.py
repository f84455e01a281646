"""The configuration of a compressed classifier, which transformers' AutoConfig knows once this is imported."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

MODEL_TYPE = "autocompress"
FORMAT = 1
"""Version of what stands in ``config.json``."""


class CompressedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of a compressed classifier.

    Args:
        base: configuration of the uncompressed model.
        structure: what stands where it is otherwise; see `modeling.structure_of`.
        plan: what was done to it.
        format_version: of ``structure``.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        structure: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        format_version: int = FORMAT,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.base, self.structure, self.plan = base or {}, structure or {}, plan or {}
        self.format_version = format_version


AutoConfig.register(MODEL_TYPE, CompressedConfig, exist_ok=True)
