"""Shards -> what training reads: latents and tokens, made once or at every step."""
