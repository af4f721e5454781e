"""What only a card shows, in under seven minutes: `python -m benchmarks.card`; README.md beside this tells how.

The parts, in the order of their worth, each in a process of its own:

right            the pack's pictures: reference vectors, rows, weights unloaded, little memory, waiting for the card
fast             the pack's steps beside the bare host's, its memory, Apply
train_fast       images a second, the share of the card's matrix rate, memory; `encode`
train_right      half precisions beside float32; a run that was killed; two ranks
compiled         the pack's steps under the host's compile node
train_compiled   images a second with torch.compile, of which the first step takes minutes
"""
