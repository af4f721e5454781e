"""The released SD3 file, by its facts: its keys, sizes and what is missing from a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core import checkpoint
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig, Base, Form
from small_adapters import JOINT, random_adapter

RELEASED_SD3 = AdapterConfig(
    width=1280,
    heads=20,
    output_width=4096,
    layers=tuple((number, 1536) for number in range(0, 24, 2)),
    base=Base.SD3,
    form=Form.JOINT,
    output_suffix="_big",
)
SQUARES = (
    "to_k_ip", "to_v_ip", "add_k_proj_ip", "add_v_proj_ip", "proj_ip", "proj_encoder_hidden_states_ip",
    "proj_encoder_passthrough_ip",
)  # fmt: skip


def test_the_released_file_has_these_keys_and_sizes() -> None:
    with torch.device("meta"):
        state = Adapter(RELEASED_SD3).state_dict()
    assert len(state) == 227
    assert sum(weight.numel() for weight in state.values()) == 390_657_792
    layers = {key for key in state if key.startswith("ip_adapter.")}
    assert layers == {f"ip_adapter.{n}.{name}.weight" for n in range(0, 24, 2) for name in SQUARES}
    assert all(state[key].shape == (1536, 1536) for key in layers)
    assert state["image_proj.proj_out_big.weight"].shape == (4096, 1280)
    assert state["image_proj.norm_out_big.bias"].shape == (4096,)
    assert AdapterConfig.from_state_dict(state) == RELEASED_SD3


def damaged(tmp_path: Path, without: str = "nothing", **changed: torch.Tensor) -> str:
    state = {k: v for k, v in random_adapter(JOINT).state_dict().items() if without not in k}
    checkpoint.write(tmp_path / "a.safetensors", state | changed, {})
    with pytest.raises(ValueError) as caught:
        checkpoint.load(tmp_path / "a.safetensors")
    return str(caught.value)


@pytest.mark.parametrize("name", SQUARES)
def test_each_of_the_seven_is_missed(tmp_path: Path, name: str) -> None:
    message = damaged(tmp_path, without=f"2.{name}.")
    assert f"ip_adapter.2.{name}.weight" in message and "missing" in message and "download it again" in message


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_block_is_named(tmp_path: Path, lost: int) -> None:
    assert f"ip_adapter.{lost}.to_k_ip.weight is missing" in damaged(tmp_path, without=f"ip_adapter.{lost}.")


def test_matrices_are_square(tmp_path: Path) -> None:
    message = damaged(tmp_path, **{"ip_adapter.2.proj_ip.weight": torch.zeros(64, 56)})
    assert "of another shape: ip_adapter.2.proj_ip.weight" in message


def test_only_a_form_of_its_own_makes_wide_tokens_sd3s(tmp_path: Path) -> None:
    """Flux reads text of the same width."""
    wide = AdapterConfig(width=64, heads=1, depth=1, output_width=4096, layers=((1, 64),), base=Base.OTHER)
    checkpoint.write(tmp_path / "a.safetensors", random_adapter(wide).state_dict(), {})
    assert checkpoint.load(tmp_path / "a.safetensors").config == wide
