"""The Space's chat page, with what answers it: the assistant in this process, or a service elsewhere.

In: the Space's settings. Out: a Gradio page that talks to an API. Page and API are the same as everywhere; here the API
is served at a port that this machine alone can reach. Does not know the hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm_core.errors import EnvironmentLack
from serve_apps.config import ServeConfig
from serve_apps.config_files import load_serve_config
from serve_apps.space.settings import SpaceSettings
from serve_apps.space.zero_gpu import borrowed_phi, is_zero_gpu

if TYPE_CHECKING:
    import gradio as gr


@contextmanager
def open_page(settings: SpaceSettings, folder: Path) -> Iterator["gr.Blocks"]:
    """Build the page; the assistant behind it ends with the block.

    Args:
        folder: of the Space.

    Raises:
        MmllmError: there is no assistant, it cannot be loaded, or the service cannot be asked.
    """
    from serve_apps.chat_page.page import build_chat_page

    if settings.base_url:
        model = settings.model or first_model(settings.base_url, settings.api_key)
        yield build_chat_page(settings.base_url, model, settings.api_key or "not-needed")
        return
    from serve_apps.in_process import serving_in_process

    bundle, config = settings.open_bundle(folder), space_config()
    with serving_in_process(bundle, config, borrowed_phi(bundle, config)) as url:
        yield build_chat_page(url, bundle.info.name)


def space_config() -> ServeConfig:
    """The embedded config on a CPU; where the Space has a GPU of its own, Phi's. The page is not served by the API."""
    import torch

    on_gpu = torch.cuda.is_available() and not is_zero_gpu()
    return load_serve_config("phi" if on_gpu else "embedded", {"ui": False})


def first_model(base_url: str, api_key: str | None) -> str:
    """The model that a service serves first.

    Raises:
        EnvironmentLack: nobody answers there, or refuses.
    """
    import openai

    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=api_key or "not-needed", timeout=60)
    try:
        models = client.models.list().data
    except openai.APIError as error:
        raise EnvironmentLack(f"MMLLM_BASE_URL {base_url}: cannot be asked: {error.message}") from error
    if not models:
        raise EnvironmentLack(f"MMLLM_BASE_URL {base_url}: MMLLM_API_KEY may ask for none of its models")
    return models[0].id
