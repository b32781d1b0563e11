"""JSON that others may have written."""

import json
from typing import Any


def json_object(text: str | bytes) -> dict[str, Any]:
    """Return the object that a text in JSON says. Raises ValueError where it says none, or nests too deep."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    return value
