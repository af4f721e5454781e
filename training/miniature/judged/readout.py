"""Where replication stumbles: what a linear classifier reads from the CLIP's states, and from the adapter's tokens.

It is asked about pictures of combinations that are held out from the adapter's training, having learned from those that
are not, or from all. What the latter reads is there; what the former does not is hard to generalise to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ipadapter_instruct_core.tasks import Task, phrase
from torch import Tensor
from training.miniature.judged.cases import REPLICATED
from training.miniature.judged.painting import load_models
from training.miniature.judged.report import JOINT, table
from training.miniature.models.oracle import labels
from training.miniature.world.drawn import to_tensor
from training.miniature.world.factors import sample
from training.miniature.world.style import render

COMPONENTS = 256  # of the states, which are many more numbers than pictures to learn from


@dataclass
class ReadoutConfig:
    """Attributes:
    adapter: told "everything".
    models: the folder that `expand` has written.
    learned, asked: pictures of things to learn from of each kind, and to be asked about.
    """

    adapter: Path = Path("runs/miniature/expanded/adapter.safetensors")
    models: Path = Path("runs/miniature/expanded")
    learned: int = 3000
    asked: int = 500
    seed: int = 0


@torch.inference_mode()
def run(config: ReadoutConfig) -> None:
    models = load_models({JOINT: str(config.adapter)}, config.models, torch.device("cpu"))
    encoders, adapter = models.any_encoders, models.adapters[JOINT, Task.EVERYTHING].adapter
    instruction = encoders.instruction_states([phrase(Task.EVERYTHING)])[0]
    told = instruction, models.dropped[adapter.config.instruction_encoder]["empty_text"]

    def states(pixels: Tensor) -> Tensor:
        return encoders.image_states(encoders.image_tower.preprocess(pixels))

    def tokens(seen: Tensor) -> Tensor:
        return adapter.image_proj(seen, *(one.expand(len(seen), *one.shape) for one in told))

    kinds = {"known": (False, config.learned), "all": (None, config.learned), "asked": (True, config.asked)}
    facts, read = {}, {"CLIP's states": {}, "the adapter's tokens": {}}
    for place, (kind, (held_out, count)) in enumerate(kinds.items()):
        generator = np.random.default_rng([config.seed, place])
        shown = [sample(generator, held_out) for _ in range(count)]
        facts[kind] = labels(shown)
        pictures = to_tensor(np.stack([render(one) for one in shown])).split(100)
        seen = [states(part) for part in pictures]
        read["CLIP's states"][kind] = torch.cat(seen).flatten(1).numpy()
        read["the adapter's tokens"][kind] = torch.cat([tokens(part) for part in seen]).flatten(1).numpy()
    lines = []
    for where, found in read.items():
        known, all_of_them = (right(found, facts, kind) for kind in ("known", "all"))
        lines += [[where, factor, f"{known[factor]:.3f}", f"{all_of_them[factor]:.3f}"] for factor in REPLICATED]
    print(table(["read from", "factor", "learned of known combinations", "of all"], lines))


def right(found: dict[str, np.ndarray], facts: dict[str, dict[str, Tensor]], kind: str) -> dict[str, float]:
    """By factor, the share of pictures asked about in which a linear classifier that learned from a kind finds it."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    reduce = make_pipeline(StandardScaler(), PCA(COMPONENTS, random_state=0), StandardScaler())
    learned, asked = reduce.fit_transform(found[kind]), reduce.transform(found["asked"])
    shares = {}
    for factor in REPLICATED:
        model = LogisticRegression(max_iter=500).fit(learned, facts[kind][factor].numpy())
        shares[factor] = float(model.score(asked, facts["asked"][factor].numpy()))
    return shares
