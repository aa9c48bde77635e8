"""Checkpoints as other programs' files, and the other way round: nothing lost, nothing run, nothing half written."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from holdfast.checkpoint.commits import CheckpointId, Checkpoints, rank_name
from holdfast.checkpoint.components import optimizer_state, parameter_names
from holdfast.checkpoint.export import numbered, to_dcp, to_safetensors, to_torch_file
from holdfast.checkpoint.image import Spec, plan
from holdfast.checkpoint.importing import as_components, import_state, read_program_state
from holdfast.checkpoint.inspection import OpenState, holdings, open_state, verify
from holdfast.checkpoint.tensors import as_bytes, dtype_names
from holdfast.checkpoint.tree import unflatten
from holdfast.errors import ConfigError, DamagedCheckpointError
from holdfast.storage import DirectoryStore

SOURCES = Path(__file__).parents[2] / "src"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Any) -> Any:
        return self.head(self.norm(self.embed(tokens)))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    one, *others = model.parameters()
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": [one]}], lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (8,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def trained() -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Tied()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4))
    return model, optimizer


@pytest.fixture
def state(store: DirectoryStore, trained: tuple[Tied, torch.optim.Optimizer]) -> OpenState:
    """The trained model and its optimizer as a checkpoint."""
    model, optimizer = trained
    named = optimizer_state("optimizer", optimizer, parameter_names({"model": model, "optimizer": optimizer}))
    components = {"model": dict(model.state_dict()), "optimizer": named, "schedule": {"milestones": (1, 2), 3: 0.5}}
    random_states = {"python": random.getstate(), "torch": torch.get_rng_state()}
    found = import_state(store, "run", 4, components, {"epoch": 2, "best": torch.ones(3)}, random_states, "a test")
    verify(store, "run", found)
    return open_state(store, "run", found)


@pytest.fixture
def store(folder: Path) -> DirectoryStore:
    return DirectoryStore(folder / "store")


def same(here: Any, there: Any) -> bool:
    if isinstance(here, torch.Tensor):
        return torch.equal(here, there) and here.dtype == there.dtype
    if isinstance(here, dict):
        return here.keys() == there.keys() and all(same(here[key], there[key]) for key in here)
    if isinstance(here, list | tuple):
        return len(here) == len(there) and all(map(same, here, there))
    return bool(here == there)


def test_the_model_s_weights_load_from_safetensors_tied_ones_too(state: OpenState, trained, folder: Path) -> None:
    assert to_safetensors(state, folder / "model.safetensors") == []
    loaded = safetensors.torch.load_file(folder / "model.safetensors")
    assert same(loaded, dict(trained[0].state_dict()))
    Tied().load_state_dict(loaded)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and file.metadata()["checkpoint"] == "0000-000000000004"


def test_what_is_no_tensor_is_left_out_of_safetensors_and_said(state: OpenState, folder: Path) -> None:
    left_out = to_safetensors(state, folder / "optimizer.safetensors", "optimizer")
    assert "param_groups.0.lr" in left_out and "param_groups.1.params" in left_out
    assert "state.model.norm.weight.exp_avg" in safetensors.torch.load_file(folder / "optimizer.safetensors")
    with pytest.raises(ConfigError, match="holds no tensor"):
        to_safetensors(state, folder / "schedule.safetensors", "schedule")


def test_safetensors_are_written_without_torch(state: OpenState, store: DirectoryStore, folder: Path) -> None:
    text = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from holdfast.checkpoint import export, inspection
from holdfast.storage import open_store
store = open_store({store.url!r})
checkpoint = inspection.find(store, "run")
inspection.verify(store, "run", checkpoint)
content = inspection.open_state(store, "run", checkpoint)
print([one.tensors for one in inspection.holdings(content)])
export.to_safetensors(content, Path("alone.safetensors"))
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [one.tensors for one in holdings(state)]
    to_safetensors(state, folder / "here.safetensors")
    assert (folder / "alone.safetensors").read_bytes() == (folder / "here.safetensors").read_bytes()


def shards_of(shape: tuple[int, ...], dimension: int, ranks: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(begin, shape) by rank, uneven ones as torch.chunk has them, and empty ones at the end."""
    rows = -(-shape[dimension] // ranks)
    found = []
    for rank in range(ranks):
        begin = min(rank * rows, shape[dimension])
        length = min(rows, shape[dimension] - begin)
        found.append(
            (
                tuple(begin if one == dimension else 0 for one in range(len(shape))),
                tuple(length if one == dimension else size for one, size in enumerate(shape)),
            )
        )
    return found


def save_sharded(
    store: DirectoryStore, whole: dict[str, tuple[torch.Tensor, int]], ranks: int, compressed: bool = False
) -> OpenState:
    """A checkpoint of several ranks, each with its shard of every tensor (sharded along the given dimension)."""
    checkpoints, checkpoint = Checkpoints(store, "sharded"), CheckpointId(1, 1)
    objects, names = {}, []
    for rank in range(ranks):
        parts, shards = {}, {}
        for name, (tensor, dimension) in whole.items():
            begin, shape = shards_of(tuple(tensor.shape), dimension, ranks)[rank]
            if 0 in shape:
                continue
            index = tuple(slice(one, one + length) for one, length in zip(begin, shape, strict=True))
            parts[f"model.{name}"] = tensor[index].contiguous()
            shards[f"model.{name}"] = {"shape": list(tensor.shape), "begin": begin}
        layout = plan({name: Spec(dtype_names()[one.dtype], tuple(one.shape)) for name, one in parts.items()})
        image = bytearray(layout.size_bytes)
        image[: len(layout.header)] = layout.header
        for name, place in layout.places.items():
            image[place.start : place.stop] = as_bytes(parts[name]).numpy().tobytes()
        name = rank_name(rank, "x")
        tree = {
            "components": {"model": {name: {"$tensor": f"model.{name}"} for name in whole}},
            "user": {}, "random": {}, "shards": shards,
        }  # fmt: skip
        objects[f"{name}.json"] = checkpoints.write(checkpoint, f"{name}.json", [json.dumps(tree).encode()])
        written = checkpoints.write_image(checkpoint, f"{name}.safetensors", memoryview(image), compressed)
        objects |= written
        names.append({"tree": f"{name}.json", "state": next(iter(written))})
    checkpoints.publish(checkpoint, objects, {"kind": "state", "step": 1, "ranks": names})
    verify(store, "sharded", checkpoint)
    return open_state(store, "sharded", checkpoint)


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_the_parts_of_all_ranks_are_one_file_however_they_were_cut(
    ranks: int, store: DirectoryStore, folder: Path
) -> None:
    torch.manual_seed(1)
    whole = {
        "rows": (torch.randn(7, 5), 0),
        "columns": (torch.randn(7, 5, dtype=torch.float64), 1),
        "middle": (torch.randn(3, 7, 4).bfloat16(), 1),
        "last": (torch.randint(9, (2, 3, 11)), 2),
        "few": (torch.randn(2), 0),
    }
    content = save_sharded(store, whole, ranks, compressed=ranks == 3)
    to_safetensors(content, folder / "whole.safetensors")
    assert same(
        safetensors.torch.load_file(folder / "whole.safetensors"), {name: one for name, (one, _) in whole.items()}
    )


def test_a_part_that_is_missing_is_no_file(store: DirectoryStore, folder: Path) -> None:
    content = save_sharded(store, {"rows": (torch.randn(4, 5), 0)}, 2)
    manifest = {**content.manifest, "ranks": content.manifest["ranks"][:1]}
    with pytest.raises(DamagedCheckpointError, match="a part of rows is in no image"):
        to_safetensors(OpenState(content.checkpoints, content.checkpoint, manifest), folder / "part.safetensors")
    assert [path.name for path in folder.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["whole.safetensors", "whole.pt", "whole"])
def test_a_damaged_checkpoint_leaves_no_half_of_an_export(name: str, state: OpenState, folder: Path) -> None:
    path = next(folder.rglob("state.safetensors"))
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    write = {"whole.safetensors": to_safetensors, "whole.pt": to_torch_file, "whole": to_dcp}[name]
    with pytest.raises(DamagedCheckpointError, match="another CRC-32"):
        write(state, folder / name)
    assert [path.name for path in folder.iterdir()] == ["store"]


def test_torch_load_takes_the_whole_state_with_weights_only(state: OpenState, trained, folder: Path) -> None:
    to_torch_file(state, folder / "whole.pt")
    loaded = torch.load(folder / "whole.pt", weights_only=True)
    assert same(loaded["optimizer"], trained[1].state_dict())
    assert loaded["schedule"] == {"milestones": (1, 2), 3: 0.5}
    assert loaded["holdfast"]["step"] == 4 and loaded["holdfast"]["state"]["epoch"] == 2
    model = Tied()
    optimizer = optimizer_of(model)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    train(model, optimizer, range(4, 9))
    train(*trained, range(4, 9))
    assert same(dict(model.state_dict()), dict(trained[0].state_dict()))
    to_torch_file(state, folder / "model.pt", "model")
    Tied().load_state_dict(torch.load(folder / "model.pt", weights_only=True))


@pytest.mark.parametrize("name", ["whole.pt", "whole"])
def test_what_was_exported_comes_back_whole(name: str, state: OpenState, store: DirectoryStore, folder: Path) -> None:
    (to_torch_file if name == "whole.pt" else to_dcp)(state, folder / name)
    found = import_state(store, "again", 4, *as_components(read_program_state(folder / name), {}), origin=name)
    again = open_state(store, "again", found)
    assert again.trees[0]["user"] == state.trees[0]["user"] and again.trees[0]["random"] == state.trees[0]["random"]
    there, here = (
        {key: unflatten(one.trees[0]["components"][key], one.read({}).__getitem__) for key in ("model", "optimizer")}
        for one in (again, state)
    )
    assert same(there["model"], here["model"])
    assert same(there["optimizer"], here["optimizer"] if name == "whole" else numbered(here["optimizer"]))


def test_tied_weights_are_one_again_after_dcp_and_safetensors(
    state: OpenState, store: DirectoryStore, folder: Path
) -> None:
    to_dcp(state, folder / "whole")
    to_safetensors(state, folder / "model.safetensors")
    for name in ("whole", "model.safetensors"):
        components, values, random_states = as_components(read_program_state(folder / name), {})
        assert components["model"]["head.weight"] is components["model"]["embed.weight"]
        found = import_state(store, name.partition(".")[0], 4, components, values, random_states, name)
        tree = open_state(store, name.partition(".")[0], found).trees[0]["components"]
        assert tree["model"]["head.weight"] == tree["model"]["embed.weight"]
    components, _, _ = as_components(read_program_state(folder / "whole"), {})
    steps = [values["step"] for values in components["optimizer"]["state"].values()]
    assert len({one.data_ptr() for one in steps}) == len(steps)  # equal, and each parameter's own


def test_optimizers_that_were_saved_flat_are_taken(store: DirectoryStore, trained, folder: Path) -> None:
    model, optimizer = trained
    model_state, flat = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"model": model_state, "optim": flat}, checkpoint_id=folder / "flat", no_dist=True)
    components, values, _ = as_components(read_program_state(folder / "flat"), {"optim": "optimizer"})
    names = parameter_names({"model": model})
    assert (
        same(components["optimizer"]["state"], optimizer_state("optimizer", optimizer, names)["state"]) and values == {}
    )
    groups = {
        tuple(sorted(group["params"])): group["weight_decay"] for group in components["optimizer"]["param_groups"]
    }
    assert groups == {("model.norm.bias", "model.norm.weight"): 0.0, ("model.embed.weight",): 0.01}


