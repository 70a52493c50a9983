"""What belongs to a person, found and masked: addresses, numbers, keys.

Numbers are looked for only in stretches of at least seven digits and what stands between digits, and every pattern has
a longest match: no text takes more than a time that grows like its length.
"""

from __future__ import annotations

import enum
import ipaddress
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from maxlm.config.cleaning.private_steps import Masks, PersonalData, Treatment
from maxlm.data.cleaning.check_digits import IBAN_LENGTH, is_card, is_iban, is_id_number
from maxlm.data.cleaning.findings import Finding, Limit, Page, measured
from maxlm.data.cleaning.secrets_found import secrets_of


class PrivateKind(enum.Enum):
    """Of personal data; its value is the rule in the report. Of two that overlap, the one that begins first counts,
    and then the one that stands first here."""

    SECRET = "secrets"
    EMAIL = "e-mail addresses"
    IBAN = "bank accounts"
    ID_NUMBER = "identity numbers"
    CARD = "payment cards"
    IP = "IP addresses"
    PHONE = "phone numbers"


_RANK = {kind: rank for rank, kind in enumerate(PrivateKind)}


class Private(NamedTuple):
    """Where something personal stands: from `start` up to `stop`."""

    start: int
    stop: int
    kind: PrivateKind


_EMAIL = re.compile(
    r"(?<![0-9A-Za-z._%+/-])[0-9A-Za-z](?:[0-9A-Za-z._%+-]{0,62}[0-9A-Za-z_+-])?@"
    r"(?:[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?\.){1,8}[A-Za-z]{2,24}(?![0-9A-Za-z-]|:[A-Za-z~])"
)
"""With letters after a colon it is where git copies from: `git@github.com:me/x`."""
_STRETCH = re.compile(r"[0-9+(][0-9 ().+\-]{6,}+")
_AFTER = 4  # what patterns look at beyond a stretch: the X of an identity number, and what may not follow
_NUMBER = re.compile(
    r"(?<![0-9A-Za-z_.])(?<![0-9A-Za-z]-)(?:"
    r"(?P<ID_NUMBER>[1-9]\d{5}(?:18|19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx])"
    r"|(?P<IP>(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d))"
    r"|(?P<CARD>\d{14,19}|\d{4}(?P<gap>[ -])\d{4}(?P=gap)\d{4}(?P=gap)\d{1,7}"
    r"|3[0-8]\d\d(?P<gap2>[ -])\d{6}(?P=gap2)\d{4,5})"
    r"|(?P<PLUS>\+[1-9]\d{0,3}(?:[ .-]?\(\d{1,5}\)|[ .-]?\d){6,14})"
    r"|(?P<CHINA>(?:(?:00)?86[ -]?)?1[3-9]\d(?P<gap3>[ -]?)\d{4}(?P=gap3)\d{4}"
    r"|(?:\(0(?:10|2\d|[3-9]\d\d)\) ?|0(?:10|2\d|[3-9]\d\d)-)[2-8]\d{6,7})"
    r"|(?P<AMERICA>(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}|[2-9]\d\d(?P<gap4>[.-])[2-9]\d\d(?P=gap4)\d{4}))"
    r"|(?P<CALLED>1?[ .-]?[2-9]\d\d ?[2-9]\d\d ?\d{4})"
    r")(?![0-9A-Za-z_]|[.-]\d)",
    re.ASCII,
)
_IPV6 = re.compile(
    r"(?<![\w:.])(?:[23][0-9a-f]{3}|f[cd][0-9a-f]{2}|fe[89ab][0-9a-f])(?::[0-9a-f]{0,4}){2,7}(?<=[0-9a-f])(?!\w|:[0-9a-f])",
    re.ASCII | re.IGNORECASE,
)
_IBAN = re.compile(r"[A-Z]{2}(?<![0-9A-Za-z]..)[0-9]{2} ?[0-9A-Z]{4}")
_IBAN_OF_LENGTH = {
    length: re.compile(rf"(?:[0-9A-Z] ?){{{length - 1}}}[0-9A-Z](?![0-9A-Za-z])")
    for length in sorted({*IBAN_LENGTH.values()})
}
_VERSION = re.compile(
    r"(?:\b(?:version|versions|ver|release|build|firmware|section|chapter|v|r|rev|revision|table|figure|oid)"
    r"|[A-Za-z_]/|版本|第|§)[\s.:=_-]{0,3}$",
    re.IGNORECASE | re.ASCII,
)
"""Before what looks like an IP address: `Chrome/10.0.0.1`, `v1.2.3.4`."""
_CALLED = re.compile(
    r"(?:(?<!<)\b(?:tel|phone|telephone|mobile|cell|call|fax|whatsapp|text)|电话|手机|热线)\W{0,4}$", re.IGNORECASE
)
"""Before ten digits of which nothing else says that they are a telephone number."""
_CODED = re.compile(
    r"(?:\b(?:isbn(?:-1[03])?|issn|doi|arxiv|pmid|sku|version|v)[\s.:]{0,2}|#|[A-Za-z]/|10\.\d{4,9}/|[\d\s)>][=*^+]\s?)$",
    re.IGNORECASE | re.ASCII,
)
"""Before what looks like a telephone number: names of other numbers, and arithmetic."""
_SUM = re.compile(r"[ \t]{0,2}(?:[=*^]|\+[ \t])")  # 555-234-1234 = ...
_BEFORE_LIST = re.compile(r"(?:(?:^|\D)\d{1,10}\.?[,/ ]{1,2}|[A-Za-z_]\(|(?:^|[\s\[(,])-)$", re.ASCII)
_AFTER_LIST = re.compile(r"\.?[,/ ]{1,2}-?(?!1[3-9]\d{9}(?!\d))\d{4}|\.[,\s]?\d|\.,", re.ASCII)
"""Around eleven digits without a gap: other numbers, a sign, a function's name, of tables and programs."""
_DATE = re.compile(r"\+\d{4}-\d\d-\d\d")
_LEAST_DIGITS = 7
"""Of an IPv4 address: 7.4.7.1 and 2.4.8.19 are sections and versions. One address in 700 has fewer digits."""
_AROUND = 16
_FINEWEB = {
    PrivateKind.EMAIL: ("email@example.com", "firstname.lastname@example.org"),
    PrivateKind.IP: (
        "22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206", "220.127.116.11", "18.104.22.168",
    ),
}  # fmt: skip
_WRITTEN = frozenset(itertools.chain(*_FINEWEB.values()))
"""What stands for an address is none: masking twice changes nothing."""


