"""How a base model mixes pictures with noise, and what it predicts of the mixture."""

from typing import Any, NamedTuple

from torch import Tensor


class Noised(NamedTuple):
    """Latents with noise in them, what the model should make of them (both [B, C, h, w]), and the model's time [B]."""

    latents: Tensor
    target: Tensor
    time: Tensor


def follows_flow(schedule: Any) -> bool:
    """Whether noise is mixed along straight lines (flow matching, as SD3), not as in SD's diffusion."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return isinstance(schedule, FlowMatchEulerDiscreteScheduler)


def noised(schedule: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
    """Mix clean latents with noise, both [B, C, h, w].

    Args:
        timesteps: places [B] in the schedule: from picture to noise in diffusion, from noise to picture in flow
            matching, as diffusers numbers its shares of noise.
    """
    if not follows_flow(schedule):
        predicts_v = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, timesteps) if predicts_v else noise
        return Noised(schedule.add_noise(latents, noise, timesteps), target, timesteps)
    places = timesteps.cpu()  # the schedule's table stays there
    share = schedule.sigmas[places].to(latents)[:, None, None, None]
    return Noised((1 - share) * latents + share * noise, noise - latents, schedule.timesteps[places].to(latents))
