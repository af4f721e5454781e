"""SD3.5's layers: a file told by its normed keys, and an addition to the image's positions alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core import checkpoint
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig, Base, Form
from ipadapter_instruct_core.image_kv import ImageStreamKeyValue
from small_adapters import JOINT, STREAM, random_adapter

SIZES = {"medium": (24, 1536), "large": (38, 2432)}


@pytest.mark.parametrize("size", SIZES)
def test_a_files_keys_and_sizes(size: str) -> None:
    """Two matrices and a norm on every second block."""
    blocks, width = SIZES[size]
    layers = tuple((number, width) for number in range(0, blocks, 2))
    config = AdapterConfig(
        width=1280, heads=20, output_width=4096, layers=layers, base=Base.SD35, form=Form.IMAGE_STREAM
    )
    with torch.device("meta"):
        state = Adapter(config).state_dict()
    names = {"to_k_ip.weight": (width, 4096), "to_v_ip.weight": (width, 4096), "norm_k_ip.weight": (64,)}
    found = {key: tuple(weight.shape) for key, weight in state.items() if key.startswith("ip_adapter.")}
    assert found == {f"ip_adapter.{n}.{name}": shape for n, _ in layers for name, shape in names.items()}
    assert AdapterConfig.from_state_dict(state) == config


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_it_is_told_by_its_keys_without_metadata(tmp_path: Path, ending: str) -> None:
    adapter = random_adapter(STREAM)
    checkpoint.write(tmp_path / f"a.{ending}", adapter.state_dict(), {"instruction_encoder": "open_clip"})
    loaded = checkpoint.load(tmp_path / f"a.{ending}")
    assert loaded.config == STREAM
    assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in adapter.state_dict().items())


@pytest.mark.parametrize("name", ["to_k_ip", "to_v_ip", "norm_k_ip"])
def test_each_of_a_blocks_three_is_missed(tmp_path: Path, name: str) -> None:
    state = {k: v for k, v in random_adapter(STREAM).state_dict().items() if f"2.{name}" not in k}
    checkpoint.write(tmp_path / "a.safetensors", state, {})
    with pytest.raises(ValueError, match=rf"ip_adapter.2.{name}.weight.*download it again"):
        checkpoint.load(tmp_path / "a.safetensors")


def test_sd3s_layers_are_not_sd35s() -> None:
    mixed = random_adapter(JOINT).state_dict() | random_adapter(STREAM).state_dict()
    with pytest.raises(ValueError, match="unexpected|another shape"):
        Adapter.from_state_dict(mixed)


def test_the_images_positions_attend_to_the_tokens_by_normed_keys() -> None:
    """Spelled out, head by head; positions of text get nothing."""
    torch.manual_seed(0)
    layer, heads = ImageStreamKeyValue(24, 128), 2
    torch.nn.init.normal_(layer.norm_k_ip.weight)
    tokens, queries, bias = torch.randn(1, 5, 24), torch.randn(1, 9, 128), torch.randn(1, 1, 1, 5)
    keys, values = (part.unflatten(-1, (heads, 64)).transpose(1, 2) for part in layer(tokens))
    added = layer.addition(queries, torch.randn(1, 9, 128), keys, values, slice(3, 9), bias)
    assert not added[:, :3].any()
    for head in range(heads):
        part = slice(64 * head, 64 * head + 64)
        own = (tokens @ layer.to_k_ip.weight.T)[0, :, part].double()
        normed = own / (own.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_k_ip.weight
        shares = (queries[0, 3:, part].double() @ normed.T / 8 + bias[0, 0]).softmax(-1)
        expected = shares @ (tokens @ layer.to_v_ip.weight.T)[0, :, part].double()
        torch.testing.assert_close(added[0, 3:, part].double(), expected, rtol=1e-5, atol=1e-6)
    longer, _ = layer(7 * tokens)
    torch.testing.assert_close(longer, layer(tokens)[0], rtol=1e-4, atol=1e-5)
