"""Strict, frozen configuration: schema first, refuse early, one line per problem."""

from __future__ import annotations

from typing import Any, TypeVar

import pydantic

from omrl.core.errors import UserError, shown, suggest


class Config(pydantic.BaseModel):
    """Base of every configuration: frozen, no unknown keys, no silent conversion (an int may stand for a float)."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )

    def resolved(self) -> dict[str, Any]:
        """Return every value, defaults included, as JSON types."""
        return self.model_dump(mode="json")


C = TypeVar("C", bound=pydantic.BaseModel)


def _fields(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that ``model`` knows at ``path`` (empty where it cannot be told)."""
    for step in path:
        fields = getattr(model, "model_fields", None)
        if fields is None or step not in fields:
            return []
        model = _model_of(fields[step].annotation)
    return list(getattr(model, "model_fields", {}) or {})


def _model_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_of(inner)
        if found is not None:
            return found
    return None


def parse(model: type[C], values: Any, where: str) -> C:
    """Validate ``values`` against ``model``.

    Args:
        model: the configuration class.
        values: what the file holds, a mapping of JSON types; None stands for an empty mapping.
        where: prefix of every message, such as ``"params.yaml: behavior"``.

    Raises:
        UserError: one line that names the key, the value and what was expected.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where} = {shown(values)}: expected a mapping of keys to values")
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(_message(model, error, where)) from None


def _message(model: type[pydantic.BaseModel], error: pydantic.ValidationError, where: str) -> str:
    details = error.errors()
    # a union reports one problem per member; the key is the same, so the expectations are joined
    first = details[0]
    location = tuple(part for part in first["loc"])
    key = join(where, location)
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; {suggest(location[-1], _fields(model, location[:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing, this key is required"
    same = [d for d in details if d["loc"][:1] == first["loc"][:1] and d["type"] != "extra_forbidden"]
    expected = " or ".join(dict.fromkeys(_expected(d) for d in same))
    if first["type"] == "value_error":
        value = f" = {shown(first['input'])}" if not isinstance(first["input"], dict) else ""
        return f"{key}{value}: {expected}"
    return f"{key} = {shown(first['input'])}: expected {shown(expected, 160, quote=False)}"


def join(where: str, location: tuple[int | str, ...]) -> str:
    """Return ``where`` extended by the keys of ``location``: ``"params.yaml: behavior" + ("sac", "tau")``."""
    keys = [
        shown(part, 60, quote=False)
        for part in location
        if not str(part).startswith(("constrained-", "function-", "literal["))
    ]
    if not keys:
        return where
    separator = " " if where.endswith(":") else "."
    return where + separator + ".".join(keys)


def _expected(detail: Any) -> str:
    if detail["type"] == "value_error":
        return shown(detail["ctx"]["error"], 200, quote=False)
    text = str(detail["msg"])
    for prefix in ("Input should be ", "Value error, "):
        text = text.removeprefix(prefix)
    return text
