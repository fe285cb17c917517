"""Folders of weights to pass on, here or on the hub: found, and read strictly.

    FOLDER/config.json, *.safetensors, and text_encoder/ where the text tower is on no hub

scripts/export.py writes one, FlowTokPipeline (modeling/pipeline.py) says what is in it. Nothing in
a folder is executed.
"""

import json
import re
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .clip_weights import one_line, why_hub_is_silent

T = TypeVar("T")
CONFIG_FILE, TOWER_FOLDER = "config.json", "text_encoder"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # USER/NAME
HUB_FILES = ["*.json", "*.safetensors", f"{TOWER_FOLDER}/*"]


def is_pretrained(folder: str | Path) -> bool:
    """Whether it is such a folder."""
    return (Path(folder) / CONFIG_FILE).is_file()


def find_folder(name: str | Path) -> Path:
    """A folder here as it is, or the hub's repository USER/NAME in the hub's cache.

    A name whose first part is a folder here is no id.

    Raises:
        ValueError: the hub does not give it.
    """
    folder = Path(name).expanduser()
    # What lies here comes first: a run is never taken from the network by a typing error.
    if folder.exists() or folder.parent.is_dir() or not HUB_ID.fullmatch(str(name)):
        return folder
    silence = why_hub_is_silent()
    try:
        found = huggingface_hub.snapshot_download(
            str(name), allow_patterns=HUB_FILES, local_files_only=bool(silence)
        )
    except Exception as error:  # of the hub, of requests or httpx, by the version
        reason = silence or one_line(error)
        raise ValueError(f"{name} is no folder here, and not from the hub: {reason}") from error
    return Path(found)


def read_config(folder: Path, schema: type[T]) -> T:
    """config.json as a dataclass; ValueError if it holds anything else than that does."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no folder that scripts/export.py wrote: no {CONFIG_FILE}")
    text = path.read_text(encoding="utf-8")
    # OmegaConf would fill in environment variables, and a tower's name sends them to the hub.
    if "${" in text:
        raise ValueError(f"{path} refers to variables of the machine that reads it: refused")
    try:
        values = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(json.loads(text)))
        return OmegaConf.to_object(values)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
