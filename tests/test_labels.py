"""Class names: ImageNet's come with the presets, and names are found the way people write them."""

import pytest
from conftest import tiny_pipeline

from djepa_hf import DJEPAConfig
from djepa_hf.imagenet_classes import IMAGENET_CLASSES
from djepa_hf.labels import find_label_id

IMAGENET = dict(enumerate(IMAGENET_CLASSES))


@pytest.mark.parametrize("preset", ["base", "large", "huge"])
def test_presets_bring_imagenets_names(preset):
    config = DJEPAConfig.from_preset(preset)
    assert config.num_labels == 1000
    assert len(set(config.id2label.values())) == 999  # the bird and the machine are both called crane
    # the corners of the list, and classes that other lists are known to swap
    expected = {0: "tench", 207: "golden retriever", 281: "tabby", 639: "maillot", 999: "toilet tissue"}
    assert {i: config.id2label[i].split(",")[0] for i in expected} == expected
    assert DJEPAConfig.from_dict(config.to_dict()).id2label == config.id2label
    assert DJEPAConfig.from_preset(preset, num_labels=1000).id2label[0] == "LABEL_0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("golden retriever", 207),
        ("Golden_Retriever", 207),
        ("  GOLDEN   retriever ", 207),
        ("Tinca tinca", 0),
        ("tench, Tinca tinca", 0),
        ("man-eating shark", 2),
        ("cardigan", 474),  # the jacket's whole label
        ("Cardigan", 264),  # the dog's first name, exactly so
        ("maillot", 638),
        ("missile", 657),  # a whole label goes before another class's second name
        ("tub", 876),
    ],
)
def test_names_are_found(name, expected):
    assert find_label_id(name, IMAGENET) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crane", r"several classes: 134 \(crane\), 517 \(crane\). Pass one of the ids"),
        ("CRANE", "several classes: 134"),
        ("panda", r"several classes: 387 \(lesser panda, .*\), 388 \(giant panda"),
        ("golden retreiver", "Unknown class 'golden retreiver'. The closest names are: golden retriever"),
        ("", "Unknown class ''"),
    ],
)
def test_names_that_are_unknown_or_shared_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_label_id(name, IMAGENET)


def test_every_class_can_be_called_by_its_whole_label_or_its_id():
    pipe = tiny_pipeline(id2label=IMAGENET)
    shared = [i for i, label in IMAGENET.items() if IMAGENET_CLASSES.count(label) > 1]
    assert shared == [134, 517]
    for i, label in IMAGENET.items():
        assert i in shared or pipe.get_label_ids(label) == [i]
    assert pipe.get_label_ids("golden retriever") == pipe.get_label_ids([207])
