"""To the Hub and back, over HTTP to a stand-in for it, with and without djepa_hf installed."""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
from conftest import GOLDEN, tiny_pipeline, tiny_vae
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard

from djepa_hf import DJEPAPipeline
from djepa_hf.model_card import create_model_card
from djepa_hf.self_contained import single_file_source

SETUP = """
import json, sys, torch
FAST = {"num_inference_steps": 3, "num_denoising_steps": 2, "output_type": "pt"}

def image_of(pipe):
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    return pipe(0, latents=latents, token_order=torch.arange(16)[None], **FAST).images.flatten()[:8].tolist()
"""


def run(code: str, home: Path, server: HubServer | None, token: str | None = TOKEN, installed: bool = True):
    """What a fresh Python process, whose Hub is the stand-in (or nothing, offline), prints as JSON."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    env |= {"HF_ENDPOINT": server.url} if server else {"HF_HUB_OFFLINE": "1"}
    env |= {"HF_TOKEN": token} if token else {}
    # without `site` there are no editable installations: djepa_hf cannot be imported, all the rest can
    flags = [] if installed else ["-S"]
    env |= {} if installed else {"PYTHONPATH": sysconfig.get_path("purelib")}
    code = SETUP + textwrap.dedent(code)
    result = subprocess.run([sys.executable, *flags, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(server, tmp_path_factory):
    """The repository of a pipeline that went there by `push_to_hub`, and a picture of it."""
    home, folder = tmp_path_factory.mktemp("pushing"), tmp_path_factory.mktemp("saved")
    sizes = {"vae": tiny_vae(4), "sample_size": 4, "patch_size": 1, "num_channels": 4}
    tiny_pipeline(**sizes, weights="ema", latent_scaling_factor=0.5).save_pretrained(folder)
    code = f"""
    from djepa_hf import DJEPAPipeline
    pipe = DJEPAPipeline.from_pretrained({str(folder)!r})
    url = pipe.push_to_hub("org/djepa-tiny", self_contained=True, max_shard_size="100KB")
    pipe.to(torch.float16).push_to_hub("org/djepa-tiny", self_contained=True, variant="fp16", max_shard_size="30KB")
    pipe.to(torch.float32)
    pipe.scheduler.register_to_config(shift=2.0)
    pipe.push_to_hub("org/djepa-shifted")
    print(json.dumps([url, image_of(DJEPAPipeline.from_pretrained({str(folder)!r}))]))
    """
    url, picture = run(code, home, server)
    assert url.startswith(f"{server.url}/org/djepa-tiny/commit/")
    shifted = server.repos["org/djepa-shifted"]["main"]
    server.repos["org/djepa-tiny"]["shifted"] = {**server.repos["org/djepa-tiny"]["main"], **shifted}
    (checkpoint,) = GOLDEN.glob("official_flow.pth")
    server.repos["org/official"] = {"main": {}, "v1": {"files/djepa.pth": checkpoint.read_bytes()}}
    return picture


def test_what_is_pushed(server, pushed):
    files = server.repos["org/djepa-tiny"]["main"]
    names = {"README.md", "model_index.json", "pipeline.py", "transformer/config.json", "transformer/modeling_djepa.py"}
    assert names | {"scheduler/scheduling_flow_match_token.py", "vae/config.json"} <= set(files)
    shards = [name for name in files if name.startswith("transformer/model-") and name.endswith(".safetensors")]
    assert len(shards) > 1
    assert len([name for name in files if name.startswith("transformer/model.fp16-")]) > 1
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert 'DJEPAPipeline.from_pretrained("org/djepa-tiny")' in card.text
    assert 'DiffusionPipeline.from_pretrained("org/djepa-tiny", trust_remote_code=True)' in card.text
    assert "EMA (the moving average" in card.text
    # the second repository was not asked to bring its code
    assert not [name for name in server.repos["org/djepa-shifted"]["main"] if name.endswith(".py")]


def test_loading_by_id_and_then_without_a_network(server, pushed, tmp_path):
    code = """
    from djepa_hf import DJEPAPipeline
    from transformers import AutoModel
    pipe = DJEPAPipeline.from_pretrained("org/djepa-tiny")
    halved = DJEPAPipeline.from_pretrained("org/djepa-tiny", variant="fp16", dtype=torch.float16)
    model = AutoModel.from_pretrained("org/djepa-tiny", subfolder="transformer")
    official = DJEPAPipeline.from_single_file("org/official/files/djepa.pth", revision="v1", weights="online")
    page = DJEPAPipeline.from_single_file("https://huggingface.co/org/official/blob/v1/files/djepa.pth")
    print(json.dumps({
        "image": image_of(pipe),
        "class": f"{type(pipe).__module__}.{type(pipe).__name__}",
        "shift": DJEPAPipeline.from_pretrained("org/djepa-tiny", revision="shifted").scheduler.config.shift,
        "other": DJEPAPipeline.from_pretrained("org/djepa-shifted").scheduler.config.shift,
        "half": str(halved.transformer.dtype),
        "same": all(torch.equal(a, b) for a, b in zip(model.parameters(), pipe.transformer.parameters())),
        "model": f"{type(model).__module__}.{type(model).__name__}",
        "weights": [loaded.transformer.config.weights for loaded in (pipe, official, page)],
    }))
    """
    result = run(code, tmp_path, server, token=None)
    assert result.pop("image") == pushed
    assert result == {
        "class": "djepa_hf.pipeline_djepa.DJEPAPipeline",
        "shift": 2.0,
        "other": 2.0,
        "half": "torch.float16",
        "same": True,
        "model": "djepa_hf.modeling_djepa.DJEPAModel",
        "weights": ["ema", "online", "ema"],
    }
    offline = """
    from djepa_hf import DJEPAPipeline
    print(json.dumps(image_of(DJEPAPipeline.from_pretrained("org/djepa-tiny"))))
    """
    assert run(offline, tmp_path, None, token=None) == pushed


def test_loading_without_djepa_hf_and_then_without_a_network(server, pushed, tmp_path):
    code = """
    import importlib.util
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download
    assert importlib.util.find_spec("djepa_hf") is None
    try:
        DiffusionPipeline.from_pretrained("org/djepa-tiny")
        refused = False
    except ValueError as error:
        refused = "trust_remote_code" in str(error)
    pipe = DiffusionPipeline.from_pretrained("org/djepa-tiny", trust_remote_code=True)
    # what came with its code goes on with it
    pipe.save_pretrained("SAVED")
    snapshot_download("org/djepa-tiny")
    print(json.dumps([refused, image_of(pipe), type(pipe.transformer).__module__.partition(".")[0]]))
    """.replace("SAVED", str(tmp_path / "saved"))
    expected = [True, pushed, "diffusers_modules"]
    assert run(code, tmp_path / "home", server, token=None, installed=False) == expected
    # offline, diffusers asks the Hub about custom code by id all the same, but not about a folder
    offline = """
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download
    cached = snapshot_download("org/djepa-tiny", local_files_only=True)
    pipes = [DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) for folder in (cached, "SAVED")]
    print(json.dumps([image_of(pipe) for pipe in pipes]))
    """.replace("SAVED", str(tmp_path / "saved"))
    assert run(offline, tmp_path / "home", None, token=None, installed=False) == [pushed, pushed]


def test_cards_stay_and_move_with_their_pipelines(server, pushed, tmp_path):
    foreign = 'other = DiTPipeline.from_pretrained("facebook/DiT")'
    own = f"---\nlicense: mit\n---\n# Mine\n\n{foreign}\n"
    server.repos["org/djepa-mine"] = {"main": {"README.md": own.encode()}}
    tiny_pipeline().save_pretrained(tmp_path / "local")
    card = create_model_card(tiny_pipeline(), str(tmp_path / "local"), training=f"Long ago. {foreign}", license="mit")
    card.save(tmp_path / "local" / "README.md")
    code = f"""
    from djepa_hf import DJEPAPipeline
    from djepa_hf.model_card import create_model_card
    pipe = DJEPAPipeline.from_pretrained({str(tmp_path / "local")!r})
    pipe.push_to_hub("org/djepa-mine")
    pipe.push_to_hub("org/djepa-moved")
    DJEPAPipeline.from_pretrained("org/djepa-moved").push_to_hub("org/djepa-twice")
    pipe.push_to_hub("org/djepa-given", model_card=create_model_card(pipe, "org/djepa-given", training="Today."))
    pipe.save_pretrained({str(tmp_path / "other")!r}, push_to_hub=True, repo_id="org/djepa-other")
    print(json.dumps(None))
    """
    run(code, tmp_path / "home", server)
    names = ("mine", "moved", "twice", "given", "other")
    cards = {name: server.repos[f"org/djepa-{name}"]["main"]["README.md"].decode() for name in names}
    assert cards["mine"] == own
    assert "Today." in cards["given"]
    for name in ("moved", "twice", "other"):
        assert "Long ago." in cards[name]
        assert "license: mit" in cards[name]
        assert f'DJEPAPipeline.from_pretrained("org/djepa-{name}")' in cards[name]
        assert f"\n# djepa-{name}\n" in cards[name]
        assert foreign in cards[name]


def test_a_repository_that_brings_its_code_keeps_bringing_it(server, pushed, tmp_path):
    code = """
    from djepa_hf import DJEPAPipeline
    pipe = DJEPAPipeline.from_pretrained("org/djepa-tiny")
    pipe.push_to_hub("org/djepa-again", self_contained=True)
    pipe.push_to_hub("org/djepa-again")
    print(json.dumps(None))
    """
    run(code, tmp_path / "first", server)
    code = """
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("org/djepa-again", trust_remote_code=True)
    pipe.push_to_hub("org/djepa-remote")
    print(json.dumps(image_of(DiffusionPipeline.from_pretrained("org/djepa-remote", trust_remote_code=True))))
    """
    assert run(code, tmp_path / "second", server, installed=False) == pushed
    card = server.repos["org/djepa-remote"]["main"]["README.md"].decode()
    assert 'DJEPAPipeline.from_pretrained("org/djepa-remote")' in card


def test_links_to_the_hub(server, pushed, tmp_path):
    file = "org/official/resolve/v1/files/djepa.pth"
    links = [f"https://huggingface.co/{file}?download=true", f"hf://{file}", f"{server.url}/{file}"]
    code = f"""
    from djepa_hf.conversion.files import find_file
    found = [find_file(link).name for link in {links!r}]
    try:
        find_file("org/nothing/files/djepa.pth")
    except FileNotFoundError as error:
        found.append("neither here nor on the Hub" in str(error))
    print(json.dumps(found))
    """
    assert run(code, tmp_path, server, token=None) == ["djepa.pth"] * 3 + [True]


def test_pushing_without_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="There is no Hugging Face token to upload with"):
        tiny_pipeline().push_to_hub("org/djepa-tiny")
    with pytest.raises(ValueError, match="There is no Hugging Face token to upload with"):
        tiny_pipeline().save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_options_and_classes_that_cannot_be_saved_are_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match="There is no option 'self_contaned'; did you mean 'self_contained'"):
        tiny_pipeline().save_pretrained(tmp_path / "out", self_contaned=True)

    class Mine(DJEPAPipeline):
        pass

    with pytest.raises(ValueError, match=r"`self_contained`: Mine is defined in .*test_hub, outside djepa_hf"):
        Mine(**tiny_pipeline().components).save_pretrained(tmp_path / "out", self_contained=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_a_self_contained_folder_needs_no_trust_where_djepa_hf_is_installed(tmp_path, objective):
    pipe = tiny_pipeline(objective=objective)
    pipe.save_pretrained(tmp_path, self_contained=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DJEPAPipeline"]
    assert index["transformer"] == ["modeling_djepa", "DJEPAModel"]
    reloaded = DJEPAPipeline.from_pretrained(tmp_path)
    assert type(reloaded) is DJEPAPipeline
    assert type(reloaded.transformer) is type(pipe.transformer)
    for file in tmp_path.rglob("*.py"):
        assert "\nfrom ." not in file.read_text()


def test_names_that_mean_two_things_cannot_share_a_file(tmp_path, monkeypatch):
    package = tmp_path / "clashing"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0'\n")
    (package / "first.py").write_text("LIMIT = 1\n")
    (package / "second.py").write_text("from .first import LIMIT as _\n\nLIMIT = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"clashing.first and clashing.second both define LIMIT"):
        single_file_source("clashing.second")
