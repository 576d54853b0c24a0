"""LoRA adapters: their files, and the methods of a pipeline that diffusers' users know."""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.peft_utils import delete_adapter_layers, recurse_remove_peft_layers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer"
CONFIG_KEY, CLASSES_KEY = "lora_adapter_metadata", "class_names"  # of a file's metadata; the first as in diffusers
CLASS_ROWS = "class_rows"
PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# attention and MLP of all three networks' blocks: a regular expression over full names, as peft takes it
DEFAULT_TARGETS = r"(encoder|predictor|denoiser)\.layers\.\d+\.(attention\.(qkv|proj)|fc1|fc2)"


@dataclass
class Adapter:
    """
    A LoRA adapter apart from any model.

    Args:
        config ([`~peft.LoraConfig`]): rank, scale and targets.
        weights (`dict[str, torch.Tensor]`): as `peft.get_peft_model_state_dict` names them.
        class_names (`list[str]`): of the classes that it brings.
        class_rows (`torch.Tensor` of shape `(classes, hidden_size)`, *optional*): their embeddings.
    """

    config: LoraConfig
    weights: dict[str, torch.Tensor]
    class_names: list[str]
    class_rows: torch.Tensor | None = None

    @classmethod
    def of_model(cls, model: nn.Module, name: str) -> "Adapter":
        """
        The adapter of a name that is attached to a [`DJEPAModel`].

        Raises:
            ValueError: if there is none of that name.
        """
        check_adapter_names(model, [name])
        weights, config = get_peft_model_state_dict(model, adapter_name=name), model.peft_config[name]
        if not config.rank_pattern:  # without the room that was made for other ranks
            weights = {key: tensor[: config.r] if ".lora_A." in key else tensor for key, tensor in weights.items()}
            weights = {key: tensor[:, : config.r] if ".lora_B." in key else tensor for key, tensor in weights.items()}
        table = model.get_input_embeddings()
        rows = table.added[name].detach() if name in table.added else None
        return cls(config, weights, model.added_classes.get(name, []), rows)

    @classmethod
    def read(cls, source: str | os.PathLike, **hub_options) -> "Adapter":
        """
        Reads an adapter.

        Args:
            source (`str` or `os.PathLike`): a file of [`~DJEPAPipeline.save_lora_weights`]; or a folder or a Hub
                repository that holds one, or one of plain peft (`get_peft_model(...).save_pretrained`).
            **hub_options: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            ValueError: if there is no adapter, it is damaged, or it is a pickle file, which could run code.
        """
        path = _find(source, **hub_options)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file, the only kind that is read: pickle files can run code.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        beside = path.with_name(PEFT_CONFIG)
        if CONFIG_KEY in metadata:
            options = json.loads(metadata[CONFIG_KEY])
            options = {name.removeprefix(f"{PREFIX}."): value for name, value in options.items()}
        elif beside.is_file():
            options = json.loads(beside.read_text())
        else:
            raise ValueError(
                f"{path} does not say how it was made: there is neither `{CONFIG_KEY}` in its metadata, nor "
                f"{PEFT_CONFIG} beside it."
            )
        return cls.of_tensors(tensors, config_of(options), json.loads(metadata.get(CLASSES_KEY, "[]")))

    @classmethod
    def of_tensors(
        cls, tensors: dict[str, torch.Tensor], config: LoraConfig, class_names: list[str] | None = None
    ) -> "Adapter":
        """
        An adapter from its tensors, under the names of a file or of `peft.get_peft_model_state_dict`.

        Args:
            tensors (`dict[str, torch.Tensor]`): the adapter's, and `class_rows` if it brings classes.
            config ([`~peft.LoraConfig`]): rank, scale and targets, which tensors do not tell.
            class_names (`list[str]`, *optional*): of the classes.

        Raises:
            ValueError: if there are no weights of LoRA among them, or rows and names do not match.
        """
        tensors = {name.removeprefix(PEFT_PREFIX).removeprefix(f"{PREFIX}."): t for name, t in tensors.items()}
        rows, names = tensors.pop(CLASS_ROWS, None), class_names or []
        if not tensors or not all(".lora_" in name for name in tensors):
            raise ValueError("These are no weights of a LoRA adapter.")
        if len(names) != (0 if rows is None else len(rows)):
            raise ValueError(f"The adapter has {len(names)} class names for {0 if rows is None else len(rows)} rows.")
        return cls(config, tensors, names, rows)

    def write(self, folder: str | os.PathLike, weight_name: str = WEIGHT_NAME) -> Path:
        """Writes one safetensors file, which holds everything; its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{PREFIX}.{name}": tensor for name, tensor in self.weights.items()}
        if self.class_rows is not None:
            tensors[f"{PREFIX}.{CLASS_ROWS}"] = self.class_rows
        options = {name: sorted(v) if isinstance(v, set) else v for name, v in self.config.to_dict().items()}
        metadata = {
            "format": "pt",
            CONFIG_KEY: json.dumps({f"{PREFIX}.{name}": value for name, value in options.items()}, sort_keys=True),
            CLASSES_KEY: json.dumps(self.class_names),
        }
        unfinished = folder / f"unfinished-{weight_name}"
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, unfinished, metadata)
        os.replace(unfinished, folder / weight_name)
        return folder / weight_name

    def check_weights(self, model: nn.Module):
        """Raises a `ValueError`, before anything is changed, unless the adapter was made for such a model."""
        linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        shapes = {name.removesuffix(".base_layer"): part.weight.shape for name, part in linear.items()}
        for name, tensor in self.weights.items():
            place, _, kind = name.partition(".lora_")
            if place not in shapes:
                raise ValueError(f"The adapter belongs to another model: this one has no layer {place!r}.")
            outputs, inputs = shapes[place]
            expected = {"A.weight": (None, inputs), "B.weight": (outputs, None)}.get(kind)
            differs = [a for a, b in zip(expected or (), tensor.shape, strict=False) if a not in (None, b)]
            if differs:
                raise ValueError(
                    f"The adapter belongs to another model: {name} has shape {tuple(tensor.shape)}, but the layer maps "
                    f"{inputs} to {outputs} numbers."
                )
            rank = {"A.weight": tensor.shape[0], "B.weight": tensor.shape[-1]}.get(kind)
            wanted = self.config.rank_pattern.get(place, self.config.r)
            if rank not in (None, wanted) and not self.config.rank_pattern:
                raise ValueError(f"The adapter's rank is {wanted}, but {name} has shape {tuple(tensor.shape)}.")
        width = model.config.hidden_size
        if self.class_rows is not None and self.class_rows.shape[1] != width:
            raise ValueError(f"The adapter's classes have width {self.class_rows.shape[1]}, the model's {width}.")


class DJEPALoraLoaderMixin(LoraBaseMixin):
    """LoRA for [`DJEPAPipeline`]: diffusers' methods, and the classes that an adapter brings."""

    _lora_loadable_modules = [PREFIX]
    _hotswap_options: dict[str, Any] | None = None
    _scaling_before_fusing: dict[str, dict] = {}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **hub_options,
    ):
        """
        Attaches an adapter and makes it the active one. Classes that it brings are known from then on.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): a file, folder or id, or tensors.
            **hub_options: see [`Adapter.read`]; for tensors `config` and `class_names`, see [`Adapter.of_tensors`].
            adapter_name (`str`, *optional*): `default_0`, `default_1` and so on if not given.
            hotswap (`bool`, defaults to `False`): put the weights into the place of the adapter of that name, which
                must have the same targets and no lower a rank. A compiled pipeline need not be compiled again.

        Raises:
            ValueError: if it cannot be read, belongs to another model, or brings a class that is there already. Nothing
                is changed then.
        """
        source, model = pretrained_model_name_or_path_or_dict, self.transformer
        if isinstance(source, dict):
            if "config" not in hub_options:
                raise ValueError("Tensors do not tell rank and scale: pass the adapter's `config`, a peft.LoraConfig.")
            adapter = Adapter.of_tensors(source, **hub_options)
        else:
            adapter = Adapter.read(source, **hub_options)
        attached = attached_adapters(model)
        free = next(f"default_{i}" for i in range(len(attached) + 1) if f"default_{i}" not in attached)
        name = adapter_name or ("default_0" if hotswap else free)
        adapter.check_weights(model)
        if hotswap:
            swap(model, adapter, name)
            return
        if name in attached:
            raise ValueError(f"There is an adapter {name!r} already: choose another name, or pass `hotswap=True`.")
        attach(model, adapter, name)
        if self._hotswap_options is not None and not attached:
            padded = copy.deepcopy(adapter.config)  # the model's own one goes on saying what the adapter is
            prepare_model_for_compiled_hotswap(model, config=padded, **self._hotswap_options)
        self.set_adapters(name)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error"):
        """
        As in diffusers, before the first adapter is loaded: makes room for ranks up to `target_rank`, so that adapters
        of other ranks can be swapped in without compiling again.

        Raises:
            ValueError: if there is an adapter already.
        """
        if attached_adapters(self.transformer):
            raise ValueError("`enable_lora_hotswap` comes before the first adapter is loaded.")
        self._hotswap_options = {"target_rank": target_rank, "check_compiled": check_compiled}

    def save_lora_weights(
        self, save_directory: str | os.PathLike, adapter_name: str | None = None, weight_name: str = WEIGHT_NAME
    ) -> Path:
        """
        Writes an attached adapter to one safetensors file, with its configuration and the classes that it brings.

        Args:
            save_directory (`str` or `os.PathLike`): a folder.
            adapter_name (`str`, *optional*): which, if several are attached.
            weight_name (`str`): of the file.

        Returns:
            `Path`: of the file.

        Raises:
            ValueError: if there is no such adapter, or several and no name.
        """
        attached = attached_adapters(self.transformer)
        if adapter_name is None and len(attached) != 1:
            raise ValueError(f"Say which adapter to save with `adapter_name`: there are {attached or 'none'}.")
        return Adapter.of_model(self.transformer, adapter_name or attached[0]).write(save_directory, weight_name)

    def _check_adapters_can_be_saved(self):
        """Raises a `ValueError` if the classes of a fused adapter would be lost."""
        lost = sorted(name for name in self.fused_loras if name in self.transformer.added_classes)
        if lost:
            raise ValueError(
                f"The fused adapter {lost[0]!r} brings classes, which would be lost: `unfuse_lora()` first."
            )

    def _save_adapters(self, folder: str | os.PathLike):
        """Writes all adapters beside the weights of a saved pipeline, but for fused ones, which are part of these."""
        names = [name for name in attached_adapters(self.transformer) if name not in self.fused_loras]
        for name in names:
            self.save_lora_weights(folder, name, WEIGHT_NAME if len(names) == 1 else f"{name}.safetensors")

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: float | list[float] | None = None):
        """
        Chooses the adapters to use, and how much of each.

        Raises:
            ValueError: if one is not attached.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        check_adapter_names(self.transformer, names)
        super().set_adapters(names, adapter_weights)

    def fuse_lora(self, components: list[str] = [PREFIX], **options):
        """
        As in diffusers: adds the active adapters, or those of `adapter_names`, to the weights themselves, which makes
        them as fast as without.

        Raises:
            ValueError: if one is not attached.
        """
        check_adapter_names(self.transformer, options.get("adapter_names") or [])
        self._scaling_before_fusing = scaling_of(self.transformer)
        super().fuse_lora(components, **options)

    def unfuse_lora(self, components: list[str] = [PREFIX], **options):
        """As in diffusers: takes [`~DJEPAPipeline.fuse_lora`] back."""
        super().unfuse_lora(components, **options)
        set_scaling(self.transformer, self._scaling_before_fusing)
        self._scaling_before_fusing = {}

    def delete_adapters(self, adapter_names: list[str] | str):
        """
        Takes adapters away, and the classes that they brought. Fused ones stay in the weights, as in diffusers.

        Raises:
            ValueError: if one is not attached.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        check_adapter_names(self.transformer, names)
        for name in names:
            remove_adapter(self.transformer, name)
        self._merged_adapters = self._merged_adapters - set(names)

    def unload_lora_weights(self):
        """Takes all adapters and their classes away. Fused ones stay in the weights, as in diffusers."""
        self.delete_adapters(attached_adapters(self.transformer))

    @contextmanager
    def _lora_scaled(self, attention_kwargs: dict[str, Any] | None) -> Iterator[None]:
        """Within, adapters work with the `scale` of a call."""
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if scale == 1.0:
            yield
            return
        before = scaling_of(self.transformer)
        for layer in tuner_layers(self.transformer).values():
            at_work = [name for name in layer.active_adapters if name in layer.scaling]
            layer.scaling.update({name: scale * layer.scaling[name] for name in at_work})
        try:
            yield
        finally:
            set_scaling(self.transformer, before)


