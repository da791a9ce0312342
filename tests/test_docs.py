"""What the README and the pages in docs/ say is so: their commands, links, files and tests exist."""

import os
import re
import shlex

import config
import export
import infer
import latent_cache
import leaderboard
import prune
from conftest import ROOT


def pages():
    """{name: text} of the README and what stands in docs/."""
    names = ["README.md", *(os.path.join("docs", name) for name in sorted(os.listdir(os.path.join(ROOT, "docs"))))]
    texts = {}
    for name in filter(lambda name: name.endswith(".md"), names):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            texts[name] = file.read()
    return texts


def commands_in(text, script):
    """The arguments of each `script` in the code of a page, as lists of words; continued lines are joined."""
    code = "\n".join(block or words for block, words in re.findall(r"```bash\n(.*?)```|`([^`\n]+)`", text, re.S))
    for line in re.findall(rf"\b{re.escape(script)} ([^\n|&]*)", code.replace("\\\n", " ")):
        yield shlex.split(line.split("#")[0])


def test_the_pages_tell_what_there_is():
    """Each command of the README and of docs/ has settings and options that exist; presets and files too."""
    found = set()
    for page, text in pages().items():
        for words in commands_in(text, "train.py"):
            if "--help" not in words:  # a run's config.json, in a preset's place, is not here
                config.load_config([w for w in words if w != "..." and not w.endswith("/config.json")])
                found.add("train")
        for module in (export, infer, latent_cache, leaderboard, prune):
            for words in commands_in(text, f"{module.__name__}.py"):
                if words and words != ["..."]:
                    module.parse(words)
                    found.add(module.__name__)
        for name in re.findall(r"`(\w+\.(?:py|txt))`", text):
            assert os.path.exists(os.path.join(ROOT, name)), f"{name} is in {page} only"
    assert found == {"train", "export", "infer", "latent_cache", "leaderboard", "prune"}
    readme = pages()["README.md"]
    assert config.PRESETS.keys() <= set(re.findall(r"`(\w+)`", readme))
    with open(os.path.join(ROOT, ".ci", "run"), encoding="utf-8") as file:
        assert "README.md" in file.read() and "python -m pytest" in readme, "CI takes its test command from the README"


def test_no_link_of_the_pages_leads_nowhere():
    texts, links = pages(), 0
    for page, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
            assert os.path.exists(os.path.join(ROOT, path)), f"{page} links to {target}"
            if anchor:
                headings = [re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-")
                            for h in re.findall(r"^#+ (.*)$", texts[path], re.M)]
                assert anchor in headings, f"{page} links to {target}"
            links += 1
    assert links > 20
    reached = re.findall(r"\]\((docs/\w+\.md)\)", texts["README.md"])
    assert set(reached) >= {page for page in texts if page.startswith("docs")}, "the README leads to every page"


def test_files_that_work_alone_import_no_others():
    """Those of which the table in docs/extending.md says so, but for imports within functions."""
    names = {name.removesuffix(".py") for name in os.listdir(ROOT) if name.endswith(".py")}
    rows = [line.split(" | ") for line in pages()[os.path.join("docs", "extending.md")].splitlines()
            if line.endswith(" | yes |")]
    alone = [name for row in rows for name in re.findall(r"`(\w+)\.py`", row[1])]
    assert len(alone) > 15
    for name in alone:
        with open(os.path.join(ROOT, f"{name}.py"), encoding="utf-8") as file:
            wanted = re.findall(r"^(?:import|from) (\w+)", file.read(), re.M)
        assert not names & set(wanted), f"{name}.py imports {names & set(wanted)}"


def test_each_row_of_what_happens_when_names_tests_that_there_are():
    with open(os.path.join(ROOT, "docs", "faults.md"), encoding="utf-8") as file:
        rows = [line for line in file if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert len(rows) >= 30
    for row in rows:
        named = re.findall(r"`((?:tests/)?test_\w+\.py)::(test_\w+)`", row.split(" | ")[2])
        assert named, row
        for name, test in named:
            with open(os.path.join(ROOT, name), encoding="utf-8") as file:
                assert f"\ndef {test}(" in file.read(), f"{name}::{test}"
