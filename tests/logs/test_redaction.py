"""Redaction: what must be replaced, what must stay, and how long it takes."""

import random
import re
import string
import time

import pytest

from oel_jax.base.errors import UserError
from oel_jax.logs.redaction import Redactor, load_hook, luhn

REPLACED = {
    "email": """
        jane@example.org
        jane.doe+tag@mail.example.co.uk
        JANE_DOE%x@EXAMPLE.COM
        o-k@a-b.io
        1234@qq.com
        josé@correo.es
        用户@例子.公司
        jane (at) example (dot) org
        jane[at]example.org
        jane {at} mail [dot] example [dot] org
        a@b.museum
        root@sub.sub2.host.net
    """,
    "phone": """
        +1 555 123 4567
        +1 (555) 123-4567
        +15551234567
        +44 20 7946 0958
        +44 (0)20 7946 0958
        +49 30 123456
        +49-170-1234567
        +33 6 12 34 56 78
        +86 138 0013 8000
        +91 98765 43210
        +7 (495) 123-45-67
        +61.2.9374.4000
        0044 20 7946 0958
        (555) 123-4567
        555-123-4567
        555.123.4567
        555 123 4567
        1-800-555-0199
        1 (800) 555-0199
        020 7946 0958
        0170 1234567
        030/1234567
        06 12 34 56 78
        09012345678
        02 9374 4000
        0171-1234567
    """,
    "card": """
        4111111111111111
        4111 1111 1111 1111
        4111-1111-1111-1111
        5500 0000 0000 0004
        2223003122003222
        378282246310005
        3782 822463 10005
        6011111111111117
        30569309025904
        6304000000000000000
        3530111333300000
    """,
    "ip": """
        192.168.0.17
        8.8.8.8
        1.2.3.4
        203.0.113.254
        2001:db8::1
        2001:0db8:85a3:0000:0000:8a2e:0370:7334
        fe80::1ff:fe23:4567:890a
        2001:db8::
    """,
    "key": """
        sk-abcdefghijklmnop1234
        sk-proj-Abc123Def456Ghi789Jkl012
        sk-ant-api03-AbCdEf0123456789
        sk_live_4eC39HqLyjWDarjtT1zdp7dc
        ghp_16C7e42F292c6912E7710c838347Ae178B4a
        github_pat_11ABCDEFG0123456789_abcdefghijklmnop
        AKIAIOSFODNN7EXAMPLE
        AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY
        xoxb-1234567890-abcdefghijkl
        hf_abcdefghijklmnopqrstuvwxyz0123456789
        eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U
        wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzKEXAMPLE12k9
        9f86d081884c7d659a2feaa0c55ad015
        Zx8Kq2LmP9vT4nRw7YbC1dGhJ6sF3aQe
        glpat-AbCd1234EfGh5678
    """,
}
KEPT = """
    On 2024-01-31 at 12:30:45, then 31/01/2024, 31.01.2024 and 01-02-2024.
    2024-01-31T12:30:45.123456Z
    2024-01-31 12:30:45
    31.12.99
    05.11.2023 14:30
    It costs $1,234,567.89 or 1 234 567,89 € or 10.000.000 EUR.
    €12345678 and £1234567.00 and 12345678% and USD 1000000
    3.14159265358979 and 0.0000012345678 and 1e-10
    The years 1914-1918 and 1939-1945, pages 100-2000.
    ISBN 978-3-16-148410-0 and ISBN 0-306-40615-2 and ISBN 0306406152
    1700000000 and 1700000000000 are times.
    4111111111111112 is no card.
    1234567890 is a bare number.
    order 12345-67890
    v1.2.3.4 and version 10.0.19041.1 and Chrome/120.0.0.0 and numpy==1.26.4.0
    127.0.0.1 and 0.0.0.0 and 255.255.255.0 and ::1 and ::
    1.2.3 and 1.2.3.4.5 and 256.1.1.1 and 1.3.6.1.4.1.311
    std::vector<int> a::b and 12:30:45 and 00:1A:2B:3C:4D:5E
    550e8400-e29b-41d4-a716-446655440000
    sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    commit 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b
    md5: 9f86d081884c7d659a2feaa0c55ad015
    @jane said hi, @app.route("/x") and lodash@4.17.21 and icon@2x.png
    git@github.com:owner/repo.git
    getUserProfileByIdentifierAndNameFromDatabase2
    my-long-branch-name-2024-01-31-with-words
    https://github.com/Owner/Repository/blob/main/docs/getting_started_2024.md
    /usr/local/lib/python3.11/site-packages/transformers/models
    Donaudampfschifffahrtsgesellschaftskapitaen
    THE_LONGEST_CONSTANT_NAME_OF_ALL_VERSION_2
    your password: please choose one, the secret is simple, token count 12
    print(token) max_tokens=1024 tokens: 123456
    x = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
    5 1 3 4 5 6 7 8 2 3 4 5 6 7 8 9
    lat 52.5200066, lon 13.4049540
    ACGTACGTACGTACGTACGTACGTACGTACGTACGT
    ================================ and --------------------------------
    at (see above) and [attention] and {at}
    2 + 12 = 14 and 3*1000000 = 3000000
    10.1000/182 and arXiv:2305.12345
    """
ASSIGNED = ["password=hunter2!", 'api_key: "abc123def"', "Authorization: Bearer abc123def456",
            "SECRET_KEY='s3cr3tvalue'", "pwd: tr0ub4dor&3"]  # fmt: skip


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


