"""What errors tell and hide, and the exit status of their classes."""

import pytest
from hub_helpers import TOKEN

from converter.errors import ConvertError, GateError, HubError, PlanError, UsageError
from converter.hub import redact

pytestmark = pytest.mark.usefixtures("impatient")  # which sets the token that is hidden


@pytest.mark.parametrize(
    "text",
    [
        "token hf_SeCrEtSeCrEt is wrong",
        "{'Authorization': 'Bearer SeCrEt.SeCrEt'}",
        "authorization: Bearer SeCrEtSeCrEt\nnext line",
        "curl -H 'authorization: SeCrEt SeCrEt'",
        "https://cdn/x?X-Amz-Signature=SeCrEt&X-Amz-Credential=SeCrEt&a=1",
        "https://cdn/x?Policy=SeCrEt&Signature=SeCrEt&Key-Pair-Id=SeCrEt",
        "http://user:SeCrEt@proxy:3128 refused",
    ],
)
def test_redact(text: str) -> None:
    assert "SeCrEt" not in redact(text)
    assert redact(redact(text)) == redact(text)


def test_redact_leaves_the_rest() -> None:
    assert redact("model hf_ok at https://x/y?revision=main") == (
        "model hf_ok at https://x/y?revision=main"
    )
    assert redact(f"the token {TOKEN[:3]}{TOKEN[3:]}.") == "the token ***."


def test_exit_codes() -> None:
    codes = {k: k.exit_code for k in (ConvertError, UsageError, PlanError, GateError, HubError)}
    assert list(codes.values()) == [1, 2, 3, 4, 5]
    error = PlanError(["one", "two"])
    assert (error.problems, str(error)) == (("one", "two"), "one\ntwo")
