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
    def _check_type(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if not any(isinstance(item, BeforeValidator) for item in field.metadata):  # it may accept a text
            _require_type(value, _types(field.annotation))
        return value


def _types(annotation: Any) -> set[Any]:
    """Return the types in an annotation."""
    if get_origin(annotation) is Annotated:
        return _types(annotation.__origin__)
    inner = get_args(annotation)
    return {part for argument in inner for part in _types(argument)} if inner else {annotation}


def _require_type(value: Any, types: set[Any]) -> None:
    """Raise a ValueError if pydantic would convert a value, or one in a list, to a number or a bool."""
    if isinstance(value, list | tuple):
        for item in value:
            _require_type(item, types)
    elif isinstance(value, bool) and bool not in types and types & {int, float}:
        raise ValueError("expected a number")
    elif isinstance(value, str) and types <= {int, float, bool, type(None), ...}:
        raise ValueError(f"expected {'true or false' if bool in types else 'a number'}, not a text")
    elif isinstance(value, int | float) and not isinstance(value, bool) and types <= {bool, type(None)}:
        raise ValueError("expected true or false")
