// What Gradio lacks: names for what one types into, a draft that outlasts a reload (Gradio reloads the page when its
// server comes back), and copies of answers without the small print.
const DRAFT = "mmllm-draft"; // of this tab
const box = () => document.querySelector("#message textarea");

new MutationObserver((_, observer) => {
    const name = (selector, label) =>
        document.querySelector(selector + ":not([aria-label])")?.setAttribute("aria-label", label);
    name("#message textarea", "Your message");
    name("#conversation textarea", "Edit message");
    document.querySelector(".examples[role=list]")?.setAttribute("role", "group");
    const draft = sessionStorage.getItem(DRAFT);
    if (draft && box()) {
        sessionStorage.removeItem(DRAFT);
        box().value = draft;
        box().dispatchEvent(new Event("input", { bubbles: true }));
    }
}).observe(document, { childList: true, subtree: true });
addEventListener("pagehide", () => sessionStorage.setItem(DRAFT, box()?.value ?? ""));

if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(text.replace(/\n?<small>.*<\/small>/g, ""));
}
