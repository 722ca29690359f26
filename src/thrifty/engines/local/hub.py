"""Before a model is loaded: is it here, or can the hub be reached? And no noise of the loaders while it is.

Without this check, a misspelt name on a machine without a network costs half a minute of retries, told in twenty lines.
Nothing here imports torch.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thrifty.engines.local.embedded import known, names
from thrifty.errors import InvalidInput, nearest

_PATIENCE = 5.0
"""Seconds that the hub may take to answer at all."""


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Loads inside are quiet, and do not ask a hub that is not there.

    `name` is a folder or a hub id. Raises InvalidInput where it is neither a folder, nor in the hub's local cache, nor
    to be had from the hub, which is asked once.
    """
    from huggingface_hub import constants

    before = offline = constants.HF_HUB_OFFLINE
    if not known(name):
        _check_folder(Path(name))
        offline = before if Path(name).exists() else _check(name)
    constants.HF_HUB_OFFLINE = offline
    try:
        with _quiet():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _check_folder(folder: Path) -> None:
    if folder.exists() and not (folder / "config.json").is_file():
        raise InvalidInput(f"{folder} is no model folder: it holds no config.json; give a model folder or a hub id")
    if not folder.exists() and (folder.is_absolute() or folder.parts[:1] == ("..",)):
        raise InvalidInput(f"there is no folder {folder}: give a model folder or a hub id")


def _check(name: str) -> bool:
    """Whether to do without the hub: the model is cached, and the hub does not answer."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise InvalidInput(f"model {name!r}: there is no such folder, and it is no hub id (ORG/NAME)") from error
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable()
    if why and not cached:
        raise InvalidInput(
            f"{nearest(name, names(), 'model')}; it is no folder, not in the hub's cache, and the hub cannot be "
            f"reached ({why}): give a model folder, or a hub id where there is a network"
        )
    return bool(why)


def _unreachable() -> str:
    """Why the hub cannot be reached; empty when it answers."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answered
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return ""  # the hub's own client may know the certificate
        return " ".join(str(error.reason).split())
    except OSError as error:
        return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
