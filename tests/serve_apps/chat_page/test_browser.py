"""The chat page in a real browser, before a real service: what a visitor does, and what is on the screen then.

The service is one process without Ray, so that its engine can be asked what it is at; the page is `mmllm ui`'s.
"""

import base64
import io
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright

from mmllm_core.bundle import Bundle
from serve_apps.config_files import load_serve_config
from serve_apps.in_process import serving_in_process
from serve_apps.phi_app import PhiDeployment
from serve_apps.served_bundles import ServedBundle
from tests.serve_apps.conftest import free_port, image_uri, wav
from tests.waiting import wait_for

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
WAIT_MS = 60_000
GRAVE = ("serious", "critical")
PACE = "first token after"
SAID = "something, never do it for free"
UI = [sys.executable, "-c", "from cluster.cli import main; main()", "ui"]


@dataclass(frozen=True)
class Served:
    """A page, and the LM that answers it in the end."""

    url: str
    phi: PhiDeployment

    @property
    def running(self) -> int:
        """Answers that the engine is at."""
        return self.phi.load().running


@pytest.fixture(scope="module")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service of the tiny bundle, and `mmllm ui` before it."""
    config = load_serve_config("embedded", {"ui": False, "phi.kv_cache_bytes": 60_000_000})
    phi = PhiDeployment({bundle.info.name: ServedBundle.of(bundle)}, config.phi, config.observability)
    port = free_port()
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads")), "PYTHONUNBUFFERED": "1"}
    with serving_in_process(bundle, config, phi) as api:
        command = [*UI, "--base-url", api, "--port", str(port)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as ui:
            try:
                assert ui.stdout is not None
                assert "Chat page:" in ui.stdout.readline()
                yield Served(f"http://127.0.0.1:{port}", phi)
            finally:
                ui.kill()


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
    expect.set_options(timeout=WAIT_MS)
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


def visit(context: BrowserContext, served: Served, most: int | None = 8) -> Page:
    """Open the page, with a bound on the length of answers."""
    page = context.new_page()
    page.goto(served.url)
    expect(page.get_by_text("It cannot read text in pictures")).to_be_visible()  # it knows who is served
    if most:
        bound(page, most)
    return page


def bound(page: Page, tokens: int) -> None:
    """Set how long answers may be."""
    page.get_by_role("button", name="Settings").click()
    field = page.get_by_label("Tokens at most")
    field.clear()
    field.press_sequentially(str(tokens))
    field.blur()
    expect(field).to_have_value(str(tokens))
    page.get_by_role("button", name="Settings").click()


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Your message")


def ask(page: Page, text: str, answers: int = 1) -> None:
    """Type, send, and wait until so many answers are complete."""
    box(page).fill(text)
    box(page).press("Enter")
    expect(page.get_by_text(PACE)).to_have_count(answers)
    expect(page.get_by_role("button", name="Submit")).to_be_visible()


def give(page: Page, event: str, name: str, colour: str) -> None:
    """Drop or paste a picture."""
    content = base64.b64decode(image_uri(colour).partition(",")[2])
    box(page).evaluate(
        """(box, [event, name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            const options = {bubbles: true, cancelable: true};
            box.dispatchEvent(
                event === "drop"
                    ? new DragEvent("drop", {...options, dataTransfer: data})
                    : new ClipboardEvent("paste", {...options, clipboardData: data}),
            );
        }""",
        [event, name, list(content)],
    )


def bubbles(page: Page, role: str) -> Locator:
    return page.locator(f"[data-testid={role}]")


def test_pictures_are_dropped_and_pasted_and_a_reload_shows_them_again(
    context: BrowserContext, served: Served, shoot: Shoot
) -> None:
    page = visit(context, served)
    give(page, "drop", "dropped.png", f"#{secrets.token_hex(3)}")
    expect(page.locator("#message .thumbnail-item")).to_have_count(1)
    give(page, "paste", "pasted.png", f"#{secrets.token_hex(3)}")
    expect(page.locator("#message .thumbnail-item")).to_have_count(2)
    ask(page, "What is this?")
    expect(page.get_by_text(PACE)).to_contain_text("dropped.png seen now · pasted.png seen now")
    pictures = bubbles(page, "user").locator("img")
    expect(pictures).to_have_count(2)
    page.reload()
    expect(pictures).to_have_count(2)
    assert pictures.last.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    ask(page, "And now?", answers=2)
    expect(page.get_by_text(PACE).last).to_contain_text("dropped.png reused from memory")
    shoot(page, "pictures")


def test_conversations_are_listed_opened_and_deleted(context: BrowserContext, served: Served) -> None:
    page = visit(context, served)
    ask(page, "First?")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_text(PACE)).to_have_count(0)
    ask(page, "Second?")
    beside = visit(context, served, most=None)  # another tab of the same browser, which keeps the bound
    ask(beside, "Third?")
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_count(3)
    page.get_by_role("button", name="First?", exact=True).click()
    expect(bubbles(page, "user")).to_contain_text("First?")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name='Delete "First?"').click()
    expect(page.get_by_text(PACE)).to_have_count(0)
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_count(2)


def test_an_answer_is_made_again_and_a_question_edited_and_its_picture_stays(
    context: BrowserContext, served: Served
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit(context, served)
    give(page, "drop", "red.png", "red")
    page.locator("#message .thumbnail-item").wait_for()
    ask(page, "One?")
    page.get_by_role("button", name="Copy message").last.click()
    answer = bubbles(page, "bot").first.inner_text()
    assert page.evaluate("navigator.clipboard.readText()").split() == answer.split()
    ask(page, "Two?", answers=2)
    bound(page, 5)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_text(PACE).last).to_contain_text("5 tokens")
    expect(page.get_by_text(PACE).first).to_contain_text("8 tokens")
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit message").fill("Three?")
    page.get_by_title("Submit").click()
    expect(page.get_by_text("Three?").first).to_be_visible()
    expect(page.get_by_text("Two?", exact=True)).to_have_count(0)
    expect(page.get_by_text(PACE)).to_contain_text("red.png reused from memory")


@pytest.mark.parametrize("leave", ["stop", "close"])
def test_who_stops_or_leaves_frees_the_engine(context: BrowserContext, served: Served, leave: str) -> None:
    page = visit(context, served, most=1500)
    wait_for(lambda: served.running == 0, "the engine to be free before the test", 60)
    box(page).fill("Tell me a very long story")
    box(page).press("Enter")
    expect(bubbles(page, "bot")).to_be_visible()
    assert served.running == 1, "the answer is not being written"
    if leave == "stop":
        box(page).fill("typed meanwhile")
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.close()
    wait_for(lambda: served.running == 0, "the engine to end", 60)
    if leave == "stop":
        expect(page.get_by_role("button", name="Submit")).to_be_visible()
        expect(box(page)).to_have_value("typed meanwhile")
        page.reload()
        expect(bubbles(page, "bot")).to_be_visible()


def test_what_the_service_refuses_is_said_as_it_says_it_and_nothing_is_lost(
    context: BrowserContext, served: Served, shoot: Shoot
) -> None:
    page = visit(context, served)
    box(page).fill("word " * 5_000)
    box(page).press("Enter")
    expect(bubbles(page, "bot")).to_contain_text("400: ")
    expect(bubbles(page, "bot")).to_contain_text("tokens")
    expect(bubbles(page, "user")).to_contain_text("word word")
    shoot(page, "refused")
    box(page).fill("half a question")
    page.reload()
    expect(bubbles(page, "user")).to_contain_text("word word")
    expect(box(page)).to_have_value("half a question")


def test_a_recording_is_uploaded_and_what_was_heard_is_shown(
    context: BrowserContext, served: Served, recording: Path
) -> None:
    page = visit(context, served)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a file").click()
    chooser.value.set_files(recording)
    page.locator("#message .thumbnail-item").first.wait_for()
    ask(page, "Who?")
    expect(page.get_by_text("Heard:")).to_contain_text(SAID)


def test_words_appear_while_one_speaks_and_can_be_corrected(
    context: BrowserContext, served: Served, shoot: Shoot
) -> None:
    page = visit(context, served)
    box(page).fill("Typed.")
    page.get_by_role("button", name="Record", exact=True).click()
    wait_for(
        lambda: "something" in page.get_by_label("Heard so far").input_value(), "what is said to be written down", 60
    )
    shoot(page, "speaking")
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_for(lambda: "something" in box(page).input_value(), "what was said to be in the box", 60)
    assert box(page).input_value().startswith("Typed. ")
    ask(page, "Corrected.")
    expect(bubbles(page, "user")).to_contain_text("Corrected.")


def test_a_conversation_is_saved_as_a_file(context: BrowserContext, served: Served) -> None:
    page = visit(context, served)
    ask(page, "Keep this")
    for button, name, start in (
        ("Save as Markdown", "chat.md", "## You\n\nKeep this\n\n## Assistant"),
        ("Save as JSON", "chat.json", '{\n  "messages": ['),
    ):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == name
        assert download.value.path().read_text(encoding="utf-8").startswith(start)


def test_settings_are_kept_and_the_keyboard_is_enough(context: BrowserContext, served: Served) -> None:
    page = visit(context, served, most=5)
    page.reload()
    expect(page.get_by_text("It cannot read text in pictures")).to_be_visible()
    expect(box(page)).to_be_focused()
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    expect(page.get_by_text(PACE)).to_contain_text("5 tokens")
    expect(bubbles(page, "user")).to_contain_text("and another")
    bound(page, 3)
    page.get_by_role("button", name="Retry").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text(PACE)).to_contain_text("3 tokens")


def test_settings_typed_before_the_server_has_answered_stay(context: BrowserContext, served: Served) -> None:
    visit(context, served, most=5)  # so that there are settings to be restored
    page = context.new_page()
    held: list[Route] = []
    page.route("**/gradio_api/queue/join*", lambda route: held.append(route))
    with page.expect_request("**/gradio_api/queue/join*"):  # the page asks who is served
        page.goto(served.url)
    bound(page, 7)
    assert held
    for route in held:
        route.continue_()
    page.unroute_all()
    expect(page.get_by_text("It cannot read text in pictures")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Tokens at most")).to_have_value("7")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_bars_the_way_to_anyone(
    browser: Browser, served: Served, shoot: Shoot, width: int, scheme: Any
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(WAIT_MS)
    page = visit(context, served, most=None)
    expect(page.get_by_text("It cannot read text in pictures")).to_be_in_viewport()
    expect(box(page)).to_be_in_viewport()
    shoot(page, f"empty-{width}-{scheme}")
    barred = grave(page)
    page.get_by_text("What is the capital of France?").click()
    expect(page.get_by_text(PACE)).to_be_in_viewport()
    shoot(page, f"answered-{width}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    barred |= grave(page)
    if width == 390:
        page.get_by_role("button", name="Toggle Sidebar").click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_be_in_viewport()
    shoot(page, f"settings-{width}-{scheme}")
    barred |= grave(page)
    context.close()
    assert not barred


def grave(page: Page) -> dict[str, list[str]]:
    """What axe finds serious or worse, by rule."""
    found = Axe().run(page).response["violations"]
    return {rule["id"]: [node["html"] for node in rule["nodes"]] for rule in found if rule["impact"] in GRAVE}
