"""Pictures of the chat page for the README: `python -m tests.bench.chat_page` (needs Debian's chromium).

In: the last bundle, or `--bundle`. Out: `docs/chat.png` (light) and `docs/chat-phone.png` (dark, on a phone), taken
while the embedded assistant answers a visitor's questions.
"""

import argparse
import shutil
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from mmllm_core.bundle import Bundle
from serve_apps.chat_page.page import PAGE_OPTIONS, build_chat_page
from serve_apps.config_files import load_serve_config
from serve_apps.in_process import serving_in_process

DOCS = Path(__file__).parents[2] / "docs"


def ask(page: Page, text: str, answers: int) -> None:
    """Ask, and wait for the whole answer."""
    box = page.get_by_role("textbox", name="Your message")
    box.fill(text)
    box.press("Enter")
    expect(page.get_by_text("first token after")).to_have_count(answers)


def take(browser: Browser, url: str, out: Path, width: int, scheme: str, questions: int) -> None:
    """Ask as a visitor does, and take the picture at the end."""
    page = browser.new_page(
        viewport={"width": width, "height": 820}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page.goto(url)
    page.get_by_text("what color is the shape?").click()
    expect(page.get_by_text("first token after")).to_have_count(1)
    if questions > 1:
        ask(page, "What is the capital of France?", 2)
    if questions > 2:
        page.get_by_role("button", name="New chat").click()
        page.get_by_text("Is this good advice?").click()
        expect(page.get_by_text("Heard:")).to_be_visible()
        expect(page.get_by_text("first token after")).to_have_count(1)
        page.get_by_role("button", name="what color is the shape?", exact=True).click()
        expect(page.get_by_text("first token after")).to_have_count(2)
    time.sleep(1)  # until the page has come to rest
    page.screenshot(path=out, animations="disabled")
    page.close()


def main() -> None:
    """Serve, ask, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path)
    given = parser.parse_args()
    bundle = Bundle.open(given.bundle) if given.bundle else Bundle.latest()
    expect.set_options(timeout=60_000)
    with (
        serving_in_process(bundle, load_serve_config("embedded", {"ui": False})) as api,
        sync_playwright() as playwright,
    ):
        page = build_chat_page(api, bundle.info.name)
        _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **PAGE_OPTIONS)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        take(browser, url, DOCS / "chat.png", 1280, "light", 3)
        take(browser, url, DOCS / "chat-phone.png", 390, "dark", 2)
        browser.close()
        page.close()


if __name__ == "__main__":
    main()
