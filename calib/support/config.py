"""The base of every stage's configuration."""

from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator


class StageConfig(BaseModel):
    """Frozen, validated settings of one stage; unknown names are refused, and so is `true` or a text for a number.

    Raises:
        pydantic.ValidationError: a value is out of range or of another type, or a name is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if not any(isinstance(own, BeforeValidator) for own in field.metadata):  # which may take a text for a number
            _require_kind(value, _kinds(field.annotation))
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    if get_origin(annotation) is Annotated:
        return _kinds(annotation.__origin__)
    inner = get_args(annotation)
    return {kind for own in inner for kind in _kinds(own)} if inner else {annotation}


def _require_kind(value: Any, kinds: set[Any]) -> None:
    """Return unless a value, or one in a list, is of a type that pydantic would make a number or a bool of."""
    if isinstance(value, list | tuple):
        for own in value:
            _require_kind(own, kinds)
    elif isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        raise ValueError("expected a number")
    elif isinstance(value, str) and kinds <= {int, float, bool, type(None), ...}:
        raise ValueError(f"expected {'true or false' if bool in kinds else 'a number'}, not a text")
    elif isinstance(value, int | float) and not isinstance(value, bool) and kinds <= {bool, type(None)}:
        raise ValueError("expected true or false")
