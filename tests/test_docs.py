"""The documentation does what it says: the tutorial's snippets print what stands below them, links
lead somewhere, flags exist, and the Chinese tutorial runs the same code."""

import re
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, run

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TUTORIAL = ROOT / "docs/tutorial.md"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d*")


def blocks(page: Path, *languages: str) -> list[str]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for _, language, text in found if language in languages]


def test_tutorial_prints_what_it_shows():
    """All snippets in one process, in order. Other CPUs round decimals in another way."""
    snippets = SNIPPET.findall(TUTORIAL.read_text(encoding="utf-8"))
    assert len(snippets) == len(blocks(TUTORIAL, "python")), "a snippet without its output"
    mark = "end of a snippet"
    script = "".join(f"{code}\nprint({mark!r})\n" for code, _ in snippets)
    # Threads that wait for each other would take minutes on a busy machine.
    told = run(sys.executable, "-c", script, OMP_NUM_THREADS="1", PYTHONUTF8="1")
    *printed, _ = told.stdout.split(f"{mark}\n")
    for (code, shown), output in zip(snippets, printed, strict=True):
        assert NUMBER.sub("#", output.strip()) == NUMBER.sub("#", shown.strip()), code
        numbers = [float(number) for number in NUMBER.findall(output)]
        assert numbers == pytest.approx(
            [float(n) for n in NUMBER.findall(shown)], abs=0.05, rel=0.05
        )


@pytest.mark.parametrize("name", ["tutorial", "architecture", "data", "training", "scale"])
def test_both_languages_show_the_same_blocks(name):
    english, chinese = (
        FENCE.findall((ROOT / folder / f"{name}.md").read_text(encoding="utf-8"))
        for folder in ("docs", "docs/zh")
    )
    assert chinese == english


def test_commands_give_flags_that_exist():
    """Whatever stands behind one of our scripts in a bash block; other programs' flags aside."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in (".", "inference", "trainer", "scripts", "demo", "benchmarks")
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
    )
    known = set(re.findall(r"^ +(\w+): .*= \w*(?:flag|field)\(", sources, re.MULTILINE))
    known |= {name.replace("-", "_") for name in re.findall(r'"--([\w-]+)"', sources)} | {"config"}
    checked, unknown = 0, []
    for page in PAGES:
        for command in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            ours = re.search(r"(?<!\S)(?:[\w/]+\.py|-m (?!lmms_eval)[a-z]\w+\.\S+) (.*)", command)
            for name in re.findall(r"(?<!\S)--(?:no-)?([\w-]+)(?![\w.-])", ours[1] if ours else ""):
                checked += 1
                if name not in known:
                    unknown.append(f"{page.relative_to(ROOT)}: --{name} in {command}")
    assert not unknown
    assert checked > 50


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    for folder in (ROOT / "docs", ROOT / "docs/zh"):
        index = (folder / "README.md").read_text(encoding="utf-8")
        missing = [page.name for page in folder.glob("*.md") if f"({page.name})" not in index]
        assert missing == ["README.md"]
