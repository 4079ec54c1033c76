"""The pages of a large run in a real browser: how long they take, 100 decisions by keyboard alone, and axe's findings.

    python benchmarks/viewing.py FOLDER [--questions 10000] [--chromium /usr/bin/chromium] [--axe axe.min.js]

FOLDER keeps the run and the screenshots; begun again, the script goes on. Every question has chains of five models; one
label in twenty is contradicted by all of them. Prints how long the index takes; for each page the median of five loads;
the median and 95th percentile of the time from a key to the next item painted; and, with axe-core's file, what it finds
on each page, light and dark, wide and narrow. Every page is also opened in Chinese, and without JavaScript. Last, the
pages of a small run whose texts are hostile: scripts that ran, dialogs, and requests to anywhere else are counted.

Needs playwright (pip install playwright==1.65.2) and a Chromium.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from test_view import TOML, viewing

WORDS = (
    "Ann",
    "Bob",
    "Cleo",
    "Dan",
    "keeps",
    "lends",
    "owns",
    "box",
    "key",
    "lamp",
    "vase",
    "coat",
    "old",
    "red",
    "tall",
)
DECISIONS = 100
LOADS = 5
WAYS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1440, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1440, "height": 900}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
    "Chinese": {"locale": "zh-CN", "viewport": {"width": 1440, "height": 900}},
}
HOSTILE = (
    "<script>window.hacked = 1; alert(1)</script>",
    '<img src="http://127.0.0.1:9/x" onerror="window.hacked = 1">',
    "</pre></textarea></title></script><svg onload=window.hacked=1>",
    '<a href="javascript:window.hacked=1" autofocus onfocus="window.hacked=1">a</a> [a](javascript:alert(1))',
    '<iframe src="http://127.0.0.1:9/"></iframe><link rel="stylesheet" href="http://127.0.0.1:9/">',
    '<base href="//x.example/"><meta http-equiv="refresh" content="0; url=http://127.0.0.1:9/">',
    "\u202egpj.exe\u2066\u200b {{ 7 * 7 }} {% include 'base.html.j2' %} ' \" ` \x1b[31m",
    "\"><style>* { display: none }</style><form action='http://127.0.0.1:9/'><button>",
)
"""Texts that a question, an option, a chain, a model's name or a note may hold."""
LONG = 200_000
"""Characters of a chain."""
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Until what the page shows now is on the screen."""
WATCH = f"""
window.times = [];
let begun = 0;
addEventListener("keydown", () => {{ begun = performance.now(); }}, true);
addEventListener("DOMContentLoaded", () => new MutationObserver(async () => {{
  if (!begun) return;
  const since = begun;
  begun = 0;
  await ({PAINTED})();
  window.times.push(performance.now() - since);
}}).observe(document.querySelector("main"), {{ childList: true }}));
"""
"""Keeps how long after a key what the page shows was on the screen."""


def make(folder: Path, count: int) -> None:
    """The run, up to its samples."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "runs" / "run" / "samples" / "manifest.json").exists():
        return
    dice = random.Random(1)

    def text(words: int) -> str:
        return " ".join(dice.choices(WORDS, k=words))

    with (folder / "train.jsonl").open("w") as questions, (folder / "chains.jsonl").open("w") as chains:
        for number in range(count):
            name, is_contradicted = f"p{number:06}", number % 20 == 7
            asked = {"question": f"Who keeps it, {number}?", "options": ["Ann", "Bob", "Cleo", "Dan"], "answer": "A"}
            questions.write(json.dumps({"id": name, "problem": text(60), "questions": [asked]}) + "\n")
            for model in range(5):
                letter = "B" if is_contradicted else "A" if dice.random() < 0.9 else "C"
                row = {"id": f"{name}#0", "chain": f"{text(120)}.\nAnswer: {letter}", "model": f"model-{model}"}
                chains.write(json.dumps(row) + "\n")
    (folder / "reviewed.jsonl").touch()
    (folder / "run.toml").write_text(TOML.replace("[[rung]]", "validation = 0.01\n[[rung]]"))
    for stage in ("questions", "samples"):
        subprocess.run([sys.executable, "-m", "stepladder", stage, "run.toml"], cwd=folder, check=True)


def decide_by_keyboard(browser: Browser, address: str) -> list[float]:
    """Milliseconds from each key to the next item painted, as the browser sees them."""
    page = browser.new_context(**WAYS["light"]).new_page()
    page.add_init_script(WATCH)
    page.goto(address)
    page.goto(f"{address.partition('/?')[0]}/audit")
    for number in range(DECISIONS):
        page.wait_for_load_state("networkidle")
        page.keyboard.press("k" if number % 3 else "2")
        page.wait_for_function("number => window.times.length > number", arg=number)
    times: list[float] = page.evaluate("window.times")
    return times


