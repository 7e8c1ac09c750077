"""A folder -> a repository of the Hugging Face hub, by huggingface_hub.

In: a folder with a model card. Out: the URL of the commit. The token comes from where `hf auth login` or `HF_TOKEN`
put it. Does not know what the folder holds.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmllm_core.errors import ExportError

Kind = Literal["model", "space"]


def ensure_repository(repo: str, *, private: bool = True, kind: Kind = "model") -> None:
    """Make a repository where there is none: called before an export, it fails before the work is done.

    Args:
        repo: `owner/name`.
        private: of a new repository; one that exists stays as it is.
        kind: a model's, or a Space's that runs Gradio.

    Raises:
        ExportError: a wrong name, no token, no permission or no network, by name.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ExportError(f"{repo}: no Hugging Face token: log in with 'hf auth login' or set HF_TOKEN")
    sdk = "gradio" if kind == "space" else None
    with _told_in_a_line(repo):
        HfApi().create_repo(repo, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)


def push_folder(folder: Path, repo: str, *, message: str = "Export from mmllm", kind: Kind = "model") -> str:
    """Upload every file of a folder as one commit; of a Space, files that were there and are not in it go.

    Returns:
        The commit's URL.

    Raises:
        ExportError: no permission or no network, by name.
    """
    from huggingface_hub import HfApi

    with _told_in_a_line(repo):
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            repo_type=kind,
            delete_patterns="*" if kind == "space" else None,
        )
    return str(commit.commit_url)


@dataclass(frozen=True)
class SpaceState:
    """What a Space has besides its files.

    Args:
        variables, secrets: by name; one that is None is taken away.
        hardware: that is asked for, by the hub's name; what it has if None.
    """

    variables: Mapping[str, str | None]
    secrets: Mapping[str, str | None]
    hardware: str | None = None


def set_up_space(repo: str, state: SpaceState) -> None:
    """Give a Space its variables, secrets and hardware.

    Raises:
        ExportError: no permission, no such hardware or no network, by name.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    with _told_in_a_line(repo):
        there = hub.get_space_variables(repo)
        _settle(repo, state.variables, there, hub.add_space_variable, hub.delete_space_variable)
        kept = hub.get_space_secrets(repo)
        _settle(repo, state.secrets, kept, hub.add_space_secret, hub.delete_space_secret)
        if state.hardware is not None:
            hub.request_space_hardware(repo, state.hardware)  # type: ignore[arg-type]


def _settle(
    repo: str,
    wanted: Mapping[str, str | None],
    there: Collection[str],
    add: Callable[[str, str, str], object],
    delete: Callable[[str, str], object],
) -> None:
    for name, value in wanted.items():
        if value is not None:
            add(repo, name, value)
        elif name in there:
            delete(repo, name)


@contextmanager
def _told_in_a_line(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the client it uses itself

    try:
        yield
    except HFValidationError as error:
        raise ExportError(f"'{repo}' is no name of a repository, which is owner/name: {error}") from error
    except OfflineModeIsEnabled as error:
        raise ExportError(f"{repo}: huggingface_hub is in offline mode: unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ExportError(f"{repo}: the hub does not know this token: log in again with 'hf auth login'") from error
        if status in (403, 404):
            raise ExportError(
                f"{repo}: this token may not write there: use one with write access, or a repository of your own"
            ) from error
        raise ExportError(f"{repo}: the hub answered {status}: {_first_line(error)}") from error
    except (httpx.TransportError, ConnectionError) as error:
        raise ExportError(f"{repo}: the hub cannot be reached: check the network ({_first_line(error)})") from error
    except ValueError as error:  # a model card that the hub does not take
        raise ExportError(f"{repo}: the hub does not take these files: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
