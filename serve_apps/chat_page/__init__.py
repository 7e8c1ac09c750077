"""The chat page in the browser, which knows nothing but the HTTP API of an assistant."""
