"""Personal data: what is found and what only looks like it, checksums by another formula, masks, and huge lines."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config.cleaning.private_steps import Masks, PersonalData, Treatment
from maxlm.data.cleaning.check_digits import is_card, is_iban, is_id_number
from maxlm.data.cleaning.findings import Page, broken
from maxlm.data.cleaning.personal_data import PersonalDataMasker, PrivateKind, personal_data

FOUND = {
    PrivateKind.EMAIL: [
        "write to [jane.doe+x@mail.example.co.uk].",
        "<[bob_2@x-y.org]>",
        "[a@b.io], or not",
        "邮箱[zhang@163.com]或者",
        "mailto:[me@site.com]?subject=x",
        "?user=[me@site.com]&x=1",
    ],
    PrivateKind.PHONE: [
        "ring [+44 20 7946 0958] today",
        "[+1 (212) 555-1234]",
        "[+49 (0)30 901820]",
        "[(212) 555-1234]",
        "call [212-555-1234].",
        "[212.555.1234]/[212.555.9876]",
        "[1-800-555-1234]",
        "tel: [2125551234]",
        "Phone no. [212-555-1234]",
        "电话[13812345678]或",
        "[13812345678],[13987654321]",
        "手机: [15912345678], 3 pm",
        "[138-1234-5678] or [138 1234 5678]",
        "[+8613812345678], [0086-138-1234-5678]",
        "[010-62345678], [(010)62345678], [0755-26712345]",
    ],
    PrivateKind.IP: [
        "[93.184.216.34]/[93.184.216.35]",
        "from [108.28.8.8] to [93.184.216.34]:80",
        "http://[93.184.216.34]/x",
        "ping [2a00:1450:4001:81b::200e]: no answer",
        "[[2606:4700:4700::1111]]",
    ],
    PrivateKind.CARD: [
        "[4111 1111 1111 1111] exp 12/29",
        "[4111111111111111]",
        "[5500-0000-0000-0004]",
        "Amex [3400 000000 00009]",
        "[6011000000000004]",
    ],
    PrivateKind.IBAN: [
        "[DE89 3704 0044 0532 0130 00] BANK",
        "[GB82WEST12345698765432]",
        "IBAN:[FR1420041010050500013M02606].",
    ],
    PrivateKind.ID_NUMBER: ["[11010519491231002X]", "身份证[440524188001010014]。"],
    PrivateKind.SECRET: [
        "aws [AKIAIOSFODNN7EXAMPLE]",
        "token [ghp_" + "a1B2" * 9 + "]",
        "[github_pat_" + "a1B2_" * 13 + "]",
        "[xoxb-123456789012-abcdef]",
        "https://[hooks.slack.com/services/T12345678/B12345678/abcdefghijklmnop1234]",
        "[AIza" + "aB1_-" * 7 + "]",
        "[sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc]",
        "a\n[-----BEGIN RSA PRIVATE KEY-----\nMIIEow/+=\n-----END RSA PRIVATE KEY-----]\nb",
        "[-----BEGIN PRIVATE KEY-----\n" + "MIIE" * 16 + "\n" + "o0W+" * 16 + "]\nThe end is missing.",
        "password = '[x7Kq9PzL2mVbT4wR]'",
        'API_KEY: "[4f3c2b1a0d9e8f7a6b5c]"',
    ],
}
NOT_FOUND = [
    *(
        "version 93.184.216.34",
        "v93.184.216.34",
        "Chrome/93.184.216.34",
        "93.184.216.34.5",
        "1.2.3.4",
        "section 93.184.216.34",
        "firmware: 93.184.216.34",
    ),
    *(
        "192.168.1.11",
        "10.20.30.40",
        "127.100.100.1",
        "999.111.111.1",
        "093.184.216.34",
        "fe80::1",
        "::1",
        "2001:db8::1",
    ),
    *("2024-01-05 12:34:56", "12/31/1999", "20240105123456", "1700000000", "1700000000123", "1999-2005-2011"),
    *("ISBN 978-0-306-40615-7", "ISBN 0-306-40615-2", "9780306406157", "ISSN 212-555-1234"),
    *("10.1000/182.555.1234", "10.1038/s41586-020-2649-2", "doi:10.1145/3292500.3330701"),
    *("d41d8cd98f00b204e9800998ecf8427e", "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
    "550e8400-e29b-41d4-a716-446655440000",
    *("555-234-1234 = -913", "x = 2 * 212-555-1234", "1 + 123456789012", "3.14159265358979", "10^23 600000000000"),
    *(
        "4111111111111112",
        "4111 1111 1111 1112",
        "9111111111111111",
        "DE88370400440532013000",
        "ZZ82WEST12345698765432",
    ),
    *("110105194912310021", "110105194913310021", "123456789012345678"),
    *(
        "std::vector a::b face::book",
        "12:34:56:78",
        "@property",
        "git@github.com:me/x.git",
        "user@localhost",
        "a@b",
        "x@y.",
    ),
    *("7.4.7.1", "3.3.3.3", "8.8.8.18", "foo==13.0.0.0", "+2024-01-05 10:00", "+1.12345679"),
    *(
        "rng(17273783424)",
        "[19835652870, -5395297]",
        "12, 16802270373",
        "-16802270373",
        "14199869525/14102",
        "17643225600., ",
    ),
    *("tokens = Python3Lexer.tokens.copy", "token = self._code.get_token_from_utf8", "tokenizer=facebook/xglm-564M"),
    *("15000000000", "1234567890", "0.13812345678", "1,234,567,890", "212-155-1234", "112-555-1234", "$1 234 567 890"),
    *("password: hunter2", "token: next_page_token_value", "secret = get_secret_from_environment"),
    *("token = 1111111111111111a", "AKIA", "AKIAIOSFODNN7EXAMPLEX", "ghp_short", "task_live_x", ""),
]


def of_brackets(marked: str) -> tuple[str, list[str]]:
    """The text without its marks, and what they stood around."""
    marked = marked.replace("[[", "[").replace("]]", "]")
    return marked.replace("[", "").replace("]", ""), re.findall(r"\[([^]]*)\]", marked)


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.name)
def test_it_is_found_with_its_first_and_last_letter(kind: PrivateKind) -> None:
    for marked in FOUND[kind]:
        text, expected = of_brackets(marked)
        found = personal_data(text)
        assert [text[one.start : one.stop] for one in found] == expected, marked
        assert {one.kind for one in found} == {kind}, marked


def test_what_looks_like_it_is_left() -> None:
    assert {text: personal_data(text) for text in NOT_FOUND if personal_data(text)} == {}


def test_private_addresses_are_found_where_they_are_wanted() -> None:
    text = "10.20.30.40 and fd12:3456::1"
    assert not personal_data(text)
    assert [text[a:b] for a, b, _ in personal_data(text, public_ips_alone=False)] == ["10.20.30.40", "fd12:3456::1"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**11 - 1))
def test_exactly_one_digit_is_right_for_a_card(middle: int) -> None:
    """By the table of doubled digits instead of their sums."""
    doubled = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
    front = f"4111{middle:011d}"
    total = sum(doubled[int(d)] if i % 2 else int(d) for i, d in enumerate(reversed(front + "0")))
    assert [last for last in range(10) if is_card(f"{front}{last}")] == [-total % 10]


@settings(max_examples=30, deadline=None)
@given(st.text("0123456789ABCXYZ", min_size=18, max_size=18))
def test_check_digits_of_accounts_and_identity_numbers(account: str) -> None:
    """The sender's rules of ISO 7064, not the receiver's: 98 less the rest; a table of weights."""
    number = int("".join(str(int(letter, 36)) for letter in account + "GB00"))
    right = f"GB{98 - number % 97:02d}{account}"
    assert is_iban(right)
    alike = "0123456789" if right[-1].isdigit() else "ABCXYZ"
    assert [last for last in alike if is_iban(right[:-1] + last)] == [right[-1]]
    digits = [ord(letter) % 10 for letter in account[:17]]
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    last = "10X98765432"[sum(d * w for d, w in zip(digits, weights, strict=True)) % 11]
    front = "".join(map(str, digits))
    assert [place for place in "0123456789X" if is_id_number(front + place)] == [last]


MIXED = "a@b.io and c@d.io at 108.28.8.8, 212-555-1234 or 4111111111111111; AKIAIOSFODNN7EXAMPLE"


def test_masks_name_the_kind_and_are_counted() -> None:
    finding = PersonalDataMasker(PersonalData())(Page("x", MIXED))
    assert finding.text == "<EMAIL> and <EMAIL> at <IP>, <PHONE> or <CARD>; <SECRET>"
    assert finding.changes == {
        "secrets": 1, "e-mail addresses": 2, "payment cards": 1, "IP addresses": 1, "phone numbers": 1,
    }  # fmt: skip


def test_fineweb_s_masks_are_its_addresses_in_turn() -> None:
    config = PersonalData(masks=Masks.FINEWEB, phone=Treatment.KEEP, card=Treatment.KEEP, secret=Treatment.KEEP)
    finding = PersonalDataMasker(config)(Page("x", MIXED))
    assert finding.text is not None and finding.text.startswith(
        "email@example.com and firstname.lastname@example.org at 22.214.171.124, 212-555-1234 or 4111111111111111;"
    )


@pytest.mark.parametrize("masks", Masks)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([of_brackets(text)[0] for texts in FOUND.values() for text in texts] + NOT_FOUND)))
def test_masking_twice_is_masking_once(masks: Masks, texts: list[str]) -> None:
    step = PersonalDataMasker(PersonalData(masks=masks))
    text = "\n".join(texts)
    once = step(Page("x", text)).text
    assert once is None or step(Page("x", once)).text is None


def test_what_is_kept_hides_nothing_that_overlaps() -> None:
    text = "password: x7Kq9PzL2mVbT4wR@mail.example.com"
    assert PersonalDataMasker(PersonalData())(Page("x", text)).text == "password: <SECRET>@mail.example.com"
    step = PersonalDataMasker(PersonalData(secret=Treatment.KEEP))
    assert step(Page("x", text)).text == "password: <EMAIL>"


def test_a_kind_that_drops_may_occur_so_often_and_no_more() -> None:
    config = PersonalData(email=Treatment.DROP, most=2)
    step = PersonalDataMasker(config)
    for n, kept in ((1, True), (2, True), (3, False)):
        finding = step(Page("x", "me@site.org, " * n))
        assert (broken(step.limits, finding) is None) == kept
        assert finding.values == (n,)
        assert finding.text is None


def test_what_only_drops_or_keeps_changes_no_text() -> None:
    kinds = [field.name for field in dataclasses.fields(PersonalData) if isinstance(field.default, Treatment)]
    for treatment in (Treatment.DROP, Treatment.KEEP):
        step = PersonalDataMasker(PersonalData(**dict.fromkeys(kinds, treatment)))
        for text in (MIXED, "", "a"):
            assert step(Page("x", text)).text is None
        assert len(step.limits) == (len(PrivateKind) if treatment is Treatment.DROP else 0)


@pytest.mark.parametrize(
    "piece",
    ["1", "a@", "1 ", "+1", "(0", "AB12", "password=", "-----BEGIN PRIVATE KEY-----", "a.", "2001:", "1-", "a@a."],
)
def test_a_line_of_a_million_takes_no_time_that_grows_like_its_square(piece: str) -> None:
    """It would be hours; with 20 MB each of them takes seconds."""
    text = piece * (1_000_000 // len(piece))
    assert all(one.stop - one.start < 25_000 for one in personal_data(text))
