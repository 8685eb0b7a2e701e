"""The store of states: resuming, damage, and cells against what was written."""
import numpy as np
import pytest

from utils.jsonl import DataError
from utils.probe.states import States, StateWriter, file_name

SETTINGS = {"model": "m"}


def fill(folder, n=7):
    """Samples with 2 to 4 steps of 3 layers x 5, the last one without latents."""
    made = {}
    with StateWriter(folder, SETTINGS) as writer:
        for i in range(n):
            rng = np.random.default_rng(i)
            shapes = ({"start": (1, 5)} if i == n - 1 else
                      {"latent": (2 + i % 3, 5), "inner": (2 + i % 3, 3, 5)})
            made[f"s/{i}"] = {kind: rng.normal(size=shape) for kind, shape in shapes.items()}
            writer.add(f"s/{i}", made[f"s/{i}"], task=f"t{i % 2}")
    return made


@pytest.mark.parametrize("budget", [1, 700, 1 << 30])
def test_cells_are_what_was_written_at_any_budget(tmp_path, budget):
    made = fill(tmp_path)
    keys = list(made)[::-1]
    store = States(tmp_path)
    assert store.records["s/3"]["task"] == "t1" and store.settings == SETTINGS
    for kind, layers in (("latent", [-1]), ("inner", [0, 1, 2])):
        cells = list(store.cells(kind, keys, budget=budget))
        assert [(cell.layer, cell.step) for cell in cells] == [(layer, step) for layer in layers
                                                               for step in range(4)]
        for cell in cells:
            wanted = {i: made[key][kind] for i, key in enumerate(keys)
                      if len(made[key].get(kind, ())) > cell.step}
            assert cell.instances.tolist() == list(wanted) and cell.states.dtype == np.float32
            own = [x[cell.step] if cell.layer < 0 else x[cell.step, cell.layer] for x in wanted.values()]
            assert np.array_equal(cell.states, np.array(own, dtype=np.float32))
    assert len(list(store.cells("latent", keys, n_steps=2))) == 2 and not list(store.cells("fed", keys))
    assert store.load("s/6", "latent") is None and np.allclose(store.load("s/6", "start"),
                                                               made["s/6"]["start"])


def test_other_settings_and_states_that_are_no_numbers_are_refused(tmp_path):
    fill(tmp_path, 1)
    with pytest.raises(DataError, match="other settings"):
        StateWriter(tmp_path, {"model": "another"})
    with StateWriter(tmp_path, SETTINGS) as writer:
        assert "s/0" in writer and "s/1" not in writer
        for bad in ({"latent": np.array([[np.nan]])}, {"vectors": np.ones((1, 1))}, {"latent": np.ones(3)}):
            with pytest.raises(ValueError, match="expected finite"):
                writer.add("s/1", bad)


def test_damage_is_named(tmp_path):
    fill(tmp_path, 2)
    path = tmp_path / "states-00000-of-00001.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"key": "torn')
    assert list(States(tmp_path).records) == ["s/0", "s/1"]
    (tmp_path / file_name("s/0")).write_bytes(b"no tensors")
    with pytest.raises(DataError, match="'s/0' cannot be read"):
        States(tmp_path).load("s/0", "latent")
    with open(path, "ab") as file:
        file.write(b"\n")
    with pytest.raises(DataError, match=":3: damaged line"):
        States(tmp_path)
