"""Between the authors' files and djepa_hf, both ways."""

from .ldm_vae import load_ldm_vae
from .official import load_official_checkpoint, load_official_model, save_official_checkpoint

__all__ = ["load_ldm_vae", "load_official_checkpoint", "load_official_model", "save_official_checkpoint"]
