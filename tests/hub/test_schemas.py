"""Result files and facts of cards with anything in the wrong place: a documented error that can be read, or a card."""

import copy
import json
import random

import pytest

from mfac_hf.hub.card import build_card, check_facts
from mfac_hf.hub.facts import CardOptions, collect
from mfac_hf.hub.run_records import read_run
from mfac_hf.storage import read_json
from tests.helpers.results import log, pruned, results, run

OTHERS = [None, True, 0, -1, 3.5, "", "text", "<b>|`*`", [], {}, [1], ["a", None], {"a": 1}, [[]], 10**400, "\ud800"]
OTHERS += [float("nan"), float("inf"), -float("inf"), {"steps": [1]}, "../../x", "\x1b[2J\n---\n"]
REPORT = {"options": {"num_grads": 64, "damping": "auto"}, "sparsity": 0.9, "steps": [{"damping": 1e-4}]}
FILES = {
    "results.json": run(1, 0.8, {"reports": [REPORT]}),
    "third.json": results(base_model="user/x", dataset={"id": "user/data", "config": None}, optimizer={"name": "SGD"}),
    "pruning.json": pruned(),
    "log.json": log(),
}


def places(value, path=()):
    """Paths to all parts of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(value, generator):
    """A copy in which one to three parts are another value, missing, or under another key."""
    value = copy.deepcopy(value)
    for _ in range(generator.randint(1, 3)):
        path = generator.choice(list(places(value)))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = generator.random()
        if kind < 0.15:
            del parent[path[-1]]
        elif kind < 0.2 and isinstance(parent, dict):
            parent["other"] = parent.pop(path[-1])
        else:
            parent[path[-1]] = copy.deepcopy(generator.choice(OTHERS))
    return value


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_changed_result_files(name, tmp_path):
    generator, path = random.Random(name), tmp_path / name
    refused = 0
    for number in range(300):
        path.write_text(json.dumps(changed(FILES[name], generator)))
        try:
            found = read_run(path, sparsity=generator.choice([None, 0.8, 0.5]), strict=number % 2 == 0)
            json.dumps(found)
        except ValueError as error:
            refused += 1
            assert name in str(error), error
    assert 30 < refused < 300


@pytest.mark.parametrize("name", FILES)
def test_cut_result_files(name, tmp_path):
    generator, path = random.Random(name), tmp_path / name
    content = json.dumps(FILES[name]).encode()
    for _ in range(60):
        damaged = bytearray(content[: generator.randrange(len(content))])
        for _ in range(generator.randint(0, 3)):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            read_run(path)


@pytest.mark.slow
def test_changed_facts_of_a_card(bert, tmp_path):
    options = CardOptions(dense=[run(1, 0.9)], caveats=["One."], license="mit")
    facts = collect([run(1, 0.8), run(2, 0.81)], model=bert, options=options)
    facts["weights"]["tensors"] = facts["weights"]["tensors"][:2]  # all alike
    facts["latency"] = {"example": "1 x 8", "seconds": {"dense": 0.1, "sparse": 0.2}, "sparse_layers": 1, "calls": 3}
    facts["latency"] |= {"hardware": "x", "threads": 1, "torch": "2"}
    facts["model"]["adapter"] = {"type": "LORA", "base": "user/x", "base_class": None, "settings": {"r": 2}}
    generator, path = random.Random(0), tmp_path / "card.json"
    written = 0
    for _ in range(400):
        path.write_text(json.dumps(changed(facts, generator)))
        try:
            again = read_json(path)
            check_facts(again, str(path))
        except ValueError as error:
            assert "card.json" in str(error), error
            continue
        card = str(build_card(again, "user/x"))
        written += 1
        assert card.startswith("---\n") and "\n## Results\n" in card
    assert 20 < written < 400
