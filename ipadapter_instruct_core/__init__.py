"""IPAdapter-Instruct in pure torch: no ComfyUI, no diffusers.

Data flows through the files in this order:

    config, tasks -> projector -> reference -> image_kv -> attention -> guidance
    curves (the weight over the steps), framing (what of a picture is seen), attention_map (where in it was looked)
    encoders (what feeds the projector), adapter and checkpoint (the whole, and its files)

Legend of the shapes in every docstring: B batch, N image patches, L text tokens, T adapter tokens,
P latent positions, D width of the projector, O width of an adapter token, H heads.
"""
