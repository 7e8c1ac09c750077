"""The Space's program: the chat page, and behind it the assistant in this process or a service elsewhere."""

import sys
from pathlib import Path

from mmllm_core.errors import MmllmError
from serve_apps.space.zero_gpu import prepare

prepare()  # before anything loads torch

from serve_apps.chat_page.page import PAGE_OPTIONS  # noqa: E402
from serve_apps.space.page import open_page  # noqa: E402
from serve_apps.space.settings import SpaceSettings  # noqa: E402

if __name__ == "__main__":
    try:
        with open_page(SpaceSettings.of_environment(), Path(__file__).parent) as page:
            page.launch(**PAGE_OPTIONS)
    except MmllmError as error:
        sys.exit(f"mmllm: {error}")
