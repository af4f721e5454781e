"""Parts of a node's schema that older hosts do not know are left out there."""

import inspect
from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made")


def supported(make: Callable[..., Made], *arguments: object, **settings: object) -> Made:
    """What ``make`` makes of the settings, without those that this host's version of it has no name for."""
    known = inspect.signature(make).parameters
    return make(*arguments, **{name: value for name, value in settings.items() if name in known})
