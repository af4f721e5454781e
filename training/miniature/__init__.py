"""A small world of known factors, and small models trained on it: what the pack shows without 7 GB of weights.

factors -> draw -> style = a picture; captions = its words; samples = the five tasks; then the models that see and
paint it: autoencoder, oracle, clip, base; and expand, which writes them in the sizes that ComfyUI knows.
"""
