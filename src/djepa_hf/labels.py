"""Class names: from a name, as people write it, to a class id."""

import difflib


class UnknownClassError(ValueError):
    """No class has that name."""


def find_label_id(name: str, id2label: dict[int, str]) -> int:
    """
    The class that a name stands for.

    A label may hold several names, separated by commas. What is spelled exactly like one of them goes before what
    differs in case, underscores or spaces; a whole label goes before its first name, and that before its others.

    Args:
        name (`str`): as in `id2label`, or any comma-separated part of a label.
        id2label (`dict[int, str]`): the model's labels.

    Returns:
        `int`: the class id.

    Raises:
        UnknownClassError: if no class has that name; the closest names are given.
        ValueError: if several have it; their ids are given.
    """
    for spelling in (str.strip, _normalized):
        for parts in (lambda label: [label], lambda label: label.split(",")[:1], lambda label: label.split(",")):
            found = [i for i, label in id2label.items() if spelling(name) in [spelling(part) for part in parts(label)]]
            if len(found) > 1:
                classes = ", ".join(f"{i} ({id2label[i]})" for i in found)
                raise ValueError(f"{name!r} is the name of several classes: {classes}. Pass one of the ids.")
            if found:
                return found[0]
    names = {_normalized(part): part.strip() for label in id2label.values() for part in [*label.split(","), label]}
    closest = difflib.get_close_matches(_normalized(name), names, n=3, cutoff=0.0)
    raise UnknownClassError(f"Unknown class {name!r}. The closest names are: {', '.join(names[c] for c in closest)}.")


def _normalized(text: str) -> str:
    return " ".join(text.replace("_", " ").split()).casefold()
