"""Records of what was measured: the JSON contract. Nothing of the project but errors is imported here."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Duration = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Record(BaseModel):
    """An immutable record; keys of a newer writer are ignored on reading."""

    # A loss that diverged is part of what a report says: JSON has no NaN, so it is written as "NaN".
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")
