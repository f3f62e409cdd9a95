"""What all records of `report.json` share."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """An immutable record; keys of a newer writer are ignored on reading."""

    # A loss that diverged is part of what a report says: JSON has no NaN, so it is written as "NaN".
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")
