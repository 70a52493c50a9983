"""Numbers that carry a check of themselves."""

from __future__ import annotations

_IBAN_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 "
    "FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 "
    "LU20 LV21 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 "
    "SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
)
IBAN_LENGTH = {entry[:2]: int(entry[2:]) for entry in _IBAN_LENGTHS.split()}
"""Country -> places of its numbers (ISO 13616, the registry)."""
_ISSUERS = (
    (4, 4, (16, 19)),  # Visa
    (51, 55, (16,)),  # Mastercard
    (2221, 2720, (16,)),
    (34, 34, (15,)),  # American Express
    (37, 37, (15,)),
    (6011, 6011, (16,)),  # Discover
    (644, 659, (16,)),
    (3528, 3589, (16,)),  # JCB
    (300, 305, (14,)),  # Diners Club
    (36, 36, (14,)),
    (38, 38, (14,)),
    (62, 62, (16, 19)),  # UnionPay
)


def is_card(digits: str) -> bool:
    """Whether an issuer's cards begin so and have so many digits, and the last is right (Luhn, US patent 2950048)."""
    if not any(
        first <= int(digits[: len(str(first))]) <= last and len(digits) in lengths for first, last, lengths in _ISSUERS
    ):
        return False
    values = [int(digit) for digit in reversed(digits)]
    return (sum(values[::2]) + sum(sum(divmod(2 * value, 10)) for value in values[1::2])) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether letters and digits without blanks are one: the rest by 97 is 1 (ISO/IEC 7064, MOD 97-10)."""
    if IBAN_LENGTH.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(letter, 36)) for letter in text[4:] + text[:4])) % 97 == 1


def is_id_number(text: str) -> bool:
    """Whether the last of 18 places is right (GB 11643-1999, which is ISO/IEC 7064, MOD 11-2)."""
    rest = sum(pow(2, 17 - i, 11) * int(digit) for i, digit in enumerate(text[:17])) % 11
    return text[17].upper() == "10X98765432"[rest]
