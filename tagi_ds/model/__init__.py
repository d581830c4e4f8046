"""The model: instruction -> encoded instruction -> adapters and fusion memory -> adapted backbone -> logits.

Knows nothing of DeepSpeed, data sets, run folders or logging.
"""

from tagi_ds.model.adapter import LowRank, Site, TaskState
from tagi_ds.model.configuration import TagiConfig
from tagi_ds.model.tagi import TagiForConditionalGeneration, TagiOutput

__all__ = ["LowRank", "Site", "TagiConfig", "TagiForConditionalGeneration", "TagiOutput", "TaskState"]
