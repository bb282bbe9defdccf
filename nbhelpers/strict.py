"""What does every config refuse? Unknown fields, by name and with the nearest known one; changes after birth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from nbhelpers.registry import unknown


class StrictConfig(BaseModel):
    """Base of the config classes: frozen, validated as a whole, defaults included."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, values: Any) -> Any:
        for name in values if isinstance(values, Mapping) else ():
            if name not in cls.model_fields:
                raise ValueError(unknown("field", name, cls.model_fields))
        return values