def test_a_state_within_another_is_named_by_its_path(trained, folder: Path) -> None:
    model, optimizer = trained
    app = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    torch.save({"app": app, "epoch": 3, "args": {"lr": 0.1}}, folder / "app.pt")
    names = {"app.model": "net", "app.optim": "optimizer", "args": ""}
    components, values, _ = as_components(read_program_state(folder / "app.pt"), names)
    assert sorted(components) == ["net", "optimizer"] and values == {"epoch": 3}
    with pytest.raises(ConfigError, match=r"there is no 'app\.opt' in it"):
        as_components(read_program_state(folder / "app.pt"), {"app.opt": "optimizer"})


def test_weights_alone_come_from_torch_save_and_safetensors(trained, folder: Path) -> None:
    weights = dict(trained[0].state_dict())
    torch.save(weights, folder / "weights.pt")
    safetensors.torch.save_file({name: one.clone() for name, one in weights.items()}, folder / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        assert same(read_program_state(folder / name)["model"], weights)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_nothing_that_is_imported_runs_code(trained, folder: Path) -> None:
    torch.save({"model": Hostile()}, folder / "hostile.pt")
    with pytest.raises(ConfigError, match="weights_only"):
        read_program_state(folder / "hostile.pt")
    dcp.save({"model": dict(trained[0].state_dict()), "more": Hostile()}, checkpoint_id=folder / "values", no_dist=True)
    with pytest.raises(ConfigError, match="can't be read"):
        read_program_state(folder / "values")
    dcp.save({"model": dict(trained[0].state_dict())}, checkpoint_id=folder / "metadata", no_dist=True)
    (folder / "metadata/.metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ConfigError, match=r"it names posix\.mkdir, which no such file needs"):
        read_program_state(folder / "metadata")
    assert not (folder / "harmed").exists()


@pytest.mark.parametrize("name", ["nothing", "empty", "text.pt", "text.safetensors"])
def test_what_is_no_checkpoint_is_said_to_be_none(name: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    for text in ("text.pt", "text.safetensors"):
        (folder / text).write_text("Once upon a time")
    with pytest.raises(ConfigError, match=name):
        read_program_state(folder / name)
