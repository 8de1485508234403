"""The limits of a gate are read strictly, and a mistake is named with its remedy."""

from __future__ import annotations

import pytest

from echo_ft.errors import EchoError
from echo_ft.gate.limits import parse_limits


def test_limits_are_read_in_any_order() -> None:
    assert list(parse_limits("escapes <= 0.02,false_alarms<=1e-2").items()) == [
        ("false_alarms", 0.01),
        ("escapes", 0.02),
    ]
    assert parse_limits(" false_alarms<=0.05 ") == {"false_alarms": 0.05}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' has no '<='; write --gate \"false_alarms<=0.01, escapes<=0.02\""),
        ("false_alarms<0.01", "'false_alarms<0.01' has no '<='; write --gate"),
        ("escapes>=0.9", "'escapes>=0.9' has no '<='"),
        ("false_alarms=0.01", "'false_alarms=0.01' has no '<='"),
        (
            "false_alarms<=0.01;escapes<=0.02",
            "the limit for false_alarms is '0.01;escapes<=0.02', which is not a number",
        ),
        ("false_alarms<=0.01,", "'' has no '<='"),
        ("escape<=0.01", "there is no limit for 'escape'; did you mean 'escapes'"),
        ("false alarms<=0.01", "there is no limit for 'false alarms'; did you mean 'false_alarms'"),
        ("False-Alarms<=0.01", "did you mean 'false_alarms'"),
        ("recall<=0.9", "there is no limit for 'recall'; use false_alarms or escapes"),
        ("<=0.9", "there is no limit for ''; use false_alarms or escapes"),
        ("escapes<=0.1, escapes<=0.2", "escapes has two limits; give one"),
        ("escapes<=2%", "the limit for escapes is '2%', which is not a number; write 1% as 0.01"),
        ("escapes<=", "the limit for escapes is '', which is not a number; write --gate"),
        ("escapes<=<=0.1", "the limit for escapes is '<=0.1', which is not a number"),
        ("escapes<=0", "no number of parts can show that escapes never occur; give a limit above 0"),
        ("escapes<=1e-320", "no run has enough parts to show that escapes are below 9.99989e-321; give a larger limit"),
        ("escapes<=1", "the limit for escapes is 1; give a fraction between 0 and 1, such as 0.01 for 1%"),
        ("escapes<=5", "the limit for escapes is 5; give a fraction between 0 and 1"),
        ("escapes<=-0.1", "the limit for escapes is -0.1; give a fraction between 0 and 1"),
        ("escapes<=nan", "the limit for escapes is nan; give a fraction between 0 and 1"),
        ("escapes<=inf", "the limit for escapes is inf; give a fraction between 0 and 1"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(text: str, message: str) -> None:
    with pytest.raises(EchoError) as raised:
        parse_limits(text)
    assert str(raised.value).startswith("--gate: ")
    assert message in str(raised.value)
