"""What the settings of every verb have in common."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings that never change, refuse names they do not know, and are explained by their attributes' docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
