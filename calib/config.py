"""The base of every stage's configuration."""

from pydantic import BaseModel, ConfigDict


class StageConfig(BaseModel):
    """Frozen, validated settings of one stage; unknown names are refused.

    Raises:
        pydantic.ValidationError: a value is out of range, or a name is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