ALL = [(kind, one) for kind, text in REPLACED.items() for one in lines(text)]


@pytest.mark.parametrize(("kind", "one"), ALL)
@pytest.mark.parametrize(
    "frame", ["{}", "My {} is here.", "({})", 'say "{}", ok', "x:\n{}\n", "为{}。"]
)
def test_replaced(kind, one, frame):
    if frame.startswith("为"):
        frame = "为 {} 。"  # \w borders: Chinese letters are letters
    text, counts = Redactor()(frame.format(one))
    assert text == frame.format(f"[{kind.upper()}]") and counts == {kind: 1}


@pytest.mark.parametrize("line", lines(KEPT))
def test_kept(line):
    assert Redactor()(line) == (line, {})


@pytest.mark.parametrize("line", ASSIGNED)
def test_assigned_secrets(line):
    text, counts = Redactor()(line)
    assert counts == {"key": 1} and "[KEY]" in text


@pytest.mark.parametrize("line", ["tel: 5551234567", "call me at 12345678", "Phone 7654321",
                                  "WhatsApp: 98765 43210", "fax no. 12-34-56-78"])  # fmt: skip
def test_a_word_makes_digits_a_number(line):
    text, counts = Redactor()(line)
    assert counts == {"phone": 1} and not re.search(r"\d", text)


def test_a_private_key_and_several_kinds():
    text = (
        "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef==\n-----END RSA PRIVATE KEY-----\n"
        "jane@example.org, joe@example.org, +44 20 7946 0958; 4111 1111 1111 1111 12/27 123"
    )
    new, counts = Redactor()(text)
    assert new == "[KEY]\n[EMAIL], [EMAIL], [PHONE]; [CARD] 12/27 123"
    assert counts == {"key": 1, "email": 2, "phone": 1, "card": 1}


def test_a_key_that_is_cut_off_is_replaced_to_the_end():
    assert Redactor()("x -----BEGIN PRIVATE KEY-----\nMIIE")[0] == "x [KEY]"


def test_redacting_again_changes_nothing():
    rng = random.Random(0)
    for _ in range(200):
        text = " ".join(rng.choice(ALL)[1] + rng.choice(["", ".", ",", "\n"]) for _ in range(6))
        once, _ = Redactor()(text)
        assert Redactor()(once) == (once, {})


def test_luhn_finds_every_single_wrong_digit():
    good = "4111111111111111"
    assert luhn(good)
    for at in range(16):
        for digit in string.digits.replace(good[at], ""):
            assert not luhn(good[:at] + digit + good[at + 1 :])


def test_random_cards_and_phones_of_any_shape():
    rng = random.Random(1)
    for _ in range(300):
        body = rng.choice("3456") + "".join(rng.choice(string.digits) for _ in range(14))
        digits = next(body + check for check in string.digits if luhn(body + check))
        gap = rng.choice(["", " ", "-", "\u00a0"])
        card = gap.join(digits[i : i + 4] for i in range(0, 16, 4))
        assert Redactor()(f"card {card}.")[0] == "card [CARD]."
        country = rng.choice(["1", "44", "49", "86", "971"])
        rest = "".join(rng.choice(string.digits) for _ in range(rng.randint(7, 10)))
        parts = [rest[:3], rest[3:6], rest[6:]]
        phone = f"+{country}{rng.choice(' -.')}" + rng.choice(" -.").join(p for p in parts if p)
        assert Redactor()(f"at {phone}, ok") == ("at [PHONE], ok", {"phone": 1}), phone


@pytest.mark.parametrize(
    "piece", ["a", "1", "1 ", "a.", "a@", "+", "(", "1.", ":", "0:", "-", "a1B", "[at]", "=", "sk-",
              "password=", "eyJ", "-----BEGIN PRIVATE KEY-----", "+1 ", "0 ", "\u00e9", "٣"]
)  # fmt: skip
def test_the_time_grows_with_the_text_alone(piece):
    """Twice and eight times a hostile text: far below the growth of a square."""
    redactor, taken = Redactor(), []
    for size in (25_000, 200_000):
        text = piece * (size // len(piece))
        best = min(_seconds(redactor, text) for _ in range(2))
        taken.append(max(best, 0.005))
    assert taken[1] < 24 * taken[0], taken


def _seconds(redactor, text):
    began = time.process_time()
    redactor(text)
    return time.process_time() - began


def test_other_digits():
    assert Redactor()("هاتف +٩٦٦ ٥٠ ١٢٣ ٤٥٦٧")[0] == "هاتف [PHONE]"


def test_a_hook(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def names(text):\n    return text.replace('Jane', '[NAME]')\nx = 1\n"
        "def bad(text):\n    return 1\ndef worse(text):\n    return 1 / 0\n"
    )
    redactor = Redactor(load_hook(f"{file}:names"))
    assert redactor("Jane, jane@example.org") == ("[NAME], [EMAIL]", {"own": 1, "email": 1})
    assert redactor("nobody") == ("nobody", {}) and dict(redactor.total) == {"own": 1, "email": 1}
    with pytest.raises(UserError, match="returned int"):
        Redactor(load_hook(f"{file}:bad"))("x")
    with pytest.raises(UserError, match=r"ZeroDivisionError.*mine\.py:7"):
        Redactor(load_hook(f"{file}:worse"))("x")
    for name in ("x", "missing.py:f", str(file), f"{file}:", f"{file}:x", f"{file}:none"):
        with pytest.raises(UserError, match="hook"):
            load_hook(name)
    file.write_text("1/0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_hook(f"{file}:names")