def make_hostile(folder: Path) -> None:
    """A run whose every text is hostile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w") as questions, (folder / "chains.jsonl").open("w") as chains:
        for number, text in enumerate(HOSTILE):
            name = f"p{number}{text[:60]}"
            asked = {"question": f"Who? {text}", "options": [f"Ann {text}", "Bob"], "answer": "A"}
            questions.write(json.dumps({"id": name, "problem": text, "questions": [asked]}) + "\n")
            for model in HOSTILE[:3]:
                padding = text * (LONG // len(text)) if number == 0 else ""
                row = {"id": f"{name}#0", "chain": f"{text}{padding}\nAnswer: B", "model": f"m{model}"}
                chains.write(json.dumps(row) + "\n")
    (folder / "reviewed.jsonl").write_text("")
    (folder / "run.toml").write_text(TOML)
    for stage in ("questions", "samples"):
        subprocess.run([sys.executable, "-m", "stepladder", stage, "run.toml"], cwd=folder, check=True)


def visit_hostile(browser: Browser, address: str) -> None:
    """Open and use every page, as a reviewer would, and count what must not be."""
    base = address.partition("/?")[0]
    page = browser.new_context(**WAYS["light"]).new_page()
    dialogs, elsewhere, visited = list[str](), list[str](), 0
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda sent: None if sent.url.startswith(base) else elsewhere.append(sent.url))
    page.goto(address)
    ran = 0
    for number in range(len(HOSTILE)):
        page.goto(f"{base}/audit")
        if page.locator("form.decide").count():
            page.fill("[name=note]", HOSTILE[number])
            page.click("button[value=drop]")
        for path in ("/", "/audit", "/decisions", "/compare", "/questions?q=%3Cscript%3E"):
            page.goto(f"{base}{path}")
            visited += 1
            ran += bool(page.evaluate("() => window.hacked"))
        page.goto(f"{base}/questions")
        page.locator("[data-row] a").nth(number % max(1, page.locator("[data-row] a").count())).click()
        page.wait_for_load_state()
        page.goto(f"{page.url}&left=0&right=1")
        visited += 2
        ran += bool(page.evaluate("() => window.hacked"))
        scripted = (
            page.locator("a[href^='javascript']").count() + page.locator("main script, main iframe, main style").count()
        )
        ran += scripted
    print(f"{visited} pages of hostile texts: {ran} ran, {len(dialogs)} dialogs, {len(elsewhere)} requests elsewhere")


def look(page: Page, folder: Path, base: str, pages: dict[str, str], way: str, axe: str | None) -> None:
    """Open every page, keep a picture, and print what axe finds."""
    for name, path in pages.items():
        page.goto(f"{base}{path}")
        page.screenshot(path=folder / "screenshots" / f"{name}-{way}.png", full_page=False)
        if axe is not None:
            for violation in run_axe(page, axe):
                print(f"  {name}, {way}: {violation['id']}: {violation['help']} ({len(violation['nodes'])} times)")


def run_axe(page: Page, axe: str) -> list[dict[str, Any]]:
    """What axe-core finds; it is run outside the page's policy, which forbids scripts of others."""
    session = page.context.new_cdp_session(page)
    session.send("Page.setBypassCSP", {"enabled": True})
    page.reload()
    page.add_script_tag(content=axe)
    violations: list[dict[str, Any]] = page.evaluate("async () => (await axe.run()).violations")
    return violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--axe", type=Path, help="axe-core's axe.min.js")
    given = parser.parse_args()
    make(given.folder, given.questions)
    (given.folder / "reviewed.jsonl").write_text("")
    (given.folder / "screenshots").mkdir(exist_ok=True)
    axe = None if given.axe is None else given.axe.read_text(encoding="utf-8")
    pages = {
        "run": "/", "questions": "/questions", "search": "/questions?q=lamp+vase&model=model-1&verdict=wrong",
        "question": "/question?id=p000007%230&left=0&right=1", "audit": "/audit", "decisions": "/decisions",
        "compare": "/compare",
    }  # fmt: skip
    with viewing(given.folder) as (_, address), sync_playwright() as playwright:
        base = address.partition("/?")[0]
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        begun = time.perf_counter()
        page = browser.new_context(**WAYS["light"]).new_page()
        page.goto(address)
        page.goto(f"{base}/questions")
        print(f"first list of {given.questions:,} questions, index included: {time.perf_counter() - begun:.2f} s")
        for name, path in pages.items():
            times = []
            for _ in range(LOADS):
                begun = time.perf_counter()
                page.goto(f"{base}{path}")
                page.evaluate(PAINTED)
                times.append(1000 * (time.perf_counter() - begun))
            print(f"  {name}: {statistics.median(times):.0f} ms", flush=True)
        times = sorted(decide_by_keyboard(browser, address))
        kept = [json.loads(line)["id"] for line in (given.folder / "reviewed.jsonl").read_text().splitlines()]
        p95 = times[int(0.95 * len(times))]
        counts = f"{len(kept)} on disk, about {len({*kept})} questions"
        print(f"{len(times)} decisions by keyboard, {counts}: {statistics.median(times):.0f} ms to the next item")
        print(f"  painted, 95th percentile {p95:.0f} ms, longest {times[-1]:.0f} ms", flush=True)
        for way, settings in WAYS.items():
            page = browser.new_context(**settings).new_page()
            page.goto(address)
            look(page, given.folder, base, pages, way, axe)
        page = browser.new_context(java_script_enabled=False).new_page()
        page.goto(address)
        page.goto(f"{base}/audit")
        before = page.get_attribute("[data-item]", "data-item")
        page.click("button[value=drop]")
        after = page.get_attribute("[data-item]", "data-item")
        print(f"without JavaScript: {before} dropped, {after} is next", flush=True)
        make_hostile(given.folder / "hostile")
        with viewing(given.folder / "hostile") as (_, other):
            visit_hostile(browser, other)
        browser.close()


if __name__ == "__main__":
    main()
