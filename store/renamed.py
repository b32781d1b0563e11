"""Old names of public things, so that what earlier versions wrote is read on: the only such table.

Each maps an old name to its present one. Tested on files that the commit before the renaming wrote.
"""

COLUMNS: dict[str, str] = {  # of manifests
}
RECIPE_KEYS: dict[str, str] = {  # of a run's config.toml, recipes and --set
}
RECIPE_VALUES: dict[str, dict[str, str]] = {  # present key -> old value -> present value
}
