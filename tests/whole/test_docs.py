"""Each `spec N.M` that the repository cites is a heading of docs/specification.md."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPECIFICATION = ROOT / "docs" / "specification.md"
PLACES = ("oel_jax", "configs", "tests", "benchmarks", "notebooks", "launch", "docs")
KINDS = {".py", ".md", ".ipynb", ".sh"}
NUMBER = r"\d+(?:\.\d+)?"
# "spec 8.3", "spec section 8", "spec 3.4 to 3.6", "spec 4.4, 6.1 and 10.5", "spec 3.3-3.7"
CITED = re.compile(rf"\bspec(?: section)? ({NUMBER}(?:(?:-|, | and | to ){NUMBER}(?![\w:]))*)")
ROW = re.compile(r"\b12, rows? (\d+)(?: and (\d+))?")
STEP = re.compile(rf"\bspec ({NUMBER}),? steps? (\d+)(?: to (\d+))?")


def files() -> list[Path]:
    found = [p for place in PLACES for p in (ROOT / place).rglob("*") if p.suffix in KINDS]
    found += ROOT.glob("*.md")
    return [p for p in found if p not in (SPECIFICATION, Path(__file__).resolve())]


def section(number: str) -> str:
    text = SPECIFICATION.read_text(encoding="utf-8")
    return re.split(rf"(?m)^#+ {re.escape(number)}\.? ", text)[1].partition("\n## ")[0]


def test_cited_sections_exist():
    text = SPECIFICATION.read_text(encoding="utf-8")
    headings = {h.rstrip(".") for h in re.findall(rf"(?m)^#+ ({NUMBER}\.?) ", text)}
    cited: dict[str, Path] = {}
    for path in files():
        for run in CITED.findall(path.read_text(encoding="utf-8")):
            cited |= {number: path for number in re.findall(NUMBER, run)}
    assert len(cited) > 30
    assert {n: p for n, p in cited.items() if n not in headings} == {}


def test_cited_rows_and_steps_exist():
    rows = set(re.findall(r"(?m)^\| (\d+) \|", section("12")))
    seen = 0
    for path in files():
        text = path.read_text(encoding="utf-8")
        for found in ROW.findall(text):
            seen += 1
            assert set(filter(None, found)) <= rows, path
        for number, *steps in STEP.findall(text):
            seen += 1
            known = set(re.findall(r"(?m)^(\d+)\. ", section(number).partition("\n### ")[0]))
            assert set(filter(None, steps)) <= known, path
    assert seen > 5


def test_the_readme_is_a_front_door():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text) <= 7_000
    assert [line for line in text.splitlines() if len(line) > 100] == []


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md"]
    pages += sorted((ROOT / "docs").rglob("*.md"))
    broken = []
    for page in pages:
        text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?m)^\[[^\]]+\]: (\S+)", text)
        for link in links:
            target, _, heading = link.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            file = page if not target else page.parent / target
            if not file.exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
            elif heading and file.suffix == ".md":
                titles = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
                names = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
                if heading not in names:
                    broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []
