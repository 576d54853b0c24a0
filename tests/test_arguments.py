"""Options from YAML files and command lines."""

from pathlib import Path

import pytest

from djepa_hf.arguments import DataArguments, ModelArguments, SamplingArguments, TrainingArguments, parse_arguments

KINDS = (ModelArguments, DataArguments, TrainingArguments, SamplingArguments)
CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))


def parse(*argv):
    return parse_arguments(*KINDS, argv=[str(part) for part in argv])


def test_command_line_goes_before_the_file(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("hidden_size: 64\nlearning_rate: 1e-3\nrandom_flip: false\nmax_train_steps: 7\nreport_to:\n")
    model, data, training, _ = parse("--hidden_size", 32, "--config", config, "--learning_rate", "2e-3")
    assert model.hidden_size == 32
    assert model.num_hidden_layers is None
    assert training.learning_rate == 2e-3
    assert training.max_train_steps == 7
    assert training.report_to is None
    assert data.random_flip is False


def test_every_size_of_the_model_is_an_option():
    model, *_ = parse("--objective", "flow_matching", "--qk_norm", "false", "--mlp_ratio", 2, "--preset", "large")
    assert (model.objective, model.qk_norm, model.mlp_ratio, model.preset) == ("flow_matching", False, 2.0, "large")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    parse("--config", path)


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("learning_rat: 1", [], "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("- 1", [], "must be a mapping of options, got a list"),
        ("a: [", [], "cannot read"),
        ("hidden_size: wide", [], "invalid int value: 'wide'"),
        ("", ["--hiden_size", "3"], "there is no option --hiden_size; did you mean hidden_size?"),
        ("", ["--objective", "ddpm"], "invalid choice: 'ddpm'"),
        ("", ["--confg", "a"], "there is no option --confg; did you mean config?"),
        ("", ["stray"], "unexpected stray"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, text, argv, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as error:
        parse("--config", tmp_path / "a.yaml", *argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_train_steps", "0"], "`max_train_steps` must be at least 1, got 0"),
        (["--train_batch_size", "-1"], "`train_batch_size` must be at least 1, got -1"),
        (["--ema_decay", "2"], r"`ema_decay` must lie in \[0, 1\], got 2.0"),
        (["--learning_rate", "0"], "`learning_rate` must be positive, got 0.0"),
    ],
)
def test_impossible_values_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_yaml_may_say_no(tmp_path):
    (tmp_path / "a.yaml").write_text("mixed_precision: no")
    assert parse("--config", tmp_path / "a.yaml")[2].mixed_precision == "no"
    assert parse()[2].mixed_precision is None


def test_a_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        parse("--config", "nowhere.yaml")
    assert "cannot read nowhere.yaml" in capsys.readouterr().err


def test_steps_default_to_what_the_model_can():
    assert SamplingArguments().call_options(16)["num_inference_steps"] == 16
    assert SamplingArguments().call_options(256)["num_inference_steps"] == 64
    assert SamplingArguments(num_inference_steps=0).call_options(256)["num_inference_steps"] == 0  # refused later
    assert SamplingArguments(num_inference_steps=8).call_options(256)["num_inference_steps"] == 8
