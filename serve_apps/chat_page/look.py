"""How the chat page looks: theme, CSS, and the little script that saves a file."""

import gradio as gr

FONTS, MONO = ["system-ui", "Segoe UI", "sans-serif"], ["ui-monospace", "Menlo", "monospace"]

CSS = """
.examples .example {border: 1px solid var(--border-color-primary); border-radius: 10px}
.message .prose blockquote {margin: 0 !important}
.message small {color: var(--body-text-color); opacity: .85}
#message {border: 1px solid var(--border-color-primary); border-radius: 16px}
.sidebar h1 {margin: 0; font-size: 1.25rem}
.sidebar table, .sidebar tbody, .sidebar tr, .sidebar td {display: block; width: 100%; border: none; text-align: left}
.sidebar td {padding: 6px 10px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.sidebar .table-wrap {border: none}
"""

HEAD = """<meta name="color-scheme" content="light dark"><script>
let isFolded = window.innerWidth >= 768;
new MutationObserver(() => {
    const name = (selector, label) =>
        document.querySelector(selector + ":not([aria-label])")?.setAttribute("aria-label", label);
    name("#message textarea", "Your message");
    name("#message .submit-button", "Send");
    document.querySelector(".examples[role=list]")?.setAttribute("role", "group");
    const toggle = document.querySelector(".sidebar.open .toggle-button");
    if (toggle && !isFolded) { isFolded = true; toggle.click(); }
}).observe(document, {childList: true, subtree: true, attributes: true, attributeFilter: ["class"]});
</script>"""
"""Names the box and its button for screen readers, which Gradio does not; on a phone folds the sidebar, once."""

DOWNLOAD = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = "NAME";
    link.click();
    URL.revokeObjectURL(link.href);
}"""
"""Lets the browser save a text as the file NAME."""


def theme() -> gr.themes.Base:
    """Quiet colours and the machine's own fonts: nothing is fetched from elsewhere."""
    soft = gr.themes.Soft(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)
    dark_enough = {f"button_primary_background_fill{state}": "*primary_700" for state in ("", "_dark", "_hover")}
    return soft.set(**dark_enough)  # for white text on it to be read by all
