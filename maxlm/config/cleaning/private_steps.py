"""Steps about what belongs to a person: addresses, numbers, keys."""

from __future__ import annotations

import enum

from maxlm.config.fields import NotNegative, config


class Treatment(enum.Enum):
    """What is done about personal data of one kind."""

    KEEP = "keep"
    """Nothing."""
    MASK = "mask"
    """Something else is written in its place."""
    DROP = "drop"
    """The document goes."""


class Masks(enum.Enum):
    """What is written in place of personal data."""

    TOKENS = "tokens"
    """The name of its kind: `<EMAIL>`, `<PHONE>`, `<IP>`, `<CARD>`, `<IBAN>`, `<ID_NUMBER>`, `<SECRET>`."""
    FINEWEB = "fineweb"
    """For e-mail and IP addresses what FineWeb has (arXiv:2406.17557; datatrove's `PIIFormatter`: two addresses at
    example.com and example.org, six IP addresses that nobody answered at), in turn; for all else, which it keeps, the
    name."""


@config("steps[].")
class PersonalData:
    """Mask personal data, or drop documents that have it. What is looked for stands in patterns, and where there is a
    checksum it must be right; names and postal addresses are not looked for."""

    email: Treatment = Treatment.MASK
    """Addresses of e-mail."""
    phone: Treatment = Treatment.MASK
    """Telephone numbers: with + and country code (E.164), of North America, of China (mobile and landline)."""
    ip: Treatment = Treatment.MASK
    """IPv4 and IPv6 addresses."""
    public_ips_alone: bool = True
    """Of IP addresses only those that the whole Internet can reach, as FineWeb does."""
    card: Treatment = Treatment.MASK
    """Numbers of payment cards: an issuer's first digits and Luhn's check digit (ISO/IEC 7812-1)."""
    iban: Treatment = Treatment.MASK
    """Numbers of bank accounts: the country's length and check digits (ISO 13616)."""
    id_number: Treatment = Treatment.MASK
    """Chinese identity numbers of 18 places: province, date of birth and check digit (GB 11643-1999)."""
    secret: Treatment = Treatment.MASK
    """Keys of AWS, GitHub, Slack, Google, Stripe and Hugging Face, private keys, random strings called a password."""
    most: NotNegative[int] = 0
    """How often a kind that drops may stand in a document that is kept."""
    masks: Masks = Masks.TOKENS
    """What is written."""
