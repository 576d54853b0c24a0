"""D-JEPA for the Hugging Face stack: models, token schedulers and the sampling pipeline."""

from diffusers import SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedModel

from .configuration_djepa import DJEPAConfig
from .conversion import load_official_checkpoint
from .modeling_djepa import DJEPAForPreTraining, DJEPAModel
from .pipeline_djepa import DJEPAPipeline
from .schedulers import DDPMTokenScheduler, FlowMatchTokenScheduler

__version__ = "0.1.0"

AutoConfig.register("djepa", DJEPAConfig)
AutoModel.register(DJEPAConfig, DJEPAModel)
AutoModelForPreTraining.register(DJEPAConfig, DJEPAForPreTraining)

# diffusers loads a pipeline's components only from libraries in this table, and finds a class's loader by the base
# classes that the library shows beside it: hence PreTrainedModel and SchedulerMixin in this namespace. With the entry,
# model_index.json says ["djepa_hf", "DJEPAModel"], and folders load from the Hub as they do from disk.
LOADABLE_CLASSES["djepa_hf"] = {
    "PreTrainedModel": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
}
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["djepa_hf"])

__all__ = [
    "DDPMTokenScheduler",
    "DJEPAConfig",
    "DJEPAForPreTraining",
    "DJEPAModel",
    "DJEPAPipeline",
    "FlowMatchTokenScheduler",
    "PreTrainedModel",
    "SchedulerMixin",
    "load_official_checkpoint",
]