def attach(model: nn.Module, adapter: Adapter, name: str):
    """
    Adds an adapter to a [`DJEPAModel`], with its classes.

    Raises:
        ValueError: if it does not fit; nothing is changed then.
    """
    model.check_new_classes(adapter.class_names)
    active, scaling = active_adapters_of(model), scaling_of(model)
    add_adapter(model, adapter.config, name)
    try:
        targets = set(get_peft_model_state_dict(model, adapter_name=name))
        if odd := sorted(targets ^ set(adapter.weights)):
            raise ValueError(f"The adapter's targets are not those of its weights, see {odd[0]}.")
        set_peft_model_state_dict(model, adapter.weights, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        remove_adapter(model, name)
        for part, names in active.items():
            model.get_submodule(part).set_adapter(names)
        set_scaling(model, scaling)
        raise ValueError(f"The adapter does not fit: {error}") from error
    if adapter.class_rows is not None:
        model.add_classes(adapter.class_names, adapter.class_rows, name)


def swap(model: nn.Module, adapter: Adapter, name: str):
    """
    Puts an adapter into the place of another one that is attached.

    Raises:
        ValueError: if there is none of that name, or this one has other targets or brings other classes.
    """
    check_adapter_names(model, [name])
    if adapter.config.use_dora or model.peft_config[name].use_dora:
        raise ValueError("Adapters with DoRA cannot be swapped: delete the one, and load the other.")
    if adapter.class_names != model.added_classes.get(name, []):
        raise ValueError("An adapter can only be swapped for one that brings the same classes.")
    weights = {}  # as the model itself calls them
    for key, tensor in adapter.weights.items():
        part, _, kind = key.rpartition(".")
        weights[f"{part}.{name}.{kind}"] = tensor
    try:
        hotswap_adapter_from_state_dict(model, weights, name, adapter.config)
    except RuntimeError as error:
        raise ValueError(f"The adapter cannot take the place of {name!r}, it has other targets.") from error
    model.peft_config[name] = adapter.config  # by which it is saved; the layers' own numbers are for `set_adapters`
    for layer in (layer for layer in tuner_layers(model).values() if name in layer.scaling):
        layer.r[name], layer.lora_alpha[name] = adapter.config.r, adapter.config.lora_alpha
        layer.use_rslora[name] = adapter.config.use_rslora
    if adapter.class_rows is not None:
        model.get_input_embeddings().added[name].data.copy_(adapter.class_rows)


def remove_adapter(model: nn.Module, name: str):
    """Takes an adapter away from a [`DJEPAModel`], the last one with all that peft has put there."""
    model.remove_classes(name)
    if list(model.peft_config) == [name]:
        recurse_remove_peft_layers(model)
        del model.peft_config
        model._hf_peft_config_loaded = False
    else:
        delete_adapter_layers(model, name)


def add_adapter(model: nn.Module, config: LoraConfig, name: str):
    """
    Adds a fresh adapter, which changes nothing yet, to a [`DJEPAModel`]. Its weights can be trained; whether others can
    be stays as it is.

    Raises:
        ValueError: if its targets match no layer (those that there are are listed), or the name has a dot.
    """
    if "." in name:
        raise ValueError(f"The name of an adapter must not have a dot, got {name!r}.")
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        inject_adapter_in_model(config, model, name)
    except ValueError as error:
        getattr(model, "peft_config", {}).pop(name, None)
        if getattr(model, "peft_config", None) == {}:
            del model.peft_config
        if "arget module" not in str(error):
            raise
        layers = sorted({name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ValueError(
            f"`target_modules` {config.target_modules!r} match no layer. Linear layers are called {', '.join(layers)}."
        ) from error
    finally:
        for parameter, is_trainable in trainable.items():
            parameter.requires_grad_(is_trainable)
    model._hf_peft_config_loaded = True
    model.train(model.training)  # what was added begins in training mode


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that adapters have been added to, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def active_adapters_of(model: nn.Module) -> dict[str, list[str]]:
    """The adapters at work in each of these layers."""
    return {name: list(layer.active_adapters) for name, layer in tuner_layers(model).items()}


def scaling_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """How strongly each adapter works in each of these layers."""
    return {name: dict(layer.scaling) for name, layer in tuner_layers(model).items()}


def set_scaling(model: nn.Module, scaling: dict[str, dict[str, float]]):
    """Goes back to what [`scaling_of`] said, for the adapters that are still there."""
    for name, layer in tuner_layers(model).items():
        before = scaling.get(name, {})
        layer.scaling.update({adapter: value for adapter, value in before.items() if adapter in layer.scaling})


def attached_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters of a model, active or not."""
    return list(getattr(model, "peft_config", {}))


def check_adapter_names(model: nn.Module, names: list[str]):
    """Raises a `ValueError` for the first name that no attached adapter has."""
    attached = attached_adapters(model)
    for name in names:
        if name not in attached:
            raise ValueError(f"There is no adapter {name!r}; attached are {', '.join(attached) or 'none'}.")


def config_of(options: dict[str, Any]) -> LoraConfig:
    """
    The configuration of an adapter from its file, but for how it began: some ways change the model's own weights.
    Options of other versions of peft are left out.
    """
    known = {field.name for field in fields(LoraConfig)} - {
        "init_lora_weights",
        "peft_type",
        "task_type",
        "runtime_config",
    }
    return LoraConfig(**{name: value for name, value in options.items() if name in known and value is not None})


def _find(
    source: str | os.PathLike, weight_name: str | None = None, subfolder: str | None = None, **hub_options
) -> Path:
    """The file of an adapter, downloaded if need be."""
    local = Path(source)
    if local.is_file():
        return local
    names = [weight_name] if weight_name else [WEIGHT_NAME, PEFT_WEIGHTS]
    if local.is_dir():
        folder = local / (subfolder or "")
        for name in names:
            if (folder / name).is_file():
                return folder / name
        if found := sorted(path.name for path in folder.glob("*.bin")):
            raise ValueError(f"{folder} holds {found[0]}: pickle files can run code, and are not read.")
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
        hint = f" There are {others}: choose one with `weight_name`." if others else ""
        raise ValueError(f"There is no adapter in {folder}: neither {' nor '.join(names)}.{hint}")
    problem = None
    for name in names:
        try:
            path = Path(hf_hub_download(str(source), name, subfolder=subfolder, **hub_options))
            if name == PEFT_WEIGHTS:
                hf_hub_download(str(source), PEFT_CONFIG, subfolder=subfolder, **hub_options)
            return path
        except EntryNotFoundError as error:  # or there is no network, and it is not in the cache
            problem = error
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            problem = error
            break
    raise ValueError(
        f"There is no adapter {str(source)!r}, neither here nor on the Hub, where {' or '.join(names)} was looked for: "
        f"{problem}"
    ) from problem
