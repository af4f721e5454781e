"""Encode Instruction's positive and negative are what CLIP Text Encode makes of the same texts, bit for bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from bench import Bench
from safetensors.torch import save_file
from tools.tiny.models import TINY_NAMES

import nodes as host_nodes

EncodeInstruction = importlib.import_module(f"{inside.PACK}.nodes.encode_instruction").EncodeInstruction
memory = importlib.import_module(f"{inside.PACK}.nodes.host.memory")
PROMPTS = {
    "plain": "a cat",
    "empty": "",
    "emphasis": "a (red:1.4) cat, (on a mat), ((sleeping:0.3))",
    "an embedding": "a cat, embedding:look, at night",
    "long": "a very long prompt about a cat " * 30,
    "escaped": r"a cat \(smiling\)",
}


def encoded(bench: Bench, clip: Any, prompt: str, negative: str, **more: Any) -> Any:
    return EncodeInstruction.execute(bench.adapter, clip, "style", "", "", prompt, negative, **more)


def assert_same_conditioning(found: list, expected: list) -> None:
    assert len(found) == len(expected) == 1
    torch.testing.assert_close(found[0][0], expected[0][0], rtol=0, atol=0)
    assert found[0][1].keys() == expected[0][1].keys()
    for key, value in expected[0][1].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[0][1][key], value, rtol=0, atol=0)
        else:
            assert found[0][1][key] == value


@pytest.mark.parametrize("clip_skip", [None, -2])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_it_is_clip_text_encode(bench: Bench, tmp_path: Path, prompt: str, clip_skip: int | None) -> None:
    clip = bench.clip
    save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "look.safetensors")
    clip.tokenizer.clip_l.embedding_directory = str(tmp_path)
    if clip_skip is not None:
        clip = host_nodes.CLIPSetLastLayer().set_last_layer(clip, clip_skip)[0]
    found = encoded(bench, clip, prompt, "blurry (very:1.2)")
    assert_same_conditioning(found[1], host_nodes.CLIPTextEncode().encode(clip, prompt)[0])
    assert_same_conditioning(found[2], host_nodes.CLIPTextEncode().encode(clip, "blurry (very:1.2)")[0])


def test_a_clip_of_its_own_encodes_the_prompts_of_an_open_clip_instruction(bench: Bench, tiny_models: Path) -> None:
    adapter = memory.load_adapter(str(tiny_models / "ipadapter_instruct" / TINY_NAMES["my_adapter.safetensors"]), "own")
    file = tiny_models / "clip_vision" / TINY_NAMES["open_clip_model.safetensors"]
    open_clip = memory.load_hosted_open_clip(str(file), file.name)
    arguments = (adapter, open_clip, "style", "", "", "a cat", "blurry")
    with_clip = EncodeInstruction.execute(*arguments, prompt_clip=bench.clip)
    assert_same_conditioning(with_clip[1], host_nodes.CLIPTextEncode().encode(bench.clip, "a cat")[0])
    without = EncodeInstruction.execute(*arguments)
    assert without[0].wording == "use the style"  # as long as nobody asks for the prompts
    for output in (without[1], without[2]):
        with pytest.raises(ValueError, match="connect the CLIP of your checkpoint to prompt_clip"):
            host_nodes.KSampler().sample(
                bench.model, 1, 1, 5.0, "euler", "normal", output, bench.empty, {"samples": torch.zeros(1, 4, 8, 8)}
            )
    with pytest.raises(ValueError, match="is an OpenCLIP model, which encodes no prompt"):
        EncodeInstruction.execute(*arguments, prompt_clip=open_clip)
