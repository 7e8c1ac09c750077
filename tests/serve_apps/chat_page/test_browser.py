"""The chat page in a real browser, before a real service: what a visitor does, and what is on the screen then."""

import base64
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.serve_apps.conftest import Service, image_uri, wav

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
WAIT_MS = 60_000
GRAVE = ("serious", "critical")
PACE = "first word after"
SAID = "something, never do it for free"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, speech: bytes) -> Path:
    """The speech as a wav file, which is what Chromium plays to its microphone."""
    from faster_whisper.audio import decode_audio

    path = tmp_path_factory.mktemp("sound") / "said.wav"
    path.write_bytes(wav(decode_audio(io.BytesIO(speech))))
    return path


@pytest.fixture(scope="module")
def browser(recording: Path) -> Iterator[Browser]:
    """A browser that hears the recording at its microphone."""
    options = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*options, f"--use-file-for-fake-audio-capture={recording}"]
        )
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A visitor of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 820}, permissions=["microphone"])
    context.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    yield context
    context.close()


Shoot = Callable[[Page, str], None]


@pytest.fixture
def shoot(tmp_path: Path) -> Shoot:
    """Take a screenshot into the folder MMLLM_TEST_SCREENSHOTS, or the test's own."""
    folder = Path(os.environ.get("MMLLM_TEST_SCREENSHOTS", tmp_path))

    def take(page: Page, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png", animations="disabled")

    return take


def visit(context: BrowserContext, service: Service, most: int | None = 8) -> Page:
    """Open the page, with a bound on the length of answers."""
    page = context.new_page()
    page.goto(service.base_url)
    box(page).wait_for()
    if most:
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Tokens at most").fill(str(most))
        page.get_by_label("Tokens at most").blur()
        page.get_by_role("button", name="Settings").click()
    return page


def box(page: Page) -> Any:
    return page.get_by_role("textbox", name="Your message")


def ask(page: Page, text: str, answers: int = 1) -> None:
    """Type, send, and wait until so many answers are complete."""
    box(page).fill(text)
    box(page).press("Enter")
    expect(page.get_by_text(PACE)).to_have_count(answers)
    expect(box(page)).to_be_enabled()


def drop(page: Page, name: str, kind: str, content: bytes) -> None:
    """Drag a file onto the box and let go."""
    transfer = page.evaluate_handle(
        """([name, type, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, {type}));
            return transfer;
        }""",
        [name, kind, list(content)],
    )
    box(page).dispatch_event("drop", {"dataTransfer": transfer})


def bubbles(page: Page, role: str) -> Any:
    return page.locator(f"[data-testid={role}]")


def running(service: Service) -> int:
    """Answers that the engine is at."""
    from ray import serve

    def ask_engine() -> int:
        return int(serve.get_deployment_handle("PhiGenerator", service.app_name).load.remote().result().running)

    with ThreadPoolExecutor(1) as beside:  # Playwright keeps an event loop in this thread, where Ray refuses to wait
        return beside.submit(ask_engine).result()


def until(happens: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_pictures_are_dropped_and_a_reload_shows_them_again(
    context: BrowserContext, service: Service, shoot: Shoot
) -> None:
    page = visit(context, service)
    drop(page, "red.png", "image/png", base64.b64decode(image_uri().partition(",")[2]))
    page.locator("#message .thumbnail-item").first.wait_for()
    ask(page, "What is this?")
    expect(bubbles(page, "user").locator("img")).to_have_count(1)
    shoot(page, "picture")
    page.reload()
    expect(bubbles(page, "user").locator("img")).to_have_count(1)
    assert bubbles(page, "user").locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)")
    ask(page, "And now?", answers=2)
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_text(PACE)).to_have_count(0)
    page.locator(".sidebar td").first.click()
    expect(page.get_by_text(PACE)).to_have_count(2)


def test_an_answer_is_made_again_and_a_question_edited(context: BrowserContext, service: Service) -> None:
    page = visit(context, service)
    ask(page, "One?")
    ask(page, "Two?", answers=2)
    page.get_by_role("button", name="Retry").last.click()
    expect(box(page)).to_be_disabled()
    expect(box(page)).to_be_enabled()
    expect(page.get_by_text(PACE)).to_have_count(2)
    page.get_by_role("button", name="Edit").first.click()
    page.locator("textarea").filter(visible=True).first.fill("Three?")
    page.get_by_title("Submit").click()
    expect(page.get_by_text("Three?").first).to_be_visible()
    expect(page.get_by_text(PACE)).to_have_count(1)
    expect(page.get_by_text("Two?", exact=True)).to_have_count(0)


@pytest.mark.parametrize("leave", ["stop", "close"])
def test_who_stops_or_leaves_frees_the_engine(context: BrowserContext, service: Service, leave: str) -> None:
    page = visit(context, service, most=None)
    until(lambda: running(service) == 0, "the engine is busy before the test")
    box(page).fill("Tell me a very long story")
    box(page).press("Enter")
    until(lambda: running(service) == 1, "no answer was begun")
    if leave == "stop":
        page.get_by_role("button", name="Stop").click()
    else:
        page.close()
    until(lambda: running(service) == 0, "the engine goes on")
    if leave == "stop":
        expect(box(page)).to_be_enabled()


def test_what_the_service_refuses_is_said_as_it_says_it_and_nothing_is_lost(
    context: BrowserContext, service: Service, shoot: Shoot
) -> None:
    page = visit(context, service)
    long = "word " * 5_000
    box(page).fill(long)
    box(page).press("Enter")
    expect(page.get_by_text("The assistant could not answer:")).to_contain_text("tokens")
    expect(bubbles(page, "user")).to_contain_text("word word")
    shoot(page, "refused")


def test_a_recording_is_uploaded_and_what_was_heard_is_shown(
    context: BrowserContext, service: Service, recording: Path
) -> None:
    page = visit(context, service)
    page.locator("#message input[type=file]").first.set_input_files(recording)
    page.locator("#message .thumbnail-item").first.wait_for()
    ask(page, "Who?")
    expect(page.get_by_text("Heard:")).to_contain_text(SAID)


def test_words_appear_while_one_speaks(context: BrowserContext, service: Service, shoot: Shoot) -> None:
    page = visit(context, service)
    page.get_by_role("button", name="Dictate").click()
    page.get_by_role("button", name="Record", exact=True).click()
    until(lambda: "free" in box(page).input_value(), "nothing was written down")
    page.get_by_role("button", name="Stop", exact=True).click()
    shoot(page, "dictated")
    box(page).fill("I was heard.")
    expect(box(page)).to_have_value("I was heard.")


def test_a_conversation_is_saved_as_a_file(context: BrowserContext, service: Service) -> None:
    page = visit(context, service)
    ask(page, "Keep this")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as Markdown").click()
    assert download.value.suggested_filename == "chat.md"
    assert download.value.path().read_text(encoding="utf-8").startswith("## You\n\nKeep this\n\n## Assistant")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_bars_the_way_to_anyone(
    browser: Browser, service: Service, shoot: Shoot, width: int, scheme: Any
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(WAIT_MS)
    page = visit(context, service, most=None)
    expect(page.get_by_text("It cannot read text in pictures")).to_be_in_viewport()
    shoot(page, f"empty-{width}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = Axe().run(page).response["violations"]
    grave = {rule["id"]: [node["html"] for node in rule["nodes"]] for rule in found if rule["impact"] in GRAVE}
    context.close()
    assert not grave
