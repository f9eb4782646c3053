"""Where a model comes from: the one that ships, a folder, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halyard.hal.errors import ModelError
from halyard.models.manifest import MANIFEST

__all__ = [
    "EMBEDDED",
    "EMBEDDED_NAMES",
    "HUB_FILES",
    "ModelSource",
    "check_folder",
    "hub_errors",
    "resolve_source",
]

EMBEDDED_NAMES = ("embedded", "halyard/embedded")
EMBEDDED = Path(__file__).parent / "embedded"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "tokenizer*"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A folder with a checkpoint, and what to call it."""

    name: str  # what the API calls the model
    path: Path  # a local folder
    kind: Literal["embedded", "path", "hub", "mirror"]
    revision: str | None = None  # commit of a hub model


def resolve_source(
    model: str | Path, revision: str | None = None, mirror: Path | None = None
) -> ModelSource:
    """Find the model's folder, downloading it if it is a hub id.

    Args:
        mirror: a folder of mirrored models; names are looked up there, and nowhere else.

    Raises:
        ModelError: it is neither here nor on the hub, or holds nothing that can be served.
    """
    text = str(model)
    if text in EMBEDDED_NAMES:
        text = EMBEDDED_NAMES[0]
        # The copy in a mirror can be verified; where there is none, the one that ships will do.
        if mirror is None or not (mirror / text / MANIFEST).is_file():
            return ModelSource(text, EMBEDDED, "embedded")
    if not text:
        raise ModelError("no such model folder: the name is empty")
    if mirror is not None and not text.startswith((".", "/", "~")):
        from halyard.models.mirror import find_in_mirror

        return find_in_mirror(mirror, text, revision)
    path = Path(text).expanduser()
    if path.is_dir():
        check_folder(path, text)
        return ModelSource(path.resolve().name, path, "path")
    if path.is_file():
        raise ModelError(
            f"{text} is a file: give the folder that holds config.json and the weights"
        )
    if text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1:
        raise ModelError(f"no such model folder: {text}")
    return _from_hub(text, revision)


def check_folder(path: Path, text: str) -> None:
    """
    Raises:
        ModelError: it is no checkpoint's folder.
    """
    if not (path / "config.json").is_file():
        others = sorted(
            {file.suffix for file in path.iterdir() if file.suffix in (".gguf", ".bin")}
        )
        hint = f" (found {', '.join(others)} files, which can't be served)" if others else ""
        raise ModelError(f"{text} has no config.json: is it a Hugging Face checkpoint?{hint}")


def _from_hub(model: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download

    with hub_errors(model, revision):
        folder = snapshot_download(model, revision=revision, allow_patterns=HUB_FILES)
    path = Path(folder)
    check_folder(path, model)
    return ModelSource(model, path, "hub", revision=path.name)


@contextmanager
def hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Say in a line what went wrong with the hub.

    Raises:
        ModelError: something did.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Without a network its HTTP library's own errors come through, whichever library that is.
    unreachable: tuple[type[Exception], ...]
    unreachable = (LocalEntryNotFoundError, *HfHubHTTPError.__bases__, OSError)
    try:
        yield
    except GatedRepoError:
        raise ModelError(
            f"{model} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{model} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"no model {model!r}: it is neither a folder here nor on the hub (private? set HF_TOKEN)"
        ) from None
    except HFValidationError:
        raise ModelError(f"{model!r} is neither a folder here nor a hub id (owner/name)") from None
    except unreachable as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ModelError(
            f"{model!r} is no folder here, and the hub can't be reached ({reason}): "
            "check the name, or download the model and give its folder"
        ) from None
