"""The folder in which mmllm keeps what it fetched and made: `$MMLLM_HOME`, by default `~/.cache/mmllm`.

packages/   unpacked packages and conversions of them, by content hash
clip/       CLIP models that were trained here, by recipe
features/   the feature store
bundles/    trained and imported assistants; `latest` names the last one
"""

import os
from pathlib import Path


def home() -> Path:
    """The root folder; it may not exist yet."""
    return Path(os.environ.get("MMLLM_HOME") or Path.home() / ".cache" / "mmllm").expanduser().absolute()


def features_folder() -> Path:
    """Where the feature store lies."""
    return home() / "features"
