"""The folder in which mmllm keeps what it fetched and made: `$MMLLM_HOME`, by default `~/.cache/mmllm`.

packages/   unpacked packages and conversions of them, by content hash
clip/       CLIP models that were trained here, by recipe
features/   the feature store, unless `$MMLLM_FEATURES` names another folder or a URL
bundles/    trained and imported assistants; `latest` names the last one
files/      files that were uploaded to the service, unless its config names another folder
rays/       the Rays that commands started and that run, each with its token
cluster.log         what the local cluster printed
features-cache/     copies of shards of feature stores that lie elsewhere
chat_history        lines that were typed into `mmllm chat`
image-keys.sqlite   the pixel hashes of image files that were read before
"""

import hashlib
import os
from pathlib import Path

from mmllm_core.errors import ConfigError


def home() -> Path:
    """The root folder; it may not exist yet."""
    return Path(os.environ.get("MMLLM_HOME") or Path.home() / ".cache" / "mmllm").expanduser().absolute()


def features_folder() -> str:
    """Where the feature store lies: a folder, or a URL such as `s3://bucket/prefix`."""
    from mmllm_core.data.feature_location import absolute_location

    return absolute_location(os.environ.get("MMLLM_FEATURES") or str(home() / "features"))


def features_cache(location: str) -> Path:
    """Folder for copies of a feature store that lies elsewhere."""
    return home() / "features-cache" / hashlib.sha256(location.encode()).hexdigest()[:16]


def features_cache_bytes() -> int:
    """How much of a feature store that lies elsewhere is copied here: `$MMLLM_FEATURES_CACHE_GB`, by default 50."""
    text = os.environ.get("MMLLM_FEATURES_CACHE_GB") or "50"
    try:
        return int(float(text) * 1e9)
    except ValueError:
        raise ConfigError(f"MMLLM_FEATURES_CACHE_GB is '{text}': give a number of gigabytes, for example 50") from None


def image_keys() -> Path:
    """The memory of `mmllm_core.data.image_keys`."""
    return home() / "image-keys.sqlite"
