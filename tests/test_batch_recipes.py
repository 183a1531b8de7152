"""Recipes as the ledger stores them."""

import pytest

from converter.batch.recipes import Asked
from converter.errors import UsageError
from converter.plan import Options

FOUR = {"mode": "affine", "bits": 4, "group_size": 64, "method": "rtn"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"allocation": {"x": 1}}, "allocation"),
        ({"target_size": {"x": 1}}, "target_size"),
        ({"dtype": "float16", "q_new": 1}, "q_new"),
        ({"quantization": {**FOUR, "levels": 3}}, "quantization"),
    ],
)
def test_a_stored_recipe_is_made_as_a_whole_or_not_at_all(change, said):
    stored = Asked(options=Options(dtype="bfloat16")).to_json()
    with pytest.raises(UsageError, match=f"ledger has {said} as this version"):
        Asked.from_json(stored | change)
