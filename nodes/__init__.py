"""The catalogue of nodes, in the order in which a workflow wires them."""

from .all_tasks import AllTasks
from .apply import ApplyAdapter
from .combine_references import CombineReferences
from .encode_instruction import EncodeInstruction
from .encode_reference import EncodeReference
from .guider import Guider
from .host import folders
from .label_sheet import LabelSheet
from .load_model import LoadModel
from .load_open_clip import LoadOpenClip
from .load_reference import LoadReference
from .prepare_reference import PrepareReference
from .save_reference import SaveReference
from .show_attention import ShowAttention

NODES = [
    LoadModel,
    LoadOpenClip,
    EncodeInstruction,
    AllTasks,
    PrepareReference,
    EncodeReference,
    CombineReferences,
    SaveReference,
    LoadReference,
    ApplyAdapter,
    Guider,
    ShowAttention,
    LabelSheet,
]

folders.register()
