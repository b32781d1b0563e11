"""docs/reliability.md: what it says of tests is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_claim_of_equality_names_a_test_that_exists() -> None:
    page = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows, file, num_named = page.split("## What is equal")[1].splitlines(), "", 0
    for row in (row for row in rows if row.startswith("| ") and not row.startswith("| result")):
        claim = row.split("|")[-2]
        file = (re.findall(r"`([\w/]+\.py)`", claim) or [file])[0]
        for name in re.findall(r"`(test_\w+)`", claim):
            assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), f"{file}: {name}"
            num_named += 1
        assert re.search(r"`test_\w+`", claim), row
    assert num_named > 20
