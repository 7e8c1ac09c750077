"""Which bundle answers under which model name, and whether another may take its place while the service runs.

Does not know Ray, and loads no weights.
"""

import json
from hashlib import blake2b
from pathlib import Path

from mmllm_core.bundle import Bundle
from mmllm_core.config import PathSource, Source, StrictModel
from mmllm_core.errors import BundleError
from mmllm_core.vision import file_sha256


class ServedBundle(StrictModel):
    """A bundle as replicas find it."""

    folder: Path
    sha256: str | None = None
    """Of its manifest, so that another bundle in the same folder is told from this one."""

    @classmethod
    def of(cls, bundle: Bundle) -> "ServedBundle":
        """The bundle as it lies there now."""
        return cls(folder=bundle.folder.absolute(), sha256=file_sha256(bundle.folder / "manifest.json"))

    def open(self) -> Bundle:
        """Open and verify it.

        Raises:
            BundleError: as `Bundle.open`, or another bundle lies there.
        """
        opened = Bundle.open(self.folder)
        if self.sha256 not in (None, ServedBundle.of(opened).sha256):
            raise BundleError(f"{self.folder}: holds another bundle than was asked for: reload it from where it lies")
        return opened


class ServedBundles(StrictModel):
    """The `user_config` of the LM's deployment: changing it changes what is served, without a restart."""

    bundles: dict[str, ServedBundle]
    """By model name; those that are not named stay as they are."""


Base = dict[str, object]
"""What bundles share that were trained on the same models, by what it is called in messages."""


def base_of(bundle: Bundle) -> Base:
    """The base of a bundle."""
    profile = bundle.profile
    return {
        "CLIP": (bundle.info.feature_fingerprint, bundle.info.d_vision, bundle.info.n_patches),
        "LM": (
            profile.language.model_dump(mode="json", exclude={"source"}),
            _identity(bundle, profile.language.source),
        ),
        "Whisper": profile.audio.model_dump(mode="json"),
        "tokenizer": _words(bundle),
    }


def require_base(base: Base, name: str, other: Bundle) -> None:
    """Refuse a bundle that cannot share what is served.

    Args:
        base: of what is served.
        name: by which that is known.

    Raises:
        BundleError: it was trained on another CLIP, LM, Whisper or tokenizer.
    """
    theirs = base_of(other)
    if differing := [what for what in base if base[what] != theirs[what]]:
        raise BundleError(
            f"bundle '{other.info.name}' ({other.folder}) has another {' and another '.join(differing)} than "
            f"'{name}' and cannot share its replicas: serve it by itself"
        )


def _words(bundle: Bundle) -> str:
    """What tells a tokenizer from others; libraries write equal ones in several ways.

    Read from its files where they are as bundles are saved: transformers takes seconds to import.
    """
    folder = bundle.folder / "tokenizer"
    backend, template = folder / "tokenizer.json", folder / "chat_template.jinja"
    if backend.is_file() and template.is_file():
        from tokenizers import Tokenizer

        words = Tokenizer.from_file(str(backend))
        vocabulary, added = words.get_vocab(), words.get_added_tokens_decoder()
        chat_template = template.read_text(encoding="utf-8")
    else:
        tokenizer = bundle.tokenizer
        vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        chat_template = tokenizer.chat_template
    told = [sorted(vocabulary.items()), sorted(added), chat_template]
    return blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def _identity(bundle: Bundle, source: Source) -> object:
    """What tells a source's weights from others: where they come from, or the content that the bundle carries."""
    if isinstance(source, PathSource) and not source.path.is_absolute():
        return bundle.digests(source.path.as_posix())
    return source.model_dump(mode="json")
