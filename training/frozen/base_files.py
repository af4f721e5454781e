"""A base model's parts, read strictly from a diffusers folder or a single-file checkpoint; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ipadapter_instruct_core.config import Base
from torch import nn

PIPELINES = {
    "StableDiffusionPipeline": Base.SD15,
    "StableDiffusionXLPipeline": Base.SDXL,
    "StableDiffusion3Pipeline": Base.SD3,
}
SD3_LIKE = (Base.SD3, Base.SD35)  # the same autoencoder, text encoders and flow
T5 = "text_encoder_3"
TEXT_ENCODERS = {
    Base.SD15: ("text_encoder",),
    Base.SDXL: ("text_encoder", "text_encoder_2"),
    **dict.fromkeys(SD3_LIKE, ("text_encoder", "text_encoder_2", T5)),
}
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
# What else a whole single-file checkpoint holds, by the beginning of its keys.
KEYS = {
    Base.SD15: {
        "autoencoder": "first_stage_model.",
        "CLIP-L text encoder": "cond_stage_model.transformer.text_model.",
    },
    Base.SDXL: {
        "autoencoder": "first_stage_model.",
        "CLIP-L text encoder": "conditioner.embedders.0.transformer.text_model.",
        "OpenCLIP text encoder": "conditioner.embedders.1.model.",
    },
}


class Parts(NamedTuple):
    """``network``, a U-Net or SD3's transformer, is None where not asked for; ``schedule`` is a DDPMScheduler with
    the base's own noise, or SD3's FlowMatchEulerDiscreteScheduler."""

    kind: Base
    network: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    schedule: Any


def folder_kind(path: Path) -> Base:
    """Raises ValueError where a folder is no SD1.5, SDXL, SD3 or SD3.5 pipeline in diffusers' layout."""
    from diffusers import DiffusionPipeline

    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} holds no model_index.json; give the folder of a whole diffusers pipeline.")
    try:
        config: Any = DiffusionPipeline.load_config(path)
        name = config.get("_class_name")
    except OSError as error:
        raise ValueError(f"{path / 'model_index.json'} cannot be read; download the folder again.") from error
    if name not in PIPELINES:
        raise ValueError(f"{path} is a {name}; adapters are trained on SD1.5, SDXL and SD3 pipelines.")
    kind = PIPELINES[name]
    return Base.SD35 if kind is Base.SD3 and _norms_queries(path / "transformer" / "config.json") else kind


def _norms_queries(config: Path) -> bool:
    """SD3.5's pipeline has SD3's name. A config that cannot be read is told of where the transformer is read."""
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("qk_norm") is not None
    except (OSError, ValueError):
        return False


def read_folder(path: Path, with_network: bool, with_t5: bool = True) -> Parts:
    """Raises ValueError where a part is missing, damaged or incomplete; the sentence names it."""
    kind = folder_kind(path)
    flow = kind in SD3_LIKE
    return Parts(
        kind=kind,
        network=_read_part(path, "transformer" if flow else "unet", kind) if with_network else None,
        vae=_read_part(path, "vae", kind),
        text_encoders=tuple(_read_part(path, name, kind) for name in TEXT_ENCODERS[kind] if name != T5 or with_t5),
        schedule=_flow_schedule(path) if flow else _schedule(path),
    )


def _read_part(path: Path, name: str, kind: Base) -> nn.Module:
    import diffusers
    import transformers
    from safetensors import SafetensorError

    tiny = "AutoencoderTiny" in _config_file(path, name).read_text(encoding="utf-8")
    projects = kind in SD3_LIKE  # there, both CLIP encoders do
    kinds = {
        "unet": diffusers.UNet2DConditionModel,
        "transformer": diffusers.SD3Transformer2DModel,
        "vae": diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        T5: transformers.T5EncoderModel,
    }
    try:
        model, report = kinds[name].from_pretrained(
            path, subfolder=name, variant=_variant(path / name), local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path / name} cannot be read ({_first(error)}); download the folder again.") from error
    missing = sorted(report["missing_keys"])
    if missing:  # the libraries would fill these with random numbers
        raise ValueError(f"{path / name} lacks {len(missing)} weights ({missing[0]}, ...); download the folder again.")
    surplus = sorted(report["unexpected_keys"]) if name in ("unet", "transformer") else []
    if surplus:  # of encoders many files hold more than is read; of the network that would be another network
        raise ValueError(
            f"{path / name} holds {len(surplus)} weights that its config.json has no place for ({surplus[0]}, ...); "
            "download the folder again."
        )
    return model


