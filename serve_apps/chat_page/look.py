"""How the chat page looks: theme and CSS, and the little scripts that Gradio lacks."""

from pathlib import Path

import gradio as gr


def _script(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


FONTS, MONO = ["system-ui", "Segoe UI", "sans-serif"], ["ui-monospace", "Menlo", "monospace"]

CSS = """
footer {display: none !important}
.main.fillable {padding: 0 12px !important}
#talk {height: 100dvh; padding: 8px 0; flex-wrap: nowrap; gap: 8px}
@media (max-width: 767px) {#talk {padding-top: 52px}}
#conversation {flex: 1 1 0 !important; min-height: 0 !important; height: auto !important}
#talk > :not(#conversation) {flex: none}
#conversation, #microphone, .form:has(#message), .form:has(#words) {width: 100%; max-width: 56rem; margin: 0 auto}
.form:has(#message), .form:has(#words) {border: none; background: none; box-shadow: none}
#conversation, #microphone {border-width: 0 !important; background: none; box-shadow: none}
#conversation .bubble-wrap {background: none}
#conversation .top-panel, #conversation [aria-label=Share], #microphone .icon-button-wrapper {display: none}
#conversation .examples .example {border: 1px solid var(--border-color-primary); border-radius: 10px}
#conversation .prose blockquote {margin: 0 !important}
#conversation .thought textarea {display: none}
#conversation small {color: var(--body-text-color); opacity: .85}
#message {border: 1px solid var(--border-color-accent-subdued) !important; border-radius: 16px !important}
.sidebar h1 {margin: 0; font-size: 1.25rem}
"""

CHATS_HTML = '<nav aria-label="Conversations"><ul></ul><p role="status"></p></nav>'
CHATS_CSS = """
ul {list-style: none !important; margin: 0; padding: 0; max-height: 50vh; overflow-y: auto}
li {display: flex; margin: 0; padding: 0}
button {padding: 8px 10px; border: none; border-radius: 8px; background: none; cursor: pointer}
button {color: var(--body-text-color)}
button:hover, button[aria-current] {background: var(--border-color-primary)}
.pick {flex: 1; min-width: 0; text-align: left; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
p {margin: 4px 0; font-size: .8rem}
"""
CHATS_JS = _script("chats.js")

OPEN_CHAT = """() => {
    const id = sessionStorage.getItem("mmllm-open-chat");
    return [{id, ...JSON.parse(id && localStorage.getItem("mmllm-chat-" + id))}];
}"""
"""The conversation that this tab showed before it was loaded again."""

SHOW_SIDEBAR = """() => ({open: window.innerWidth >= 768, __type__: "update"})"""
"""Where there is room for it; on a phone it would cover the conversation."""

HEAD = f'<meta name="color-scheme" content="light dark"><script type="module">{_script("head.js")}</script>'

KEEP_SETTINGS = """(model, system, temperature, tokens, key, keeps) => {
    const settings = [model, system, temperature, tokens, keeps ? key : "", keeps];
    localStorage.setItem("mmllm-settings", JSON.stringify(settings));
}"""
RESTORE_SETTINGS = """() => {
    const kept = JSON.parse(localStorage.getItem("mmllm-settings")) ?? [];
    const types = Array.from(kept, (each) => typeof each).join();
    return types === "string,string,string,string,string,boolean" ? kept : Array(6).fill({__type__: "update"});
}"""
"""Settings as KEEP_SETTINGS kept them; where there are none such, as on a first visit, none is touched."""

DOWNLOAD = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = "NAME";
    link.click();
    URL.revokeObjectURL(link.href);
}"""
"""Lets the browser save a text as the file NAME."""

ADD_SAID = """(box, words, recording) => [
    {
        text: [box?.text?.trimEnd(), words].filter(Boolean).join(" "),
        files: [...(box?.files ?? []), ...(recording ? [recording] : [])],
    },
    "",
    null,
]"""
"""Puts what was said behind what stands in the box at that moment, whatever was typed meanwhile."""


def theme() -> gr.themes.Base:
    """Quiet colours and the machine's own fonts: nothing is fetched from elsewhere."""
    soft = gr.themes.Soft(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)
    dark_enough = {f"button_primary_background_fill{state}": "*primary_700" for state in ("", "_dark", "_hover")}
    titles = {f"block_title_background_fill{mode}": "none" for mode in ("", "_dark")}
    titles |= {f"block_title_text_color{mode}": "*body_text_color" for mode in ("", "_dark")}
    return soft.set(**dark_enough, **titles)  # contrasts that all can read
