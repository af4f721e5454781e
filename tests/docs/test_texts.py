"""Help pages, translations and the README say what the code says: nothing is missing, and nothing is out of date."""

from __future__ import annotations

import ast
import json
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest
import tomllib
import yaml
from ipadapter_instruct_core.config import Base
from ipadapter_instruct_core.curves import Curve
from ipadapter_instruct_core.tasks import GuidanceMode, Task, defaults, phrase
from PIL import Image
from tools.host.server import PACK_NAME, ComfyServer

ROOT = inside.ROOT
DOCS = ROOT / "web" / "docs"
README = (ROOT / "README.md").read_text()
LANGUAGES = ("en", "zh")


def _schemas() -> dict[str, Any]:
    inside.start()
    from ipadapter_instruct_pack import nodes

    return {schema.node_id: schema for schema in (node.define_schema() for node in nodes.NODES)}


SCHEMAS = _schemas()
PAGES = {
    f"{node}-{language}": (node, DOCS / page)
    for node in SCHEMAS
    for language, page in (("en", f"{node}.md"), ("zh", f"{node}/zh.md"))
}
each_page = pytest.mark.parametrize(("node", "page"), PAGES.values(), ids=PAGES.keys())


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table row in a Markdown text, headings included."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


# Help pages


def told_inputs(page: Path) -> list[tuple[str, str, str]]:
    """Each input's name, values and advice: a list, since the host's help panel is too narrow for a table."""
    return re.findall(r"^- \*\*`(\w+)`\*\* \((.*?)\): (.+)$", page.read_text(), re.MULTILINE)


@each_page
def test_a_help_page_explains_every_input_in_order(node: str, page: Path) -> None:
    assert [name for name, *_ in told_inputs(page)] == [entry.id for entry in SCHEMAS[node].inputs]


@each_page
def test_a_help_page_gives_the_real_ranges_and_choices(node: str, page: Path) -> None:
    cells = {name: values for name, values, _ in told_inputs(page)}
    for entry in SCHEMAS[node].inputs:
        if entry.io_type == "FLOAT":
            told = [float(number) for number in re.findall(r"[\d.]+", cells[entry.id])]
            assert told == [entry.min, entry.max, entry.default], entry.id
        elif entry.io_type == "COMBO" and not entry.id.endswith("_name"):  # those list files
            assert re.findall(r"`([^`]+)`", cells[entry.id]) == entry.options, entry.id


def test_the_pictures_of_the_curves_are_drawn_as_the_weight_goes() -> None:
    pictures = {path.stem: path.read_text() for path in (DOCS / "curves").glob("*.svg")}
    assert pictures.keys() == {curve.value.replace(" ", "_") for curve in Curve}
    for curve in Curve:
        name = curve.value.replace(" ", "_")
        (line,) = re.findall(r'points="(.+?)"', pictures[name])
        points = np.array([[float(number) for number in pair.split(",")] for pair in line.split()])
        progress, drawn = (points[:, 0] - 4) / 88, (44 - points[:, 1]) / 40
        np.testing.assert_allclose(drawn, [curve.factor(p) for p in progress], atol=0.01)
        for _, page in [each for each in PAGES.values() if each[0] == "IPAdapterInstructApply"]:
            assert f"(curves/{name}.svg)" in page.read_text()


def test_no_help_page_is_stale() -> None:
    known = {page for _, page in PAGES.values()}
    assert known == set(DOCS.rglob("*.md"))


def test_the_host_serves_help_pages_and_translations(server: ComfyServer) -> None:
    for _, page in PAGES.values():
        place = urllib.parse.quote(str(page.relative_to(DOCS)))
        with urllib.request.urlopen(f"{server.url}/extensions/{PACK_NAME}/docs/{place}", timeout=60) as answer:
            assert answer.read().decode() == page.read_text()
    translations = server.get("/i18n")
    for language in LANGUAGES:
        served = translations[language]["nodeDefs"]
        assert served.items() >= _translation(language).items()


# Translations


def _translation(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text())


def _own_texts(schema: Any) -> dict[str, Any]:
    """What a schema says about itself, in the form of the host's nodeDefs.json."""
    inputs = {
        entry.id: {"name": entry.display_name or entry.id} | ({"tooltip": entry.tooltip} if entry.tooltip else {})
        for entry in schema.inputs
    }
    texts = {"display_name": schema.display_name, "description": schema.description, "inputs": inputs}
    outputs = {str(i): {"name": out.display_name} for i, out in enumerate(schema.outputs) if out.display_name}
    return texts | ({"outputs": outputs} if outputs else {})


