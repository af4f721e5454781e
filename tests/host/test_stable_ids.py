"""Names that saved workflows hold: once shipped, none of them changes. Add to this table, never edit it.

A type of an output may be added to: each name that a link was saved with stays among those that fit.
"""

from __future__ import annotations

import sys

import inside

TASKS = ["everything", "style", "composition", "object", "face", "colour", "pose", "foreground", "background"]
SHIPPED = {
    "IPAdapterInstructModelLoader": (["adapter_name"], ["IPADAPTER_INSTRUCT"]),
    "IPAdapterInstructOpenCLIPLoader": (["model_name"], ["IPADAPTER_INSTRUCT_OPEN_CLIP,CLIP,CLIP_VISION"]),
    "IPAdapterInstructEncode": (
        ["adapter", "clip", "task", "instruction", "subject", "prompt", "negative_prompt", "prompt_clip"],
        ["IPADAPTER_INSTRUCTION", "CONDITIONING", "CONDITIONING"],
    ),
    "IPAdapterInstructPrepareReference": (
        ["image", "crop_position", "colour", "seed", "use_mask", "margin", "size", "mask"],
        ["IMAGE"],
    ),
    "IPAdapterInstructAllTasks": (
        ["adapter", "clip", *TASKS, "wordings", "subject", "prompt", "negative_prompt", "prompt_clip"],
        ["IPADAPTER_INSTRUCTION", "STRING", "CONDITIONING", "CONDITIONING"],
    ),
    "IPAdapterInstructShowAttention": (["adapter", "instruction", "clip_vision", "image", "show"], ["IMAGE"]),
    "IPAdapterInstructLabelSheet": (["images", "columns", "label", "reference"], ["IMAGE"]),
    "IPAdapterInstructEncodeReference": (
        ["adapter", "instruction", "clip_vision", "image", "combine_images"],
        ["IPADAPTER_INSTRUCT_REFERENCE"],
    ),
    "IPAdapterInstructCombineReferences": (
        [
            "reference_1",
            "weight_1",
            "reference_2",
            "weight_2",
            "method",
            "reference_3",
            "weight_3",
            "reference_4",
            "weight_4",
        ],
        ["IPADAPTER_INSTRUCT_REFERENCE"],
    ),
    "IPAdapterInstructSaveReference": (["reference", "filename_prefix"], []),
    "IPAdapterInstructLoadReference": (["reference_name"], ["IPADAPTER_INSTRUCT_REFERENCE"]),
    "IPAdapterInstructApply": (
        [
            "model",
            "adapter",
            "instruction",
            "clip_vision",
            "image",
            "weight",
            "start_percent",
            "end_percent",
            "guidance",
            "instruct_scale",
            "image_scale",
            "combine_images",
            "mask",
            "reference",
            "negative_reference",
            "weight_curve",
        ],
        ["MODEL"],
    ),
    "IPAdapterInstructGuider": (
        ["model", "positive", "negative", "cfg", "instruct_scale", "image_scale"],
        ["GUIDER"],
    ),
}
CHOICES = {
    "task": TASKS,
    "show": ["attention", "difference to everything"],
    "crop_position": ["center", "top", "bottom", "left", "right", "pad"],
    "use_mask": ["zoom", "cut out", "cut out and zoom"],
    "guidance": ["auto", "simple", "three-way"],
    "combine_images": ["concatenate", "average", "one for each batch item"],
    "weight_curve": ["constant", "ease in", "ease out", "ease in-out", "ease out-in"],
    "method": ["side by side", "mean"],
}


def test_ids_inputs_and_outputs_are_those_shipped() -> None:
    schemas = {node.define_schema().node_id: node.define_schema() for node in sys.modules[f"{inside.PACK}.nodes"].NODES}
    found = {
        node_id: ([i.id for i in schema.inputs], [o.get_io_type() for o in schema.outputs])
        for node_id, schema in schemas.items()
    }
    assert found == SHIPPED
    inputs = [i for schema in schemas.values() for i in schema.inputs]
    assert {i.id: i.options for i in inputs if i.id in CHOICES} == CHOICES


def test_inputs_have_the_hosts_own_types() -> None:
    """By which packs that fill inputs from afar know them: they compare types with ==."""
    inputs = {
        i.id: i.get_io_type() for node in sys.modules[f"{inside.PACK}.nodes"].NODES for i in node.define_schema().inputs
    }
    host = {"model": "MODEL", "clip": "CLIP", "clip_vision": "CLIP_VISION", "image": "IMAGE", "mask": "MASK"}
    host |= {"positive": "CONDITIONING", "negative": "CONDITIONING"}
    assert {name: inputs[name] for name in host} == host
