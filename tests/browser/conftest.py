"""One browser page on the shared server, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tools.host.page import ComfyPage, comfy_page
from tools.host.server import ComfyServer


@pytest.fixture(scope="module")
def opened_page(server: ComfyServer) -> Iterator[ComfyPage]:
    with comfy_page(server) as page:
        yield page


@pytest.fixture
def page(opened_page: ComfyPage) -> ComfyPage:
    """The page with an empty graph and no errors."""
    opened_page.clear()
    opened_page.errors.clear()
    return opened_page
