"""Knowledge texts: reading them out of an extractor's answer, accumulating and truncating them.

A knowledge text is plain text. Template versions differ in what an item is (spec 6.2):

    v4, v1   a line that begins with the marker `- EXPERIENCE ITEM:`
    v2       a line that begins with `- `
    v3, v5   no items: the whole answer counts, and in truncation every line is one item

Lines end at "\\n" and nowhere else: other Unicode line separators are part of a line.
Nothing here imports JAX; token counts come in as a function.
"""

from collections.abc import Callable

from oel_jax.base.errors import UserError

MARKER = "- EXPERIENCE ITEM:"
NO_OP = "NO NEW EXPERIENCE"  # what the extractor is to answer with `extract.no_op`
NO_OP_SENTENCE = (  # ends its template then
    "If the interaction history teaches nothing beyond the previous experience, answer exactly: "
    + NO_OP
)
VERSIONS = ("v1", "v2", "v3", "v4", "v5")


def _check_version(version: str) -> None:
    if version not in VERSIONS:
        raise UserError(f"extract.version must be one of {', '.join(VERSIONS)}; got {version!r}")


def _starts_item(line: str, version: str, marker: str) -> bool:
    if version in ("v3", "v5"):
        return True
    return line.strip().startswith("- " if version == "v2" else marker)


def parse(text: str, version: str, marker: str = MARKER) -> str:
    """The knowledge in an answer (spec 6.2); '' when there is none.

    v4: every line that holds the marker is split at it; what comes before the first marker is
    lost, each non-blank rest becomes an item, and continuation lines are lost. v3: the stripped
    text.

    Raises UserError for an unknown version or an empty marker.
    """
    _check_version(version)
    if not marker.strip():
        raise UserError("extract.item_marker must not be blank")
    if version in ("v3", "v5"):
        return text.strip()
    lines = text.split("\n")
    if version == "v2":
        stripped = (line.strip() for line in lines)
        return "\n".join(line for line in stripped if line.startswith("- "))
    items = (piece for line in lines for piece in line.split(marker)[1:] if piece.strip())
    return "\n".join((marker + piece).rstrip() for piece in items).strip()


def _content(line: str, marker: str) -> str:
    """What an item says, up to case, white space and a final full stop."""
    words = " ".join(line.strip().removeprefix(marker).split())
    return words.casefold().removesuffix(".").rstrip()


def without_no_op(answer: str, parsed: str, marker: str = MARKER) -> tuple[str, bool]:
    """Leave out the items that say `NO_OP` and nothing else (`extract.no_op`).

    Args:
        answer: the whole answer after its thought. Structured versions find no item in an answer
            that consists of `NO_OP` alone.
        parsed: what `parse` found in it; each of its lines is an item.

    Returns:
        (the other items, '' if there are none; whether the extractor said that there is nothing
        new and wrote nothing else that counts).
    """
    nothing = NO_OP.casefold()
    lines = parsed.split("\n")
    others = [line for line in lines if _content(line, marker) != nothing]
    if len(others) == len(lines):
        return parsed, not parsed and _content(answer, marker) == nothing
    rest = "\n".join(others).strip()
    return rest, not rest


def deduplicate(knowledge: str, parsed: str, marker: str = MARKER) -> tuple[str, int]:
    """Leave out the items that the text, or `parsed` further up, already has.

    Two items are equal if they differ in case, white space and a final full stop at most. Each line
    is an item in all versions (a parsed structured text has no other lines); blank ones are none.

    Returns:
        (the new items, '' if there are none; how many were left out).
    """
    known = {_content(line, marker) for line in knowledge.split("\n")}
    kept, dropped = [], 0
    for line in parsed.split("\n"):
        content = _content(line, marker)
        if content and content in known:
            dropped += 1
            continue
        known.add(content)
        kept.append(line)
    return ("\n".join(kept).strip(), dropped) if dropped else (parsed, 0)


def append(knowledge: str, parsed: str) -> str:
    """Accumulated knowledge with `parsed` as its new last lines (spec 6.1, step 7)."""
    return f"{knowledge}\n{parsed}" if knowledge and parsed else knowledge or parsed


def truncate(
    knowledge: str,
    l_max: int,
    count: Callable[[str], int],
    version: str,
    keep: str = "tail",
    marker: str = MARKER,
) -> str:
    """Cut a knowledge text to at most `l_max` tokens at line borders (spec 6.3).

    A text that fits as a whole comes back unchanged. Otherwise keep='tail' keeps the newest lines:
    it walks back from the last line, stops at the first item start that overflows, skips
    overflowing continuation lines, and drops kept lines before the first item start. A last line
    that alone is longer than `l_max` therefore leaves the empty string. keep='head' keeps the
    oldest lines instead: all lines before the first one that overflows.

    Lines are counted one by one, each with its newline, so the result may be a little shorter than
    necessary.

    Args:
        count: number of tokens of a text, without special tokens.

    Raises:
        UserError: unknown version or keep, or an `l_max` that is not a positive integer.
    """
    _check_version(version)
    if keep not in ("tail", "head"):
        raise UserError(f"extract.truncate must be 'tail' or 'head'; got {keep!r}")
    if isinstance(l_max, bool) or not isinstance(l_max, int) or l_max < 1:
        raise UserError(f"extract.l_max must be a positive integer; got {l_max!r}")
    if count(knowledge) <= l_max:
        return knowledge
    lines = knowledge.split("\n")
    kept: list[str] = []
    used = 0
    for line in lines if keep == "head" else reversed(lines):
        cost = count(line + "\n")
        if used + cost <= l_max:
            kept.append(line)
            used += cost
        elif keep == "head" or not kept or _starts_item(line, version, marker):
            break
    if keep == "head":
        return "\n".join(kept)
    kept.reverse()
    starts = (i for i, line in enumerate(kept) if _starts_item(line, version, marker))
    return "\n".join(kept[next(starts, 0) :])
