// The list of conversations, which lie in this browser alone. Runs where Gradio loads the list (`gr.HTML`): a value that
// Python gives, {id, title, entries}, is kept and becomes the open one; {id: ""} opens none. A click hands an entry back.
const PREFIX = "mmllm-chat-";
const OPEN = "mmllm-open-chat"; // of this tab
const chatOf = (id) => JSON.parse(localStorage.getItem(PREFIX + id));
const ids = () => Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
const byAge = () => ids().map((id) => ({ id, ...chatOf(id) })).sort((a, b) => b.time - a.time);
const shown = element.querySelector("ul");
const note = element.querySelector("[role=status]");

function keep({ id, title, entries }) {
    for (;;) {
        try {
            return localStorage.setItem(PREFIX + id, JSON.stringify({ title, entries, time: Date.now() }));
        } catch (full) {
            const oldest = byAge().filter((chat) => chat.id !== id).pop();
            if (!oldest) {
                note.textContent = "This conversation is too large for the browser: save it as a file.";
                return;
            }
            localStorage.removeItem(PREFIX + oldest.id);
            note.textContent = `The browser's storage is full: "${oldest.title}" was let go.`;
        }
    }
}

function button(className, text, label, click) {
    const made = document.createElement("button");
    Object.assign(made, { className, textContent: text, title: label, onclick: click });
    made.setAttribute("aria-label", label);
    return made;
}

function draw() {
    const open = sessionStorage.getItem(OPEN);
    shown.replaceChildren(
        ...byAge().map(({ id, title, entries }) => {
            const line = document.createElement("li");
            const pick = button("pick", title, title, () => trigger("select", { id, entries }));
            if (id === open) pick.setAttribute("aria-current", "true");
            const remove = button("remove", "×", `Delete "${title}"`, () => {
                if (!confirm(`Delete "${title}"?`)) return;
                localStorage.removeItem(PREFIX + id);
                if (id === open) trigger("clear");
                draw();
            });
            line.append(pick, remove);
            return line;
        }),
    );
}

watch("value", () => {
    const { id, entries, title } = props.value;
    sessionStorage.setItem(OPEN, id);
    if (entries) keep({ id, title, entries });
    draw();
});
addEventListener("storage", draw); // another tab
draw();
