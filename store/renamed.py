"""Old names of public things, so that what earlier versions wrote is still read: the only such table.

Each entry maps an old name to the present one. `store.manifest` applies the first three to files of this toolkit;
the recipe keys also count in recipes and --set.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

COLUMNS: dict[str, str] = {"weakest": "min_similarity_to_kept"}  # of manifests
PARAMETERS: dict[str, str] = {}  # of a command, in the provenance
FIGURES: dict[str, str] = {  # that a command measured, in the provenance
    "limit": "max_difference",
    "looked_at": "pairs_verified",
    "unread": "pairs_unreadable",
}
RECIPE_KEYS: dict[str, str] = {  # of a run's config.toml, recipes and --set
    "koleo_gather": "koleo_distributed",
    "recompute": "activation_checkpointing",
    "split_views": "sequential_views",
}
RECIPE_VALUES: dict[str, dict[str, str]] = {  # present key -> old value -> present value
    "activation_checkpointing": {"nothing": "none", "cheap": "selective", "blocks": "full"},
}

T = TypeVar("T")


def with_present_names(values: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """Return `values` under their present names; where a present name is there too, its own value counts."""
    moved = {names[name]: value for name, value in values.items() if name in names}
    return {**moved, **{name: value for name, value in values.items() if name not in names}}


def with_present_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe or a run under their present keys, with present values."""
    present = with_present_names(settings, RECIPE_KEYS)
    for key, values in RECIPE_VALUES.items():
        if isinstance(old := present.get(key), str):
            present[key] = values.get(old, old)
    return present
