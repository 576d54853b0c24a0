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


def test_a_card_that_is_there_stays(server, pushed, tmp_path):
    own = b'---\nlicense: mit\n---\n# Mine\n\n```python\npipe = DJEPAPipeline.from_pretrained("elsewhere")\n```\n'
    server.repos["org/djepa-mine"] = {"main": {"README.md": own}}
    (tmp_path / "local").mkdir()
    tiny_pipeline().save_pretrained(tmp_path / "local")
    (tmp_path / "local" / "README.md").write_bytes(own.replace(b"# Mine", b"# Local"))
    code = f"""
    from djepa_hf import DJEPAPipeline
    from huggingface_hub import EvalResult
    from djepa_hf.model_card import create_model_card
    pipe = DJEPAPipeline.from_pretrained({str(tmp_path / "local")!r})
    pipe.push_to_hub("org/djepa-mine")
    pipe.push_to_hub("org/djepa-local")
    pipe.push_to_hub("org/djepa-given", model_card=create_model_card(pipe, "org/djepa-given", training="Long ago."))
    pipe.save_pretrained({str(tmp_path / "other")!r}, push_to_hub=True, repo_id="org/djepa-other")
    print(json.dumps(None))
    """
    run(code, tmp_path / "home", server)
    cards = {name: server.repos[f"org/djepa-{name}"]["main"]["README.md"].decode() for name in
             ("mine", "local", "given", "other")}  # fmt: skip
    assert "# Mine" in cards["mine"]
    assert 'from_pretrained("org/djepa-mine")' in cards["mine"]
    assert "# Local" in cards["local"]
    assert 'from_pretrained("org/djepa-local")' in cards["local"]
    assert "Long ago." in cards["given"]
    assert 'from_pretrained("org/djepa-other")' in cards["other"]


def test_pushing_without_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="There is no Hugging Face token to upload with"):
        tiny_pipeline().push_to_hub("org/djepa-tiny")
    with pytest.raises(ValueError, match="There is no Hugging Face token to upload with"):
        tiny_pipeline().save_pretrained(tmp_path / "out", push_to_hub=True)
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