def _leaves(tree: dict[str, Any], path: str = "") -> dict[str, str]:
    found = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{path}{key}/") if isinstance(value, dict) else {path + key: value}
    return found


def test_english_is_the_schemas_own_text() -> None:
    assert _translation("en") == {node: _own_texts(schema) for node, schema in SCHEMAS.items()}


def test_chinese_has_the_same_entries_and_is_chinese() -> None:
    english, chinese = _leaves(_translation("en")), _leaves(_translation("zh"))
    assert list(chinese) == list(english)
    untranslated = [k for k, v in chinese.items() if k.endswith(("tooltip", "description")) and not _is_chinese(v)]
    assert not untranslated


def _is_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_signs_that_the_page_would_interpret(language: str) -> None:
    marked = [key for key, text in _leaves(_translation(language)).items() if re.search(r"[{}@|]", text)]
    assert not marked


# README


def test_the_task_table_agrees_with_the_tasks() -> None:
    expected = []
    for task in Task:
        each = [defaults(task, base) for base in (Base.SD15, Base.SDXL, Base.SD3)]
        scales = [f"{one.instruct_scale:g} and {one.image_scale:g}" for one in each]
        weights, guidance = " / ".join(f"{one.weight:g}" for one in each), each[0].guidance.value
        told = " / ".join(scales) if each[0].guidance is GuidanceMode.THREE_WAY else ""
        assert each[1].guidance is each[0].guidance
        if each[2].guidance is not each[0].guidance:
            guidance, told = f"{guidance}; {each[2].guidance.value} on SD3", f"{scales[2]} on SD3"
        expected.append([task.value, phrase(task), weights, guidance, told])
    rows = table_rows(section(README, "The tasks"))[1:]
    assert [row[:5] for row in rows] == expected


def _said_by_the_code() -> list[str]:
    """Every string of the nodes and the core, with … for what is filled in."""
    found = []
    for folder in ("nodes", "ipadapter_instruct_core"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[srd]", "…", node.value))
    return found


def _quotes() -> list[str]:
    rows = table_rows(section(README, "When something goes wrong"))
    quotes = [quote for message, _ in rows for quote in re.findall(r"`([^`]+)`", message)]
    for _, page in PAGES.values():
        quotes += re.findall(r"\*\*[\"“](.+?)[\"”]", page.read_text())
    return sorted(set(quotes))


@pytest.mark.parametrize("quote", _quotes())
def test_a_quoted_message_is_one_that_the_code_gives(quote: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in quote.split("…") if piece.strip()]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in _said_by_the_code())


def test_the_readme_names_every_node_workflow_and_blueprint() -> None:
    names = [schema.display_name for schema in SCHEMAS.values()]
    names += [f"`{path.stem}`" for path in (ROOT / "workflows").glob("*.json")]
    names += [f"**{path.stem}**" for path in (ROOT / "subgraphs").glob("*.json")]
    assert [name for name in names if name not in README] == []


# Registry metadata


def test_the_registry_installs_what_the_requirements_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert project["dependencies"] == [line for line in lines if line]


def test_the_citation_and_the_forms_for_issues_are_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["repository-code"]) == (project["version"], project["urls"]["Repository"])
    assert cited["references"][0]["title"] in README
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    config, problem = (yaml.safe_load(form.read_text()) for form in forms)
    assert config["contact_links"][0]["url"].startswith(project["urls"]["Repository"])
    assert len({part["id"] for part in problem["body"]}) == len(problem["body"]) == 5


def test_the_host_reads_the_registry_metadata() -> None:
    inside.start()
    from comfy_config.config_parser import extract_node_configuration

    found = extract_node_configuration(str(ROOT))
    assert found.tool_comfy.display_name and found.tool_comfy.publisher_id
    assert found.project.supported_comfyui_version and found.project.supported_os == ["OS Independent"]
    assert found.project.urls.repository.startswith("https://")


def test_the_registrys_pictures_lie_where_their_addresses_say() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    repository = project["project"]["urls"]["Repository"].replace("//github.com", "//raw.githubusercontent.com")
    addresses = [project["tool"]["comfy"][kind] for kind in ("Icon", "Banner")]
    icon, banner = (ROOT / address.removeprefix(f"{repository}/main/") for address in addresses)
    assert icon.is_file()
    with Image.open(banner) as picture:
        assert picture.width * 9 == picture.height * 21
    assert banner.stat().st_size < 100_000
