"""How a pipeline comes from files and from the Hub, and gets there."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import ModelCard, create_repo, file_exists, get_token, repo_exists, upload_folder
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from transformers import PreTrainedModel

from .configuration_djepa import DJEPAConfig
from .conversion import load_official_model
from .json_files import write_json
from .model_card import create_model_card, renamed
from .options import check_options
from .schedulers import token_scheduler_for
from .self_contained import brings_its_code, check_code, write_code

_PACKAGE = __name__.rpartition(".")[0]


class PipelineHubMixin:
    """Loading, saving and publishing of [`DJEPAPipeline`], where it goes beyond diffusers' own."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        vae: AutoencoderKL | None = None,
        weights: str = "ema",
        dtype: torch.dtype | None = None,
        config: DJEPAConfig | dict[str, Any] | None = None,
        **hub_options,
    ):
        """
        A pipeline from one of the authors' training files.

        Sizes come from the shapes of the tensors and the options that the file was trained with, and from `config`
        where neither tells. No code from the file is run, and only the weights asked for are read.

        Args:
            pretrained_model_link_or_path (`str` or `os.PathLike`): a `.pth` file on disk or on the Hub
                (`owner/name/djepa_base.pth`, or its address).
            vae ([`~diffusers.AutoencoderKL`], *optional*): the autoencoder of the model's latents.
            weights (`"ema"` or `"online"`, defaults to `"ema"`): which copy to sample from. The log, the saved
                configuration (`transformer.config.weights`) and the model card say which it was.
            dtype (`torch.dtype`, *optional*): of the model; as stored (float32) if not given.
            config ([`DJEPAConfig`] or `dict`, *optional*): the configuration, or single arguments of it, such as
                `{"num_attention_heads": 12}`, that the file does not tell.
            **hub_options: `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no such checkpoint, holds anything that could run code, does not fit `config` or
                `vae`, has tensors missing, left over or of another shape (all are listed), or overflows in `dtype`.
        """
        if vae is not None and not isinstance(vae, AutoencoderKL):
            raise ValueError(f"`vae` must be an AutoencoderKL, got {vae!r}: load it first, with its `from_pretrained`.")

        def pipeline(model: PreTrainedModel):
            return cls(transformer=model, scheduler=token_scheduler_for(model.config.objective), vae=vae)

        model = load_official_model(
            pretrained_model_link_or_path,
            weights,
            dtype,
            config,
            vae_channels=vae.config.latent_channels if vae is not None else None,
            check=pipeline,  # whether they fit each other shows before gigabytes are read
            **hub_options,
        )
        return pipeline(model)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        self_contained: bool | None = None,
        **kwargs,
    ):
        """
        As [`~diffusers.DiffusionPipeline.save_pretrained`].

        Args:
            save_directory (`str` or `os.PathLike`): the folder to write.
            safe_serialization (`bool`, defaults to `True`): as in diffusers.
            variant (`str`, *optional*): such as `"fp16"`, becomes part of the weights' file names.
            max_shard_size (`int` or `str`, *optional*): larger weights are split.
            push_to_hub (`bool`, defaults to `False`): whether to upload the folder, see [`~DJEPAPipeline.push_to_hub`].
            self_contained (`bool`, *optional*): whether to write the code beside the weights, for
                `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` where djepa_hf is not installed. If not
                given: where there is such code already.
            **kwargs: `repo_id` and other arguments of [`~DJEPAPipeline.push_to_hub`].

        Raises:
            ValueError: if an argument does not exist, if a class is not djepa_hf's whose code is to be written, or,
                with `push_to_hub`, if there is no token; before anything is written.
        """
        repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
        check_options(kwargs, ("commit_message", "private", "token", "create_pr", "model_card", "self_contained"))
        if push_to_hub:
            check_token(kwargs.get("token"))
        if self_contained is None:
            self_contained = brings_its_code(self) or (Path(save_directory) / "pipeline.py").exists()
        if self_contained:
            check_code(self)
        self._check_adapters_can_be_saved()
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        self._save_adapters(save_directory)
        if variant is not None:
            # All variants share one configuration, so that it must not name the type of this one: transformers would
            # load the others in it. Without it, weights load as they are stored.
            configuration = Path(save_directory) / "transformer" / "config.json"
            shared = json.loads(configuration.read_text())
            shared.pop("dtype", None)
            write_json(configuration, shared)
        if self_contained:
            write_code(self, save_directory)
        if push_to_hub:
            upload_pipeline(self, save_directory, repo_id, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        self_contained: bool | None = None,
        model_card: ModelCard | None = None,
    ) -> str:
        """
        Uploads the pipeline with a model card.

        The card is `model_card` if given; else the one that the repository has already; else that of the folder or
        repository which the pipeline came from; else a new one, from the pipeline's configuration.

        Args:
            repo_id (`str`): `owner/name`; made if it does not exist.
            commit_message (`str`, *optional*): of the commit.
            private (`bool`, *optional*): whether a new repository is private.
            token (`str`, *optional*): to write there; that of `hf auth login` if not given.
            create_pr (`bool`, defaults to `False`): whether to open a pull request instead.
            safe_serialization, variant, max_shard_size, self_contained: as in [`~DJEPAPipeline.save_pretrained`].
            model_card ([`~huggingface_hub.ModelCard`], *optional*): such as [`create_model_card`] makes.

        Returns:
            `str`: the address of the commit.

        Raises:
            ValueError: if there is no token; before anything is written.
        """
        check_token(token)
        if self_contained is None and repo_exists(repo_id, token=token):
            self_contained = file_exists(repo_id, "pipeline.py", token=token) or None
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size, self_contained=self_contained)
            return upload_pipeline(self, folder, repo_id, commit_message, private, token, create_pr, model_card)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # Where djepa_hf is installed, a self-contained folder needs neither its own code nor the trust for it.
        index = super()._dict_from_json_file(json_file)
        if not cls.__module__.startswith(f"{_PACKAGE}."):
            return index
        library = sys.modules[_PACKAGE]
        for name, value in index.items():
            if isinstance(value, list) and value[0] not in (None, _PACKAGE) and hasattr(library, value[1]):
                index[name] = value[1] if name == "_class_name" else [_PACKAGE, value[1]]
        return index