def personal_data(
    text: str, kinds: Collection[PrivateKind] = tuple(PrivateKind), *, public_ips_alone: bool = True
) -> list[Private]:
    """All that is found of these kinds, in order, without overlaps."""
    found = [Private(*span, PrivateKind.SECRET) for span in secrets_of(text)] if PrivateKind.SECRET in kinds else []
    if PrivateKind.EMAIL in kinds and "@" in text:
        found += [Private(*one.span(), PrivateKind.EMAIL) for one in _EMAIL.finditer(text) if one[0] not in _WRITTEN]
    found += _ibans(text)
    found += _numbers(text, public_ips_alone)
    if text.count(":") >= 2:
        found += [
            Private(*one.span(), PrivateKind.IP)
            for one in _IPV6.finditer(text)
            if _is_address(one[0], public_ips_alone)
        ]
    kept, end = [], 0
    for one in sorted(found, key=lambda one: (one.start, _RANK[one.kind])):
        if one.kind in kinds and one.start >= end:
            kept.append(one)
            end = one.stop
    return kept


def _ibans(text: str) -> Iterator[Private]:
    for start in _IBAN.finditer(text):
        length = IBAN_LENGTH.get(start[0][:2])
        one = length and _IBAN_OF_LENGTH[length].match(text, start.start())
        if one and is_iban(one[0].replace(" ", "")):
            yield Private(*one.span(), PrivateKind.IBAN)


def _numbers(text: str, public_ips_alone: bool) -> Iterator[Private]:
    for stretch in _STRETCH.finditer(text):
        for one in _NUMBER.finditer(text, stretch.start(), stretch.end() + _AFTER):
            before = text[max(0, one.start() - _AROUND) : one.start()]
            kind = _kind(one, before, text[one.end() : one.end() + _AROUND], public_ips_alone)
            if kind is not None:
                yield Private(*one.span(), kind)


def _kind(one: re.Match[str], before: str, after: str, public_ips_alone: bool) -> PrivateKind | None:
    """What a number is; None: nothing personal."""
    value = one[0]
    match one.lastgroup:
        case "ID_NUMBER" if is_id_number(value):
            return PrivateKind.ID_NUMBER
        case "ID_NUMBER" | "CARD":
            return PrivateKind.CARD if value[-1].isdigit() and is_card(re.sub("[ -]", "", value)) else None
        case "IP":
            if value in _WRITTEN or len(value) < _LEAST_DIGITS + 3 or _VERSION.search(before):
                return None
            return PrivateKind.IP if _is_address(value, public_ips_alone) else None
        case "PLUS":
            digits = sum(map(str.isdigit, value))
            return PrivateKind.PHONE if 9 <= digits <= 15 and value.count(".") != 1 and not _DATE.match(value) else None
        case "CALLED":
            return PrivateKind.PHONE if _CALLED.search(before) else None
        case "CHINA" if len(value) == 11 and (_BEFORE_LIST.search(before) or _AFTER_LIST.match(after)):
            return None
        case _:
            other = _CODED.search(before) or _SUM.match(after) or value.endswith("000000")  # a round sum of money
            return None if other else PrivateKind.PHONE


def _is_address(value: str, public_alone: bool) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    return not public_alone or address.is_global


class PersonalDataMasker:
    """See `PersonalData`."""

    def __init__(self, config: PersonalData) -> None:
        self._config = config
        self._treatment = {kind: getattr(config, kind.name.lower()) for kind in PrivateKind}
        self._kinds = tuple(kind for kind in PrivateKind if self._treatment[kind] is not Treatment.KEEP)
        self._dropping = tuple(kind for kind in PrivateKind if self._treatment[kind] is Treatment.DROP)
        self.limits = tuple(Limit(kind.value, most=config.most, unit="occurrences") for kind in self._dropping)
        tokens = {kind: (f"<{kind.name}>",) for kind in PrivateKind}
        self._masks = tokens | _FINEWEB if config.masks is Masks.FINEWEB else tokens

    def __call__(self, page: Page) -> Finding:
        found = personal_data(page.text, self._kinds, public_ips_alone=self._config.public_ips_alone)
        counts = Counter(one.kind for one in found)
        values = measured(self.limits, (float(counts[kind]) for kind in self._dropping))
        masked = [one for one in found if self._treatment[one.kind] is Treatment.MASK]
        if not masked:
            return Finding(values)
        masks = {kind: itertools.cycle(words) for kind, words in self._masks.items()}
        pieces, at = [], 0
        for one in masked:
            pieces += [page.text[at : one.start], next(masks[one.kind])]
            at = one.stop
        written = Counter(one.kind for one in masked)
        changes = {kind.value: written[kind] for kind in PrivateKind if written[kind]}
        return Finding(values, text="".join([*pieces, page.text[at:]]), changes=changes)
