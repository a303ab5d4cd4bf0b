"""Prompt texts: bytes of Appendix A, assembly rules of spec 4.4, 6.1 and 8.1."""

import hashlib
import json
from pathlib import Path

import pytest

from oel_jax.base.errors import UserError
from oel_jax.data import prompts

TEMPLATES = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "templates.json").read_text()
)


@pytest.mark.parametrize(
    ("constant", "key", "sha256"),
    [
        ("GAME_V3", "textgame_v3",
         "6c59c0f5d331286c224bdbc821203f11f2a4873afb48c09c0b1b4df1e200ccf0"),
        ("GAME_V4", "textgame_v4",
         "7cd616d023194d5662c3a6a37831e75a7946c179c4492e2378670d9789e26f30"),
        ("MATH_V3", "math_v3", "53fed6efb6ae051d2d0b7df58ba3493c20b7b5cbe037fba219747d6dadc2e850"),
        ("MATH_V4", "math_v4", "7c89b65cbf45222800d49771e50e3bc280eba38a555ac2416ba52b7780b03c74"),
        ("MATH_SOLVE", "math_solve_template",
         "cff4c7f989ff4be02590ac109e8a4c660e971121ce70b49c60ef41b10b7d0763"),
        ("HEAD", "textgame_head_no_knowledge",
         "9bfd5956392dc0e4e9ee8db47fbbbbc5846c764056c1d53ef1cbe2f70f68dee7"),
        ("KNOWLEDGE_HEAD", "textgame_head_with_knowledge",
         "288b365f6312be0fa1e9fbaeaa4c49574553de685180d4927ef4ae80f4306f0e"),
        ("TAIL", "textgame_tail",
         "a12637f352291a908e848d037bd8d44bcea6b6f592c7385baa0c5061e6cb33e9"),
        ("NO_PREVIOUS", "no_previous",
         "5da66efe15fa97af0b8ecb20bfaaef0e1128ab0d3944270df41ba2839941da0b"),
    ],
)  # fmt: skip
def test_templates_are_byte_exact(constant, key, sha256):
    text = getattr(prompts, constant)
    assert text == TEMPLATES[key]
    assert hashlib.sha256(text.encode()).hexdigest() == sha256


def test_play_prompt_has_two_forms():
    plain = prompts.play_prompt("[GAME] board\n")
    assert plain == prompts.HEAD + "[GAME] board\n" + prompts.TAIL
    told = prompts.play_prompt("[GAME] board\n", "- EXPERIENCE ITEM: A")
    assert "learned:\n- EXPERIENCE ITEM: A\n\nCurrent situation:\n[GAME] board\n\n\nWhat" in told


def test_a_situation_that_quotes_the_head_keeps_its_quotation():
    assert prompts.play_prompt(prompts.HEAD + "x\n", "K").count(prompts.HEAD) == 1


def test_outside_text_is_never_interpreted():
    nasty = r"{experience} {0} {LATEST_EXPERIENCE} {PREVIOUS_EXPERIENCE} {prompt} \1 \g<0> { }"
    assert prompts.play_prompt("s\n", nasty).count(nasty) == 1
    assert prompts.play_prompt(nasty + "\n", "K").count(nasty) == 1
    for domain in ("game", "math"):
        for version in ("v3", "v4"):
            text = prompts.extraction_prompt(nasty, nasty, version=version, domain=domain)
            template = TEMPLATES[{"game": "textgame"}.get(domain, domain) + "_" + version]
            start, middle, end = (
                template.replace("{PREVIOUS_EXPERIENCE}", "{LATEST_EXPERIENCE}")
            ).split("{LATEST_EXPERIENCE}")
            assert text == start + nasty + middle + nasty + end
    assert prompts.math_prompt(nasty, nasty).count(nasty) == 2


def test_extraction_prompt_without_previous_knowledge():
    text = prompts.extraction_prompt("HISTORY", "", version="v3")
    assert "# Experience\nNo previous experience.\n\nYour task" in text
    assert "output):\nHISTORY\n\nHere" not in text and "(output)):\nHISTORY\n\nHere" in text


@pytest.mark.parametrize("version", ["v1", "v2", "v5", "4", ""])
def test_versions_without_a_template(version):
    with pytest.raises(UserError, match="extract.version"):
        prompts.extraction_prompt("h", "p", version=version)


def test_own_templates(tmp_path):
    path = tmp_path / "template.txt"
    path.write_bytes("é {PREVIOUS_EXPERIENCE}|{LATEST_EXPERIENCE}\r\n".encode())
    template = prompts.load_template(path)
    text = prompts.extraction_prompt("H", "P", version="v4", template=template)
    assert text == "é P|H\r\n"

    path.write_text("{LATEST_EXPERIENCE} {previous_experience}")
    with pytest.raises(UserError, match=r"template\.txt.*lacks \{PREVIOUS_EXPERIENCE\}"):
        prompts.load_template(path)
    with pytest.raises(UserError, match="lacks"):
        prompts.extraction_prompt("H", "P", version="v4", template="")
    path.write_bytes(b"\xff{LATEST_EXPERIENCE}{PREVIOUS_EXPERIENCE}")
    with pytest.raises(UserError, match="not UTF-8"):
        prompts.load_template(path)
    with pytest.raises(UserError, match="missing.txt cannot be read: No such file"):
        prompts.load_template(tmp_path / "missing.txt")


OUTCOME = "Summary:\nFinal Result: Failure\nFeedback: You fell.\nFinal Result: is quoted\n"


def test_history_and_its_outcome_modes():
    turns = [("[GAME] a", "<think>x"), ("\n[GAME] b", "[up]")]
    body = "\nRound0_Input: [GAME] a\n\nRound0_Output: <think>x"
    body += "\nRound1_Input: \n[GAME] b\n\nRound1_Output: [up]"
    assert prompts.extraction_history(turns, OUTCOME) == f"{body}\n\n\n{OUTCOME}\n"
    told = prompts.extraction_history(turns, OUTCOME, outcome_mode="text_only")
    assert told == body + ("\n\n\nSummary:\nFeedback: You fell.\nFinal Result: is quoted\n\n")
    assert prompts.extraction_history(turns, OUTCOME, outcome_mode="none") == body
    limit = "Environment terminated because the round limit is reached"
    for mode in ("full", "text_only"):
        text = prompts.extraction_history(turns, limit, outcome_mode=mode)
        assert text == f"{body}\n\n\n{limit}\n"
    with pytest.raises(UserError, match="extract.outcome"):
        prompts.extraction_history(turns, OUTCOME, outcome_mode="partial")


def test_mathematics():
    assert prompts.math_prompt("1+1?") == "1+1?"
    text = prompts.math_prompt("1+1?", "Count.")
    assert text.startswith("Given previous learned experience:\n# Experience\nCount.\n\nSolve")
    assert text.endswith("process:\n1+1?")
    assert prompts.math_history("q", "<think>t</think>a") == "Input: q\nOutput: <think>t</think>a"
    with pytest.raises(UserError, match="extract.domain"):
        prompts.extraction_prompt("h", "p", version="v3", domain="chess")