def upload_pipeline(
    pipe: DiffusionPipeline,
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    model_card: ModelCard | None = None,
) -> str:
    """
    Uploads the folder that a pipeline was saved to. Writes a model card into it first.

    Args:
        pipe ([`DJEPAPipeline`]): which the folder holds.
        folder (`str` or `os.PathLike`): to upload.
        repo_id, commit_message, private, token, create_pr, model_card: as in [`~DJEPAPipeline.push_to_hub`].

    Returns:
        `str`: the address of the commit.
    """
    check_token(token)
    folder = Path(folder)
    card = model_card or _card_of(repo_id, token)
    if card is None and (card := _card_of(pipe.config.get("_name_or_path"), token)) is not None:
        card = renamed(card, repo_id)
    if card is None and not brings_its_code(pipe):  # which does not bring the card's template
        card = create_model_card(pipe, repo_id, self_contained=(folder / "pipeline.py").exists())
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if card is not None:
        card.save(folder / "README.md")
    message = commit_message or f"Upload {type(pipe).__name__}"
    return str(
        upload_folder(
            repo_id=repo_id, folder_path=folder, token=token, commit_message=message, create_pr=create_pr
        ).commit_url
    )


def _card_of(name_or_path: str | None, token: str | None) -> ModelCard | None:
    """The card in a folder or repository, if there is one."""
    if name_or_path is None:
        return None
    local = Path(name_or_path)
    if local.is_dir():
        return ModelCard.load(local / "README.md") if (local / "README.md").is_file() else None
    try:
        return ModelCard.load(str(name_or_path), token=token)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None


def check_token(token: str | bool | None):
    """Raises a `ValueError` if there is no token to write to the Hub with."""
    if not (token or get_token()):
        raise ValueError("There is no Hugging Face token to upload with: run `hf auth login`, or pass `token`.")
