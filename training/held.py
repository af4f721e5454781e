"""What a folder is held to: what decided on its content lies beside it, and every later run has to agree with that."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from training.files import write_json


def hold(
    path: Path,
    now: dict[str, Any],
    holds: str,
    defaults: Mapping[str, Any] = {},
    free: Collection[str] = (),
    begun: bool = True,
) -> None:
    """Keep what decides on a folder's content, or hold this run to what is kept.

    A name that was not kept is new since then: a setting had its default, and anything else is kept from now on.

    Args:
        path: the JSON file, in that folder.
        now: settings, and identities and hashes of what was read.
        holds: what the folder holds, as in "features made".
        defaults: of the settings, see `defaults_of`.
        free: names that may change, those of a part behind a dot.
        begun: whether anything came of earlier runs yet; until then all may change.

    Raises:
        ValueError: something has changed; the first is named.
    """
    now = json.loads(json.dumps(now))
    kept = _read(path) if begun else {}
    compare(_over(defaults, kept) if kept else {}, now, path.parent, holds, free)
    if kept | now != _read(path):
        write_json(path, kept | now)


def compare(
    kept: Mapping[str, Any], now: Mapping[str, Any], folder: Path, holds: str, free: Collection[str] = ()
) -> None:
    """Raises ValueError where a name that both have is something else; see `hold`."""
    kept, now = _without(kept, free), _without(now, free)
    for name, value in now.items():
        if name in kept and kept[name] != value:
            raise ValueError(_changed(folder, holds, name, kept[name], value))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{path} is damaged; start anew in another folder.") from None


def defaults_of(settings: type[BaseModel]) -> dict[str, Any]:
    """Of those settings that have one, as they are kept."""
    return settings.model_construct().model_dump(mode="json", warnings=False)


def paths_of(settings: BaseModel) -> Iterator[str]:
    """Names of the settings that are paths, those of a part behind a dot."""
    for name, value in settings:
        if isinstance(value, Path):
            yield name
        elif isinstance(value, BaseModel):
            yield from (f"{name}.{deeper}" for deeper in paths_of(value))


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    result = {}
    for name, value in values.items():
        deeper = [inner.removeprefix(f"{name}.") for inner in names if inner.startswith(f"{name}.")]
        if name not in names:
            result[name] = _without(value, deeper) if deeper and isinstance(value, dict) else value
    return result


def _over(defaults: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    result = {**defaults, **kept}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(kept.get(name), dict):
            result[name] = _over(value, kept[name])
    return result


def hash_of(texts: Iterable[str]) -> str:
    """Of texts in their order, as of the hashes of shards, or of the wordings of instructions."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _changed(folder: Path, holds: str, name: str, before: Any, now: Any) -> str:
    while isinstance(before, dict) and isinstance(now, dict):
        part = next(part for part in {**now, **before} if now.get(part) != before.get(part))
        name, before, now = f"{name}.{part}", before.get(part), now.get(part)
    return (
        f"{folder} holds {holds} with {name} = {_short(before)}, not {_short(now)}; give it as it "
        "was, or another folder."
    )


def _short(value: Any) -> Any:
    """Of a hash, what tells it from others."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) in (32, 64) and value.isalnum() else value