def _config_file(path: Path, name: str, file: str = "config.json") -> Path:
    found = path / name / file
    if not found.is_file():
        raise ValueError(f"{path} lacks its {name}: there is no {name}/{file}; give a whole diffusers folder.")
    return found


def _variant(folder: Path) -> str | None:
    """Many folders on the Hub hold their weights in half precision alone, under names of their own."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _schedule(path: Path, **changes: Any) -> Any:
    from diffusers import DDPMScheduler

    _config_file(path, "scheduler", "scheduler_config.json")
    loaded: Any = DDPMScheduler.load_config(path, subfolder="scheduler")
    config = {**loaded, **changes}
    predicts = config.get("prediction_type", "epsilon")
    if "beta_start" not in config or predicts not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{path} follows the noise schedule of {config.get('_class_name')} and predicts {predicts}; "
            "adapters are trained on bases with SD's betas that predict epsilon or v_prediction."
        )
    return DDPMScheduler.from_config(config)


def _flow_schedule(path: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    _config_file(path, "scheduler", "scheduler_config.json")
    config: Any = FlowMatchEulerDiscreteScheduler.load_config(path, subfolder="scheduler")
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{path} follows the noise schedule of {config.get('_class_name')}, not SD3's; give SD3 medium's folder or "
            "SD3.5's."
        )
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def t5_tokenizer(path: Path) -> Any:
    """T5's tokenizer from a pipeline's folder.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path / "tokenizer_3", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / 'tokenizer_3'} is no tokenizer ({_first(error)}); download the folder again."
        ) from error


def _first(error: BaseException) -> str:
    """An error of a library, cut to its first sentence."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return " ".join(line.split(". ")[0].split()).rstrip(".")


def _keys(path: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name} is no .safetensors file; take that version of the checkpoint: others can run code."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file; download it again.") from error


def single_file_kind(path: Path) -> Base:
    """Raises ValueError where a file is no SD1.5 or SDXL checkpoint with all its parts; the sentence says why."""
    keys = _keys(path)
    if UNET_KEY not in keys:
        raise ValueError(f"{path.name} is no checkpoint of SD1.5 or SDXL; of SD3, give the diffusers folder.")
    kind = Base.SDXL if any(key.startswith("conditioner.") for key in keys) else Base.SD15
    for part, start in KEYS[kind].items():
        if not any(key.startswith(start) for key in keys):
            raise ValueError(f"{path.name} holds no {part}; give a whole checkpoint of SD1.5 or SDXL.")
    if any(key.startswith("edm_") for key in keys):
        raise ValueError(f"{path.name} follows EDM's noise schedule; adapters are trained on bases with SD's own.")
    return kind


def read_single_file(path: Path, kind: Base, config: Path, with_network: bool) -> Parts:
    """Read a checkpoint in the original key layout.

    Args:
        config: a folder in diffusers' layout with the configurations of the parts.

    Raises:
        ValueError: weights are missing or of other shapes than the configurations say.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if folder_kind(config) is not kind:
        raise ValueError(f"{path.name} is {kind.label}, but {config} describes another; give the one that fits.")
    for name in ("unet", "vae", *TEXT_ENCODERS[kind]):
        _config_file(config, name)
    keys = _keys(path)
    changes = {"prediction_type": "v_prediction"} if "v_pred" in keys else {}  # marks that ComfyUI reads, too
    changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in keys else {}
    schedule = _schedule(config, **changes)
    pipeline = StableDiffusionXLPipeline if kind is Base.SDXL else StableDiffusionPipeline
    given: dict[str, Any] = {"scheduler": None, "feature_extractor": None, "tokenizer": None}
    given |= {"tokenizer_2": None} if kind is Base.SDXL else {"safety_checker": None, "requires_safety_checker": False}
    given |= {} if with_network else {"unet": None}
    try:
        pipe = pipeline.from_single_file(str(path), config=str(config), local_files_only=True, **given)
        models = [getattr(pipe, name) for name in ("unet", "vae", *TEXT_ENCODERS[kind])]
        if any(tensor.is_meta for model in models if model is not None for tensor in model.state_dict().values()):
            raise NotImplementedError
    except Exception as error:  # the conversion tells of a file that does not fit in many ways
        why = "weights are missing" if isinstance(error, NotImplementedError) else _first(error)
        raise ValueError(
            f"{path.name} is no {kind.label} as {config} describes it ({why}); download it again, "
            "or give its own configurations as base_config."
        ) from error
    return Parts(kind, models[0], models[1], tuple(models[2:]), schedule)
