"""The catalogue of nodes, in the order in which a workflow wires them."""

from .apply import ApplyAdapter
from .encode_instruction import EncodeInstruction
from .guider import Guider
from .host import folders
from .load_model import LoadModel
from .load_open_clip import LoadOpenClip

NODES = [LoadModel, LoadOpenClip, EncodeInstruction, ApplyAdapter, Guider]

folders.register()
